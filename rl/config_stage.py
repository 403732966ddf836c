"""The stages of a run: what each trains on, for how long, and by which objective."""

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl.config_algo import AlgoConfig
from rl.config_base import Strict

Share = Annotated[float, Field(ge=0, le=1)]


class Demonstrations(Strict):
    """Where demonstrations come from: the environment's own demonstrator, or rows of `messages` at `path`."""

    path: str | None = None
    count: PositiveInt = 8192
    guess_fraction: float = Field(default=0.0, ge=0, le=1)


class ParameterFilter(Strict):
    """Which parameters a stage trains.

    half: half fine-tuning (HFT), a random half of each category's matrices, another half every stage and round;
    pattern: a regular expression on names; function: dotted path of f(name, round) -> bool.
    """

    kind: Literal["half", "pattern", "function"]
    value: str = ""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "ParameterFilter":
        if (self.kind == "half") == bool(self.value):
            raise ValueError("kind half takes no value; pattern and function need one")
        if self.kind == "pattern":
            try:
                re.compile(self.value)
            except re.error as error:
                raise ValueError(f"{self.value!r} is not a regular expression: {error}") from None
        return self


class AuxiliaryLoss(Strict):
    """`function`: dotted path of f(logprobs_N, entropy_N, micro_batch) -> loss [N], added with this coefficient."""

    function: str
    coefficient: float = 1.0


class TrainingStage(Strict):
    """What every stage that changes weights has."""

    steps: PositiveInt
    start: NonNegativeInt | None = None
    """The index of an earlier stage: the weights that it ended with are where this one starts. Default: the weights as
    they are. Stages with one start are alternatives, compared in one run."""
    lr: float = Field(default=1e-4, gt=0)
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    adam_eps: float = Field(default=1e-8, gt=0)
    """Far above a gradient's size, Adam moves along the gradient: weights that hold only noise then stay put."""
    param_filter: ParameterFilter | None = None
    aux_loss: AuxiliaryLoss | None = None

    @property
    def objective(self) -> str:
        """The name of the loss where a kind of stage has several."""
        return ""

    @property
    def total_steps(self) -> int:
        """Those of all rounds."""
        return self.steps


class SampleConfig(Strict):
    """Episodes that a stage samples for itself before each of its rounds, through the run's generators.

    policy: the weights as they are, or those that the stage started with.
    """

    tasks: PositiveInt = 128
    samples: PositiveInt = 4
    temperature: float = Field(default=1.0, ge=0)
    policy: Literal["current", "stage_start"] = "current"


class ExampleStage(TrainingStage):
    """A stage that draws batches from a set of examples; every round makes a new set and takes `steps` steps on it.

    mix_previous: the share of each batch that comes from the round before.
    """

    batch_size: PositiveInt = 64
    rounds: PositiveInt = 1
    mix_previous: float = Field(default=0.0, ge=0, lt=1)
    sample: SampleConfig | None = None
    data_stage: str | None = None
    """How sampled episodes become examples: a built-in name, or a dotted path (rl/data_stage.py)."""

    @property
    def total_steps(self) -> int:
        return self.steps * self.rounds

    @model_validator(mode="after")
    def _rounds_differ(self) -> "ExampleStage":
        if self.rounds > 1 and self.sample is None:
            raise ValueError("rounds without `sample` would train on the same examples again: use more steps")
        if self.mix_previous and self.rounds == 1:
            raise ValueError("mix_previous mixes in the round before, and rounds is 1")
        return self


class MaskedThought(Strict):
    """Masked thought (MFT): a share of the assistant's tokens is replaced where the model reads them, not as labels.

    The rate rises from 0 to `rate` over the first `warmup` share of the stage. replacement: a uniformly random token,
    as in the paper's GSM8K recipe, or the tokenizer's mask (else pad) token.
    """

    rate: float = Field(default=0.4, gt=0, lt=1)
    warmup: Share = 2 / 3
    replacement: Literal["random", "mask"] = "random"


class OneTokenRollout(Strict):
    """One-token rollout (OTR): at each target the policy samples `samples` tokens and is rewarded for the right one."""

    samples: PositiveInt = 256
    temperature: PositiveFloat = 1.3
    wrong_reward: float = -0.1


class SftStage(ExampleStage):
    kind: Literal["sft"]
    lr: float = Field(default=1e-3, gt=0)
    warmup_steps: NonNegativeInt = 20
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    demonstrations: Demonstrations = Demonstrations()
    masked_thought: MaskedThought | None = None
    one_token_rollout: OneTokenRollout | None = None

    @model_validator(mode="after")
    def _data_stage(self) -> "SftStage":
        if (self.sample is None) != (self.data_stage is None):
            raise ValueError(
                "`sample` and `data_stage` go together: one says what is sampled, the other what becomes of it (s3ft, "
                "successes, feedback, or a dotted path)"
            )
        return self


class PairsConfig(Strict):
    """Pairs from the sampled episodes of a task: a right against a wrong one, the best against the worst by more than
    `margin`, or its demonstration against a sample (SPIN). path: rows of `chosen` and `rejected` messages instead."""

    rule: Literal["right_wrong", "margin", "demonstration"] = "right_wrong"
    margin: NonNegativeFloat = 0.1
    per_task: PositiveInt = 1
    path: str | None = None


