"""The learner's ranks against each other and against plain torch: the same batch gives the same update."""

import asyncio
import os
import signal
from collections.abc import Collection

import numpy as np
import pytest
import ray
import torch

from actors.learner import LearnerRank
from actors.learner_batch import Drawn, Held, RlBatch, example_samples
from actors.learner_group import LearnerGroup
from actors.role import bound_threads, remote_class
from actors.supervisor import Supervisor
from actors.weight_store import WeightStore
from rl import adapter
from rl.algo.loss import token_weights
from rl.batch import Sample, spread_weights, turn_lengths
from rl.config_algo import AlgoConfig, CriticConfig, KlConfig
from rl.config_stage import PairsConfig, PreferenceStage, RlStage
from rl.data_stage import Example
from rl.env import World
from rl.gradient import TorchTrainer, optimizer_step
from rl.model import LogprobHead, TokenScorer, ValueScorer, frozen_scores, load_causal_lm
from rl.objective import PolicyGradient, Preference, ValueRegression, add_sums, to_metrics
from rl.pretrained import prepare_model
from rl.trajectory import Trajectory
from rl.weights import unpack

PROBE = list(range(3, 60))
ALGO = AlgoConfig(group_size=4, kl=KlConfig(coefficient=0.1), aggregation="token")
STEPS, LR = 3, 1e-3
EPS = 1e-4  # of the gradient's own size: one that is dropped shows
SMALL = ("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2")


@pytest.fixture(scope="module")
def model(quickstart_config, tmp_path_factory):
    config = quickstart_config(*SMALL)
    return str(prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("m") / "m"))


def columns_of(rng, t: Trajectory) -> dict[str, np.ndarray]:
    """A reference, advantages that differ from token to token, values and returns; all 0 off the mask."""
    drawn = {
        "reference": -5.8 + 0.1 * rng.standard_normal(len(t)),
        "advantages": rng.standard_normal(len(t)),
        "values": 0.1 * rng.standard_normal(len(t)),
        "returns": rng.standard_normal(len(t)),
    }
    return {name: np.where(t.loss_mask, values, 0).astype(np.float32) for name, values in drawn.items()}


