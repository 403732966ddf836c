"""The buffer against real workers and graders that die: what is lost is played again, what fails is named.

No failure becomes a reward.
"""

import asyncio
import os
import signal
import time

import pytest
import ray
from conftest import HERE
from deadly_env import KINDS

from actors.buffer import Buffer, Dropped
from actors.faults import tried
from actors.generator import Generator
from actors.reward import Reward
from actors.role import bound_threads, remote_class
from actors.rollout import RolloutWorker
from actors.supervisor import Supervisor
from actors.weight_store import WeightStore
from rl.config import FaultsConfig
from rl.env import World
from rl.episode import GroupRequest
from rl.policy import Sampling
from rl.pretrained import prepare_model

NAMESPACE = "test-buffer"
SAMPLING = Sampling(max_tokens=4)
FAULTS = "faults={attempts: 3, deadline_s: 60, patience_s: 120}"


@pytest.fixture(scope="module")
def parts(ray_cluster, quickstart_config, tmp_path_factory):
    """Two workers, two graders and a generator, as the company makes them."""
    folder = tmp_path_factory.mktemp("deadly")
    config = quickstart_config(
        "model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2", FAULTS,
        f"env={{name: custom, path: deadly_env.Deadly, max_turns: 2, args: {{folder: {folder}}}}}",
        "reward.function=deadly_env.slowly",
        "stages=[{kind: eval}]",
    )  # fmt: skip
    model = str(prepare_model(quickstart_config().model.model_copy(update={"scratch": config.model.scratch}),
                              World(quickstart_config().env, 0), 0, folder / "m"))  # fmt: skip
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    options = {"num_cpus": 0, "max_restarts": -1, "runtime_env": {"env_vars": {**bound_threads(1), "PYTHONPATH": path}}}
    many = {**options, "max_concurrency": 64}
    store = remote_class(WeightStore).options(name="store", namespace=NAMESPACE, **many).remote()
    generator = remote_class(Generator).options(**many).remote(config, "cpu", "store", NAMESPACE)
    workers = [remote_class(RolloutWorker).options(**many).remote(config, [generator]) for _ in range(2)]
    graders = [remote_class(Reward).options(**options).remote(config) for _ in range(2)]
    ray.get([generator.open.remote(model), store.newest.remote(), *(w.open.remote(model) for w in workers)])
    yield config, model, workers, graders, many
    for actor in [store, generator, *workers, *graders]:
        ray.kill(actor)


def played(parts, indices, meanwhile=None, **changes):
    """The buffer's answer for tasks by index, two samples each, while dead workers are opened again."""
    config, model, workers, graders, many = parts
    source = World(config.env, 0).source
    config = config.model_copy(update={"faults": config.faults.model_copy(update=changes)})

    async def run():
        supervisor = Supervisor(FaultsConfig(infra_budget=100), lambda message: None)
        for worker in workers:
            supervisor.keep("rollout", worker, lambda w=worker: opened(w))

        async def opened(worker) -> None:
            await worker.open.remote(model)

        for worker in workers:  # one that the test before has killed may not have been opened again
            await tried(lambda _, w=worker: opened(w), FaultsConfig())
        buffer = remote_class(Buffer).options(**many).remote(config, workers, graders)
        requests = [GroupRequest(0, 0, source.task("train", i), 2) for i in indices]
        playing = asyncio.ensure_future(asyncio.wrap_future(buffer.play.remote(requests, SAMPLING).future()))
        if meanwhile:
            await meanwhile(workers, graders, buffer)
        found = await playing
        again = await buffer.play.remote(requests[:1], SAMPLING)
        supervisor.close()
        ray.kill(buffer)
        assert not supervisor.failed.done()
        return found, again

    return asyncio.run(run())


