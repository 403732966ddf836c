"""Feedback by rules on a turn of the Python environment: what a careful reader would say, without a model."""

from dataclasses import dataclass

from rl.chat import shortened
from rl.env import Hint
from rl.sandbox import Result

LIMITS = {
    "wall": "it took too long",
    "cpu": "it took too much processor time",
    "memory": "it took too much memory",
    "processes": "it started too many processes or threads",
    "file_size": "it wrote too much to files",
    "open_files": "it opened too many files",
    "output": "it printed too much",
}
_ERROR_CHARS = 200


@dataclass(frozen=True)
class Played:
    """What a turn did: neither code nor answer is a void turn, code without a result was not run.

    repeated: an earlier turn ran the same code, with the same result.
    """

    code: str | None = None
    answer: str | None = None
    result: Result | None = None
    repeated: bool = False


def hint(turn: Played, right: bool | None) -> Hint:
    """right: whether what the turn answered or printed is the task's answer; None: nobody knows.

    The text says nothing that the turn and its observation do not hold, but for that.
    """
    result = turn.result
    if turn.answer is not None:
        return _of_answer(turn.answer, right)
    if turn.code is None:
        return Hint(False, "The turn had neither code that can be run nor an answer: write one of them.")
    if result is None:
        return Hint(False, "The code was not run: no calls are left. Answer with what is known.")
    again = " It is the same code as before, with the same result: try something else." if turn.repeated else ""
    if not result.ok:
        return Hint(False, _of_failure(result) + again)
    if not result.output.strip():
        return Hint(False, "The code ran and printed nothing: print the result." + again)
    if right is None:
        text = "The code ran and printed a result: check it against the question, and answer if it fits."
        return Hint(not turn.repeated, "The code ran." + again if turn.repeated else text)
    if right:
        return Hint(True, "What the code printed is right: answer with it.")
    return Hint(False, "What the code printed is not the right answer: check the code against the question." + again)


def _of_answer(answer: str, right: bool | None) -> Hint:
    if not answer:
        return Hint(False, "The answer is empty: write it out.")
    if right is None:
        return Hint(False, "Check the answer, for example with code, before you propose another one.")
    if right:
        return Hint(True, "The answer is right.")
    return Hint(False, "The answer is not right: find the mistake, for example with code, before you propose another.")


def _of_failure(result: Result) -> str:
    lines = result.error.strip().splitlines()
    if result.limit is not None:
        return f"The code was stopped: {LIMITS[result.limit]}. Find a way that needs less."
    if not lines:
        return "The code failed and did not say why."
    return f"The code failed with {shortened(lines[-1], _ERROR_CHARS)}: correct that and run it again."
