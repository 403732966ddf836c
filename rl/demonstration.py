"""Demonstrations -> trajectories: what SFT trains on, encoded by the same episode loop and codec as sampled turns."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rl.chat import ChatCodec
from rl.data_stage import Example
from rl.env import Demonstrator, World
from rl.episode import Identity, Limits, run_episode
from rl.feedback import played
from rl.policy import Sampling, ScriptedPolicy
from rl.task import Task, derive_seed
from rl.trajectory import Trajectory, to_trajectory


async def demonstrate(
    world: World, task: Task, codec: ChatCodec, *, guess_fraction: float, limits: Limits, seed: int
) -> Trajectory:
    """The environment's own demonstrator plays the task through the episode loop.

    A fraction of the tasks, chosen by seed, is demonstrated badly: see `Demonstrator`.
    """
    if not isinstance(world.source, Demonstrator):
        raise ValueError(
            "this environment has no demonstrations of its own: set demonstrations.path on the sft stage to rows of "
            "messages, or drop the stage"
        )
    rng = random.Random(derive_seed("demonstration", seed, task.id))
    guess = rng.random() < guess_fraction
    policy = ScriptedPolicy(codec, world.source.demonstrate(task, rng, guess))
    identity = Identity(-1, 0, task.id)
    env = played(world, None, identity=identity, max_turns=limits.max_turns, seed=seed)
    episode = await run_episode(env, task, policy, codec, sampling=Sampling(), limits=limits, identity=identity)
    return to_trajectory(episode)


def encode_messages(
    codec: ChatCodec, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), max_length: int = 2**31
) -> Trajectory:
    """A recorded conversation as a trajectory, the loss on every assistant turn. Cut at `max_length` tokens.

    An assistant message may hold the `token_ids` that were sampled for it. They count as long as they are its content
    in this model's tokens.

    Raises ValueError when no assistant message follows the opening ones.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    if not first:
        raise ValueError("a demonstration needs a message before the assistant's first one")
    tokens = codec.prompt(messages[:first], tools)
    mask, turn_of = [False] * len(tokens), [-1] * len(tokens)
    turn, i = 0, first
    while i < len(messages):
        reply, supplied = _reply(codec, messages[i])
        seen_from = i + 1
        i = next((j for j in range(seen_from, len(messages)) if messages[j]["role"] == "assistant"), len(messages))
        # What follows the last assistant message trains nothing.
        seen = codec.observation(messages[seen_from:i]) if i < len(messages) else []
        glue = supplied + seen
        tokens += reply + glue
        mask += [True] * len(reply) + [False] * len(glue)
        turn_of += [turn] * (len(reply) + len(glue))
        turn += 1
    return Trajectory(
        np.asarray(tokens, np.int32)[:max_length],
        np.asarray(mask, bool)[:max_length],
        np.asarray(turn_of, np.int16)[:max_length],
        np.zeros(min(len(tokens), max_length), np.float32),
        np.full(min(len(tokens), max_length), -1, np.int32),
    )


def _reply(codec: ChatCodec, message: dict[str, Any]) -> tuple[list[int], list[int]]:
    """An assistant message's tokens, and the end of turn that was supplied when it was cut short."""
    ids: list[int] = list(message.get("token_ids") or ())
    if not ids or codec.action(ids).text != message["content"]:
        return codec.reply(message), []
    ended = ids[-1] == codec.end_of_turn
    return ids, [codec.end_of_turn] * (not ended)