class PairStage(ExampleStage):
    """A stage on pairs. `steps` and `batch_size` count pairs."""

    batch_size: PositiveInt = 16
    pairs: PairsConfig = PairsConfig()
    demonstrations: Demonstrations = Demonstrations()

    @model_validator(mode="after")
    def _source(self) -> "PairStage":
        if (self.sample is None) == (self.pairs.path is None):
            raise ValueError(
                "pairs come from sampled episodes (`sample`) or from a file (`pairs.path`): give one of both"
            )
        if self.sample is not None and self.sample.samples == 1 and self.pairs.rule != "demonstration":
            raise ValueError(f"pairs.rule: {self.pairs.rule} compares samples of one task, and sample.samples is 1")
        return self


class PreferenceStage(PairStage):
    """DPO and its family on whole trajectories, over the model's tokens of every turn.

    sigmoid: M-DPO (https://arxiv.org/abs/2409.02392); hinge; ipo; simpo: length-averaged, no reference; kto: M-KTO.
    reference: the weights that the stage, or the round, started with.
    """

    kind: Literal["preference"]
    lr: float = Field(default=1e-5, gt=0)
    loss: Literal["sigmoid", "hinge", "ipo", "simpo", "kto"] = "sigmoid"
    beta: PositiveFloat = 0.1
    simpo_gamma: NonNegativeFloat = 0.5
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    nll_coefficient: NonNegativeFloat = 0.0
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0
    reference: Literal["stage_start", "last_iterate"] = "stage_start"

    @property
    def objective(self) -> str:
        return self.loss

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"

    @model_validator(mode="after")
    def _consistent(self) -> "PreferenceStage":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is defined for loss: sigmoid, and loss is {self.loss}")
        return self


class RewardModelStage(PairStage):
    """Trains a reward model on pairs; reward.model: trained scores later stages with it.

    last_token: Bradley-Terry on the value at the last token; from_divergence: at every token from the first to differ.
    """

    kind: Literal["reward_model"]
    lr: float = Field(default=1e-5, gt=0)
    loss: Literal["last_token", "from_divergence"] = "last_token"

    @property
    def objective(self) -> str:
        return self.loss


class EvalStage(Strict):
    kind: Literal["eval"]
    n: PositiveInt = 200
    samples: PositiveInt = 1
    """Sampled episodes a task: pass@k for k up to as many. The greedy one is one."""
    temperature: float = Field(default=1.0, gt=0)
    greedy: bool = True
    top_p: float = Field(default=1.0, gt=0, le=1)
    split: Literal["held_out", "train"] = "held_out"
    condition: str | None = None
    """A text added to each prompt, such as the feedback that a stage with data_stage: feedback conditions on."""


class HorizonConfig(Strict):
    """ScalingInter-RL: the most turns of an episode is turns[min(step // every, last)]."""

    every: PositiveInt
    turns: tuple[PositiveInt, ...] = Field(min_length=1)


class CurriculumConfig(Strict):
    """A pool of tasks, played `samples` times each by the policy that the stage starts with, and ordered by success p.

    potential: by 4 p (1 - p), highest first (R1-Code-Interpreter); easy_to_hard: by p, highest first. The stage opens
    the order in `parts` equal parts, one after the other, and draws from what is open.
    """

    order: Literal["potential", "easy_to_hard"] = "potential"
    pool: PositiveInt = 256
    samples: PositiveInt = 4
    parts: PositiveInt = 4


class EvaluateConfig(Strict):
    """Held-out episodes of the policy as it is after every `every` steps, sampled as in training, beside the next step.

    Each is of one checkpoint, which is written then; the one with the highest success is kept as checkpoints/best.
    """

    every: PositiveInt
    n: PositiveInt = 100


class RlStage(TrainingStage):
    kind: Literal["rl"]
    tasks_per_step: PositiveInt = 32
    max_staleness: NonNegativeInt = 0
    """How many versions behind the learner's the oldest token of an episode may be. 0: synchronous; 1: one step off; k:
    the generators go on while the learner learns. What is staler is played again."""
    checkpoint_every: NonNegativeInt = 20
    """Steps. 0: none before the stage ends; the batches of the whole stage are kept for a learner that may die."""
    evaluate: EvaluateConfig | None = None
    algo: AlgoConfig = AlgoConfig()
    horizon: HorizonConfig | None = None
    curriculum: CurriculumConfig | None = None

    @property
    def objective(self) -> str:
        return self.algo.name

    @model_validator(mode="after")
    def _divides(self) -> "RlStage":
        episodes = self.tasks_per_step * self.algo.group_size
        if episodes % self.algo.mini_batches:
            raise ValueError(
                f"a batch of {self.tasks_per_step} tasks x {self.algo.group_size} samples = {episodes} episodes does "
                f"not divide into algo.mini_batches = {self.algo.mini_batches}"
            )
        if self.max_staleness and self.algo.surrogate == "reinforce" and self.algo.importance is None:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, and the reinforce surrogate takes every token for on-policy. "
                "Use 0, a surrogate with a ratio (clip, cispo), or set algo.importance"
            )
        return self


Stage = Annotated[SftStage | PreferenceStage | RewardModelStage | EvalStage | RlStage, Field(discriminator="kind")]
