"""Episode -> flat token arrays, and the Parquet files that hold them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rl.episode import Episode, Identity
from rl.reward import Score


@dataclass(frozen=True)
class Trajectory:
    """An episode as arrays of length T.

    tokens int32; loss_mask bool, True on sampled tokens only; turn int16, -1 before the first turn; logprobs float32
    of the distribution sampled from, 0 off the mask; versions int32, the weight version that sampled the token, -1 off
    the mask.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    turn: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def oldest_version(self) -> int:
        sampled = self.versions[self.loss_mask]
        return int(sampled.min()) if len(sampled) else -1


@dataclass(frozen=True)
class Summary:
    """What the controller knows of an episode without its tokens. turn_tokens: sampled tokens of each turn;
    prompt_tokens: of the opening."""

    identity: Identity
    tokens: int
    turn_tokens: tuple[int, ...]
    turn_rewards: tuple[float, ...]
    stop_reason: str
    flags: tuple[str, ...]
    oldest_version: int
    duration_s: float
    prompt_tokens: int = 0

    @property
    def observation_tokens(self) -> int:
        """What the environment has said between turns, and what was supplied: in the context, never in the loss."""
        return self.tokens - self.prompt_tokens - self.sampled_tokens

    @property
    def turns(self) -> int:
        return len(self.turn_rewards)

    @property
    def sampled_tokens(self) -> int:
        return sum(self.turn_tokens)


def to_trajectory(episode: Episode) -> Trajectory:
    """Flatten: prompt, then for each turn its sampled ids, a supplied end-of-turn, and the observation."""
    tokens: list[int] = list(episode.prompt_ids)
    mask: list[bool] = [False] * len(tokens)
    turns: list[int] = [-1] * len(tokens)
    logprobs: list[float] = [0.0] * len(tokens)
    versions: list[int] = [-1] * len(tokens)
    for k, turn in enumerate(episode.turns):
        glue = [*([episode.end_of_turn] if turn.supplied_end else []), *turn.observation_ids]
        tokens += [*turn.token_ids, *glue]
        mask += [True] * len(turn.token_ids) + [False] * len(glue)
        turns += [k] * (len(turn.token_ids) + len(glue))
        logprobs += [*turn.logprobs, *[0.0] * len(glue)]
        versions += [*turn.versions, *[-1] * len(glue)]
    return Trajectory(
        np.asarray(tokens, np.int32),
        np.asarray(mask, bool),
        np.asarray(turns, np.int16),
        np.asarray(logprobs, np.float32),
        np.asarray(versions, np.int32),
    )


def summarise(episode: Episode, trajectory: Trajectory) -> Summary:
    return Summary(
        episode.identity,
        len(trajectory),
        tuple(len(turn.token_ids) for turn in episode.turns),
        tuple(turn.reward for turn in episode.turns),
        str(episode.stop_reason),
        tuple(flag for turn in episode.turns for flag in turn.flags),
        trajectory.oldest_version,
        episode.duration_s,
        len(episode.prompt_ids),
    )


SCHEMA = pa.schema(
    [
        ("stage", pa.int32()),
        ("step", pa.int32()),
        ("task", pa.string()),
        ("sample", pa.int32()),
        ("attempt", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("turn", pa.list_(pa.int16())),
        ("logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.int32())),
        ("turn_rewards", pa.list_(pa.float32())),
        ("turn_flags", pa.list_(pa.list_(pa.string()))),
        ("turn_seeds", pa.list_(pa.int32())),
        ("reward", pa.float32()),
        ("reward_parts", pa.map_(pa.string(), pa.float32())),
        ("advantage", pa.float32()),
        ("success", pa.bool_()),
        ("answer", pa.string()),
        ("stop_reason", pa.string()),
        ("duration_s", pa.float32()),
        ("messages", pa.string()),
    ]
)


def to_row(episode: Episode, trajectory: Trajectory, score: Score, advantage: float) -> dict[str, Any]:
    """One Parquet row; `advantage` is the mean over its tokens, `messages` is the readable conversation as JSON."""
    messages: list[Any] = list(episode.prompt)
    for turn in episode.turns:
        messages += [{"role": "assistant", "content": turn.text}, *turn.observation]
    arrays = {name: getattr(trajectory, name) for name in ("tokens", "loss_mask", "turn", "logprobs", "versions")}
    return {
        **arrays,
        "stage": episode.identity.stage,
        "step": episode.identity.step,
        "task": episode.identity.task,
        "sample": episode.identity.sample,
        "attempt": episode.identity.attempt,
        "turn_rewards": [turn.reward for turn in episode.turns],
        "turn_flags": [list(turn.flags) for turn in episode.turns],
        "turn_seeds": [turn.seed for turn in episode.turns],
        "reward": score.total,
        "reward_parts": list(score.parts.items()),
        "advantage": advantage,
        "success": score.success,
        "answer": episode.task.answer,
        "stop_reason": str(episode.stop_reason),
        "duration_s": episode.duration_s,
        "messages": json.dumps(messages, ensure_ascii=False),
    }


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), partial)
    partial.rename(path)


def join_parquet(parts: Sequence[Path], path: Path) -> None:
    """Several such files as one, in their order, whole or not at all."""
    partial = path.with_suffix(".partial")
    pq.write_table(pa.concat_tables([pq.ParquetFile(part).read() for part in parts]), partial)
    partial.rename(path)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()