def read_rows(path: str, bad: list[str] | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a JSONL or Parquet file, each with its number: of its line, or of the row, from 1 on. Or of all such
    files in a folder, one after the other.

    bad: gets what is wrong with each line that holds no row, in the place of an error.

    Raises ValueError with the file, and the line where it is not JSON.
    """
    file = Path(path)
    if file.is_dir():
        return [row for each in row_files(path) for row in read_rows(each, bad)]
    if not file.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        if not len(table):
            raise ValueError(f"{path}: no rows")
        return list(enumerate(table.to_pylist(), 1))
    rows, wrong = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("expected an object")
            except ValueError as error:
                what = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
                wrong.append(f"{path}:{number}: {what}")
            else:
                rows.append((number, row))
    if bad is None and wrong:
        raise ValueError(wrong[0])
    if not rows:
        raise ValueError(f"{path}: no rows")
    if bad is not None:
        bad += wrong
    return rows


def row_files(path: str) -> list[str]:
    """The files with a path's rows: itself, or those in a folder, by name. Raises ValueError for a folder with none."""
    if not Path(path).is_dir():
        return [path]
    files = sorted(str(f) for f in Path(path).iterdir() if f.suffix in (".parquet", ".jsonl"))
    if not files:
        raise ValueError(f"{path}: no *.parquet or *.jsonl in this folder")
    return files


def encode_rows(path: str, codec: ChatCodec, max_length: int) -> list[Example]:
    """Demonstrations of one's own: rows with `messages` and, where tools were used, `tools`.

    Raises ValueError naming the row that cannot be encoded.
    """
    return [Example(both) for _, both in _encode_columns(path, codec, max_length, ("messages",))]


def encode_pairs(path: str, codec: ChatCodec, max_length: int, *, unpaired: bool = False) -> list[Example]:
    """Pairs of one's own: rows with two whole conversations, `chosen` and `rejected`, and, where used, `tools`.

    unpaired: rows may be `messages` with a `label` above or below 0 instead. KTO, whose loss is of each conversation
    alone, then gets one of either label in the place of a pair; those of which there are fewer come again.

    Raises ValueError naming the row that cannot be encoded.
    """
    if not unpaired or "label" not in read_rows(path)[0][1]:
        encoded = _encode_columns(path, codec, max_length, ("chosen", "rejected"))
        return [Example(both, (1.0, -1.0), "rows") for _, both in encoded]
    good: list[Trajectory] = []
    bad: list[Trajectory] = []
    for row, (conversation,) in _encode_columns(path, codec, max_length, ("messages",)):
        label = row["label"]
        if not isinstance(label, int | float) or not label:
            raise ValueError(f"{path}: a label is a number above or below 0, and not {label!r}")
        (good if label > 0 else bad).append(conversation)
    if not good or not bad:
        raise ValueError(f"{path}: {len(good)} rows have a label above 0 and {len(bad)} one below: KTO needs both")
    count = max(len(good), len(bad))
    return [Example((good[i % len(good)], bad[i % len(bad)]), (1.0, -1.0), "rows") for i in range(count)]


def _encode_columns(
    path: str, codec: ChatCodec, max_length: int, columns: Sequence[str]
) -> Iterator[tuple[dict[str, Any], tuple[Trajectory, ...]]]:
    """Rows, and the conversations in those columns; they and `tools` may be JSON in a string."""
    for file in row_files(path):
        for number, row in read_rows(file):
            try:
                tools, *conversations = map(_plain, (row.get("tools"), *(row[c] for c in columns)))
                yield row, tuple(encode_messages(codec, m, tools or (), max_length) for m in conversations)
            except (KeyError, TypeError, ValueError) as error:
                wanted = " and ".join(f"`{c}`" for c in columns)
                raise ValueError(f"{file}: row {number}: not an example with {wanted}: {error!r}") from error


def _plain(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def draw_batch(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """Which demonstrations SFT step `step` trains on: a new seeded permutation each epoch."""
    permutations: dict[int, list[int]] = {}

    def at(position: int) -> int:
        epoch, offset = divmod(position, count)
        if epoch not in permutations:
            permutations[epoch] = random.Random(derive_seed("sft", seed, epoch)).sample(range(count), count)
        return permutations[epoch][offset]

    return [at(p) for p in range(step * batch_size, (step + 1) * batch_size)]
