"""The configuration as a pydantic schema: every setting of a run, its default and its bounds.

Imports no torch. rl/config_file.py reads YAML and dotted overrides into it and explains what is wrong.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rl.config_base import Strict
from rl.config_env import EnvConfig
from rl.config_stage import EvalStage, PreferenceStage, RewardModelStage, RlStage, Stage

Dtype = Literal["float32", "bfloat16"]


class RunConfig(Strict):
    name: str = Field(default="run", pattern=r"^[\w.\-=]+$")
    root: str = "runs"
    seed: int = 0
    overwrite: bool = False
    keep_checkpoints: PositiveInt = 3

    @property
    def dir(self) -> Path:
        return Path(self.root) / self.name


class ScratchModel(Strict):
    """A Qwen3 made by the run itself, with a byte-level BPE tokenizer trained on the environment's demonstrations."""

    layers: PositiveInt = 4
    hidden: PositiveInt = 128
    heads: PositiveInt = 4
    intermediate: PositiveInt = 352
    vocabulary: int = Field(default=512, ge=300)

    @model_validator(mode="after")
    def _head_size(self) -> "ScratchModel":
        if self.hidden % (32 * self.heads):
            raise ValueError(
                f"hidden {self.hidden} over {self.heads} heads: vLLM's attention needs heads of 32, 64, 96 ... each. "
                f"Use hidden = {32 * self.heads}, or fewer heads"
            )
        return self


class ModelConfig(Strict):
    """`path`: a folder, a hub id, or package://MODULE/FILE.gguf (converted once, then cached). Or `scratch`."""

    path: str | None = None
    scratch: ScratchModel | None = None
    dtype: Dtype = "float32"
    max_length: PositiveInt = 512
    trust_remote_code: bool = False
    keep_sampled_turns: bool = False
    """Accept a chat template that rewrites earlier turns: the turns stay in the context as they were sampled."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give either `path` (a pretrained model) or `scratch` (a model made by the run)")
        return self


class RewardRule(Strict):
    """`function`: dotted path of `f(task, episode) -> float | dict of parts`; default: the environment's own rule."""

    function: str | None = None
    success_at: float = 1.0
    model: str | None = None
    """A reward model in place of the rule: a folder, or `trained`, the one of the last reward_model stage before. Its
    score replaces the rule's reward; success is still the rule's."""


class Role(Strict):
    """What one actor of a role may use: `cpus` and `gpus` are Ray's shares, `threads` bounds its thread pools."""

    count: PositiveInt = 1
    cpus: float = Field(default=0.25, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    threads: PositiveInt = 1


class VllmConfig(Strict):
    """What a vLLM engine is made with, whoever holds it."""

    dtype: Dtype | None = None
    tensor_parallel: PositiveInt = 1
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    kv_cache_gib: PositiveInt = 1
    max_sequences: PositiveInt = 128
    enforce_eager: bool | None = None
    """No compilation, no CUDA graphs. Default: on CPU, where compiling takes longer than most runs save by it."""


class EngineConfig(Role, VllmConfig):
    """An actor with a vLLM engine."""

    cpus: float = Field(default=0.5, ge=0)
    threads: PositiveInt = 2


class GeneratorConfig(EngineConfig):
    swap: Literal["drain", "continue"] = "drain"


class RolloutConfig(Role):
    cpus: float = Field(default=0.1, ge=0)
    episodes_in_flight: PositiveInt = 256
    max_turn_tokens: PositiveInt = 64
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)


class ReferenceConfig(Role):
    source: str = "stage_start"
    """stage_start | initial | a model path"""


class LoraConfig(Strict):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) by peft. targets: module names, or every linear layer.

    publish: merged weights (merged in fp32), or the adapter alone, which the generator's vLLM applies.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    publish: Literal["merged", "adapter"] = "merged"


class LearnerConfig(Role):
    cpus: float = Field(default=0.5, ge=0)
    threads: PositiveInt = 2
    dtype: Dtype | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_tokens: PositiveInt = 8192
    grad_clip: float = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    lora: LoraConfig | None = None


class WeightsConfig(Strict):
    bucket_mib: PositiveInt = 256
    full_every: PositiveInt = 1
    """Every so many publishes are whole; those between send only the values that changed, lossless. Worth it in bf16
    where generators are on other nodes than the learner; the learner then keeps a copy of what it sent last."""
    probe_bound: float | None = Field(default=None, gt=0)
    """Largest mean |log-prob difference| of the probe, generator against learner. Default 1e-3 (fp32), 0.1 (bf16)."""


class PlacementConfig(Strict):
    strategy: Literal["packed", "spread"] = "packed"
    time_share: bool = False
    """All roles take turns on the same GPUs: vLLM sleeps while the learner learns, the optimizer is offloaded else."""


