"""The settings of the policy-gradient objectives: what each is made of, and which parts do not go together.

An objective is a choice in six places: what a turn is given (credit), how that becomes an advantage (advantage,
baseline, normalise), the surrogate, the correction for off-policy tokens, the KL term, and how tokens are summed up.
`name` sets all of them as the paper has them; every one can be set by itself.
"""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rl.config_base import Strict

AlgoName = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "ppo", "epo"
]
Aggregation = Literal["token", "sequence", "fixed_length", "sum", "turn", "turn_sum"]


class KlConfig(Strict):
    """KL(policy || reference); estimators after http://joschu.net/blog/kl-approx.html.

    place: in the loss, token by token, where the gradient of k1 is zero on average, or taken off the reward. `final`:
    the coefficient moves to it in a straight line over the stage.
    """

    coefficient: NonNegativeFloat = 0.0
    final: NonNegativeFloat | None = None
    estimator: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"

    @property
    def used(self) -> bool:
        return self.coefficient > 0 or bool(self.final)


class ImportanceConfig(Strict):
    """Weights that correct for tokens sampled by another policy than the one that the ratio is taken against.

    truncated: min(w, high); masked: w inside [low, high], 0 outside.
    """

    kind: Literal["truncated", "masked"] = "truncated"
    level: Literal["token", "sequence"] = "token"
    low: NonNegativeFloat = 0.5
    high: PositiveFloat = 2.0


