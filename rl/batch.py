"""Trajectories -> micro-batches: padding, the token budget, and balance across ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

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
class MicroBatch:
    """Right-padded rows, and per-token values at the N trained positions in row-major order."""

    tokens_BT: Tensor
    mask_BT: Tensor
    weights_N: Tensor
    advantages_N: Tensor
    behaviour_N: Tensor
    reference_N: Tensor | None

    def to(self, device: str) -> "MicroBatch":
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return MicroBatch(**moved)


_MIN_FILL = 0.75
"""A row shorter than this share of a micro-batch's width starts the next one: padding costs as much as tokens do."""


def plan(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of each micro-batch: rows of similar length, at most `token_budget` padded tokens (or one row)."""
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = batches and (len(batches[-1]) + 1) * width <= token_budget
        if fits and lengths[i] >= _MIN_FILL * width:
            batches[-1].append(i)
        else:
            batches.append([i])
            width = lengths[i]
    return batches


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, the longest first onto the least loaded: every rank gets about the same tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += lengths[i]
    return shares


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pad the rows on the right, and gather the trained positions' values."""
    trajectories = [s.trajectory for s in samples]
    width = max(map(len, trajectories))
    tokens = np.zeros((len(samples), width), np.int64)
    mask = np.zeros((len(samples), width), bool)
    for row, t in enumerate(trajectories):
        tokens[row, : len(t)] = t.tokens
        mask[row, : len(t)] = t.loss_mask
    mask[:, 0] = False  # position 0 has no predecessor to be predicted from
    masks = [mask[row, : len(t)] for row, t in enumerate(trajectories)]

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(
            np.concatenate([np.full(m.sum(), v, np.float32) for m, v in zip(masks, values, strict=True)])
        )

    def gather(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.tensor(np.concatenate([a[m] for a, m in zip(arrays, masks, strict=True)]))

    references = [s.reference for s in samples if s.reference is not None]
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(mask),
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
