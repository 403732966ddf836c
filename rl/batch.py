"""Trajectories -> micro-batches: packing without padding, the token budget, and balance across ranks."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.trajectory import Trajectory


@dataclass(frozen=True)
class Sample:
    """One trajectory as the learner trains on it.

    weights: float32 [T], each trained token's weight in the batch's loss (rl/algo/loss.py: token_weights).
    columns: further float32 [T] arrays by name: advantages, reference, proximal, values, returns.
    inputs: int32 [T], what the model reads in the place of the tokens (masked thought); the labels stay the tokens.
    unit: samples of one unit, a pair, stay in one micro-batch. label: 1 chosen or desirable, -1 rejected, 0 neither.
    """

    trajectory: Trajectory
    weights: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    inputs: np.ndarray | None = None
    unit: int | None = None
    label: float = 0.0

    @property
    def read(self) -> np.ndarray:
        return self.trajectory.tokens if self.inputs is None else self.inputs


@dataclass(frozen=True)
class Packed:
    """Sequences of which every common beginning is held, and computed, once.

    What a token's hidden state depends on is the tokens up to it: sequences that begin alike, as the samples of one
    task do and all tasks of one system prompt, share the states of that beginning. The U tokens are those of the
    prefix tree of the sequences. tokens_U, positions_U: int64.
    rows: sequences of similar length, as int64 [B, L] of indices into U, padded on the right with any index.
    home_U: a place of token u among the positions of all rows, laid end to end. It may have several, all alike.
    starts_R: where each row starts among them, and the end of the last, int32 [rows + 1].
    """

    tokens_U: Tensor
    positions_U: Tensor
    rows: tuple[Tensor, ...]
    home_U: Tensor
    starts_R: Tensor

    def to(self, device: str) -> "Packed":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if k != "rows"}
        return Packed(**moved, rows=tuple(r.to(device) for r in self.rows))


@dataclass(frozen=True)
class MicroBatch:
    """E packed trajectories, and per-token values at the N trained positions, trajectory after trajectory.

    before_N: the index in U of the token that precedes each trained one, whose hidden state predicts targets_N; at_N:
    of the trained token itself. episode_N, turn_N: which trajectory of the micro-batch, and which of its turns.
    columns: those that all samples have, and `behaviour`, the recorded log-probs. units_E, labels_E: the samples'.
    """

    packed: Packed
    before_N: Tensor
    at_N: Tensor
    targets_N: Tensor
    episode_N: Tensor
    turn_N: Tensor
    weights_N: Tensor
    columns: Mapping[str, Tensor]
    units_E: Tensor
    labels_E: Tensor

    @property
    def episodes(self) -> int:
        return len(self.labels_E)

    def to(self, device: str) -> "MicroBatch":
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if k != "columns"}
        return MicroBatch(**moved, columns={k: v.to(device) for k, v in self.columns.items()})


_MIN_FILL = 0.75
"""A row shorter than this share of its block's width starts the next block: attention pays for padding."""

_MAX_SHARING = 4
"""A micro-batch's rows together have at most this many times its token budget: attention holds them unshared."""


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    width = min(len(a), len(b))
    differ = np.flatnonzero(a[:width] != b[:width])
    return int(differ[0]) if len(differ) else width


def alike(sequences: Sequence[np.ndarray]) -> list[int]:
    """Indices in lexicographic order: each sequence after the one that it shares the longest beginning with."""
    return sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())


