"""How a few reasoning-gym questions are answered with code: what SFT on the Python environment demonstrates."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Metadata = Mapping[str, Any]


def _gcd(of: Metadata) -> str:
    return f"import math\nprint(math.gcd({', '.join(map(str, of['numbers']))}))"


def _lcm(of: Metadata) -> str:
    return f"import math\nprint(math.lcm({', '.join(map(str, of['numbers']))}))"


def _count_primes(of: Metadata) -> str:
    prime = "n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))"
    return f"print(sum({prime} for n in range({of['start']}, {of['end']} + 1)))"


def _prime_factors(of: Metadata) -> str:
    return (
        f"n, d, factors = {of['number']}, 2, []\n"
        "while n > 1:\n    while n % d == 0:\n        factors.append(str(d))\n        n //= d\n    d += 1\n"
        "print(' × '.join(factors))"
    )


def _base(of: Metadata) -> str:
    return (
        f"n = int({of['source_repr']!r}, {of['source_base']})\ndigits = ''\n"
        f"while n:\n    n, d = divmod(n, {of['target_base']})\n"
        "    digits = '0123456789abcdefghijklmnopqrstuvwxyz'[d] + digits\nprint(digits or '0')"
    )


def _text(words: Sequence[str]) -> str:
    return json.dumps(" ".join(words))


def _fraction(of: Metadata) -> str:
    return f"from fractions import Fraction\nprint(Fraction({of['numerator']}, {of['denominator']}))"


SOLUTIONS: dict[str, Callable[[Metadata], str]] = {
    "chain_sum": lambda of: f"print({of['expression']})",
    "products": lambda of: f"print({of['expression']})",
    "bitwise_arithmetic": lambda of: f"print(hex({of['problem']}))",
    "gcd": _gcd,
    "lcm": _lcm,
    "count_bits": lambda of: f"print(bin({of['number']}).count('1'))",
    "count_primes": _count_primes,
    "prime_factorization": _prime_factors,
    "base_conversion": _base,
    "fraction_simplification": _fraction,
    "letter_counting": lambda of: f"print({_text(of['span'])}.lower().count({of['target_letter']!r}))",
    "spell_backward": lambda of: f"print({of['word']!r}[::-1])",
}
"""From an entry's metadata, which repeats what its question says, to code that prints the answer."""