def test_what_nobody_refers_to_any_more_leaves_the_buffers_memory(parts):
    """Ray itself does not free it where the last reference was another process's: actors/owned.py."""
    config, _, workers, graders, many = parts
    source = World(config.env, 0).source

    def kept(self) -> int:
        return ray._private.worker.global_worker.core_worker.get_memory_store_size()

    buffer = remote_class(Buffer).options(**many).remote(config, workers, graders)
    sizes = []
    for _ in range(3):
        requests = [GroupRequest(0, 0, source.task("train", index_of("fine", n)), 2) for n in range(8)]
        found = ray.get(buffer.play.remote(requests, SAMPLING))
        sizes.append(ray.get(buffer.__ray_call__.remote(kept)))
        assert all(len(ray.get(g.episodes)) == len(ray.get(g.trajectories)) == 2 for g in found.groups)
        del found
        time.sleep(0.5)  # the buffer hears of it
    ray.kill(buffer)
    assert sizes[0] >= 16 and max(sizes) <= sizes[0] + 16, "one step's, and one before it at most"


def index_of(kind: str, n: int = 0) -> int:
    return KINDS.index(kind) + n * len(KINDS)


def test_a_task_that_ends_every_worker_is_quarantined_and_named_and_the_others_are_played(parts):
    fine = [index_of("fine", n) for n in range(6)]
    found, again = played(parts, [index_of("kills"), *fine])
    assert [g.request.task.id for g in found.groups] == [f"fine-{i}" for i in fine]
    assert [[s.total for s in g.scores] for g in found.groups] == [[float(i)] * 2 for i in fine]
    (dropped,) = found.dropped
    assert dropped == Dropped("kills-1", "its environment ended the rollout worker 3 times", quarantined=True)
    assert found.replayed >= 3
    assert again.groups == [] and again.dropped[0].cause == "it is quarantined", "it is never tried again"


def test_a_task_that_fails_of_itself_is_dropped_after_its_attempts_and_a_lost_service_is_asked_again(parts):
    found, _ = played(parts, [index_of("raises"), index_of("service", 1), index_of("never", 2)], deadline_s=3)
    assert [g.request.task.id for g in found.groups] == [f"service-{index_of('service', 1)}"]
    assert [s.total for s in found.groups[0].scores] == [float(index_of("service", 1))] * 2
    causes = {d.task: d.cause for d in found.dropped}
    assert causes[f"raises-{index_of('raises')}"] == "KeyError: 'a bad row'"
    assert "faults.deadline_s" in causes[f"never-{index_of('never', 2)}"]
    assert not any(d.quarantined for d in found.dropped)


def test_graders_and_workers_that_are_killed_under_load_cost_no_group_and_make_no_reward(parts):
    async def kill(workers, graders, buffer) -> None:
        victims = [(await v.status.remote())["pid"] for v in (graders[0], workers[0], graders[1])]
        for number, pid in enumerate(victims):
            while (await buffer.where.remote())[0] <= 5 * number:  # each of them has groups under way
                await asyncio.sleep(0.02)
            os.kill(pid, signal.SIGKILL)

    fine = [index_of("fine", n) for n in range(10, 40)]
    found, _ = played(parts, fine, kill)
    assert found.dropped == [] and found.replayed > 0
    assert {g.request.task.id: [s.total for s in g.scores] for g in found.groups} == {
        f"fine-{i}": [float(i)] * 2 for i in fine
    }


def test_what_no_grader_can_score_is_dropped_and_named_and_is_no_reward(parts):
    """One that raises, one that ends the grader's process, one that never returns; others are scored meanwhile."""
    kinds = ("graded_raises", "graded_kills", "graded_never")
    fine = [index_of("fine", n) for n in range(50, 56)]
    found, _ = played(parts, [*(index_of(kind) for kind in kinds), *fine], grading_s=3)
    assert {g.request.task.id: [s.total for s in g.scores] for g in found.groups} == {
        f"fine-{i}": [float(i)] * 2 for i in fine
    }
    dropped = {d.task.rsplit("-")[0]: d for d in found.dropped}
    assert dropped["graded_raises"].cause == "RuntimeError: cannot tell" and not dropped["graded_raises"].quarantined
    assert dropped["graded_kills"].cause.startswith("its scoring ended the grader 3 times: its process died")
    assert dropped["graded_never"].cause.startswith("its scoring ended the grader 3 times: ")
    assert "faults.grading_s = 3 s" in dropped["graded_never"].cause
    assert dropped["graded_kills"].quarantined and dropped["graded_never"].quarantined
    assert found.replayed >= 4 and set(dropped) == set(kinds)
