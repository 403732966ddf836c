"""Arithmetic that a small model cannot do alone, with a calculator that takes one binary operation a call.

Two to four operations need two to four tool turns, then an answer. With `*` among the operators the usual
precedence holds, so that the order of the calls has to be found.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rl.config_env import CalculatorConfig
from rl.env import Action, Message, Observation, Step
from rl.task import Task, derive_seed, held_out

TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes one operation: a op b.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "op": {"type": "string", "enum": ["+", "-", "*"]},
                "b": {"type": "integer"},
            },
            "required": ["a", "op", "b"],
        },
    },
}
MAX_RESULT_DIGITS = 40


class CalculatorError(ValueError):
    """A call that the calculator does not take; the text is what the model is shown."""


def calculate(arguments: object) -> int:
    """The result of one call's arguments {"a": int, "op": "+|-|*", "b": int}."""
    if not isinstance(arguments, dict) or set(arguments) != {"a", "op", "b"}:
        raise CalculatorError("a call takes a, op and b")
    a, op, b = arguments["a"], arguments["op"], arguments["b"]
    if type(a) is not int or type(b) is not int:
        raise CalculatorError("a and b are integers")
    if len(str(abs(a))) > MAX_RESULT_DIGITS or len(str(abs(b))) > MAX_RESULT_DIGITS:
        raise CalculatorError("a and b are too long")
    if op not in ("+", "-", "*"):
        raise CalculatorError("op is one of + - *")
    return a + b if op == "+" else a - b if op == "-" else a * b


def answer_call(action: Action) -> tuple[str, str | None]:
    """The observation text for a turn that called a tool, and its error flag."""
    if action.error is not None:
        return f"error: {action.error}", "tool_error"
    if len(action.tool_calls) != 1:
        return "error: one call a turn", "tool_error"
    call = action.tool_calls[0]
    if call.name != "calculator":
        return f"error: no tool {call.name}", "tool_error"
    try:
        return str(calculate(dict(call.arguments))), None
    except CalculatorError as error:
        return f"error: {error}", "tool_error"


@dataclass(frozen=True)
class Expression:
    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.numbers[0]) + "".join(f"{o}{n}" for o, n in zip(self.operators, self.numbers[1:], strict=True))

    def steps(self) -> list[tuple[int, str, int]]:
        """The calls that evaluate it: the leftmost operation of the highest precedence, until none is left."""
        numbers, operators, calls = list(self.numbers), list(self.operators), []
        while operators:
            i = operators.index("*") if "*" in operators else 0
            a, op, b = numbers[i], operators.pop(i), numbers.pop(i + 1)
            calls.append((a, op, b))
            numbers[i] = calculate({"a": a, "op": op, "b": b})
        return calls


class CalculatorTasks:
    """Expressions drawn from a seed. Which split an expression belongs to is a function of its text."""

    def __init__(self, config: CalculatorConfig, seed: int):
        self._config, self._seed = config, seed

    def size(self, split: str) -> None:
        return None

    def task(self, split: str, index: int) -> Task:
        rng = random.Random(derive_seed("calculator", self._seed, split, index))
        while True:
            expression = self._draw(rng)
            if held_out(str(expression)) == (split == "held_out"):
                break
        a, op, b = expression.steps()[-1]
        answer = str(calculate({"a": a, "op": op, "b": b}))
        return Task(id=f"calc:{expression}", prompt={"expression": expression}, answer=answer)

    def _draw(self, rng: random.Random) -> Expression:
        c = self._config
        count = rng.randint(c.min_operations, c.max_operations)
        digits = [rng.randint(1, c.max_digits) for _ in range(count + 1)]
        numbers = tuple(rng.randint(0 if d == 1 else 10 ** (d - 1), 10**d - 1) for d in digits)
        return Expression(numbers, tuple(rng.choice(c.operators) for _ in range(count)))

    def demonstrate(self, task: Task, rng: random.Random, guess: bool) -> Iterator[Message]:
        """The right calls and the answer; or, as logs hold them, an answer stated without the tool."""
        if guess:
            scale = 10 ** len(task.answer.lstrip("-"))
            yield {"role": "assistant", "content": str(rng.randrange(-scale // 2, scale))}
            return
        for a, op, b in task.prompt["expression"].steps():
            call = {"name": "calculator", "arguments": {"a": a, "op": op, "b": b}}
            yield {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        yield {"role": "assistant", "content": task.answer}


class Calculator:
    """A turn with a tool call is answered by its result; a turn without one is the answer and ends the episode.

    An answer without a number is flagged void. With `progress_reward` each turn is given that much for the next step of
    the expression that was still to do, and for the right answer.
    """

    reward = "rl.reward.final_answer"
    tasks = CalculatorTasks

    def __init__(self, config: CalculatorConfig):
        self._config = config
        self._to_do: list[tuple[int, str, int]] = []
        self._answer = ""

    async def reset(self, task: Task) -> Observation:
        self._to_do, self._answer = task.prompt["expression"].steps(), task.answer
        return Observation([{"role": "user", "content": str(task.prompt["expression"])}], [TOOL])

    async def step(self, action: Action) -> Step:
        if not action.tool_calls and action.error is None:
            gain = self._config.progress_reward * (action.text.strip() == self._answer)
            return Step(Observation([]), gain, done=True, info={"flags": void_flags(action)})
        content, error = answer_call(action)
        flags = [error] if error else []
        return Step(Observation([{"role": "tool", "content": content}]), self._progress(action), info={"flags": flags})

    def _progress(self, action: Action) -> float:
        """What the call is worth: the first step still to do is done once, whatever came between."""
        asked = tuple(action.tool_calls[0].arguments.get(k) for k in ("a", "op", "b")) if action.tool_calls else ()
        if not self._to_do or len(action.tool_calls) != 1 or asked != self._to_do[0]:
            return 0.0
        self._to_do.pop(0)
        return self._config.progress_reward

    async def close(self) -> None:
        pass


def void_flags(action: Action) -> list[str]:
    """A turn that neither calls a tool nor states a number does nothing: SimpleTIR's void turn."""
    return [] if last_integer(action.text) else ["void"]


def last_integer(text: str) -> str | None:
    """The last integer in a text, thousands separators removed; None when there is none."""
    found = re.findall(r"-?\d[\d,]*", text)
    return str(int(found[-1].replace(",", ""))) if found else None
