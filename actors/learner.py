"""The learner: a group of DeepSpeed ranks, one actor each, that trains on trajectory refs and publishes weights."""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch

from actors.deepspeed_trainer import DeepSpeedTrainer
from actors.learner_batch import Drawn, Held, RlBatch, StepResult, example_samples, with_masked_thoughts
from actors.role import NotOpen, WatchedRole
from rl import adapter
from rl.algo.preference import kto_kl
from rl.algo.sft import masked_thought_rate
from rl.batch import Sample
from rl.config import Config
from rl.config_stage import ExampleStage, PreferenceStage, RewardModelStage, RlStage, SftStage, TrainingStage
from rl.credit import Columns
from rl.env import World
from rl.gradient import optimizer_step
from rl.model import LogprobHead, TokenScorer, ValueScorer, frozen_scores, load_causal_lm, sequence_logprobs
from rl.objective import Objective, PolicyGradient, Sums, ValueRegression, WithAuxiliary, add_sums, example_objective
from rl.param_filter import trainable
from rl.pretrained import load_tokenizer, prepare_model
from rl.task import derive_seed
from rl.trajectory import Trajectory
from rl.weights import Manifest, checksum, difference, pack, plan_buckets

StepId = tuple[int, int, int]
"""(stage, step, optimizer step within it): asking for the same one again returns the first answer."""

What = Literal["all", "base", "adapter"]
"""What is published: the weights, an adapter merged in; without it; or it alone, for who has the base."""


