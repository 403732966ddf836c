"""What a stage minimises: each objective turns a micro-batch's log-probs (or values) into one loss and its metrics.

An objective asks for a head (what is computed where the logits are) and gets that head's two [N] tensors back. Its loss
carries the batch's denominator in the micro-batch's weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rl.algo.importance import importance_weights, log_ratio, mismatch_kl
from rl.algo.kl import kl_estimate
from rl.algo.loss import cispo, clipped_surrogate, reinforce, sequence_surrogate, value_loss
from rl.algo.preference import gains, kto_loss, preference_loss, simpo_loss
from rl.algo.reward_model import from_divergence_loss, last_token_loss
from rl.algo.sequence import means_by, sums_by
from rl.algo.sft import negative_log_likelihood, one_token_rollout
from rl.batch import MicroBatch
from rl.config_algo import AlgoConfig
from rl.config_stage import AuxiliaryLoss, OneTokenRollout, PreferenceStage, RewardModelStage, SftStage
from rl.env import load_object
from rl.model import LogprobHead

Sums = dict[str, float]
"""Sums by metric name. `tokens`, `pairs`, ... are counts: `name` is divided by tokens, `name@pairs` by pairs; a name
ending in `/max` is a maximum instead."""


class Objective(Protocol):
    @property
    def head(self) -> Any: ...

    @property
    def after(self) -> bool:
        """Whether it asks about the state after each trained token (a reward model), or before it."""
        ...

    def __call__(self, scores_N: Tensor, entropy_N: Tensor, micro: MicroBatch, /) -> tuple[Tensor, Sums]:
        """The weighted loss (scalar) and its sums."""
        ...


def add_sums(a: Mapping[str, float], b: Mapping[str, float]) -> Sums:
    """Combine the sums of two micro-batches or two ranks."""
    names = {**a, **b}
    return {
        n: max(a.get(n, -math.inf), b.get(n, -math.inf)) if n.endswith("/max") else a.get(n, 0.0) + b.get(n, 0.0)
        for n in names
    }


def to_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums -> means over what they count, maxima as they are."""
    metrics = {}
    for name, value in sums.items():
        name, _, counted = name.partition("@")
        if name.endswith("/max"):
            metrics[name.removesuffix("/max")] = value
        elif "/" in name:
            metrics[name] = value / max(1.0, sums.get(counted or "tokens", 0.0))
    return metrics