@pytest.fixture(scope="module")
def batch():
    """Three groups of four two-turn trajectories of very different lengths, and their columns."""
    rng = np.random.default_rng(0)
    groups, columns = [], []
    for _ in range(3):
        trajectories = []
        for _ in range(4):
            length = int(rng.integers(8, 90))
            mask = rng.random(length) < 0.5
            mask[0], mask[1] = False, True
            trajectories.append(
                Trajectory(
                    rng.integers(3, 300, length).astype(np.int32),
                    mask,
                    np.where(np.arange(length) < length // 2, 0, 1).astype(np.int16),
                    np.where(mask, -5.8 + 0.3 * rng.standard_normal(length), 0).astype(np.float32),
                    np.where(mask, 0, -1).astype(np.int32),
                )
            )
        groups.append(trajectories)
        columns.append([columns_of(rng, t) for t in trajectories])
    return groups, columns


def torch_trainer(config, scorer):
    c = config.learner
    return TorchTrainer(
        scorer, betas=c.betas, weight_decay=c.weight_decay, grad_clip=c.grad_clip, device="cpu", eps=EPS
    )


def plain_torch(config, model, batch, algo):
    """AdamW on the whole batch in one process, without DeepSpeed: the yardstick."""
    groups, columns = batch
    lm = load_causal_lm(model, "float32")
    if config.learner.lora:
        adapter.attach(lm, config.learner.lora, seed=0)
        adapter.fold(lm, seed_of_the_first_stage())
    trainer = torch_trainer(config, TokenScorer(lm))
    flat = [(g, s) for g in range(3) for s in range(4)]
    weights = token_weights([turn_lengths(groups[g][s]) for g, s in flat], aggregation=algo.aggregation)
    samples = [
        Sample(groups[g][s], spread_weights(groups[g][s], w), columns[g][s])
        for (g, s), w in zip(flat, weights, strict=True)
    ]
    for _ in range(STEPS):
        sums, _ = optimizer_step(trainer, samples, PolicyGradient.of(algo, 1.0), lr=LR, token_budget=10_000)
    return {n: t.clone() for n, t in adapter.merged_tensors(lm)}, to_metrics(sums)


def seed_of_the_first_stage() -> int:
    from rl.task import derive_seed

    return derive_seed("adapter", 0, 0)


class Ranks:
    """A learner group of its own, killed at the end."""

    def __init__(self, config, model):
        rank = remote_class(LearnerRank)
        options = {"num_cpus": 0, "runtime_env": {"env_vars": bound_threads(1)}}
        self.actors = [rank.options(**options).remote(config, "cpu", i) for i in range(config.learner.count)]
        self.model = model

    def __enter__(self):
        host, port = ray.get(self.actors[0].address.remote())
        self.all("open", self.model, PROBE, host, port)
        return self

    def __exit__(self, *_):
        for actor in self.actors:
            ray.kill(actor)

    def all(self, method, *arguments):
        return ray.get([getattr(a, method).remote(*arguments) for a in self.actors])

    def step(self, method, *arguments):
        sums = {}
        for result in self.all(method, *arguments):
            sums = add_sums(sums, result.sums)
        return sums

    def published(self, what="all"):
        manifests = self.all("prepare", 0, STEPS, what)
        weights = {}
        for i, bucket in enumerate(manifests[0][0].buckets):
            data, *_ = ray.get(self.actors[i % len(self.actors)].bucket.remote(0, i))
            weights |= {n: t.clone() for n, t in unpack(bucket, data, manifests[0][0].dtype)}
        return weights, manifests[0][0]


def rl_stage(algo) -> RlStage:
    return RlStage(kind="rl", steps=STEPS, lr=LR, adam_eps=EPS, tasks_per_step=3, algo=algo)


def shipped(batch, algo) -> RlBatch:
    groups, columns = batch
    return RlBatch(
        [ray.put(g) for g in groups],
        [[len(t) for t in g] for g in groups],
        [[turn_lengths(t) for t in g] for g in groups],
        ray.put(columns),
        [(g, s) for g in range(3) for s in range(4)],
        algo,
        320,
        1.0,
        algo.kl.coefficient,
    )


def assert_same_update(model, found, expected):
    """fp32 sums in another order differ by 1e-7; Adam's division makes that at most 1e-2 of a step where it moves."""
    start = dict(load_causal_lm(model, "float32").named_parameters())
    assert set(found) == set(expected)
    moved = torch.cat([(expected[n] - start[n]).abs().flatten() for n in expected])
    apart = torch.cat([(expected[n] - found[n]).abs().flatten() for n in expected])
    assert moved.mean() > 2e-5
    assert apart.mean() < 1e-3 * moved.mean() and apart.max() < 0.2 * LR, (apart.mean(), apart.max(), moved.mean())


LORA = ("learner.lora.rank=4", "learner.lora.alpha=8")


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "more", "aggregation"),
    [
        (1, 0, (), "token"),
        (1, 0, LORA, "token"),
        (2, 0, (), "sequence"),
        (2, 1, (), "turn"),
        (2, 2, (), "token"),
        (2, 3, (), "sum"),
        (2, 2, LORA, "turn"),
        (2, 3, LORA, "token"),
    ],
)
def test_ranks_zero_stages_and_adapters_give_plain_torchs_update(
    ray_cluster, quickstart_config, model, batch, ranks, zero_stage, more, aggregation
):
    config = quickstart_config(
        *SMALL, f"learner.count={ranks}", f"learner.zero_stage={zero_stage}", "learner.micro_batch_tokens=128",
        "weights.bucket_mib=1", *more,
    )  # fmt: skip
    algo = ALGO.model_copy(update={"aggregation": aggregation})
    expected, expected_metrics = plain_torch(config, model, batch, algo)
    with Ranks(config, model) as learner:
        learner.all("begin_stage", 0, rl_stage(algo), model, None)
        one = shipped(batch, algo)
        for step in range(STEPS):
            sums = learner.step("rl_step", (0, step, 0), one, LR, None)
        again = learner.step("rl_step", (0, STEPS - 1, 0), one, LR, None)
        assert again == sums, "a step that ran is not run again"
        weights, _ = learner.published()
        if more:
            base, _ = learner.published("base")
            assert all(torch.equal(base[n], p) for n, p in load_causal_lm(model, "float32").named_parameters())
    assert_same_update(model, weights, expected)
    metrics = to_metrics(sums)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 1)])
