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

    Raises ValueError when no assistant message follows the opening ones.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    if not first:
        raise ValueError("a demonstration needs a message before the assistant's first one")
    tokens = codec.prompt(messages[:first], tools)
    mask, turn_of = [False] * len(tokens), [-1] * len(tokens)
    turn, i = 0, first
    while i < len(messages):
        reply = codec.reply(messages[i])
        seen_from = i + 1
        i = next((j for j in range(seen_from, len(messages)) if messages[j]["role"] == "assistant"), len(messages))
        # What follows the last assistant message trains nothing.
        seen = codec.observation(messages[seen_from:i]) if i < len(messages) else []
        tokens += reply + seen
        mask += [True] * len(reply) + [False] * len(seen)
        turn_of += [turn] * (len(reply) + len(seen))
        turn += 1
    return Trajectory(
        np.asarray(tokens, np.int32)[:max_length],
        np.asarray(mask, bool)[:max_length],
        np.asarray(turn_of, np.int16)[:max_length],
        np.zeros(min(len(tokens), max_length), np.float32),
        np.full(min(len(tokens), max_length), -1, np.int32),
    )


def read_rows(path: str, bad: list[str] | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a JSONL or Parquet file, each with its number: of its line, or of the row, from 1 on.

    bad: gets what is wrong with each line that holds no row, in the place of an error.

    Raises ValueError with the file, and the line where it is not JSON.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    if file.suffix == ".parquet":
        return list(enumerate(pq.read_table(file).to_pylist(), 1))
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


def encode_rows(path: str, codec: ChatCodec, max_length: int) -> list[Example]:
    """Demonstrations of one's own: rows with `messages` and, where tools were used, `tools`.

    Raises ValueError naming the row that cannot be encoded.
    """
    return [Example(both) for both in _encode_columns(path, codec, max_length, ("messages",))]


def encode_pairs(path: str, codec: ChatCodec, max_length: int) -> list[Example]:
    """Pairs of one's own: rows with two whole conversations, `chosen` and `rejected`, and, where used, `tools`.

    Raises ValueError naming the row that cannot be encoded.
    """
    encoded = _encode_columns(path, codec, max_length, ("chosen", "rejected"))
    return [Example(both, (1.0, -1.0), "rows") for both in encoded]


def _encode_columns(
    path: str, codec: ChatCodec, max_length: int, columns: Sequence[str]
) -> Iterator[tuple[Trajectory, ...]]:
    for number, row in read_rows(path):
        try:
            conversations = [json.loads(row[c]) if isinstance(row[c], str) else row[c] for c in columns]
            yield tuple(encode_messages(codec, m, row.get("tools") or (), max_length) for m in conversations)
        except (KeyError, TypeError, ValueError) as error:
            wanted = " and ".join(f"`{c}`" for c in columns)
            raise ValueError(f"{path}: row {number}: not an example with {wanted}: {error!r}") from error


def draw_batch(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """Which demonstrations SFT step `step` trains on: a new seeded permutation each epoch."""
    permutations: dict[int, list[int]] = {}

    def at(position: int) -> int:
        epoch, offset = divmod(position, count)
        if epoch not in permutations:
            permutations[epoch] = random.Random(derive_seed("sft", seed, epoch)).sample(range(count), count)
        return permutations[epoch][offset]

    return [at(p) for p in range(step * batch_size, (step + 1) * batch_size)]
