"""Tasks of a reasoning-gym generator (https://github.com/open-thought/reasoning-gym), scored by the generator's own
scorer, with the calculator tool or none.

The generators are endless and their items cannot be listed, so which split an item belongs to is a function of its
question: an index owns a few hundred candidate items and takes the first that falls into its split.

Two things to know of the generators. Some (isomorphic_strings, knight_swap, polynomial_multiplication, ransom_note,
word_ladder in 0.1.25) iterate over sets of strings: their items repeat only under a fixed PYTHONHASHSEED. Some scorers
run what the model wrote as Python: rl/envs/reasoning_answers.py says what they are given.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rl.config_env import ReasoningGymConfig
from rl.env import Message
from rl.envs.calculator import Expression, calculate
from rl.envs.reasoning_answers import INTEGRALS, disarmed, integrates, tree_of
from rl.envs.rows import Question, check_turns
from rl.episode import Episode, StopReason
from rl.task import Task, derive_seed, held_out

with warnings.catch_warnings():  # a dependency of reasoning_gym compares strings by identity
    warnings.simplefilter("ignore", SyntaxWarning)
    from reasoning_gym.factory import DATASETS, create_dataset

_BLOCK, _DRAWS, _ROUNDS = 64, 64, 4
"""64 indices share one dataset, 64 candidates each; an index whose candidates all miss its split gets 64 of the next
dataset. Missing 4 x 64 times has a probability of (7/8)^256 < 2e-15, so it means that the questions repeat."""
_PROBES = 4
_NUMBER = r"(?<![\d.])-?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?"
_EXPRESSION = r"-?\d+(?:\s*[-+*]\s*-?\d+)*"


class ReasoningGymTasks:
    """A task carries its whole entry, so that any process can score it. `arithmetic`: see ArithmeticTasks.

    where: the part of the run's configuration that errors name.
    """

    def __init__(self, config: ReasoningGymConfig, seed: int, where: str = "env"):
        check(config, where)
        self._config, self._seed, self._where = config, seed, where
        entries = [self.entry("train", index) for index in range(_PROBES)]
        self.arithmetic = all(expression_of(e) is not None for e in entries)
        kind = "number" if all(_is_number(e["answer"]) for e in entries) else "answer"
        how = "Use the calculator for every step. " if config.tool == "calculator" else ""
        self._system = f"{how}End with only the final {kind}."

    def size(self, split: str) -> None:
        return None

    def task(self, split: str, index: int) -> Task:
        entry = self.entry(split, index)
        prompt = {
            "prompt": [{"role": "system", "content": self._system}, {"role": "user", "content": entry["question"]}],
            "dataset": self._config.dataset,
            "settings": self._config.settings,
            "entry": entry,
        }
        # Some generators only check answers and know none.
        answer = "" if entry["answer"] is None else str(entry["answer"])
        return Task(id=entry_id(self._config.dataset, entry), prompt=prompt, answer=answer)

    def entry(self, split: str, index: int) -> dict[str, Any]:
        """A generator's item of a split, by index."""
        block, place = divmod(index, _BLOCK)
        for round_ in range(_ROUNDS):
            seed = derive_seed("reasoning_gym", self._seed, split, block, round_)
            dataset = _dataset(self._config.dataset, _frozen(self._config.settings), seed, _BLOCK * _DRAWS)
            for candidate in range(place * _DRAWS, (place + 1) * _DRAWS):
                entry = dataset[candidate]
                if held_out(entry["question"]) == (split == "held_out"):
                    return entry
        raise ValueError(
            f"{self._where}.settings of {self._config.dataset}: the generator repeats a few questions, and none "
            f"of them falls into the {split} split. Give it settings with more variety"
        )