class LearnerRank(WatchedRole):
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
        self._held: list[Held] = []
        self._before: list[Held] = []
        self._last: tuple[StepId, StepResult] | None = None
        self._packed: dict[int, np.ndarray] = {}
        self._sent: dict[int, np.ndarray] = {}
        """The whole buckets of `_sent_version`, where publishes may be of changes."""
        self._sent_version: int | None = None
        self._open: tuple[TokenScorer, DeepSpeedTrainer] | None = None
        self._values: DeepSpeedTrainer | None = None
        self._base_version: int | None = None

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
        lm = self._load(model_path)
        if c.lora:
            adapter.attach(lm, c.lora, seed=self._config.run.seed)
        self._tokenizer = load_tokenizer(model_path, trust_remote_code=self._config.model.trust_remote_code)
        special = set(self._tokenizer.all_special_ids)
        self._words = np.asarray([i for i in range(len(self._tokenizer)) if i not in special])
        mask_token = getattr(self._tokenizer, "mask_token_id", None)
        self._mask_token = self._tokenizer.pad_token_id if mask_token is None else mask_token
        scorer = TokenScorer(lm).to(self._device)
        self._open = scorer, DeepSpeedTrainer(scorer, self._config, self._device)

    @property
    def _scorer(self) -> TokenScorer:
        return self._opened[0]

    @property
    def _policy(self) -> DeepSpeedTrainer:
        return self._opened[1]

    @property
    def _opened(self) -> tuple[TokenScorer, DeepSpeedTrainer]:
        if self._open is None:
            raise NotOpen(f"learner rank {self._rank} was started again, and is not in the group yet")
        return self._open

    def _load(self, path: str) -> Any:
        lm = load_causal_lm(path, self._config.learner_dtype, trust_remote_code=self._config.model.trust_remote_code)
        if self._config.learner.gradient_checkpointing:
            lm.gradient_checkpointing_enable()
        return lm

    def begin_stage(self, index: int, stage: TrainingStage, start: str, resume: str | None) -> None:
        """A fresh optimizer, and the value model that the stage trains.

        start: the folder of the weights that the stage starts with; resume: a checkpoint inside the stage.
        """
        self._stage_index, self._stage = index, stage
        if self._config.learner.lora and resume is None:
            # What was learned becomes the base: with the adapter off, the model is the stage's start.
            seed = derive_seed("adapter", self._config.run.seed, index)
            adapter.fold(self._scorer.lm, seed, partial(self._gathered, writer=0))
            self._policy.take_weights()
        self._policy.begin(stage.adam_eps, fresh=resume is None)
        self._held, self._before, self._values = [], [], None
        if isinstance(stage, RewardModelStage) or (isinstance(stage, RlStage) and stage.algo.critic):
            scorer = ValueScorer(self._load(start)).to(self._device)
            self._values = DeepSpeedTrainer(scorer, self._config, self._device)
            self._values.begin(stage.adam_eps, fresh=True)
            if resume:
                self._values.engine.load_checkpoint(str(Path(resume) / "learner" / "values"), tag="state")
        self._filter_parameters(0)

    @property
    def _trainer(self) -> DeepSpeedTrainer:
        """What the stage's examples train: the reward model in its stage, else the policy."""
        if isinstance(self._stage, RewardModelStage):
            assert self._values is not None
            return self._values
        return self._policy

    def begin_round(self, number: int) -> None:
        """Every round is a training of its own: fresh moments, and other parameters where the filter says so."""
        self._trainer.begin(self._stage.adam_eps, fresh=True)
        self._filter_parameters(number)

    def _filter_parameters(self, number: int) -> None:
        seed = derive_seed("param_filter", self._config.run.seed, self._stage_index)
        named = self._trainer.engine.module.named_parameters()
        shapes = {n.removeprefix("lm."): tuple(getattr(p, "ds_shape", p.shape)) for n, p in named if p.requires_grad}
        self._trainer.train_only(trainable(shapes, self._stage.param_filter, seed=seed, round=number))

    # -- training on examples ------------------------------------------------------------------------------------

    def hold(self, refs: Sequence[Any], keep: bool) -> int:
        """Take the round's examples; `keep`: those of before stay, as the round before. Returns how many there are."""
        self._before = self._held if keep else []
        examples = [e for part in ray.get(list(refs)) for e in part]
        self._held = [Held(e) for e in examples if all(t.loss_mask[1:].any() for t in e.trajectories)]
        return len(self._held)

    def score_held(self, base: bool) -> tuple[list[list[np.ndarray]], int]:
        """This rank's strided share of the held examples' log-probs: a reference. And how many. Two return values.

        base: with the adapter off, else under the weights as they are.
        """
        mine = self._held[self._rank :: self._config.learner.count] or self._held[:1]
        flat = [t for h in mine for t in h.example.trajectories]
        with self._base_alone() if base else nullcontext():
            scored = iter(self._scored(self._policy, flat, LogprobHead()))
        return [[next(scored) for _ in h.example.trajectories] for h in mine], len(mine)

    def hold_references(self, parts: Sequence[Any]) -> None:
        """parts: refs, the i-th of the references of every len(parts)-th held example from i on."""
        shares = ray.get(list(parts))
        self._held = [Held(h.example, shares[i % len(shares)][i // len(shares)]) for i, h in enumerate(self._held)]

    def example_step(self, step_id: StepId, drawn: Drawn, step: int, lr: float) -> StepResult:
        """step: within the round."""
        held = [self._held[i] for i in drawn.now] + [self._before[i] for i in drawn.before]
        stage, count = self._stage, self._config.learner.count
        assert isinstance(stage, ExampleStage)

        def run() -> Sums:
            told: Sums = {}
            samples = example_samples(held, self._rank, count)
            if isinstance(stage, SftStage) and stage.masked_thought:
                m = stage.masked_thought
                told["sft/masked_share/max"] = masked_thought_rate(step, stage.steps, rate=m.rate, warmup=m.warmup)
                samples = with_masked_thoughts(
                    samples, stage, step, self._config.run.seed, self._words, self._mask_token
                )
            kl = 0.0
            if isinstance(stage, PreferenceStage) and stage.loss == "kto":
                kl = told["preference/kto_kl/max"] = self._kto_kl(held)
            objective = example_objective(stage, len(self._tokenizer), kl)
            return {**self._optimize(self._trainer, samples, objective, lr), **told}

        return self._once(step_id, run)

    def _kto_kl(self, held: Sequence[Held]) -> float:
        """KTO's reference point, over the batch's mismatched trajectories on all ranks."""
        mine = held[self._rank :: self._config.learner.count]
        strange = [
            (t, h.references[i])
            for h in mine
            for i, (t, label) in enumerate(zip(h.example.trajectories, h.example.labels, strict=True))
            if not label and h.references is not None
        ]
        spare = held[0].example.trajectories[:1]
        scored = self._scored(self._policy, [t for t, _ in strange] or spare, LogprobHead())
        gains = [float((now - then).sum()) for now, (_, then) in zip(scored, strange, strict=False)]
        total, number = self._policy.totals([sum(gains), len(gains)])
        return kto_kl(total, int(number))

    # -- training on groups --------------------------------------------------------------------------------------

    def score(
        self, groups: Sequence[Any], temperature: float, wanted: Sequence[str]
    ) -> tuple[list[list[Columns]], int]:
        """This rank's strided share of the groups, [g][s], under the weights as they are. And how many trajectories.

        Two return values. wanted: proximal (log-probs), reference (log-probs with the adapter off), values (of the
        critic).
        """
        mine: list[list[Trajectory]] = ray.get(list(groups[self._rank :: self._config.learner.count]))
        flat = [t for group in mine for t in group] or ray.get(groups[0])[:1]
        columns: dict[str, list[np.ndarray]] = {}
        with self.calling("score"):
            for name in wanted:
                if name == "values":
                    assert self._values is not None
                    columns[name] = self._scored(self._values, flat, None)
                else:
                    with self._base_alone() if name == "reference" else nullcontext():
                        columns[name] = self._scored(self._policy, flat, LogprobHead(temperature))
        rows = iter([{name: columns[name][i] for name in wanted} for i in range(len(flat))])
        return [[next(rows) for _ in group] for group in mine], len(flat)

    def rl_step(self, step_id: StepId, batch: RlBatch, lr: float, critic_lr: float | None) -> StepResult:
        """lr 0: only the critic learns. critic_lr None: there is none."""

        def run() -> Sums:
            samples = batch.share(self._rank, self._config.learner.count)
            sums: Sums = {}
            if critic_lr is not None:
                assert self._values is not None and batch.algo.critic is not None
                valued = batch.for_critic(samples)
                for _ in range(batch.algo.critic.epochs):
                    objective = ValueRegression(batch.algo.critic.clip)
                    found = self._optimize(self._values, valued, objective, critic_lr)
                    norm = found.pop("actor/grad_norm/max")
                    found.pop("tokens", None)
                    sums = add_sums(sums, {**found, "critic/grad_norm/max": norm})
            if lr or critic_lr is None:
                policy: Any = PolicyGradient.of(batch.algo, batch.temperature, batch.kl_coefficient)
                if self._stage.aux_loss:
                    policy = WithAuxiliary(policy, self._stage.aux_loss)
                sums = {**sums, **self._optimize(self._policy, samples, policy, lr)}
            return sums

        return self._once(step_id, run)

    # -- what the steps share ------------------------------------------------------------------------------------

    def _once(self, step_id: StepId, run: Any) -> StepResult:
        if self._last is not None and self._last[0] == step_id:
            return self._last[1]
        started = time.perf_counter()
        with self.calling("step"):
            sums = run()
        result = StepResult(sums, self._budget, time.perf_counter() - started)
        self._last = (step_id, result)
        return result

    def _optimize(self, trainer: DeepSpeedTrainer, samples: Sequence[Sample], objective: Objective, lr: float) -> Sums:
        sums, self._budget = optimizer_step(trainer, samples, objective, lr=lr, token_budget=self._budget)
        return sums

    def _scored(self, trainer: DeepSpeedTrainer, trajectories: Sequence[Trajectory], head: Any) -> list[np.ndarray]:
        trainer.engine.module.eval()
        out = frozen_scores(trainer.engine, trajectories, head, self._budget, self._device, trainer.largest)
        trainer.engine.module.train()
        return out

    # -- publishing ----------------------------------------------------------------------------------------------

    def prepare(self, version: int, step: int, what: What, against: int | None = None) -> tuple[Manifest, float]:
        """Pack this rank's buckets on the host and score the probe. Every rank, in the same order.

        against: the version that whoever takes the buckets has, and may be sent changes to.
        Returns the manifest (checksums not yet filled in) and the probe's seconds. Training may go on afterwards.
        """
        with self.calling("prepare"):
            if what != "all" or self._sent_version != against:
                self._sent = {}
            self._sent_version = version if what == "all" else None
            return self._prepare(version, step, what)

    def _prepare(self, version: int, step: int, what: What) -> tuple[Manifest, float]:
        lm, dtype, count = self._scorer.lm, self._config.generator_dtype, self._config.learner.count
        if what == "adapter":
            # As they are: the generator's engine rounds them as it rounds any adapter.
            parts, dtype = adapter.adapter_parts(lm), "float32"
        else:
            parts = adapter.parts(lm)
        if what == "base":
            parts = {name: adapter.Part(part.base) for name, part in parts.items()}
        shapes = {name: part.shape for name, part in parts.items()}
        buckets = plan_buckets(shapes, dtype, self._config.weights.bucket_mib << 20)
        self._packed = {}
        for i, bucket in enumerate(buckets):
            held = {e.name: parts[e.name] for e in bucket.entries}
            with self._gathered([p for part in held.values() for p in part.parameters]):
                if i % count == self._rank:
                    self._packed[i] = pack(bucket, {name: part.value() for name, part in held.items()}, dtype)
        started = time.perf_counter()
        self._scorer.eval()
        with self._base_alone() if what == "base" else nullcontext():
            probe = sequence_logprobs(self._policy.engine, self._probe, self._device).numpy()
        self._scorer.train()
        if what == "base" and version >= 0:  # below: only compared
            self._base_version = version
        base = self._base_version if what == "adapter" else None
        manifest = Manifest(version, step, dtype, tuple(buckets), tuple(self._probe), probe, base)
        return manifest, time.perf_counter() - started

    def _base_alone(self) -> Any:
        return adapter.disabled(self._scorer.lm)

    def bucket(self, version: int, index: int) -> tuple[np.ndarray, str, str, bool]:
        """A packed bucket's bytes, or what changed in them (rl/weights.py, difference); the whole bucket's checksum;
        this node's id; and whether it is only what changed. Four return values; the caller becomes their owner."""
        data, before = self._packed.pop(index), self._sent.pop(index, None)
        dtype = self._config.generator_dtype
        changes = difference(before, data, dtype) if before is not None else None
        if self._config.weights.full_every > 1 and self._sent_version == version:
            self._sent[index] = data
        sent = data if changes is None else changes
        return sent, checksum(data), ray.get_runtime_context().get_node_id(), changes is not None

    def _gathered(self, parameters: Sequence[Any], writer: int | None = None) -> Any:
        """Whole parameters under ZeRO-3; what rank `writer` writes to them is everybody's afterwards."""
        enabled = self._config.learner.zero_stage == 3
        return self._deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer, enabled=enabled)

    # -- checkpoints and time-sharing ----------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Hugging Face weights and tokenizer by rank 0, and every rank's optimizer state, into `folder`."""
        with self.calling("save"):
            self._save(folder)

    def _save(self, folder: str) -> None:
        lm = self._scorer.lm
        with self._gathered(list(lm.parameters())):
            if self._rank == 0:
                lm.save_pretrained(folder, state_dict=dict(adapter.merged_tensors(lm)))
                self._tokenizer.save_pretrained(folder)
        self._policy.engine.save_checkpoint(str(Path(folder) / "learner"), tag="state")
        if self._values is not None:
            self._values.engine.save_checkpoint(str(Path(folder) / "learner" / "values"), tag="state")

    def save_values(self, folder: str) -> None:
        """The reward model in Hugging Face's format for sequence classification with one label, and its tokenizer."""
        assert self._values is not None
        scorer: ValueScorer = self._values.engine.module
        with self._gathered(list(scorer.parameters())):
            if self._rank == 0:
                scorer.save(folder)
                self._tokenizer.save_pretrained(folder)

    def restore(self, folder: str) -> None:
        self._policy.engine.load_checkpoint(str(Path(folder) / "learner"), tag="state")
        self._last = None

    def move(self, to: Literal["host", "device"]) -> None:
        """Time-sharing: optimizer and parameters leave the GPU while others use it."""
        for trainer in filter(None, (self._policy, self._values)):
            trainer.move(to)
        if to == "host":
            torch.cuda.empty_cache()
