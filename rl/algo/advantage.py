"""Advantages from rewards."""

import torch
from torch import Tensor

EPSILON = 1e-6


def group_advantages(rewards_G: Tensor, *, baseline: str, normalise: str) -> Tensor:
    """Advantage of each episode of one group, [G].

    GRPO (https://arxiv.org/abs/2402.03300, section 4.1.2): (r - mean) / std over the group, with the sample standard
    deviation (G - 1), as TRL computes it. baseline: group_mean | none; normalise: group_std | none (Dr. GRPO,
    https://arxiv.org/abs/2503.20783, leaves the division out).
    """
    centred_G = rewards_G - rewards_G.mean() if baseline == "group_mean" else rewards_G
    if normalise == "group_std":
        return centred_G / (rewards_G.std() + EPSILON)
    return centred_G


def batch_advantages(rewards_BG: Tensor, *, baseline: str, normalise: str) -> Tensor:
    """Advantages of a batch of groups, [B, G]: each group by itself."""
    return torch.stack([group_advantages(g, baseline=baseline, normalise=normalise) for g in rewards_BG])
