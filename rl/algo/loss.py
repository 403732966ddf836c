"""Losses of the policy and the critic, and how per-token losses become one number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rl.algo.importance import log_ratio
from rl.algo.sequence import means_by


def clipped_surrogate(
    logprobs_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token clipped policy-gradient loss, unreduced, and where a clip was active, both [N].

    PPO (https://arxiv.org/abs/1707.06347, equation 7), with separate bounds as in DAPO
    (https://arxiv.org/abs/2503.14476, equation 8): -min(rho A, clip(rho, 1 - low, 1 + high) A). dual_clip, c > 1:
    where A < 0 the loss is at most -c A (https://arxiv.org/abs/1912.09729, equation 5).
    """
    ratio_N = log_ratio(logprobs_N, old_N).exp()
    loss_N, clipped_N = _pessimistic(ratio_N, advantages_N, low, high)
    if dual_clip is None:
        return loss_N, clipped_N
    ceiling_N = torch.where(advantages_N < 0, -dual_clip * advantages_N, torch.inf)
    return torch.minimum(loss_N, ceiling_N), clipped_N | (loss_N > ceiling_N)


def sequence_surrogate(
    logprobs_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    episode_N: Tensor,
    episodes: int,
    *,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """The clipped loss of the episode on each of its tokens, unreduced, and where the clip was active, both [N].

    GSPO (https://arxiv.org/abs/2507.18071, equations 5 to 7): the ratio is s = exp(mean over the episode's tokens of
    log(pi / pi_old)) and carries the gradient. A mean over an episode's tokens is the paper's term of that episode.
    """
    # The mean of differences: that of the log-probs by themselves would round away bounds as near to 1 as 3e-4.
    ratio_E = means_by(log_ratio(logprobs_N, old_N), episode_N, episodes).exp()
    return _pessimistic(ratio_E[episode_N], advantages_N, low, high)


def _pessimistic(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    free_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1 - low, 1 + high) * advantages_N
    return -torch.minimum(free_N, clipped_N), clipped_N < free_N


def cispo(
    logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, *, low: float | None, high: float
) -> tuple[Tensor, Tensor]:
    """Per-token policy-gradient loss under a clipped, constant ratio, and where the ratio was clipped, both [N].

    CISPO (MiniMax-M1, https://arxiv.org/abs/2506.13585, equations 4 and 5):
    -sg(clip(rho, 1 - low, 1 + high)) A log pi. A clipped token keeps its gradient. low None: no lower bound, as there.
    """
    ratio_N = log_ratio(logprobs_N.detach(), old_N).exp()
    bounded_N = ratio_N.clamp(min=None if low is None else 1 - low, max=1 + high)
    return -bounded_N * advantages_N * logprobs_N, bounded_N != ratio_N


def reinforce(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Per-token policy-gradient loss -A log pi, unreduced, [N].

    R. J. Williams 1992, Simple statistical gradient-following algorithms for connectionist reinforcement learning.
    """
    return -advantages_N * logprobs_N


def value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """The critic's loss per token, unreduced, and where the clip was active, both [N].

    (V - R)^2 / 2; with `clip` the larger of it and (clip(V, V_old - clip, V_old + clip) - R)^2 / 2, as in OpenAI's
    baselines for PPO (https://arxiv.org/abs/1707.06347) and as studied in https://arxiv.org/abs/2006.05990.
    """
    free_N = (values_N - returns_N).square() / 2
    if clip is None:
        return free_N, torch.zeros_like(free_N, dtype=torch.bool)
    clipped_N = (values_N.clamp(old_values_N - clip, old_values_N + clip) - returns_N).square() / 2
    return torch.maximum(free_N, clipped_N), clipped_N > free_N


def token_weights(
    turn_lengths: Sequence[Sequence[int]], *, aggregation: str, fixed_length: int | None = None
) -> list[list[float]]:
    """The weight of each token of turn k of episode b in the batch's loss; turn_lengths[b][k]: its trained tokens.

    The batch loss is sum_b sum_k w_bk sum_t loss_bkt. token: 1 / all tokens (DAPO); sequence: mean over episodes of the
    mean over each one's tokens (GRPO's formula); fixed_length: sum over tokens / (episodes x fixed length) (Dr. GRPO);
    sum: mean over episodes of the sum over tokens, the log-prob of all that was said (REINFORCE, RLOO, ReMax);
    turn: mean over episodes of the mean over turns of the mean over the turn's tokens (EPO); turn_sum: the same summed
    over episodes (EPO's code). Episodes and turns without trained tokens do not count.
    The denominator is the batch's: a micro-batch or a rank that holds part of it uses the same weights.
    """
    tokens = sum(map(sum, turn_lengths))
    episodes = sum(any(turns) for turns in turn_lengths)

    def denominator(turns: Sequence[int], length: int) -> int:
        spoken = sum(n > 0 for n in turns)
        if aggregation == "fixed_length":
            assert fixed_length is not None
            return episodes * fixed_length
        return {
            "token": tokens,
            "sequence": episodes * sum(turns),
            "sum": episodes,
            "turn": episodes * spoken * length,
            "turn_sum": spoken * length,
        }[aggregation]

    return [[1 / denominator(turns, n) if n else 0.0 for n in turns] for turns in turn_lengths]


def overlong_penalty(length: int, *, limit: int, buffer: int) -> float:
    """What a response of `length` tokens loses in reward: 0 up to limit - buffer, then linearly to -1 at the limit.

    DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, equation 13).
    """
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer))