@dataclass(frozen=True)
class PolicyGradient:
    """The surrogate of an AlgoConfig, its importance weights, the KL penalty and the entropy bonus."""

    algo: AlgoConfig
    head: LogprobHead
    kl_coefficient: float
    after: bool = False

    @staticmethod
    def of(algo: AlgoConfig, temperature: float, kl_coefficient: float | None = None) -> "PolicyGradient":
        head = LogprobHead(temperature, entropy_gradient=algo.entropy_coefficient != 0)
        return PolicyGradient(algo, head, algo.kl.coefficient if kl_coefficient is None else kl_coefficient)

    def __call__(self, logprobs_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        algo, columns, now_N = self.algo, micro.columns, logprobs_N.detach()
        behaviour_N = columns["behaviour"]
        old_N = columns.get("proximal", behaviour_N)
        loss_N, clipped_N = self._surrogate(logprobs_N, old_N, micro)
        count = len(now_N)
        sums: Sums = {
            "actor/pg_loss": loss_N.detach().sum().item(),
            "actor/entropy": entropy_N.detach().sum().item(),
            "actor/clip_fraction": clipped_N.float().sum().item(),
            "mismatch/kl": mismatch_kl(behaviour_N, now_N).item() * count if count else 0.0,
            "mismatch/max_logprob_diff/max": (now_N - behaviour_N).abs().max().item() if count else 0.0,
        }
        if algo.importance is not None:
            i = algo.importance
            # Against recomputed log-probs the ratio itself corrects for what was learned since; without, all is left.
            to_N = old_N if algo.proximal == "recompute" else now_N
            weights_N, cut_N = importance_weights(
                log_ratio(to_N, behaviour_N), micro.episode_N, micro.episodes,
                level=i.level, kind=i.kind, low=i.low, high=i.high,
            )  # fmt: skip
            loss_N = loss_N * weights_N
            sums["importance/weight"] = weights_N.sum().item()
            sums["importance/cut"] = cut_N.float().sum().item()
        if "reference" in columns:
            kl_N = kl_estimate(logprobs_N, columns["reference"], algo.kl.estimator)
            sums["actor/kl"] = kl_N.detach().sum().item()
            if algo.kl.place == "loss":
                loss_N = loss_N + self.kl_coefficient * kl_N
        if algo.entropy_coefficient:
            loss_N = loss_N - algo.entropy_coefficient * entropy_N
        return (loss_N * micro.weights_N).sum(), sums

    def _surrogate(self, logprobs_N: Tensor, old_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        algo, advantages_N = self.algo, micro.columns["advantages"]
        if algo.surrogate == "reinforce":
            return reinforce(logprobs_N, advantages_N), torch.zeros_like(advantages_N, dtype=torch.bool)
        if algo.surrogate == "cispo":
            return cispo(logprobs_N, old_N, advantages_N, low=algo.clip_low, high=algo.clip_high)
        assert algo.clip_low is not None, "the configuration refuses it"
        if algo.surrogate == "sequence_clip":
            return sequence_surrogate(
                logprobs_N, old_N, advantages_N, micro.episode_N, micro.episodes, low=algo.clip_low, high=algo.clip_high
            )
        return clipped_surrogate(
            logprobs_N, old_N, advantages_N, low=algo.clip_low, high=algo.clip_high, dual_clip=algo.dual_clip
        )


@dataclass(frozen=True)
class ValueRegression:
    """The critic's: the clipped value loss, a mean over the batch's values."""

    clip: float | None
    head: None = None
    after: bool = False

    def __call__(self, values_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        returns_N = micro.columns["returns"]
        loss_N, clipped_N = value_loss(values_N, micro.columns["values"], returns_N, clip=self.clip)
        used_N = micro.weights_N > 0
        error_N = (values_N.detach() - returns_N) * used_N
        sums = {
            "critic/loss": (loss_N.detach() * used_N).sum().item(),
            "critic/clip_fraction": (clipped_N & used_N).float().sum().item(),
            "critic/value": (values_N.detach() * used_N).sum().item(),
            "critic/squared_error": error_N.square().sum().item(),
        }
        return (loss_N * micro.weights_N).sum(), {f"{k}@values": v for k, v in sums.items()} | {
            "values": float(used_N.sum())
        }


@dataclass(frozen=True)
class Supervised:
    """Negative log-likelihood of the assistant's tokens."""

    head: LogprobHead = field(default_factory=LogprobHead)
    after: bool = False

    def __call__(self, logprobs_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        loss_N = negative_log_likelihood(logprobs_N)
        sums = {"sft/loss": loss_N.detach().sum().item(), "actor/entropy": entropy_N.detach().sum().item()}
        return (loss_N * micro.weights_N).sum(), sums


@dataclass(frozen=True)
class OneTokenHead:
    """Scores each target token by its one-token rollout; the second [n] is the negative log-likelihood."""

    config: OneTokenRollout
    vocabulary: int
    """Tokens that the tokenizer has: an embedding's padding rows are nobody's rollout."""

    def __call__(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        c, logits_NV = self.config, logits_NV[:, : self.vocabulary]
        loss_N = one_token_rollout(
            logits_NV, targets_N, samples=c.samples, temperature=c.temperature, wrong_reward=c.wrong_reward
        )
        with torch.no_grad():
            nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
        return loss_N, nll_N


@dataclass(frozen=True)
class OneTokenRollouts:
    """OTR (rl/algo/sft.py): the loss comes out of the head; `sft/loss` stays the negative log-likelihood."""

    head: OneTokenHead
    after: bool = False

    def __call__(self, loss_N: Tensor, nll_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        sums = {"sft/otr_loss": loss_N.detach().sum().item(), "sft/loss": nll_N.sum().item()}
        return (loss_N * micro.weights_N).sum(), sums


@dataclass(frozen=True)
class Preference:
    """DPO's family. A unit of the micro-batch is a pair, a sample's label says which side it is.

    kl: KTO's estimate for the whole batch, made before the step.
    """

    stage: PreferenceStage
    head: LogprobHead
    kl: float = 0.0
    after: bool = False

    def __call__(self, logprobs_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        s, owner_N, episodes = self.stage, micro.episode_N, micro.episodes
        chosen, rejected = sides(micro)
        sequence_E, mean_E = sums_by(logprobs_N, owner_N, episodes), means_by(logprobs_N, owner_N, episodes)
        weights_P = episode_weights(micro)[chosen]
        if s.loss == "simpo":
            score_E = mean_E
            loss_P = simpo_loss(mean_E[chosen], mean_E[rejected], beta=s.beta, gamma=s.simpo_gamma)
        else:
            score_E = gains(logprobs_N, micro.columns["reference"], owner_N, episodes)
            loss_P = self._against_reference(score_E, micro.labels_E > 0, chosen, rejected)
        implicit_P = (s.beta * (score_E[chosen] - score_E[rejected])).detach()
        sums = {
            "preference/loss@pairs": loss_P.detach().sum().item(),
            "preference/margin@pairs": implicit_P.sum().item(),
            "preference/accuracy@pairs": (implicit_P > 0).float().sum().item(),
            "preference/logprob_chosen@pairs": sequence_E.detach()[chosen].sum().item(),
            "preference/logprob_rejected@pairs": sequence_E.detach()[rejected].sum().item(),
            "actor/entropy": entropy_N.detach().sum().item(),
            "pairs": float(len(chosen)),
        }
        if s.nll_coefficient:
            # Of the chosen one, a mean over its tokens, so that it does not outweigh the preference by its length.
            loss_P = loss_P - s.nll_coefficient * mean_E[chosen]
        return (loss_P * weights_P).sum(), sums

    def _against_reference(self, gain_E: Tensor, desirable_E: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        s = self.stage
        if s.loss != "kto":
            return preference_loss(
                gain_E[chosen], gain_E[rejected], loss=s.loss, beta=s.beta, label_smoothing=s.label_smoothing
            )
        loss_E = kto_loss(
            gain_E, desirable_E, gain_E.new_tensor(self.kl), beta=s.beta,
            desirable_weight=s.desirable_weight, undesirable_weight=s.undesirable_weight,
        )  # fmt: skip
        return (loss_E[chosen] + loss_E[rejected]) / 2  # a mean over labelled rows, two a pair


@dataclass(frozen=True)
class RewardModelling:
    """Pairs of values: the chosen trajectory's above the rejected one's."""

    stage: RewardModelStage
    head: None = None
    after: bool = True

    def __call__(self, values_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        weights_E = episode_weights(micro)
        chosen, rejected = sides(micro)
        lengths = torch.bincount(micro.episode_N, minlength=micro.episodes)
        ends = lengths.cumsum(0)
        last_E = values_N[ends - 1]
        if self.stage.loss == "last_token":
            loss_P = last_token_loss(last_E[chosen], last_E[rejected])
        else:
            of_episode = values_N.split(lengths.tolist())
            targets = micro.targets_N.split(lengths.tolist())
            losses = [
                from_divergence_loss(of_episode[c], of_episode[r], first_difference(targets[c], targets[r]))
                for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
            ]
            loss_P = torch.stack(losses) if losses else last_E[chosen]  # a filler has no pair
        weights_P = weights_E[chosen]
        margin_P = (last_E[chosen] - last_E[rejected]).detach()
        sums = {
            "reward_model/loss@pairs": loss_P.detach().sum().item(),
            "reward_model/margin@pairs": margin_P.sum().item(),
            "reward_model/accuracy@pairs": (margin_P > 0).float().sum().item(),
            "pairs": float(len(chosen)),
        }
        return (loss_P * weights_P).sum(), sums


@dataclass(frozen=True)
class WithAuxiliary:
    """An objective plus a loss of one's own: f(logprobs_N, entropy_N, micro) -> [N], weighted like the objective's."""

    inner: Any
    auxiliary: AuxiliaryLoss

    @property
    def head(self) -> Any:
        """The objective's, and an entropy that a loss can be made of."""
        head = self.inner.head
        return replace(head, entropy_gradient=True) if isinstance(head, LogprobHead) else head

    @property
    def after(self) -> bool:
        return self.inner.after

    def __call__(self, scores_N: Tensor, entropy_N: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums]:
        loss, sums = self.inner(scores_N, entropy_N, micro)
        function: Callable[..., Tensor] = load_object(self.auxiliary.function)
        extra_N = function(scores_N, entropy_N, micro)
        sums["aux/loss"] = extra_N.detach().sum().item()
        return loss + self.auxiliary.coefficient * (extra_N * micro.weights_N).sum(), sums


def example_objective(stage: Any, vocabulary: int, kl: float = 0.0) -> Any:
    """The objective of a stage on examples: sft, preference or reward_model."""
    if isinstance(stage, SftStage):
        otr = stage.one_token_rollout
        inner: Any = OneTokenRollouts(OneTokenHead(otr, vocabulary)) if otr else Supervised()
    elif isinstance(stage, PreferenceStage):
        inner = Preference(stage, LogprobHead(), kl)
    else:
        assert isinstance(stage, RewardModelStage)
        inner = RewardModelling(stage)
    return WithAuxiliary(inner, stage.aux_loss) if stage.aux_loss else inner


def episode_weights(micro: MicroBatch) -> Tensor:
    """Each episode's weight, [E]: that of its trained tokens, which all carry the same."""
    return means_by(micro.weights_N, micro.episode_N, micro.episodes)


def sides(micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Indices of the chosen and of the rejected episodes, pair by pair, both [P]."""
    order = torch.argsort(micro.units_E, stable=True)
    labels = micro.labels_E[order]
    return order[labels > 0], order[labels < 0]


def first_difference(a: Tensor, b: Tensor) -> int:
    """How many trained tokens two trajectories have in common at their beginning; of equal ones all but one."""
    width = min(len(a), len(b))
    differ = (a[:width] != b[:width]).nonzero()
    return int(differ[0]) if len(differ) else min(width, max(len(a), len(b)) - 1)