class CriticConfig(Strict):
    """The value model beside the policy: the stage's starting weights with a scalar head of its own."""

    lr: float = Field(default=1e-5, gt=0)
    clip: float | None = Field(default=0.2, gt=0)
    epochs: PositiveInt = 1
    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the beginning in which only the critic learns."""


class FilterConfig(Strict):
    """What is not trained on. `removes`: from the loss, from the group's statistics, or from both.

    accuracy_band keeps groups whose share of successes lies within [low, high].
    """

    name: Literal["void_turn", "truncated", "tool_error", "zero_variance", "accuracy_band"]
    removes: Literal["loss", "statistics", "both"] = "both"
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> "FilterConfig":
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: no group would be kept")
        if self.name in ("zero_variance", "accuracy_band") and self.removes != "both":
            raise ValueError(f"{self.name} takes whole groups, which leave loss and statistics together: removes: both")
        return self


class OverlongConfig(Strict):
    """DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, equation 13) on an episode's last turn.

    Counted is the whole episode: prompt, every turn's tokens and observations. The paper counts the response, as its
    generation is cut there; an episode is cut at model.max_length tokens of it all.

    limit: the length that costs the full -1, default model.max_length; buffer: over how many tokens below the limit
    the cost rises to that, default a fifth of the limit, as in the paper.
    """

    limit: PositiveInt | None = None
    buffer: PositiveInt | None = None


_GROUP = {"group_size": 8, "advantage": "episode", "baseline": "group_mean", "normalise": "group_std"}
_ALONE = {"group_size": 1, "baseline": "none", "normalise": "none"}
_PAPERS: dict[str, dict[str, Any]] = {
    "grpo": {**_GROUP, "clip_high": 0.2, "aggregation": "sequence"},
    "dr_grpo": {**_GROUP, "normalise": "none", "clip_high": 0.2, "aggregation": "fixed_length"},
    "dapo": {
        **_GROUP,
        "clip_high": 0.28,
        "aggregation": "token",
        "filters": [{"name": "zero_variance"}],
        "oversample": 3.0,
        "overlong": {},
    },
    "gspo": {
        **_GROUP,
        "surrogate": "sequence_clip",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence",
    },
    "cispo": {**_GROUP, "surrogate": "cispo", "clip_low": None, "clip_high": 5.0, "aggregation": "token"},
    "rloo": {
        **_GROUP,
        "baseline": "leave_one_out",
        "normalise": "none",
        "surrogate": "reinforce",
        "aggregation": "sum",
        "kl": {"place": "reward", "estimator": "k1"},
    },
    "reinforce_pp": {
        **_ALONE,
        "advantage": "token",
        "normalise": "batch_std",
        "aggregation": "token",
        "kl": {"place": "reward", "estimator": "k1"},
    },
    "reinforce_pp_baseline": {**_GROUP, "normalise": "batch_std", "aggregation": "token", "kl": {"estimator": "k2"}},
    "remax": {
        **_ALONE,
        "baseline": "greedy",
        "surrogate": "reinforce",
        "aggregation": "sum",
        "kl": {"place": "reward", "estimator": "k1"},
    },
    "ppo": {
        **_ALONE,
        "advantage": "gae",
        "normalise": "batch_std",
        "aggregation": "token",
        "critic": {},
        "kl": {"place": "reward", "estimator": "k1"},
    },
    "epo": {
        **_ALONE,
        "credit": "turn",
        "advantage": "turn",
        "normalise": "max_return",
        "gamma": 0.99,
        "surrogate": "reinforce",
        "aggregation": "turn",
    },
}


class AlgoConfig(Strict):
    """A policy-gradient objective. What `name` sets (rl/config_algo.py: _PAPERS) is a default like any other.

    On arXiv: grpo 2402.03300 · dr_grpo 2503.20783 · dapo 2503.14476 · gspo 2507.18071 · cispo 2506.13585 ·
    rloo 2402.14740 · reinforce_pp, reinforce_pp_baseline 2501.03262 · remax 2310.10505 · ppo 1707.06347 ·
    epo 2502.12486. None has a KL term until kl.coefficient says how much.
    """

    name: AlgoName = "grpo"
    group_size: PositiveInt = 8
    credit: Literal["outcome", "turn", "dense"] = "outcome"
    """What a turn is given: all on the last one; what the environment gave each; or dense (rl/algo/returns.py)."""
    max_total_reward: PositiveFloat = 1.0
    """dense divides a lost episode's gains by it."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    advantage: Literal["episode", "turn", "token", "gae", "turn_gae"] = "episode"
    baseline: Literal["group_mean", "leave_one_out", "greedy", "none"] = "group_mean"
    normalise: Literal["group_std", "batch_std", "max_return", "none"] = "group_std"
    surrogate: Literal["clip", "sequence_clip", "cispo", "reinforce"] = "clip"
    clip_low: float | None = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float | None = Field(default=None, gt=1)
    proximal: Literal["behaviour", "recompute"] = "behaviour"
    """What the ratio is taken against: the recorded log-probs, or the learner's own at the start of the step."""
    importance: ImportanceConfig | None = None
    kl: KlConfig = KlConfig()
    entropy_coefficient: float = 0.0
    aggregation: Aggregation = "token"
    fixed_length: PositiveInt | None = None
    """For aggregation fixed_length. Default: model.max_length."""
    mini_batches: PositiveInt = 1
    epochs: PositiveInt = 1
    critic: CriticConfig | None = None
    filters: tuple[FilterConfig, ...] = ()
    oversample: float = Field(default=1.0, ge=1)
    """How many times tasks_per_step may be drawn in a step to refill what the filters took."""
    overlong: OverlongConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_the_paper_has_it(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        papers = _PAPERS.get(str(data.get("name", "grpo")), {})
        merged = {**papers, **data}
        if isinstance(data.get("kl"), dict):
            merged["kl"] = {**papers.get("kl", {}), **data["kl"]}
        return merged

    @model_validator(mode="after")
    def _consistent(self) -> "AlgoConfig":
        for wrong, why in self._contradictions():
            if wrong:
                raise ValueError(why)
        return self

    @property
    def needs_critic(self) -> bool:
        return self.advantage in ("gae", "turn_gae")

    def _contradictions(self) -> list[tuple[bool, str]]:
        of_group = self.baseline in ("group_mean", "leave_one_out") or self.normalise == "group_std"
        clips = self.surrogate in ("clip", "sequence_clip")
        off_policy = self.mini_batches * self.epochs > 1
        kinds = {f.name for f in self.filters}
        return [
            (
                self.group_size == 1 and of_group,
                f"group_size is 1, and a group of one has no baseline ({self.name}: {self.baseline}, "
                f"{self.normalise}): its advantage is always 0. Use group_size of 2 or more, or baseline: none and "
                "normalise: none",
            ),
            (
                self.group_size == 1 and bool(kinds & {"zero_variance", "accuracy_band"}),
                "group_size is 1, and every group of one has no variance: drop the filter, or use a larger group",
            ),
            (
                self.surrogate == "sequence_clip" and self.importance is not None and self.importance.level == "token",
                "gspo's ratio is that of the whole sequence: token-level importance weights would bring back the "
                "variance that it removes. Use importance.level: sequence",
            ),
            (
                self.surrogate == "sequence_clip" and self.aggregation != "sequence",
                f"gspo clips the ratio of a sequence, and aggregation: {self.aggregation} would weigh it by its "
                "tokens. Use aggregation: sequence",
            ),
            (
                self.needs_critic and self.critic is None,
                f"advantage: {self.advantage} needs the values of a critic, and algo.critic is null. Set algo.critic, "
                "or use an advantage without one (episode, turn, token)",
            ),
            (
                self.critic is not None and not self.needs_critic,
                f"algo.critic would train a value model that advantage: {self.advantage} never asks. Use advantage: "
                "gae or turn_gae, or drop the critic",
            ),
            (
                self.needs_critic and self.baseline != "none",
                f"the critic is the baseline of advantage: {self.advantage}. Use baseline: none",
            ),
            (
                self.baseline == "greedy" and self.advantage != "episode",
                "baseline: greedy compares whole episodes with the greedy one. Use advantage: episode",
            ),
            (
                self.baseline == "greedy" and (self.credit == "dense" or self.overlong is not None),
                "baseline: greedy is the whole reward of the greedy episode: credit: dense or overlong would measure "
                "the sampled ones by another scale. Use credit: outcome and overlong: null",
            ),
            (
                len(kinds) < len(self.filters),
                "algo.filters names a filter twice: give each once",
            ),
            (
                self.advantage in ("token", "gae", "turn_gae") and self.normalise in ("group_std", "max_return"),
                f"advantage: {self.advantage} differs from token to token: normalise: batch_std or none",
            ),
            (
                self.advantage == "token" and self.baseline != "none",
                "advantage: token is the reward still to come, without a baseline. Use baseline: none, or advantage: "
                "episode",
            ),
            (
                self.normalise == "max_return" and (self.advantage != "turn" or self.baseline != "none"),
                "normalise: max_return divides turn-level returns by the largest. Use advantage: turn, baseline: none",
            ),
            (
                self.advantage == "episode" and self.gamma < 1,
                "advantage: episode has one number an episode: gamma has no effect. Use advantage: turn, token or gae",
            ),
            (
                self.advantage == "episode" and self.credit == "turn",
                "advantage: episode adds the turns up again, so credit: turn has no effect. Use advantage: turn",
            ),
            (
                self.surrogate == "reinforce" and off_policy and self.importance is None,
                f"mini_batches x epochs = {self.mini_batches * self.epochs} optimizer steps a batch, and the reinforce "
                "surrogate takes every token for on-policy. Use 1 of each, or set algo.importance",
            ),
            (
                clips and self.importance is not None and self.proximal == "behaviour",
                "the clipped ratio is taken against the behaviour log-probs already: an importance weight on top would "
                "count it twice. Use proximal: recompute, or drop algo.importance",
            ),
            (
                self.surrogate == "cispo" and self.importance is not None and self.proximal == "behaviour",
                "cispo's clipped weight corrects for the behaviour policy already. Use proximal: recompute, or drop "
                "algo.importance",
            ),
            (
                self.surrogate == "reinforce" and self.proximal == "recompute",
                "the reinforce surrogate has no ratio to take against recomputed log-probs. Use proximal: behaviour",
            ),
            (
                self.dual_clip is not None and self.surrogate != "clip",
                f"dual_clip bounds the clip surrogate, and surrogate is {self.surrogate}",
            ),
            (
                clips and self.clip_low is None,
                f"surrogate: {self.surrogate} needs clip_low; only cispo has no lower bound",
            ),
            (
                self.importance is not None
                and self.importance.kind == "masked"
                and self.importance.low > self.importance.high,
                "importance.low is above importance.high: every weight would be 0",
            ),
            (
                self.oversample > 1 and not self.filters,
                "oversample refills what filters take, and there are none. Set algo.filters, or oversample: 1",
            ),
        ]
