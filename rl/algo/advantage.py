"""Advantages from rewards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rl.algo.returns import discounted_returns
from rl.algo.sequence import sums_by

EPSILON = 1e-6


def group_advantages(rewards_G: Tensor, *, baseline: str, normalise: str, counted_G: Tensor | None = None) -> Tensor:
    """Advantage of each episode of one group, [G].

    GRPO (https://arxiv.org/abs/2402.03300, section 4.1.2): (r - mean) / std over the group, with the sample standard
    deviation (G - 1), as TRL computes it. RLOO (https://arxiv.org/abs/2402.14740): r minus the mean of the others.
    baseline: group_mean | leave_one_out | none; normalise: group_std | none (Dr. GRPO,
    https://arxiv.org/abs/2503.20783, leaves the division out).

    counted_G, bool: whose rewards make mean and std; the rest are measured by those. An advantage whose baseline has
    no counted reward to average, or whose std has no two that differ, is 0.
    """
    counted_G = torch.ones_like(rewards_G, dtype=torch.bool) if counted_G is None else counted_G
    # In float64 the mean of equal float32 rewards is that reward: no rounding for the division to blow up.
    relative_G = _relative(rewards_G.double(), torch.arange(len(rewards_G)), counted_G, baseline, normalise)
    return relative_G.to(rewards_G.dtype)


def group_turn_advantages(
    rewards: Sequence[Tensor], *, gamma: float, baseline: str, normalise: str, counted_G: Tensor | None = None
) -> list[Tensor]:
    """Advantage of each turn of each episode of one group; rewards: [K_i] for episode i, and so the result.

    GRPO with process supervision (https://arxiv.org/abs/2402.03300, section 4.1.3, where gamma is 1):
    A_k = sum_{j>=k} gamma^(j-k) (r_j - mean) / std, with mean and sample standard deviation over all turn rewards of
    the group. baseline leave_one_out: the mean over the turn rewards of the other episodes. The choices are those of
    `group_advantages`, which this is when every episode has one turn.
    """
    counted_G = torch.ones(len(rewards), dtype=torch.bool) if counted_G is None else counted_G
    turns = [len(rewards_K) for rewards_K in rewards]
    episode_N = torch.arange(len(rewards)).repeat_interleave(torch.tensor(turns))
    flat_N = torch.cat(list(rewards))
    relative_N = _relative(flat_N.double(), episode_N, counted_G, baseline, normalise)
    return [discounted_returns(relative_K, gamma).to(flat_N.dtype) for relative_K in relative_N.split(turns)]


def _relative(rewards_N: Tensor, episode_N: Tensor, counted_G: Tensor, baseline: str, normalise: str) -> Tensor:
    """Rewards against the counted rewards of their group, [N]; episode_N: whose reward it is."""
    counted_N = counted_G[episode_N]
    centred_N = rewards_N
    if baseline != "none":
        kept_N = torch.where(counted_N, rewards_N, 0.0)
        sum_N, count_N = kept_N.sum(), counted_N.sum()
        if baseline == "leave_one_out":
            sum_N = sum_N - sums_by(kept_N, episode_N, len(counted_G))[episode_N]
            count_N = count_N - sums_by(counted_N.long(), episode_N, len(counted_G))[episode_N]
        centred_N = torch.where(count_N > 0, rewards_N - sum_N / count_N, 0.0)
    return _scaled(centred_N, rewards_N[counted_N], correction=1) if normalise == "group_std" else centred_N


def _scaled(centred_N: Tensor, measured_M: Tensor, *, correction: int) -> Tensor:
    """Divided by the standard deviation of `measured_M`; 0 where no two of those differ, for they give no scale."""
    if len(measured_M.unique()) < 2:
        return torch.zeros_like(centred_N)
    return centred_N / (measured_M.std(correction=correction) + EPSILON)


def remax_advantages(rewards_G: Tensor, greedy_reward: float) -> Tensor:
    """r minus the reward of the greedy episode of the same task, [G]. ReMax (https://arxiv.org/abs/2310.10505)."""
    return rewards_G - greedy_reward


def whiten(advantages_N: Tensor, counted_N: Tensor | None = None) -> Tensor:
    """(A - mean) / std over all trained tokens of the batch, [N]. REINFORCE++ (https://arxiv.org/abs/2501.03262).

    The standard deviation is the population's (N), as in OpenRLHF, by the paper's authors; TRL's and verl's whitening
    divide by N - 1. counted_N, bool: which tokens make mean and std; the rest are measured by those. Where no two
    counted advantages differ the result is 0.
    """
    exact_N = advantages_N.double()
    kept_M = exact_N if counted_N is None else exact_N[counted_N]
    return _scaled(exact_N - kept_M.mean(), kept_M, correction=0).to(advantages_N.dtype)


def gae(rewards_T: Tensor, values_T: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates of one episode, and the returns a critic learns (A + V), both [T].

    Schulman et al. (https://arxiv.org/abs/1506.02438, equation 16): A_t = sum_l (gamma lam)^l delta_{t+l} with
    delta_t = r_t + gamma V_{t+1} - V_t; the value after the last element is 0.

    T counts what the caller hands over. Given the trained tokens of an episode, observations left out, this is GAE by
    token that skips observations: the last token of a turn looks to the first one of the next, and an observation
    costs no discount. Given a reward and a value for each turn, it is GAE by turn.
    """
    values = values_T.tolist()
    advantages = []
    advantage = following = 0.0
    for reward, value in zip(reversed(rewards_T.tolist()), reversed(values), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        advantages.append(advantage)
        following = value
    advantages.reverse()
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    return rewards_T.new_tensor(advantages), rewards_T.new_tensor(returns)
