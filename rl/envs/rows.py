"""Prompts of one's own: rows of `prompt` and `answer`, answered at once or with the calculator.

    {"prompt": "What is 2 + 2?", "answer": 4}
    {"prompt": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}], "answer": "4", "id": "q17"}

Every other column is kept in `task.prompt`, for a reward function of one's own.
"""

import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from rl.config_env import ReasoningGymConfig, RowsConfig
from rl.demonstration import read_rows
from rl.env import Action, Message, Observation, Step
from rl.envs.calculator import TOOL, answer_call
from rl.task import Task, derive_seed, held_out

log = logging.getLogger("repertory")
_ROLES = ("system", "user", "assistant", "tool")


class Question:
    """Shows the messages of `task.prompt["prompt"]`. A turn without a tool call is the answer and ends the episode.

    Without a tool every turn is the answer.
    """

    def __init__(self, tool: Literal["calculator", "none"]):
        self._tool = tool

    async def reset(self, task: Task) -> Observation:
        return Observation(task.prompt["prompt"], [TOOL] if self._tool == "calculator" else [])

    async def step(self, action: Action) -> Step:
        if self._tool == "none" or (not action.tool_calls and action.error is None):
            void = not action.text.strip()
            return Step(Observation([]), done=True, info={"flags": ["void"] if void else []})
        content, error = answer_call(action)
        return Step(Observation([{"role": "tool", "content": content}]), info={"flags": [error] if error else []})

    async def close(self) -> None:
        pass


def check_turns(config: RowsConfig | ReasoningGymConfig) -> None:
    """Raises ValueError when the turns do not suffice for one call and an answer."""
    if config.tool == "calculator" and config.max_turns < 2:
        raise ValueError(
            "env.max_turns is 1, and a calculator call and the answer take a turn each: set env.max_turns to 2 or "
            "more, or env.tool to none"
        )


class RowsTasks:
    """The rows of one or two files. Train rows come in a seeded order, held-out rows in the file's."""

    def __init__(self, config: RowsConfig, seed: int):
        check_turns(config)
        self.left_out: list[str] = []
        """What was wrong with each row that is left out."""
        bad = self.left_out if config.bad_rows == "skip" else None
        train = read_tasks(config.prompts, bad)
        if config.held_out is None:
            kept = [t for t in train if held_out(_content(t))]
            train = [t for t in train if not held_out(_content(t))]
            if not train or not kept:
                raise ValueError(
                    f"{config.prompts}: of {len(train) + len(kept)} different prompts, {len(kept)} fall into the "
                    "held-out split (one in eight, chosen by content), and neither split may be empty: add rows, or "
                    "name a second file in env.held_out"
                )
        else:
            kept = read_tasks(config.held_out, bad)
            train = _without(train, kept, config)
        random.Random(derive_seed("rows", seed)).shuffle(train)
        self._tasks = {"train": train, "held_out": kept}

    def size(self, split: str) -> int:
        return len(self._tasks[split])

    def task(self, split: str, index: int) -> Task:
        tasks = self._tasks[split]
        return tasks[index % len(tasks)]


class Rows(Question):
    reward = "rl.reward.math_answer"
    tasks = RowsTasks

    def __init__(self, config: RowsConfig):
        super().__init__(config.tool)


def read_tasks(path: str, bad: list[str] | None = None) -> list[Task]:
    """A file's rows as tasks, in order; a prompt that occurs again is dropped and counted in the log.

    bad: gets what is wrong with each row that is no task, in the place of an error.

    Raises ValueError naming the file, a row and what is missing or wrong, and how many more such rows there are.
    """
    wrong: list[str] = []
    try:
        rows = read_rows(path, wrong)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: neither JSONL nor Parquet: {error}") from None
    except ValueError:
        if bad is None:
            read_rows(path)  # of a file without a row it names the first line, where there is one
        raise
    tasks: dict[str, Task] = {}
    row_of: dict[str, int] = {}
    repeated = 0
    for number, row in rows:
        try:
            task = _to_task(row, f"{path}: row {number}")
            if _content(task) not in tasks and task.id in row_of:
                raise ValueError(f"its id {row['id']!r} is that of row {row_of[task.id]}")
        except ValueError as error:
            wrong.append(f"{path}: row {number}: {error}")
            continue
        repeated += _content(task) in tasks
        row_of.setdefault(task.id, number)
        tasks.setdefault(_content(task), task)
    if wrong and bad is None:
        more = f"; and {len(wrong) - 1} more bad rows" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}")
    if not tasks:
        raise ValueError(f"{path}: no rows{' but bad ones: ' + wrong[-1] if wrong else ''}")
    if bad is not None:
        bad += wrong
    if repeated:
        log.info("%s: %d rows repeat an earlier prompt and are dropped", path, repeated)
    return list(tasks.values())


def _to_task(row: Mapping[str, Any], where: str) -> Task:
    messages, answer = _messages(row.get("prompt")), _answer(row.get("answer"))
    content = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    given = row.get("id")
    name = hashlib.blake2b(content.encode(), digest_size=8).hexdigest() if given is None else str(given)
    others = {k: v for k, v in row.items() if k not in ("prompt", "answer", "id")}
    return Task(id=f"rows:{name}", prompt={**others, "prompt": messages}, answer=answer, where=where)


def _messages(prompt: object) -> list[Message]:
    if prompt is None:
        raise ValueError("`prompt` is missing")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(m, dict) for m in prompt):
        raise ValueError("`prompt` is neither a text nor a list of messages")
    # Parquet gives every message every field of the column; those it was not written with are None.
    messages = [{k: v for k, v in m.items() if v is not None} for m in prompt]
    for message in messages:
        if message.get("role") not in _ROLES:
            raise ValueError(f"`prompt` has a message whose role is {message.get('role')!r}: use {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError("`prompt` has a message without `content`")
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise ValueError("`prompt` is empty: it holds no user message with text")
    if messages[-1]["role"] == "assistant":
        raise ValueError("`prompt` ends with an assistant message: leave the model's own turn out")
    return messages


def _answer(answer: object) -> str:
    if answer is None:
        raise ValueError("`answer` is missing")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"`answer` is {answer!r}: expected a text or a number")
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise ValueError(f"`answer` is {answer}: expected a text or a finite number")
        answer = int(answer) if answer.is_integer() else answer
    text = str(answer).strip()
    if not text:
        raise ValueError("`answer` is empty")
    return text


def _content(task: Task) -> str:
    """What makes two tasks the same task."""
    return json.dumps(task.prompt["prompt"], sort_keys=True, ensure_ascii=False)


def _without(train: list[Task], kept: list[Task], config: RowsConfig) -> list[Task]:
    contents = {_content(t) for t in kept}
    left = [t for t in train if _content(t) not in contents]
    if len(left) < len(train):
        log.info(
            "%s: %d prompts also occur in %s and are dropped from training",
            config.prompts,
            len(train) - len(left),
            config.held_out,
        )
    if not left:
        raise ValueError(f"{config.prompts}: every prompt also occurs in {config.held_out}: none is left to train on")
    return left
