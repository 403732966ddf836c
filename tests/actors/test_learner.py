"""The learner's ranks against each other and against plain torch: the same batch gives the same update."""


import numpy as np
import pytest
import ray
import torch

from actors.learner import LearnerRank, RlBatch
from actors.role import bound_threads
from rl.batch import Sample
from rl.config import GrpoConfig, KlConfig
from rl.env import World
from rl.gradient import TorchTrainer, add_sums, grpo_objective, optimizer_step, to_metrics, weigh
from rl.model import TokenScorer, load_causal_lm
from rl.pretrained import prepare_model
from rl.trajectory import Trajectory

PROBE = list(range(3, 60))
ALGO = GrpoConfig(group_size=4, kl=KlConfig(coefficient=0.1))
STEPS, LR = 3, 1e-3
EPS = 1e-4  # of the gradient's own size: one that is dropped shows


@pytest.fixture(scope="module")
def model(quickstart_config, tmp_path_factory):
    small = ("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2")
    config = quickstart_config(*small)
    return str(prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("m") / "m"))


@pytest.fixture(scope="module")
def batch():
    """Three groups of four trajectories of very different lengths, with behaviour and reference log-probs."""
    rng = np.random.default_rng(0)
    groups, references = [], []
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
                    np.zeros(length, np.int16),
                    np.where(mask, -5.8 + 0.3 * rng.standard_normal(length), 0).astype(np.float32),
                    np.where(mask, 0, -1).astype(np.int32),
                )
            )
        groups.append(trajectories)
        references.append([np.where(t.loss_mask, -5.8, 0).astype(np.float32) for t in trajectories])
    return groups, references, rng.standard_normal((3, 4)).tolist()


def plain_torch(config, model, batch):
    """AdamW on the whole batch in one process, without DeepSpeed: the yardstick."""
    groups, references, advantages = batch
    scorer = TokenScorer(load_causal_lm(model, "float32"))
    c = config.learner
    trainer = TorchTrainer(
        scorer, betas=c.betas, weight_decay=c.weight_decay, grad_clip=c.grad_clip, device="cpu", eps=EPS
    )
    flat = [(g, s) for g in range(3) for s in range(4)]
    weights = weigh([int(groups[g][s].loss_mask[1:].sum()) for g, s in flat], ALGO)
    samples = [
        Sample(groups[g][s], w, advantages[g][s], references[g][s]) for (g, s), w in zip(flat, weights, strict=True)
    ]
    for _ in range(STEPS):
        sums, _ = optimizer_step(
            trainer, samples, grpo_objective(ALGO), lr=LR, temperature=1.0, token_budget=10_000
        )
    return {n: p.detach() for n, p in scorer.lm.named_parameters()}, to_metrics(sums)


def through_actors(config, model, batch):
    groups, references, advantages = batch
    rank = ray.remote(LearnerRank)
    options = {"num_cpus": 0, "runtime_env": {"env_vars": bound_threads(1)}}
    ranks = [rank.options(**options).remote(config, "cpu", i) for i in range(config.learner.count)]
    try:
        host, port = ray.get(ranks[0].address.remote())
        ray.get([r.open.remote(model, PROBE, host, port) for r in ranks])
        ray.get([r.begin_stage.remote(True, EPS) for r in ranks])
        lengths = [[(len(t), int(t.loss_mask[1:].sum())) for t in g] for g in groups]
        chosen = [(g, s) for g in range(3) for s in range(4)]
        shipped = RlBatch(
            [ray.put(g) for g in groups], lengths, advantages, chosen, ray.put(references), ALGO, 1.0
        )
        for step in range(STEPS):
            results = ray.get([r.rl_step.remote((0, step, 0), shipped, LR) for r in ranks])
        again = ray.get([r.rl_step.remote((0, STEPS - 1, 0), shipped, LR) for r in ranks])
        assert [r.sums for r in again] == [r.sums for r in results], "a step that ran is not run again"
        manifests = ray.get([r.prepare.remote(0, STEPS) for r in ranks])
        sums = {}
        for result in results:
            sums = add_sums(sums, result.sums)
        weights = {}
        from rl.weights import unpack

        for i, bucket in enumerate(manifests[0][0].buckets):
            data, _, _ = ray.get(ranks[i % len(ranks)].bucket.remote(0, i))
            weights |= {n: t.clone() for n, t in unpack(bucket, data, "float32")}
        return weights, to_metrics(sums)
    finally:
        for r in ranks:
            ray.kill(r)


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 0), (2, 2)])
def test_one_rank_and_two_give_plain_torchs_update(ray_cluster, quickstart_config, model, batch, ranks, zero_stage):
    """fp32 sums in another order differ by 1e-7; Adam's division makes that at most 1e-2 of a step where it moves."""
    config = quickstart_config(
        f"learner.count={ranks}", f"learner.zero_stage={zero_stage}", "learner.micro_batch_tokens=128",
        "weights.bucket_mib=1",
    )  # fmt: skip
    expected, expected_metrics = plain_torch(config, model, batch)
    weights, metrics = through_actors(config, model, batch)
    start = dict(load_causal_lm(model, "float32").named_parameters())
    assert set(weights) == set(expected)
    moved = torch.cat([(expected[n] - start[n]).abs().flatten() for n in expected])
    apart = torch.cat([(expected[n] - weights[n]).abs().flatten() for n in expected])
    assert moved.mean() > 1e-4
    assert apart.mean() < 1e-3 * moved.mean() and apart.max() < 0.2 * LR, (apart.mean(), apart.max())
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