def test_bfloat16_has_masters_of_float32(ray_cluster, quickstart_config, model, batch, ranks, zero_stage):
    """Steps of 1e-5 are lost on weights of 0.02 in bfloat16, whose next number is 1e-4 away. Twenty add up to it."""
    many, small = 20, 1e-5
    config = quickstart_config(
        *SMALL, f"learner.count={ranks}", f"learner.zero_stage={zero_stage}", "model.dtype=bfloat16"
    )
    stage = rl_stage(ALGO).model_copy(update={"adam_eps": 1e-8})
    name = "model.layers.0.mlp.up_proj.weight"
    start = dict(load_causal_lm(model, "bfloat16").named_parameters())[name].detach()
    moved = {}
    with Ranks(config, model) as learner:
        learner.all("begin_stage", 0, stage, model, None)
        one = shipped(batch, ALGO)
        for step in range(many):
            learner.step("rl_step", (0, step, 0), one, small, None)
            if step + 1 in (1, many):
                weights, manifest = learner.published()
                assert manifest.dtype == "bfloat16" and weights[name].dtype == torch.bfloat16
                moved[step + 1] = (weights[name].float() - start.float()).abs().mean().item()
    assert moved[1] < 0.5 * small, "a step alone rounds away nearly everywhere"
    assert 0.5 * many * small < moved[many] < 1.5 * many * small