class FaultsConfig(Strict):
    """What a run survives. When a budget is spent, it ends with the cause."""

    infra_budget: int = Field(default=16, ge=0)
    """Deaths of our processes, and calls of theirs that got stuck, within `window_s` or without a step between them."""
    data_budget: int = Field(default=100, ge=0)
    """Tasks dropped within `window_s`, because they fail wherever they are played."""
    window_s: PositiveFloat = 3600.0
    attempts: PositiveInt = 3
    """How often a task may fail of itself, or take the rollout worker with it, before it is dropped."""
    deadline_s: PositiveFloat = 1800.0
    """Of one call: a group's episodes, a learner's step, a load."""
    grading_s: PositiveFloat = 300.0
    """Of the scoring of one group. A grader that takes longer is killed; a task whose scoring has ended `attempts` of
    them is dropped."""
    heartbeat_s: PositiveFloat = 60.0
    """A process that does not answer for so long is killed and started again. A grader's or a reference's answer comes
    after the call that it has: deadline_s."""
    start_s: PositiveFloat = 1800.0
    """How long the actors may take to start, and an engine to make a step."""
    patience_s: PositiveFloat = 900.0
    """How long a call that meets dead processes is made again, from the first of them on."""


class WandbConfig(Strict):
    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "repertory"
    sample_episodes: PositiveInt = 4


class LoggingConfig(Strict):
    wandb: WandbConfig = WandbConfig()


class Config(Strict):
    """One run: a model, an environment, and a list of stages."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    env: EnvConfig
    reward: RewardRule = RewardRule()
    stages: list[Stage] = Field(min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    generator: GeneratorConfig = GeneratorConfig()
    rollout: RolloutConfig = RolloutConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward_actor: Role = Role(cpus=0.1)
    feedback_actor: EngineConfig = EngineConfig()
    """Where env.feedback.source is checkpoint."""
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    placement: PlacementConfig = PlacementConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if any(stage.kind == "rl" for stage in self.stages) and (self.rollout.top_p < 1 or self.rollout.top_k > 0):
            raise ValueError(
                "an rl stage refuses rollout.top_p and rollout.top_k: they renormalise the sampled distribution and "
                "bias every importance ratio (about +0.1 in log-prob a token at top_p 0.9). Use rollout.temperature"
            )
        for index, stage in enumerate(self.stages):
            if stage.kind != "eval" and stage.param_filter and self.learner.weight_decay:
                raise ValueError(
                    f"stages[{index}].param_filter freezes parameters, and learner.weight_decay = "
                    f"{self.learner.weight_decay:g} would shrink them all the same: set it to 0"
                )
            if stage.kind != "eval" and stage.start is not None:
                earlier = [i for i, s in enumerate(self.stages[:index]) if s.kind != "eval"]
                if stage.start not in earlier:
                    raise ValueError(
                        f"stages[{index}].start: {stage.start} is not a stage before it that trains. Those are: "
                        f"{', '.join(map(str, earlier)) or 'none'}"
                    )
            if isinstance(stage, RlStage) and stage.max_staleness and self.placement.time_share:
                raise ValueError(
                    f"stages[{index}].max_staleness has the generators play while the learner learns, and "
                    "placement.time_share has them take turns: use one of both"
                )
        if self.placement.time_share and self.learner.zero_stage == 0:
            raise ValueError(
                "placement.time_share moves the learner off the GPU between its turns, which DeepSpeed does from ZeRO "
                "stage 1 on: set learner.zero_stage to 1 or more"
            )
        trains_rewards = [i for i, stage in enumerate(self.stages) if isinstance(stage, RewardModelStage)]
        if self.reward.model == "trained" and not trains_rewards:
            raise ValueError("reward.model is `trained`, and no stage is a reward_model: add one, or give a folder")
        if trains_rewards and self.learner.lora:
            raise ValueError("a reward_model stage trains a full model beside the policy: drop learner.lora")
        return self

    @property
    def generator_dtype(self) -> Dtype:
        return self.generator.dtype or self.model.dtype

    @property
    def learner_dtype(self) -> Dtype:
        return self.learner.dtype or self.model.dtype

    @property
    def probe_bound(self) -> float:
        return self.weights.probe_bound or (1e-3 if self.generator_dtype == self.learner_dtype == "float32" else 0.1)

    @property
    def needs_feedback_model(self) -> bool:
        return self.env.feedback.on and self.env.feedback.source == "checkpoint"

    @property
    def of_feedback(self) -> "Config":
        """What a feedback actor runs under: its model and its engine's settings in the place of the generators'."""
        feedback, engine = self.env.feedback, self.feedback_actor
        model = ModelConfig(
            path=feedback.model,
            dtype=self.model.dtype,
            max_length=feedback.max_length,
            trust_remote_code=self.model.trust_remote_code,
            keep_sampled_turns=True,  # each of its prompts is one turn
        )
        learner = self.learner.model_copy(update={"lora": None})
        alone = self.placement.model_copy(update={"time_share": False})
        return self.model_copy(update={"model": model, "generator": engine, "learner": learner, "placement": alone})

    @property
    def only_evaluates(self) -> bool:
        return all(isinstance(stage, EvalStage) for stage in self.stages)

    @property
    def needs_reference(self) -> bool:
        """Whether any stage asks the reference actors; with LoRA the learner answers, its adapter off."""
        return any(self.stage_needs_reference(stage) for stage in self.stages)

    def stage_needs_reference(self, stage: Stage) -> bool:
        if self.learner.lora is not None and self.reference.source == "stage_start":
            return False
        if isinstance(stage, RlStage):
            return stage.algo.kl.used
        return isinstance(stage, PreferenceStage) and stage.needs_reference and stage.reference == "stage_start"
