"""How a turn of the Python environment says what it does: fenced blocks, MINT's tags, tool calls."""

import re
from dataclasses import dataclass
from typing import Protocol

from rl.env import Action, Message

TOOL = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code and returns what it prints.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


@dataclass(frozen=True)
class Move:
    """What a turn does: one of code and answer, or neither. end: how many of its characters that takes."""

    code: str | None = None
    answer: str | None = None
    end: int | None = None
    error: str | None = None


class Style(Protocol):
    system: str

    def move(self, action: Action) -> Move: ...

    def shown(self, text: str) -> Message:
        """What a turn is answered with."""
        ...

    def runs(self, code: str) -> Message:
        """A turn that runs this."""
        ...

    def answers(self, answer: str) -> Message: ...


def _says(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Fenced:
    system = (
        "Answer the question. You may run Python: write it in a ```python block and stop; what it prints is shown to "
        "you. Put the final answer in \\boxed{}."
    )

    def move(self, action: Action) -> Move:
        code, answer = _fence(action.text), boxed(action.text)
        if code is not None and (answer is None or code[1] < answer[1]):
            return Move(code=code[0], end=code[2])
        return Move(answer=answer[0], end=answer[1]) if answer is not None else Move()

    def shown(self, text: str) -> Message:
        return {"role": "user", "content": f"Code execution result: {text}"}

    def runs(self, code: str) -> Message:
        return _says(f"```python\n{code}\n```")

    def answers(self, answer: str) -> Message:
        return _says(f"\\boxed{{{answer}}}")


class Tags:
    system = (
        "Answer the question step by step. In each turn write your thought in <thought></thought>, and then either "
        "Python in <execute></execute>, which is run and whose output is shown to you, or your answer in "
        "<solution></solution>."
    )
    invalid = (
        "I don't understand your input. To run Python, write it in <execute></execute>; to answer, write the answer in "
        "<solution></solution>."
    )

    def move(self, action: Action) -> Move:
        found = [f for f in (_between(action.text, f"<{tag}>", f"</{tag}>") for tag in ("execute", "solution")) if f]
        if not found:
            return Move(error=self.invalid)
        text, start, end = min(found, key=lambda f: f[1])
        if action.text.startswith("<execute>", start):
            return Move(code=text.strip("\n"), end=end)
        return Move(answer=text.strip(), end=end)

    def shown(self, text: str) -> Message:
        return {"role": "user", "content": f"Observation:\n{text}"}

    def runs(self, code: str) -> Message:
        return _says(f"<thought>Python can tell.</thought>\n<execute>\n{code}\n</execute>")

    def answers(self, answer: str) -> Message:
        return _says(f"<thought>That is the answer.</thought>\n<solution>{answer}</solution>")


class ToolCalls:
    system = "Answer the question. Use the tool where it helps. End with only the final answer."

    def move(self, action: Action) -> Move:
        if action.error is not None:
            return Move(error=f"error: {action.error}")
        if not action.tool_calls:
            return Move(answer=action.text.strip())
        if len(action.tool_calls) != 1:
            return Move(error="error: one call a turn")
        call = action.tool_calls[0]
        if call.name != "python":
            return Move(error=f"error: no tool {call.name}")
        code = call.arguments.get("code")
        if set(call.arguments) != {"code"} or not isinstance(code, str):
            return Move(error="error: a call takes code, a text")
        return Move(code=code)

    def shown(self, text: str) -> Message:
        return {"role": "tool", "content": text}

    def runs(self, code: str) -> Message:
        call = {"name": "python", "arguments": {"code": code}}
        return {**_says(""), "tool_calls": [{"type": "function", "function": call}]}

    def answers(self, answer: str) -> Message:
        return _says(answer)


STYLES: dict[str, type[Style]] = {"fenced": Fenced, "tags": Tags, "tool": ToolCalls}


_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n")


def boxed(text: str) -> tuple[str, int] | None:
    """The first answer in \\boxed{} or <<< >>>, and where it ends."""
    box, angles = text.find("\\boxed{"), _between(text, "<<<", ">>>")
    if angles is not None and (box < 0 or angles[1] < box):
        return angles[0].strip(), angles[2]
    if box < 0:
        return None
    start = box + len("\\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()].strip(), start + brace.end()
    return None


def _fence(text: str) -> tuple[str, int, int] | None:
    opening = _FENCE.search(text)
    end = text.find("```", opening.end()) if opening is not None else -1
    return (text[opening.end() : end], opening.start(), end + 3) if opening is not None and end >= 0 else None


def _between(text: str, opening: str, closing: str) -> tuple[str, int, int] | None:
    """What lies between the first opening and the closing after it, where the opening starts, where the closing ends.

    One that is not closed ends the search, as none after it can be: a search that began again would be quadratic.
    """
    start = text.find(opening)
    end = text.find(closing, start + len(opening)) if start >= 0 else -1
    return (text[start + len(opening) : end], start, end + len(closing)) if end >= 0 else None
