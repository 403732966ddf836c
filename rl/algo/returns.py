"""What each turn is given, what it is worth, and on which token that lies."""

import torch
from torch import Tensor


def outcome_rewards(turn_rewards_K: Tensor, outcome: float) -> Tensor:
    """Everything on the last turn, [K]: what the environment gave over the turns, plus the outcome."""
    rewards_K = torch.zeros_like(turn_rewards_K)
    rewards_K[-1:] = turn_rewards_K.double().sum() + outcome
    return rewards_K


def turn_rewards(turn_rewards_K: Tensor, outcome: float) -> Tensor:
    """Each turn keeps what the environment gave it, and the last one gets the outcome too, [K]."""
    rewards_K = turn_rewards_K.clone()
    rewards_K[-1:] += outcome
    return rewards_K


def dense_rewards(gains_K: Tensor, won: bool, max_total: float) -> Tensor:
    """Each turn's gain in score, scaled, [K].

    A practitioner's guide (https://arxiv.org/abs/2510.01132): gain / number of turns with a positive gain if the
    episode was won, so that unit gains add up to 1; else gain / max_total, the most that the task gives. Neither
    divisor is below 1. The divisor depends on the outcome: only a finished episode can be scored.
    """
    divisor = int((gains_K > 0).sum()) if won else max_total
    return gains_K / max(1, divisor)


def discounted_returns(rewards_K: Tensor, gamma: float) -> Tensor:
    """G_k = sum_{j>=k} gamma^(j-k) r_j, [K]."""
    returns = []
    following = 0.0
    for reward in reversed(rewards_K.tolist()):
        following = reward + gamma * following
        returns.append(following)
    return rewards_K.new_tensor(returns[::-1])


def epo_advantages(rewards_K: Tensor, gamma: float) -> Tensor:
    """G_k / max_j |G_j| over the episode's discounted returns, [K]; there is no baseline.

    EPO (https://arxiv.org/abs/2502.12486). An episode that was given nothing has advantages of 0.
    """
    if not rewards_K.any():
        return torch.zeros_like(rewards_K)
    returns_K = discounted_returns(rewards_K, gamma)
    return returns_K / returns_K.abs().max()


def on_last_token(rewards_K: Tensor, turn_N: Tensor) -> Tensor:
    """Each turn's reward on the last trained token of that turn, [N].

    turn_N: the turn of each trained token, ascending. The reward of a turn without a trained token goes to the nearest
    earlier turn that has one, or else to the first later one: nothing is lost as long as there is a token.
    """
    rewards_N = torch.zeros(len(turn_N), dtype=torch.float64)
    if len(turn_N):
        turn_K = torch.arange(len(rewards_K), dtype=turn_N.dtype).clamp(min=turn_N[0])
        rewards_N.index_add_(0, torch.searchsorted(turn_N, turn_K, right=True) - 1, rewards_K.double())
    return rewards_N.to(rewards_K.dtype)


def over_tokens(values_K: Tensor, turn_N: Tensor) -> Tensor:
    """A turn's value on each of its trained tokens, [N]."""
    return values_K[turn_N.long()]
