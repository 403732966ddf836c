"""The learner: a group of DeepSpeed ranks, one actor each, that trains on trajectory refs and publishes weights."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch import Tensor

from actors.role import Role
from rl.batch import MicroBatch, Sample, balance
from rl.config import Config, GrpoConfig
from rl.env import World
from rl.gradient import Objective, Sums, grpo_objective, optimizer_step, sft_objective, weigh
from rl.model import TokenScorer, load_causal_lm, sequence_logprobs
from rl.pretrained import load_tokenizer, prepare_model
from rl.trajectory import Trajectory
from rl.weights import Manifest, checksum, pack, plan_buckets

StepId = tuple[int, int, int]
"""(stage, step, optimizer step within it): asking for the same one again returns the first answer."""


@dataclass(frozen=True)
class RlBatch:
    """One optimizer step's trajectories, by reference: `groups[g]` is a ref of a list, `chosen` picks (g, sample).

    lengths[g][s] = (tokens, trained tokens), so that ranks can share the work out before they fetch anything.
    references[g] is a list of float32 [T] or the batch has none.
    """

    groups: Sequence[Any]
    lengths: Sequence[Sequence[tuple[int, int]]]
    advantages: Sequence[Sequence[float]]
    chosen: Sequence[tuple[int, int]]
    references: Any | None
    algo: GrpoConfig
    temperature: float


@dataclass(frozen=True)
class StepResult:
    sums: Sums
    token_budget: int
    seconds: float


class DeepSpeedTrainer:
    """rl.gradient's Trainer over a DeepSpeed engine. Gradients are summed over ranks: weights carry the denominator."""

    def __init__(self, engine: Any, device: str, world: int, zero_stage: int, clip_here: float | None):
        self.engine, self.device, self._world = engine, device, world
        self._norm: float | None = None
        if clip_here is not None:
            # Without a ZeRO or bf16 optimizer DeepSpeed clips, but tells nobody the norm: clip between its gradient
            # reduction and the optimizer's step.
            parameters = list(engine.module.parameters())

            def clip(*_: Any) -> None:
                self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip_here))

            engine.optimizer.register_step_pre_hook(clip)
        # From stage 2 on every backward pass runs collectives: one rank cannot start again on its own.
        self.can_retry = world == 1 or zero_stage < 2

    def forward(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        return self.engine(micro.packed, micro.before_N, micro.targets_N, temperature)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self._world)  # DeepSpeed averages over ranks

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self._norm if self._norm is not None else self.engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed reports the gradient's norm after a step"
        return float(norm)

    def zero_grad(self) -> None:
        self.engine.zero_grad()
        if hasattr(self.engine.optimizer, "zero_grad"):
            self.engine.optimizer.zero_grad()

    def any_rank(self, flag: bool) -> bool:
        return self.largest(int(flag)) > 0

    def largest(self, number: int) -> int:
        if self._world == 1:
            return number
        value = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return int(value.item())


