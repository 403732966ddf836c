"""Weights through the object store: owned by the store, proven by log-probs, and alive after the learner's death."""

import os
import signal

import numpy as np
import pytest
import ray

from actors.bucket_cache import BucketCache
from actors.faults import is_infra
from actors.generator import Generator
from actors.learner import LearnerRank
from actors.role import bound_threads, remote_class
from actors.weight_store import WeightStore
from rl.env import World
from rl.pretrained import prepare_model
from rl.weights import checksum

NAMESPACE = "test-weights"
PROBE = list(range(3, 90))


class StaleHeadGenerator(Generator):
    """The planted fault: the output head keeps computing with its packed copy of the old tied embedding."""

    async def open(self, model_path: str) -> None:
        import rl.transfer

        rl.transfer.refresh_tied_head = lambda model: None
        await super().open(model_path)


class DyingStore(WeightStore):
    """Its first process ends when a bucket is asked for, which is in the middle of a load."""

    async def bucket(self, version: int, index: int):
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            os._exit(1)
        return await super().bucket(version, index)


def environment(threads: int = 1) -> dict:
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    return {"env_vars": {**bound_threads(threads), "PYTHONPATH": path}}


@pytest.fixture(scope="module")
def parts(ray_cluster, quickstart_config, tmp_path_factory):
    """A store, a learner and what it takes to make generators; the learner has trained nothing yet."""
    small = ("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2")
    config = quickstart_config(*small, "weights.bucket_mib=1")
    model = str(prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("m") / "m"))
    store = remote_class(WeightStore).options(name="store", namespace=NAMESPACE, num_cpus=0).remote()
    return config, model, store, make_learner(config, model)


def make_generator(cls, config, model, store="store"):
    generator = (
        ray.remote(cls)
        .options(num_cpus=0, max_concurrency=64, runtime_env=environment())
        .remote(config, "cpu", store, NAMESPACE)
    )
    ray.get(generator.open.remote(model))
    return generator


def make_learner(config, model):
    learner = remote_class(LearnerRank).options(num_cpus=0, runtime_env=environment()).remote(config, "cpu", 0)
    ray.get(learner.open.remote(model, PROBE, *ray.get(learner.address.remote())))
    return learner


def perturb(rank, scale: float) -> None:
    """Stands for training: move the learner's weights, far enough for a stale tensor to show."""
    import torch

    def move(self):
        torch.manual_seed(1)
        with torch.no_grad():
            for p in self._scorer.lm.parameters():
                p.add_(scale * torch.randn_like(p))

    ray.get(rank.__ray_call__.remote(move))


def test_a_version_outlives_its_learner_and_faults_are_caught(parts):
    config, model, store, learner = parts
    perturb(learner, 0.05)
    published = ray.get(store.publish.remote(0, 0, [learner]))
    manifest = ray.get(store.manifest.remote(0))
    assert published.nbytes == manifest.nbytes and all(b.checksum for b in manifest.buckets)

    pid = ray.get(learner.status.remote())["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(learner.status.remote())

    late = make_generator(Generator, config, model)
    assert ray.get(late.start.remote()) == 0
    scored = ray.get(late.score.remote(PROBE))
    assert np.abs(scored - manifest.probe_logprobs).max() < 1e-4

    stale = make_generator(StaleHeadGenerator, config, model)
    with pytest.raises(ray.exceptions.RayTaskError, match=r"weight version 0.*probe.*weights\.probe_bound"):
        ray.get(stale.start.remote())


def test_version_numbers_are_never_reused(parts):
    store = parts[2]
    with pytest.raises(ray.exceptions.RayTaskError, match="not reused"):
        ray.get(store.publish.remote(0, 0, []))
    with pytest.raises(ray.exceptions.RayTaskError, match="not in the store"):
        ray.get(store.manifest.remote(7))


def test_changes_are_applied_once_a_node_and_a_restarted_store_takes_only_what_was_published(parts):
    config, model, _, _ = parts
    config = config.model_copy(update={"weights": config.weights.model_copy(update={"full_every": 3})})
    options = {"num_cpus": 0, "runtime_env": environment(), "max_concurrency": 8}
    store = remote_class(WeightStore).options(name="changes", namespace=NAMESPACE, **options).remote(3)
    learner = make_learner(config, model)
    cache = remote_class(BucketCache).options(**options).remote("changes", NAMESPACE)

    def move_one(self):
        import torch

        with torch.no_grad():
            next(iter(self._scorer.lm.parameters()))[0, :5] += 1

    def received(version: int) -> int:
        """Bytes that the node got for a version; what its processes read is the version to the bit."""
        before = ray.get(cache.status.remote())["received"]
        for _ in range(2):  # two generators
            manifest, ref = ray.get(cache.bucket.remote(version, 0))
            assert np.array_equal(ray.get(ref), ray.get(ray.get(store.bucket.remote(version, 0))[1]))
        assert manifest.version == version and checksum(ray.get(ref)) == manifest.buckets[0].checksum
        return ray.get(cache.status.remote())["received"] - before

    sent = []
    for version in range(4):
        if version != 2:
            ray.get(learner.__ray_call__.remote(move_one))
        sent.append(ray.get(store.publish.remote(version, version, [learner])))
        assert received(version) == sent[-1].sent
    whole = sent[0].nbytes
    assert [p.sent for p in sent] == [whole, 5 * 8, 0, whole], "the third after a whole one is whole again"

    again = remote_class(WeightStore).options(num_cpus=0).remote(3)
    ray.get(learner.__ray_call__.remote(move_one))
    with pytest.raises(ray.exceptions.RayTaskError, match="other weights"):
        ray.get(again.publish.remote(3, 3, [learner], "all", sent[-1].checksums))
    assert ray.get(again.newest.remote()) is None
    for actor in (store, again, learner, cache):
        ray.kill(actor)


def test_a_store_that_dies_in_the_middle_of_a_load_does_not_take_the_engine_with_it(parts):
    config, model, _, _ = parts
    options = {"num_cpus": 0, "max_restarts": 1, "runtime_env": environment()}
    store = remote_class(DyingStore).options(name="dying", namespace=NAMESPACE, **options).remote()
    learner = make_learner(config, model)
    generator = make_generator(Generator, config, model, "dying")
    pid = ray.get(generator.status.remote())["pid"]
    perturb(learner, 0.05)
    ray.get(store.publish.remote(0, 0, [learner]))
    with pytest.raises(ray.exceptions.RayError) as failed:
        ray.get(generator.load.remote(0))
    assert is_infra(failed.value)
    ray.get(store.publish.remote(1, 1, [learner]))
    assert ray.get(generator.load.remote(1)).probe_max_diff < 1e-4
    assert ray.get(generator.status.remote())["pid"] == pid
