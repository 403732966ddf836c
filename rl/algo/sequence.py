"""Values of flat tokens, gathered by the episode (or the turn) that they belong to."""

import torch
from torch import Tensor


def sums_by(values_N: Tensor, owner_N: Tensor, owners: int) -> Tensor:
    """The sum of each owner's values, [owners], differentiable; owner_N: int64 in [0, owners)."""
    return torch.zeros(owners, dtype=values_N.dtype, device=values_N.device).index_add(0, owner_N, values_N)


def means_by(values_N: Tensor, owner_N: Tensor, owners: int) -> Tensor:
    """The mean of each owner's values, [owners], differentiable; 0 for an owner without any."""
    counts = sums_by(torch.ones_like(values_N), owner_N, owners)
    return sums_by(values_N, owner_N, owners) / counts.clamp(min=1)
