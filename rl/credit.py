"""Rewards of a batch's groups -> advantages of its tokens: which turn and which token gets what for what was won.

Each episode's turns are given their rewards (algo.credit), those become advantages (algo.advantage against
algo.baseline), are normalised, and laid out on the trained tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rl.algo.advantage import gae, group_advantages, group_turn_advantages, remax_advantages, whiten
from rl.algo.kl import kl_estimate
from rl.algo.loss import overlong_penalty
from rl.algo.returns import (
    dense_rewards,
    discounted_returns,
    epo_advantages,
    on_last_token,
    outcome_rewards,
    over_tokens,
    turn_rewards,
)
from rl.algo.sequence import sums_by
from rl.batch import trained_positions
from rl.config_algo import AlgoConfig, OverlongConfig
from rl.trajectory import Trajectory

Columns = Mapping[str, np.ndarray]
"""Per-token arrays of one trajectory, float32 [T], by name."""


@dataclass(frozen=True)
class GroupFacts:
    """What the G episodes of a group were given, without their tokens.

    turn_rewards: by the environment, turn by turn; outcomes: by the reward rule at the end; counted: who takes part in
    the group's statistics; greedy: the whole reward of the task's greedy episode (ReMax).
    """

    turn_rewards: Sequence[Sequence[float]]
    outcomes: Sequence[float]
    successes: Sequence[bool]
    counted: Sequence[bool]
    greedy: float | None = None


@dataclass(frozen=True)
class _Played:
    """One episode while its credit is worked out.

    at: its trained positions; kl_N: what the KL penalty takes off each one's reward.
    """

    length: int
    at: np.ndarray
    turn_N: Tensor
    rewards_K: Tensor
    kl_N: Tensor
    values_N: Tensor | None

    @property
    def kl_K(self) -> Tensor:
        return sums_by(self.kl_N, self.turn_N, len(self.rewards_K))

    @property
    def total(self) -> float:
        return float(self.rewards_K.sum() - self.kl_N.sum())


def assign_credit(
    groups: Sequence[Sequence[Trajectory]],
    facts: Sequence[GroupFacts],
    algo: AlgoConfig,
    *,
    max_length: int,
    kl_coefficient: float = 0.0,
    scored: Sequence[Sequence[Columns]] | None = None,
) -> list[list[Columns]]:
    """The columns that the objective reads: what was `scored` (reference, proximal, values), advantages, returns.

    Groups x samples; every array is float32 [T] and 0 off the trained tokens.
    """
    columns: list[list[Columns]] = []
    played: list[list[_Played]] = []
    for g, (group, fact) in enumerate(zip(groups, facts, strict=True)):
        known = scored[g] if scored else [{} for _ in group]
        episodes = [_play(t, fact, s, algo, max_length, kl_coefficient, known[s]) for s, t in enumerate(group)]
        made = [_laid_out(e, m) for e, m in zip(episodes, _advantages(episodes, fact, algo), strict=True)]
        played.append(episodes)
        columns.append([{**k, **m} for k, m in zip(known, made, strict=True)])
    return _whitened(columns, played, facts) if algo.normalise == "batch_std" else columns


def first_tokens(turn_N: np.ndarray) -> np.ndarray:
    """bool [N]: the first trained token of each turn."""
    return np.r_[True, turn_N[1:] != turn_N[:-1]] if len(turn_N) else np.zeros(0, bool)


def _play(
    trajectory: Trajectory,
    fact: GroupFacts,
    s: int,
    algo: AlgoConfig,
    max_length: int,
    kl_coefficient: float,
    known: Columns,
) -> _Played:
    at = trained_positions(trajectory)
    given_K = torch.tensor(fact.turn_rewards[s], dtype=torch.float64)
    if algo.credit == "dense":
        rewards_K = dense_rewards(given_K, fact.successes[s], algo.max_total_reward)
    else:
        rewards_K = (turn_rewards if algo.credit == "turn" else outcome_rewards)(given_K, fact.outcomes[s])
    if algo.overlong is not None and len(rewards_K):
        rewards_K[-1] += _overlong(len(trajectory), algo.overlong, max_length)
    kl_N = torch.zeros(len(at), dtype=torch.float64)
    if algo.kl.place == "reward" and "reference" in known:
        behaviour_N, reference_N = (torch.from_numpy(a[at]).double() for a in (trajectory.logprobs, known["reference"]))
        kl_N = kl_coefficient * kl_estimate(behaviour_N, reference_N, algo.kl.estimator)
    values_N = torch.from_numpy(known["values"][at]).double() if "values" in known else None
    return _Played(
        len(trajectory), at, torch.from_numpy(trajectory.turn[at].astype(np.int64)), rewards_K, kl_N, values_N
    )


def _overlong(length: int, config: OverlongConfig, max_length: int) -> float:
    limit = config.limit or max_length
    return overlong_penalty(length, limit=limit, buffer=config.buffer or max(1, limit // 5))


def _advantages(episodes: list[_Played], fact: GroupFacts, algo: AlgoConfig) -> list[dict[str, Tensor]]:
    """Per-token columns of each episode of a group, [N] each."""
    if algo.advantage == "episode":
        totals_G = torch.tensor([e.total for e in episodes], dtype=torch.float64)
        counted_G = torch.tensor(fact.counted)
        if algo.baseline == "greedy":
            assert fact.greedy is not None, "the greedy episode of each task is played beside the sampled ones"
            made_G = remax_advantages(totals_G, fact.greedy)
        else:
            normalise = "group_std" if algo.normalise == "group_std" else "none"
            made_G = group_advantages(totals_G, baseline=algo.baseline, normalise=normalise, counted_G=counted_G)
        return [{"advantages": a.expand(len(e.at))} for e, a in zip(episodes, made_G, strict=True)]
    if algo.advantage == "turn":
        made = _of_turns(episodes, fact, algo)
        return [{"advantages": over_tokens(a_K, e.turn_N)} for e, a_K in zip(episodes, made, strict=True)]
    return [_of_tokens(e, algo) for e in episodes]


def _of_turns(episodes: list[_Played], fact: GroupFacts, algo: AlgoConfig) -> list[Tensor]:
    given = [e.rewards_K - e.kl_K for e in episodes]
    if algo.normalise == "max_return":
        return [epo_advantages(rewards_K, algo.gamma) for rewards_K in given]
    return group_turn_advantages(
        given,
        gamma=algo.gamma,
        baseline=algo.baseline,
        normalise="group_std" if algo.normalise == "group_std" else "none",
        counted_G=torch.tensor(fact.counted),
    )


def _of_tokens(e: _Played, algo: AlgoConfig) -> dict[str, Tensor]:
    if algo.advantage == "turn_gae":
        assert e.values_N is not None
        starts_N = torch.from_numpy(first_tokens(e.turn_N.numpy()))
        whose_N = starts_N.long().cumsum(0) - 1
        # A turn that sampled nothing has no state of its own: its reward joins that of its neighbour.
        given_N = on_last_token(e.rewards_K - e.kl_K, e.turn_N)
        given_K = sums_by(given_N, whose_N, int(starts_N.sum()))
        made_K, returns_K = gae(given_K, e.values_N[starts_N], gamma=algo.gamma, lam=algo.lam)
        return {"advantages": made_K[whose_N], "returns": returns_K[whose_N]}
    rewards_N = on_last_token(e.rewards_K, e.turn_N) - e.kl_N
    if algo.advantage == "token":
        return {"advantages": discounted_returns(rewards_N, algo.gamma)}
    assert e.values_N is not None
    made_N, returns_N = gae(rewards_N, e.values_N, gamma=algo.gamma, lam=algo.lam)
    return {"advantages": made_N, "returns": returns_N}


def _laid_out(e: _Played, made: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    out = {name: np.zeros(e.length, np.float32) for name in made}
    for name, values_N in made.items():
        out[name][e.at] = values_N.numpy()
    return out


def _whitened(
    columns: list[list[Columns]], played: list[list[_Played]], facts: Sequence[GroupFacts]
) -> list[list[Columns]]:
    flat = [
        (c, e, counted)
        for group, episodes, fact in zip(columns, played, facts, strict=True)
        for c, e, counted in zip(group, episodes, fact.counted, strict=True)
    ]
    advantages_N = torch.cat([torch.from_numpy(c["advantages"][e.at]) for c, e, _ in flat])
    counted_N = torch.cat([torch.full((len(e.at),), counted) for _, e, counted in flat])
    parts = iter(whiten(advantages_N, counted_N).split([len(e.at) for _, e, _ in flat]))
    out = []
    for group, episodes in zip(columns, played, strict=True):
        out.append([])
        for c, e in zip(group, episodes, strict=True):
            out[-1].append({**c, **_laid_out(e, {"advantages": next(parts)})})
    return out
