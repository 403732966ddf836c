"""Learning from pairs and from labels.

A trajectory's gain is Δ(y) = sum over its model tokens, those of all turns and no observation, of
log pi - log pi_ref. With that sum DPO becomes M-DPO and KTO becomes M-KTO (https://arxiv.org/abs/2409.02392), which
are ordinary DPO and KTO but for the mask; the sum is never divided by a length. SPIN
(https://arxiv.org/abs/2401.01335, equation 4.7) is `preference_loss` too: the demonstration is chosen, the answer
that the opponent generated is rejected, and the opponent, the policy that the iteration starts from, is the reference.

_P pairs, _E episodes. Every loss is one number a pair or an episode, unreduced: the caller divides by how many the
whole batch has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rl.algo.sequence import sums_by


def gains(logprobs_N: Tensor, reference_N: Tensor, episode_N: Tensor, episodes: int) -> Tensor:
    """Δ(y) of each episode, [E]; episode_N: the episode that each trained token belongs to, int64."""
    return sums_by(logprobs_N - reference_N, episode_N, episodes)


def preference_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, loss: str, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair of gains, [P]; with h = Δ(chosen) - Δ(rejected):

    sigmoid: -log sigmoid(beta h), DPO (https://arxiv.org/abs/2305.18290, equation 7);
    hinge: max(0, 1 - beta h), SLiC-HF (https://arxiv.org/abs/2305.10425) with its margin at 1 / beta;
    ipo: (h - 1 / (2 beta))^2, IPO (https://arxiv.org/abs/2310.12036, equation 17).

    label_smoothing: the probability that a label is wrong; the loss is its expectation over that, which with sigmoid
    is conservative DPO (https://ericmitchell.ai/cdpo.pdf).
    """
    h_P = chosen_P - rejected_P
    return (1 - label_smoothing) * _pair_loss(h_P, loss, beta) + label_smoothing * _pair_loss(-h_P, loss, beta)


def _pair_loss(h_P: Tensor, loss: str, beta: float) -> Tensor:
    if loss == "sigmoid":
        return -F.logsigmoid(beta * h_P)
    if loss == "hinge":
        return torch.relu(1 - beta * h_P)
    return (h_P - 1 / (2 * beta)).square()


def simpo_loss(chosen_mean_P: Tensor, rejected_mean_P: Tensor, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) of each pair, [P].

    SimPO (https://arxiv.org/abs/2405.14734, equation 6): chosen and rejected are the mean log pi of a trajectory's
    model tokens; there is no reference.
    """
    return -F.logsigmoid(beta * (chosen_mean_P - rejected_mean_P) - gamma)


def kto_loss(
    gain_E: Tensor,
    desirable_E: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Loss of each labelled episode, [E]; desirable_E: bool; kl: the scalar of `kto_kl`, through which nothing flows.

    KTO (https://arxiv.org/abs/2402.01306, section 4): w (1 - sigmoid(beta (Δ - KL))) where desirable,
    w (1 - sigmoid(beta (KL - Δ))) where not.
    """
    score_E = beta * (gain_E - kl.detach())
    # 1 - sigmoid(x) is sigmoid(-x), and that keeps its digits near 0.
    return torch.where(
        desirable_E, desirable_weight * torch.sigmoid(-score_E), undesirable_weight * torch.sigmoid(score_E)
    )


def kto_kl(total: float, count: int) -> float:
    """KTO's reference point: the mean gain of mismatched prompts and answers, at least 0; 0 where there are none.

    total, count: over the whole batch. A part of it with a negative mean has to pull the others' down, so the bound
    applies after everything has been added up.
    """
    return max(0.0, total / count) if count else 0.0
