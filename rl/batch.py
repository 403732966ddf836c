"""Trajectories -> micro-batches: packing without padding, the token budget, and balance across ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.trajectory import Trajectory


@dataclass(frozen=True)
class Sample:
    """One trajectory as the learner trains on it.

    advantage: of the whole episode; weight: of each of its trained tokens in the batch's loss (`token_weights`);
    reference: float32 [T], the reference policy's log-probs, or None.
    """

    trajectory: Trajectory
    weight: float
    advantage: float = 0.0
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class Packed:
    """Sequences of which every common beginning is held, and computed, once.

    What a token's hidden state depends on is the tokens up to it: sequences that begin alike, as the samples of one
    task do and all tasks of one system prompt, share the states of that beginning. The U tokens are those of the
    prefix tree of the sequences. tokens_U, positions_U: int64.
    rows: sequences of similar length, as int64 [B, L] of indices into U, padded on the right with any index.
    home_U: a place of token u among the positions of all rows, laid end to end. It may have several, all alike.
    """

    tokens_U: Tensor
    positions_U: Tensor
    rows: tuple[Tensor, ...]
    home_U: Tensor

    def to(self, device: str) -> "Packed":
        rows = tuple(r.to(device) for r in self.rows)
        return Packed(self.tokens_U.to(device), self.positions_U.to(device), rows, self.home_U.to(device))


@dataclass(frozen=True)
class MicroBatch:
    """Packed trajectories, and per-token values at the N trained positions, trajectory after trajectory.

    before_N: the index in U of the token that precedes each trained one, whose hidden state predicts targets_N.
    """

    packed: Packed
    before_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    advantages_N: Tensor
    behaviour_N: Tensor
    reference_N: Tensor | None

    def to(self, device: str) -> "MicroBatch":
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in vars(self).items()}
        return MicroBatch(**moved)


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


def plan(sequences: Sequence[np.ndarray], token_budget: int) -> list[list[int]]:
    """Indices of each micro-batch: at most `token_budget` tokens to compute, or one sequence."""
    batches: list[list[int]] = []
    computed = held = 0
    for i in alike(sequences):
        length = len(sequences[i])
        new = length - shared_length(sequences[batches[-1][-1]], sequences[i]) if batches else length
        if batches and computed + new <= token_budget and held + length <= _MAX_SHARING * token_budget:
            batches[-1].append(i)
            computed, held = computed + new, held + length
        else:
            batches.append([i])
            computed = held = length
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
    tensor = torch.from_numpy
    return Packed(tensor(tokens), tensor(positions), tuple(map(tensor, rows)), tensor(home)), places


def trained_positions(trajectory: Trajectory) -> np.ndarray:
    """int64 [N]. Position 0 is never among them: it has no predecessor to be predicted from."""
    return np.flatnonzero(trajectory.loss_mask[1:]) + 1


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pack the trajectories, and gather the trained positions' values."""
    trajectories = [s.trajectory for s in samples]
    packed, places = pack([t.tokens for t in trajectories])
    trained = [trained_positions(t) for t in trajectories]

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(
            np.concatenate([np.full(len(at), v, np.float32) for at, v in zip(trained, values, strict=True)])
        )

    def gather(arrays: Sequence[np.ndarray], shift: int = 0) -> Tensor:
        return torch.tensor(np.concatenate([a[at + shift] for a, at in zip(arrays, trained, strict=True)]))

    references = [s.reference for s in samples if s.reference is not None]
    return MicroBatch(
        packed,
        gather(places, -1),
        gather([t.tokens.astype(np.int64) for t in trajectories]),
        spread([s.weight for s in samples]),
        spread([s.advantage for s in samples]),
        gather([t.logprobs for t in trajectories]),
        gather(references) if len(references) == len(samples) else None,
    )


def filler(sample: Sample) -> MicroBatch:
    """A micro-batch of weight zero, for a rank that has fewer than the others: collectives need equal counts."""
    return collate([Sample(sample.trajectory, 0.0, 0.0, sample.reference)])


def mini_batches(episodes: int, parts: int, epochs: int) -> list[list[int]]:
    """Episode indices of each optimizer step of a batch: `epochs` passes over `parts` equal, strided parts."""
    return [list(range(k, episodes, parts)) for k in range(parts)] * epochs