class ArithmeticTasks(ReasoningGymTasks):
    """Questions that hold one expression of integers under + - *, such as chain_sum's: these can be demonstrated."""

    def demonstrate(self, task: Task, rng: random.Random, guess: bool) -> Iterator[Message]:
        """The right calls and the answer; or, as logs hold them, an answer stated without the tool.

        Raises ValueError on a question that holds no such expression.
        """
        expression = expression_of(task.prompt["entry"])
        if expression is None:
            raise ValueError(
                f"reasoning_gym {self._config.dataset} has questions that cannot be demonstrated, such as "
                f"{task.prompt['entry']['question']!r}: set demonstrations.path on the sft stage"
            )
        if guess:
            scale = 10 ** len(task.answer.lstrip("-"))
            yield {"role": "assistant", "content": str(rng.randrange(-scale // 2, scale))}
            return
        for a, op, b in expression.steps() if self._config.tool == "calculator" else []:
            call = {"name": "calculator", "arguments": {"a": a, "op": op, "b": b}}
            yield {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        yield {"role": "assistant", "content": task.answer}


def entry_id(dataset: str, entry: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(entry["question"].encode(), digest_size=8).hexdigest()
    return f"{dataset}:{digest}"


def tasks(config: ReasoningGymConfig, seed: int) -> ReasoningGymTasks:
    """The tasks of a generator, with demonstrations where they can be made."""
    found = ReasoningGymTasks(config, seed)
    return ArithmeticTasks(config, seed) if found.arithmetic else found


class ReasoningGym(Question):
    reward = "rl.envs.reasoning.own_scorer"
    tasks = staticmethod(tasks)

    def __init__(self, config: ReasoningGymConfig):
        super().__init__(config.tool)


def own_scorer(task: Task, episode: Episode) -> float:
    """What the generator's scorer gives the final message, in [0, 1]; some give a part for an answer that is close.

    Where the ground truth is a number, the last number of the message is the answer; else its whole text. 0 for an
    episode that ended without an answer.
    """
    if episode.stop_reason != StopReason.DONE:
        return 0.0
    return score(task, episode.final_text)


def score(task: Task, answer: str) -> float:
    """The same of an answer.

    Raises what the scorer raises on the ground truth, and what no answer is to blame for, such as a full memory: then
    it is the scorer that fails.
    """
    entry, answer, name = task.prompt["entry"], answer.strip(), task.prompt["dataset"]
    truth = entry["answer"]
    if _is_number(truth):
        numbers = re.findall(_NUMBER, answer.replace("\N{MINUS SIGN}", "-"))
        if not numbers:
            return 0.0
        answer = numbers[-1]
    if _NOT_FINITE.search(answer) and not _NOT_FINITE.search(str(truth)):
        return 0.0
    answer = disarmed(name, answer, str(truth))
    if name in INTEGRALS and not integrates(answer, entry["metadata"]):
        return 0.0
    dataset = _dataset(name, _frozen(task.prompt["settings"]), 0, 1)
    try:
        found = float(dataset.score_answer(answer, entry))
    except Exception as error:
        nested = isinstance(error, MemoryError) and tree_of(answer) is None  # the parser's word for what is nested deep
        if isinstance(error, MemoryError | OSError) and not nested:
            raise
        # A hundred parsers of free text: what one of them cannot read, but the truth it can, is not an answer.
        if truth is not None:
            dataset.score_answer(truth, entry)
        return 0.0
    if not math.isfinite(found) or (found >= 1 and name in _FULL_MARKS and not _FULL_MARKS[name](answer, truth)):
        return 0.0
    return found


_NOT_FINITE = re.compile(r"(?<![a-z])(?:nan|inf|infinity)j?(?![a-z])|(?<=[\d.])e[+-]?\d{4,}", re.IGNORECASE)
"""Nothing is further from a NaN than a scorer's tolerance: complex_arithmetic and number_sorting take it for right. An
exponent of four digits is past every float, and coin_flip would write its power of ten out."""


def _same_number(answer: str, truth: str) -> bool:
    return abs(Fraction(answer.replace(",", "")) - Fraction(truth.replace(",", ""))) <= _COIN_TOLERANCE


def _same_text(answer: str, truth: object) -> bool:
    return answer.lower() == str(truth).lower()


_COIN_TOLERANCE = 1e-4
_FULL_MARKS = {"coin_flip": _same_number, "game_of_life_halting": _same_text}
"""What full marks take beyond the scorer's word: one gives them for the first digits of the truth, so for `0`, the
other for every text that is not empty."""


def check(config: ReasoningGymConfig, where: str = "env") -> None:
    """Raises ValueError naming the dataset or the setting that does not exist, with the nearest that do."""
    name, given = config.dataset, config.settings
    if name not in DATASETS:
        near = difflib.get_close_matches(name, list(DATASETS), n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(DATASETS))}."
        raise ValueError(f"{where}.dataset: {name!r} is not a dataset of reasoning_gym. {hint}")
    check_turns(config)
    fields = {f.name: f for f in dataclasses.fields(DATASETS[name][1]) if f.name not in ("seed", "size")}
    for key, value in given.items():
        if key in ("seed", "size"):
            raise ValueError(f"{where}.settings.{key} is not yours to set: tasks are endless and follow from run.seed")
        if key not in fields:
            near = difflib.get_close_matches(key, list(fields), n=1, cutoff=0.4)
            hint = f"Did you mean {where}.settings.{near[0]}?" if near else f"Known: {', '.join(fields)}."
            raise ValueError(f"{where}.settings.{key} is not a setting of {name}. {hint}")
        kind = type(fields[key].default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if kind in (int, float, str, bool) and not fits:
            raise ValueError(f"{where}.settings.{key} is {value!r}: {name} expects {kind.__name__}")
    try:
        _dataset(name, _frozen(given), 0, 1)
    except Exception as error:
        # The generators check their settings by assertions, and some only fail while they build their tables.
        raise ValueError(f"{where}.settings of {name}: {error} (given {dict(given)})") from None


def expression_of(entry: Mapping[str, Any]) -> Expression | None:
    """The one expression of integers that the question holds and whose value is the answer; None without one."""
    found = re.findall(_EXPRESSION, entry["question"])
    if len(found) != 1:
        return None
    numbers = [re.match(r"-?\d+", found[0]).group()]  # type: ignore[union-attr]
    rest = re.findall(r"([-+*])\s*(-?\d+)", found[0][len(numbers[0]) :])
    expression = Expression((int(numbers[0]), *(int(n) for _, n in rest)), tuple(op for op, _ in rest))
    try:
        steps = expression.steps()
    except ValueError:  # a number too long for the calculator
        return None
    value = calculate(dict(zip(("a", "op", "b"), steps[-1], strict=True))) if steps else expression.numbers[0]
    return expression if str(value) == entry["answer"] else None


def _is_number(answer: object) -> bool:
    return isinstance(answer, str) and re.fullmatch(_NUMBER, answer) is not None


def _frozen(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


@lru_cache(maxsize=8)
def _dataset(name: str, settings: str, seed: int, size: int) -> Any:
    return create_dataset(name, seed=seed, size=size, **json.loads(settings))