def test_a_critic_learns_beside_the_policy_on_two_ranks(ray_cluster, quickstart_config, model, batch):
    """Its values before and after, and its loss, against a value model trained in this process."""
    algo = AlgoConfig(name="ppo", critic=CriticConfig(lr=LR, clip=None, epochs=2, warmup_steps=0))
    config = quickstart_config(*SMALL, "learner.count=2", "learner.zero_stage=2", "learner.micro_batch_tokens=128")
    groups, columns = batch
    flat = [(g, s) for g in range(3) for s in range(4)]
    scorer = ValueScorer(load_causal_lm(model, "float32"))
    trainer = torch_trainer(config, scorer)
    one = shipped(batch, algo)
    valued = one.for_critic([Sample(groups[g][s], np.ones(len(groups[g][s])), columns[g][s]) for g, s in flat])
    for _ in range(2):
        sums, _ = optimizer_step(trainer, valued, ValueRegression(None), lr=LR, token_budget=10_000)
    expected = frozen_scores(scorer, [groups[g][s] for g, s in flat], None, 10_000)
    with Ranks(config, model) as learner:
        learner.all("begin_stage", 0, rl_stage(algo), model, None)
        before = [scored for scored, _ in learner.all("score", one.groups, 1.0, ["values", "proximal"])]
        found = learner.step("rl_step", (0, 0, 0), one, LR, LR)
        after = [scored for scored, _ in learner.all("score", one.groups, 1.0, ["values"])]
    of_group = {g: after[g % 2][g // 2] for g in range(3)}
    values = np.concatenate([of_group[g][s]["values"] for g, s in flat])
    assert not any(c["values"].any() for share in before for group in share for c in group), "the head starts at zero"
    assert any(c["proximal"].any() for share in before for group in share for c in group)
    assert np.abs(values).max() > 0.01
    np.testing.assert_allclose(values, np.concatenate(expected), atol=2e-3 * np.abs(values).max() + 1e-5)
    assert to_metrics(found)["critic/loss"] > 0 and "actor/pg_loss" in to_metrics(found)
    # Both sums are over the two epochs here, over the last one there: the first epoch's loss is the larger.
    assert found["critic/loss@values"] / 2 > sums["critic/loss@values"]


def test_pairs_on_two_ranks_with_a_reference_by_the_learner(ray_cluster, quickstart_config, model, batch):
    """M-DPO and M-KTO over two ranks against one process; the reference is what the learner itself scored before."""
    groups, _ = batch
    config = quickstart_config(*SMALL, "learner.count=2", "learner.zero_stage=1", "learner.micro_batch_tokens=128")
    pairs = [Example((g[0], g[1], groups[(i + 1) % 3][2]), (1.0, -1.0, 0.0), "pair") for i, g in enumerate(groups)]
    for loss in ("sigmoid", "kto"):
        stage = PreferenceStage(
            kind="preference", steps=STEPS, lr=LR, adam_eps=EPS, batch_size=3, loss=loss, beta=0.5,
            reference="last_iterate", pairs=PairsConfig(path="given"),
        )  # fmt: skip
        lm = load_causal_lm(model, "float32")
        scorer = TokenScorer(lm)
        trainer = torch_trainer(config, scorer)
        flat = iter(frozen_scores(scorer, [t for p in pairs for t in p.trajectories], LogprobHead(), 10_000))
        held = [Held(p, [next(flat) for _ in p.trajectories]) for p in pairs]
        for _ in range(STEPS):
            strange = frozen_scores(scorer, [p.trajectories[2] for p in pairs], LogprobHead(), 10_000)
            gains = [float((s - h.references[2]).sum()) for s, h in zip(strange, held, strict=True)]
            kl = max(0.0, sum(gains) / 3) if loss == "kto" else 0.0
            optimizer_step(
                trainer, example_samples(held, 0, 1), Preference(stage, LogprobHead(), kl), lr=LR, token_budget=10_000
            )
        with Ranks(config, model) as learner:
            learner.all("begin_stage", 0, stage, model, None)
            assert learner.all("hold", [ray.put(pairs)], False) == [3, 3]
            learner.all(
                "hold_references", [a.score_held.options(num_returns=2).remote(False)[0] for a in learner.actors]
            )
            for step in range(STEPS):
                sums = learner.step("example_step", (0, step, 0), Drawn([0, 1, 2]), step, LR)
            weights, _ = learner.published()
        assert_same_update(model, weights, {n: p.detach() for n, p in lm.named_parameters()})
        assert to_metrics(sums)["preference/margin"] > 0.1


@pytest.mark.parametrize(("ranks", "zero_stage"), [(2, 1)])
def test_a_group_that_lost_a_rank_is_made_again_and_reaches_the_same_weights(
    ray_cluster, quickstart_config, model, batch, tmp_path, ranks, zero_stage
):
    """Killed inside a step and between two, before a checkpoint and after one; the weights to the bit."""
    config = quickstart_config(*SMALL, f"learner.count={ranks}", f"learner.zero_stage={zero_stage}")
    stage, one = rl_stage(ALGO), shipped(batch, ALGO)

    async def train(killed: Collection[str]) -> tuple[list[tuple[str, ...]], int]:
        supervisor = Supervisor(config.faults, lambda message: None)
        options = {"num_cpus": 0, "max_restarts": -1, "runtime_env": {"env_vars": bound_threads(1)}}
        rank = remote_class(LearnerRank).options(**options)
        group = LearnerGroup([rank.remote(config, "cpu", i) for i in range(ranks)], config.faults, supervisor)
        store = remote_class(WeightStore).options(num_cpus=0).remote()
        await group.open(model, PROBE)

        async def kill(moment: str, after_s: float = 0.0) -> None:
            if moment in killed:
                await asyncio.sleep(after_s)
                os.kill(pid, signal.SIGKILL)

        async def step(number: int) -> None:
            nonlocal pid
            pid = (await group.ask("status"))[-1]["pid"]
            await asyncio.gather(group.tell("rl_step", (0, number, 0), one, LR, None), kill(f"in step {number}", 0.01))

        async def publish(version: int) -> None:
            lives = group.lives
            try:
                told = await store.publish.remote(version, version, group.ranks)
            except Exception as error:
                await group.mend_if_broken(lives, error)
                told = await store.publish.remote(version, version, group.ranks)
            group.published(told.checksums, "all")
            published.append(told.checksums)

        pid, published = 0, []
        await group.tell("begin_stage", 0, stage, model, None)
        await step(0)
        await publish(0)
        pid = (await group.ask("status"))[-1]["pid"]
        await kill("between")
        await step(1)
        await group.ask("save", str(tmp_path / f"c{len(killed)}"))
        folder = tmp_path / f"c{len(killed)}"
        group.saved(folder, ("begin_stage", (0, stage, model, str(folder))))
        await publish(1)
        await step(2)
        await publish(2)
        assert group.holds_the_published
        with pytest.raises(ray.exceptions.RayTaskError, match="not iterable"):
            await group.ask("hold_references", 7)  # an error of its own is no death
        for actor in [*group.ranks, store]:
            ray.kill(actor)
        return published, group.lives

    async def both():
        return await train(()), await train(("in step 0", "between", "in step 2"))

    (expected, once), (found, lives) = asyncio.run(both())
    assert once == 0 and lives == 3
    assert len(set(expected)) == 3 and found == expected