class LearnerRank(Role):
    role = "learner"

    def __init__(self, config: Config, device: str, rank: int):
        super().__init__()
        self._config, self._device, self._rank = config, device, rank
        if device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # seconds: while others prepare the model

        if device == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce for half a minute or more, once a machine. gloo does.
            deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
        self._deepspeed = deepspeed
        self._budget = config.learner.micro_batch_tokens
        self._held: list[Trajectory] = []
        self._last: tuple[StepId, StepResult] | None = None
        self._packed: dict[int, np.ndarray] = {}

    # -- the group -----------------------------------------------------------------------------------------------

    def prepare_model(self, folder: str) -> str:
        """The initial model's folder: `folder`, when the model is made from scratch."""
        world = World(self._config.env, self._config.run.seed)
        return str(prepare_model(self._config.model, world, self._config.run.seed, Path(folder)))

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens for the others."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def open(self, model_path: str, probe: Sequence[int], host: str, port: int) -> None:
        """Join the group, load the model and make the DeepSpeed engine. Returns when every rank has.

        probe: token ids that are scored with every publish.
        """
        c, deepspeed = self._config.learner, self._deepspeed
        self._probe = list(probe)
        os.environ.update(
            RANK=str(self._rank),
            LOCAL_RANK="0" if self._device == "cuda" else str(self._rank),
            WORLD_SIZE=str(c.count),
            LOCAL_SIZE=str(c.count),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
        )
        deepspeed.init_distributed("nccl" if self._device == "cuda" else "gloo", verbose=False)
        torch.manual_seed(self._config.run.seed)
        lm = load_causal_lm(
            model_path, self._config.learner_dtype, trust_remote_code=self._config.model.trust_remote_code
        )
        if c.gradient_checkpointing:
            lm.gradient_checkpointing_enable()
        self._tokenizer = load_tokenizer(model_path, trust_remote_code=self._config.model.trust_remote_code)
        scorer = TokenScorer(lm).to(self._device)
        if c.offload_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            adam: Any = DeepSpeedCPUAdam
            optimizer: Any = adam(scorer.parameters(), lr=0.0, betas=c.betas, weight_decay=c.weight_decay)
        else:
            # fused: one pass over the weights instead of ten.
            optimizer = torch.optim.AdamW(
                scorer.parameters(), lr=0.0, betas=c.betas, weight_decay=c.weight_decay, fused=True
            )
        engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=deepspeed_config(self._config))
        self._scorer = scorer
        clip_here = c.grad_clip if clips_itself(self._config) else None
        self._trainer = DeepSpeedTrainer(engine, self._device, c.count, c.zero_stage, clip_here)

    def begin_stage(self, fresh: bool, eps: float) -> None:
        """A new stage starts with a fresh optimizer: moments of another objective would steer its first steps."""
        optimizer = self._trainer.engine.optimizer
        for group in optimizer.param_groups:
            group["eps"] = eps
        if fresh:
            getattr(optimizer, "optimizer", optimizer).state.clear()
        self._held = []

    # -- training ------------------------------------------------------------------------------------------------

    def hold(self, refs: Sequence[Any]) -> int:
        """Keep demonstrations for the stage. Returns how many there are."""
        self._held = [t for part in ray.get(list(refs)) for t in part if t.loss_mask[1:].any()]
        return len(self._held)

    def sft_step(self, step_id: StepId, indices: Sequence[int], lr: float) -> StepResult:
        lengths = [len(self._held[i]) for i in indices]
        weights = weigh([int(self._held[i].loss_mask[1:].sum()) for i in indices], None)
        mine = balance(lengths, self._config.learner.count)[self._rank]
        samples = [Sample(self._held[indices[k]], weights[k]) for k in mine]
        return self._step(step_id, samples, sft_objective, lr, 1.0)

    def rl_step(self, step_id: StepId, batch: RlBatch, lr: float) -> StepResult:
        weights = weigh([batch.lengths[g][s][1] for g, s in batch.chosen], batch.algo)
        tokens = [batch.lengths[g][s][0] for g, s in batch.chosen]
        mine = balance(tokens, self._config.learner.count)[self._rank]
        needed = sorted({batch.chosen[k][0] for k in mine})
        fetched = dict(zip(needed, ray.get([batch.groups[g] for g in needed]), strict=True))
        references = ray.get(batch.references) if batch.references is not None else None
        samples = []
        for k in mine:
            g, s = batch.chosen[k]
            reference = references[g][s] if references else None
            samples.append(Sample(fetched[g][s], weights[k], batch.advantages[g][s], reference))
        return self._step(step_id, samples, grpo_objective(batch.algo), lr, batch.temperature)

    def _step(
        self, step_id: StepId, samples: Sequence[Sample], objective: Objective, lr: float, temperature: float
    ) -> StepResult:
        self._calls["step"] += 1
        if self._last is not None and self._last[0] == step_id:
            return self._last[1]
        started = time.perf_counter()
        sums, self._budget = optimizer_step(
            self._trainer, samples, objective, lr=lr, temperature=temperature, token_budget=self._budget
        )
        result = StepResult(sums, self._budget, time.perf_counter() - started)
        self._last = (step_id, result)
        return result

    # -- publishing ----------------------------------------------------------------------------------------------

    def prepare(self, version: int, step: int) -> tuple[Manifest, float]:
        """Pack this rank's buckets on the host and score the probe. Every rank, in the same order.

        Returns the manifest (checksums not yet filled in) and the probe's seconds. Training may go on afterwards.
        """
        self._calls["publish"] += 1
        lm, dtype, count = self._scorer.lm, self._config.generator_dtype, self._config.learner.count
        parameters = dict(lm.named_parameters())
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
        buckets = plan_buckets(shapes, dtype, self._config.weights.bucket_mib << 20)
        self._packed = {}
        for i, bucket in enumerate(buckets):
            with self._gathered([parameters[e.name] for e in bucket.entries]):
                if i % count == self._rank:
                    self._packed[i] = pack(bucket, parameters, dtype)
        started = time.perf_counter()
        self._scorer.eval()
        probe = sequence_logprobs(self._trainer.engine, self._probe, self._device).numpy()
        self._scorer.train()
        manifest = Manifest(version, step, dtype, tuple(buckets), tuple(self._probe), probe)
        return manifest, time.perf_counter() - started

    def bucket(self, version: int, index: int) -> tuple[np.ndarray, str, str]:
        """A packed bucket's bytes, their checksum, and this node's id. The caller becomes the owner."""
        data = self._packed.pop(index)
        return data, checksum(data), ray.get_runtime_context().get_node_id()

    def _gathered(self, parameters: Sequence[Any]) -> Any:
        return self._deepspeed.zero.GatheredParameters(parameters, enabled=self._config.learner.zero_stage == 3)

    # -- checkpoints and time-sharing ----------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Hugging Face weights and tokenizer by rank 0, and every rank's optimizer state, into `folder`."""
        lm = self._scorer.lm
        with self._gathered(list(lm.parameters())):
            if self._rank == 0:
                lm.save_pretrained(folder)
                self._tokenizer.save_pretrained(folder)
        self._trainer.engine.save_checkpoint(str(Path(folder) / "learner"), tag="state")

    def restore(self, folder: str) -> None:
        self._trainer.engine.load_checkpoint(str(Path(folder) / "learner"), tag="state")
        self._last = None

    def move(self, to: Literal["host", "device"]) -> None:
        """Time-sharing: optimizer and parameters leave the GPU while others use it."""
        if to == "host":
            self._trainer.engine.offload_states()
            torch.cuda.empty_cache()
        else:
            self._trainer.engine.reload_states()


def clips_itself(config: Config) -> bool:
    """Whether the gradient is clipped by us: plain fp32 without ZeRO, where DeepSpeed hides the norm."""
    return config.learner.zero_stage == 0 and config.learner_dtype == "float32"


def deepspeed_config(config: Config) -> dict[str, Any]:
    c = config.learner
    zero: dict[str, Any] = {"stage": c.zero_stage}
    if c.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # We own the accumulation boundary: any number of backward passes, then one step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_itself(config) else c.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.learner_dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