def plan(
    sequences: Sequence[np.ndarray], token_budget: int, units: Sequence[int | None] | None = None
) -> list[list[int]]:
    """Indices of each micro-batch: at most `token_budget` tokens to compute, or one unit (a sequence without one)."""
    together: dict[int, list[int]] = {}
    for i in alike(sequences):
        unit = units[i] if units is not None else None
        together.setdefault(-1 - i if unit is None else unit, []).append(i)
    batches: list[list[int]] = []
    computed = held = 0
    for members in together.values():
        lengths = [len(sequences[i]) for i in members]
        inside = sum(lengths) - sum(
            shared_length(sequences[a], sequences[b]) for a, b in itertools.pairwise(members)
        )
        shared = shared_length(sequences[batches[-1][-1]], sequences[members[0]]) if batches else 0
        fits = computed + inside - shared <= token_budget and held + sum(lengths) <= _MAX_SHARING * token_budget
        if batches and fits:
            batches[-1] += members
            computed, held = computed + inside - shared, held + sum(lengths)
        else:
            batches.append(members)
            computed, held = inside, sum(lengths)
    return batches


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, in order: about the same tokens, and a group, which shares its prompt, on one rank."""
    ends = np.cumsum(lengths)
    middles = ends - np.asarray(lengths) / 2
    owner = np.minimum(middles * ranks // max(1, ends[-1] if len(ends) else 1), ranks - 1)
    return [np.flatnonzero(owner == rank).tolist() for rank in range(ranks)]


def pack(sequences: Sequence[np.ndarray]) -> tuple[Packed, list[np.ndarray]]:
    """The sequences' prefix tree, and for each sequence the int64 [T] indices of its tokens in U."""
    places: list[np.ndarray] = [np.zeros(0, np.int64)] * len(sequences)
    used, before = 0, None
    for i in alike(sequences):
        shared = 0 if before is None else shared_length(sequences[before], sequences[i])
        fresh = np.arange(used, used + len(sequences[i]) - shared)
        places[i] = fresh if before is None else np.concatenate([places[before][:shared], fresh])
        used, before = used + len(fresh), i
    tokens, positions, home = (np.zeros(used, np.int64) for _ in range(3))
    blocks: list[list[np.ndarray]] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        tokens[places[i]], positions[places[i]] = sequences[i], np.arange(len(sequences[i]))
        if not blocks or len(sequences[i]) < _MIN_FILL * len(blocks[-1][0]):
            blocks.append([])
        blocks[-1].append(places[i])
    rows, start = [], 0
    for block in blocks:
        width = len(block[0])
        rows.append(np.zeros((len(block), width), np.int64))
        for b, place in enumerate(block):
            rows[-1][b, : len(place)] = place
            home[place] = start + b * width + np.arange(len(place))
        start += len(block) * width
    starts = np.cumsum([0, *(len(row) for block in rows for row in block)], dtype=np.int32)
    tensor = torch.from_numpy
    return Packed(tensor(tokens), tensor(positions), tuple(map(tensor, rows)), tensor(home), tensor(starts)), places


def trained_positions(trajectory: Trajectory) -> np.ndarray:
    """int64 [N]. Position 0 is never among them: it has no predecessor to be predicted from."""
    return np.flatnonzero(trajectory.loss_mask[1:]) + 1


def spread_weights(trajectory: Trajectory, turn_weights: Sequence[float]) -> np.ndarray:
    """float32 [T]: each turn's weight on its trained tokens, 0 elsewhere."""
    if not turn_weights:
        return np.zeros(len(trajectory), np.float32)
    by_turn = np.asarray(turn_weights, np.float32)
    return np.where(trajectory.loss_mask, by_turn[np.maximum(trajectory.turn, 0)], np.float32(0))


def turn_lengths(trajectory: Trajectory) -> list[int]:
    """Trained tokens of each turn; a turn that sampled nothing has 0."""
    turns = int(trajectory.turn.max(initial=-1)) + 1
    return np.bincount(trajectory.turn[trained_positions(trajectory)], minlength=turns).tolist()


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pack the trajectories, and gather the trained positions' values."""
    packed, places = pack([s.read for s in samples])
    trained = [trained_positions(s.trajectory) for s in samples]

    def gather(arrays: Sequence[np.ndarray], shift: int = 0) -> Tensor:
        return torch.tensor(np.concatenate([a[at + shift] for a, at in zip(arrays, trained, strict=True)]))

    names = set.intersection(*(set(s.columns) for s in samples))
    return MicroBatch(
        packed=packed,
        before_N=gather(places, -1),
        at_N=gather(places),
        targets_N=gather([s.trajectory.tokens.astype(np.int64) for s in samples]),
        episode_N=torch.tensor(np.repeat(np.arange(len(samples)), [len(at) for at in trained])),
        turn_N=gather([s.trajectory.turn.astype(np.int64) for s in samples]),
        weights_N=gather([s.weights for s in samples]),
        columns={
            "behaviour": gather([s.trajectory.logprobs for s in samples]),
            **{name: gather([s.columns[name] for s in samples]) for name in sorted(names)},
        },
        units_E=torch.tensor([-1 if s.unit is None else s.unit for s in samples]),
        labels_E=torch.tensor([s.label for s in samples]),
    )


def filler(sample: Sample) -> MicroBatch:
    """A micro-batch of weight zero, for a rank that has fewer than the others: collectives need equal counts."""
    return collate([replace(sample, weights=np.zeros_like(sample.weights), label=0.0)])


def mini_batches(episodes: int, parts: int, epochs: int) -> list[list[int]]:
    """Episode indices of each optimizer step of a batch: `epochs` passes over `parts` equal, strided parts."""
    return [list(range(k, episodes, parts)) for k in range(parts)] * epochs
