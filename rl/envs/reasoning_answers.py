"""What reasoning-gym's scorers are given: some of them run an answer as a program, or compute for long."""

import ast
import cmath
import math
import operator
import re
from collections.abc import Container, Mapping
from typing import Any, cast

BY_EVAL = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
BY_SYMPY = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
INTEGRALS = {"intermediate_integration", "simple_integration"}
_OF_CMATH = ("sqrt", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")
_FUNCTIONS: dict[str, Any] = {
    **{name: getattr(cmath, name) for name in (*_OF_CMATH, "asinh", "acosh", "atanh")},
    **{"ln": cmath.log, "cbrt": lambda z: z ** (1 / 3), "Abs": abs},
    **{"sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z), "cot": lambda z: 1 / cmath.tan(z)},
}
_OPERATORS: dict[type, Any] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.Pow: operator.pow, ast.UAdd: operator.pos, ast.USub: operator.neg},
}
_EXPRESSION_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.BinOp, ast.UnaryOp, ast.UAdd, ast.USub),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
)
_MOST_NODES = 250
_LARGEST_POWER, _LARGEST_POWER_OF_A_SUM, _ALL_POWERS, _ALL_POWERS_OF_SUMS = 64, 12, 512, 24
_LARGEST_NUMBER = 10**15
"""sympy expands, differentiates and simplifies what it is given, on an event loop: the true answers of the generators
stay far below these. What simplifies for long within them is left to `integrates`."""


def disarmed(dataset: str, answer: str, truth: str = "") -> str:
    """The answer, or nothing in the place of one that a scorer would run as a program, or would compute for long.

    Some of reasoning-gym's scorers hand the model's text to `eval`, or to sympy's parser, which does so. The first get
    literals, the others an expression of numbers, of names of one letter or of the truth's, and of elementary
    functions, whose powers and size are bounded.
    """
    if dataset not in BY_EVAL | BY_SYMPY:
        return answer
    tree = tree_of(answer)
    if tree is None:  # eval does not run what is no Python; sympy's parser may
        return answer if dataset in BY_EVAL else ""
    if dataset in BY_EVAL:
        return answer if _is_literal(tree) else ""
    names = {*re.findall(r"[^\W\d]\w*", truth), *_FUNCTIONS, "pi"}
    return answer if _is_arithmetic(tree, names) and _is_quick(tree) else ""


def tree_of(text: str) -> ast.Expression | None:
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_literal(tree: ast.Expression) -> bool:
    try:
        ast.literal_eval(tree)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return isinstance(tree.body, ast.Name)
    return True


def _is_arithmetic(tree: ast.Expression, names: Container[str]) -> bool:
    def fine(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
        if isinstance(node, ast.Constant):  # sympy's functions read texts as programs
            return type(node.value) in (int, float) and abs(cast(float, node.value)) <= _LARGEST_NUMBER
        if isinstance(node, ast.Name):
            return len(node.id) == 1 or node.id in names
        return isinstance(node, _EXPRESSION_NODES)

    return all(map(fine, ast.walk(tree)))


def _is_quick(tree: ast.Expression) -> bool:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    if len(nodes) > _MOST_NODES:
        return False
    powers = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    plain = [_power(node) for node in powers if isinstance(node.left, ast.Name | ast.Constant)]
    of_sums = [_power(node) for node in powers if not isinstance(node.left, ast.Name | ast.Constant)]
    return (
        max(plain, default=0) <= _LARGEST_POWER
        and max(of_sums, default=0) <= _LARGEST_POWER_OF_A_SUM
        and sum(plain) <= _ALL_POWERS
        and sum(of_sums) <= _ALL_POWERS_OF_SUMS
    )


def _power(node: ast.AST) -> float:
    """The exponent of a power, times those of the powers within its base; elsewhere the largest of those inside."""
    inside = max(map(_power, ast.iter_child_nodes(node)), default=1.0)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _size(node.right) * inside
    return inside


def _size(exponent: ast.expr) -> float:
    """No exponent of this form has a larger absolute value; infinite for other forms."""
    match exponent:
        case ast.Constant(value=int() | float() as value):
            return abs(value)
        case ast.Name():
            return 1
        case ast.UnaryOp(operand=operand):
            return _size(operand)
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            return _size(left) + _size(right)
        case ast.BinOp(left, ast.Mult(), right):
            return _size(left) * _size(right)
        case ast.BinOp(left, ast.Div(), ast.Constant(value=int() as value)) if value:
            return _size(left) / abs(value)
    return math.inf


_POINTS = (0.31 + 0.17j, 0.83 + 0.29j, 1.37 - 0.41j)
_STEP, _CLOSE = 1e-4, 1e-4


def integrates(answer: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the slope of an answer is the integrand, by numbers: what is not equal needs no simplifying.

    sympy takes minutes over some wrong answers. Its symbols are complex numbers, so what it finds equal is equal at
    points off the real axis, where no root or logarithm changes its branch.
    """
    tree, integrand = tree_of(answer), tree_of(metadata["integrand"])
    if tree is None or integrand is None:
        return False
    compared = False
    for point in _POINTS:
        try:
            ahead, behind = (_value(tree.body, metadata["variable"], point + step) for step in (_STEP, -_STEP))
            slope, wanted = (ahead - behind) / (2 * _STEP), _value(integrand.body, metadata["variable"], point)
        except (ArithmeticError, ValueError, TypeError, KeyError, RecursionError):  # it has no value here
            continue
        if not cmath.isfinite(slope) or not cmath.isfinite(wanted):
            continue
        # The difference of two large values loses their last digits.
        if abs(slope - wanted) > _CLOSE * max(1.0, abs(wanted)) + 1e-10 * abs(ahead) / _STEP:
            return False
        compared = True
    return compared


def _value(node: ast.expr, variable: str, at: complex) -> complex:
    """Of an expression where its variable has this value; all other names are constants."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return complex(value)
        case ast.Name(id=name):
            return at if name == variable else {"pi": cmath.pi, "E": cmath.e}.get(name, 0.7)
        case ast.UnaryOp(op, operand):
            return _OPERATORS[type(op)](_value(operand, variable, at))
        case ast.BinOp(left, op, right):
            return _OPERATORS[type(op)](_value(left, variable, at), _value(right, variable, at))
        case ast.Call(ast.Name(id=name), arguments):
            return _FUNCTIONS[name](*(_value(argument, variable, at) for argument in arguments))
    raise ValueError(f"no arithmetic: {ast.unparse(node)}")
