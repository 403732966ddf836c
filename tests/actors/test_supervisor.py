"""Failures told apart and made good: the ledger, the supervisor, RLlib's manager over a pool, and who plays alone."""

import asyncio
import os
import signal
import threading
import time
from collections import Counter

import pytest
import ray
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from actors.faults import BudgetSpent, Ledger, Stuck, is_death, is_infra, tried, within
from actors.replica_health import ReplicaHealth
from actors.role import AsyncRole, NotOpen, Role, WatchedRole, remote_class
from actors.supervisor import Supervisor
from actors.worker_pool import Ended, WorkerPool
from rl.config import FaultsConfig
from rl.env import InfraError

QUICK = FaultsConfig(heartbeat_s=2, deadline_s=5, patience_s=20)


class Worker(AsyncRole):
    """Holds what `open` gave it, until its process dies."""

    held = ""

    async def open(self, what: str) -> None:
        self.held = what

    async def what(self) -> tuple[int, str]:
        return os.getpid(), self.held


class Rank(WatchedRole):
    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Replica(Role):
    def pid(self) -> tuple[int, bool]:
        return os.getpid(), threading.current_thread() is threading.main_thread()


def made(cls: type):
    many = {"max_concurrency": 16} if issubclass(cls, AsyncRole) else {}
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    options = {"num_cpus": 0, "max_restarts": -1, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    return remote_class(cls).options(**options, **many).remote()


def wrapped(cause: Exception) -> RayTaskError:
    return RayTaskError("f", "traceback", cause)


@pytest.mark.parametrize(
    ("error", "infra", "death"),
    [
        (ActorDiedError(), True, True),
        (wrapped(ActorDiedError()), True, False),  # of somebody that the called process depends on
        (wrapped(wrapped(ConnectionResetError())), True, False),
        (wrapped(NotOpen("x")), True, False),
        (wrapped(InfraError("the judge is gone")), True, False),
        (ObjectLostError("00" * 28, None, ""), True, False),
        (TimeoutError(), True, False),
        (wrapped(ValueError("a task of the wrong kind")), False, False),
        (wrapped(OSError("no such file")), False, False),
        (KeyError("x"), False, False),
    ],
)
def test_failures_of_ours_are_told_from_a_tasks_own(error, infra, death):
    assert (is_infra(error), is_death(error)) == (infra, death)


def test_each_budget_is_spent_by_its_own_kind_within_its_window(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("actors.faults.time.monotonic", lambda: now[0])
    ledger = Ledger(FaultsConfig(infra_budget=2, data_budget=1, window_s=10))
    for second in (0, 6, 12):  # never more than two within ten seconds
        now[0] = second
        ledger.infra("generator", ActorDiedError())
        ledger.progress()
    ledger.data("t1", "a bad row")
    with pytest.raises(BudgetSpent, match=r"task t2 was dropped: another bad row"):
        ledger.data("t2", "another bad row")
    now[0] = 13
    with pytest.raises(
        BudgetSpent, match=r"3 failures within 7 s .*infra_budget = 2.*the store failed: its process died"
    ):
        ledger.infra("store", ActorDiedError())
    assert ledger.told() == {
        "faults/restarts": 4.0,
        "faults/restarts_generator": 3.0,
        "faults/restarts_store": 1.0,
    }
    assert ledger.told() == {"faults/restarts": 0.0}


def test_failures_without_a_step_between_them_do_not_age(monkeypatch):
    """A call that takes its whole deadline each time would never spend a budget by the hour."""
    now = [0.0]
    monkeypatch.setattr("actors.faults.time.monotonic", lambda: now[0])
    ledger = Ledger(FaultsConfig(infra_budget=2, window_s=10))
    for second in (100, 200):
        now[0] = second
        ledger.infra("learner", Stuck("x"))
    now[0] = 300
    with pytest.raises(BudgetSpent, match="3 failures within 200 s"):
        ledger.infra("learner", Stuck("x"))


def test_a_call_is_made_again_only_for_a_failure_of_ours():
    calls = []

    async def failing(attempt: int) -> str:
        calls.append(attempt)
        if attempt < 2:
            raise wrapped(ConnectionRefusedError())
        return "done"

    async def wrong(attempt: int) -> None:
        calls.append(attempt)
        raise wrapped(ValueError("x"))

    async def never() -> None:
        await asyncio.Event().wait()

    assert asyncio.run(tried(failing, QUICK)) == "done" and calls == [0, 1, 2]
    calls.clear()
    with pytest.raises(RayTaskError):
        asyncio.run(tried(wrong, QUICK))
    assert calls == [0]
    with pytest.raises(Stuck, match=r"faults\.deadline_s"):
        asyncio.run(within(0.1, never()))


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_died_or_hangs_is_opened_again(ray_cluster, way):
    async def run() -> tuple[tuple[int, str], tuple[int, str], dict[str, float]]:
        supervisor = Supervisor(QUICK, lambda message: None)
        worker = made(Worker)
        await worker.open.remote("tokenizer")
        before = await worker.what.remote()
        back = asyncio.Event()

        async def reopen() -> None:
            await worker.open.remote("tokenizer")
            back.set()

        supervisor.keep("rollout", worker, reopen)
        os.kill(before[0], way)
        await asyncio.wait_for(back.wait(), 60)
        assert not supervisor.failed.done()
        after = await worker.what.remote()
        supervisor.close()
        ray.kill(worker)
        return before, after, supervisor.ledger.told()

    before, after, told = asyncio.run(run())
    assert after[0] != before[0] and after[1] == "tokenizer"
    assert told["faults/restarts_rollout"] >= 1


def test_the_run_ends_with_the_cause_when_the_budget_is_spent_or_nothing_can_replace_it(ray_cluster):
    async def run(budget: int, opened_again: bool) -> BaseException | None:
        supervisor = Supervisor(QUICK.model_copy(update={"infra_budget": budget}), lambda message: None)
        worker = made(Worker)
        pid, _ = await worker.what.remote()

        async def reopen() -> None:
            os.kill((await worker.what.remote())[0], signal.SIGKILL)
            await worker.what.remote()

        supervisor.keep("generator", worker, reopen if opened_again else None)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait({supervisor.failed}, timeout=60)
        supervisor.close()
        return supervisor.failed.exception()

    spent, lost = asyncio.run(run(1, True)), asyncio.run(run(9, False))
    assert isinstance(spent, BudgetSpent) and "the generator failed: its process died" in str(spent)
    assert isinstance(lost, InfraError) and not isinstance(lost, BudgetSpent)


def test_a_rank_answers_for_its_health_beside_a_long_call(ray_cluster):
    rank = made(Rank)
    pid = ray.get(rank.pid.remote())
    life = ray.get(rank.ping.remote())
    sleeping = rank.sleep.remote(60)
    assert ray.get(rank.ping.remote(), timeout=10) == life
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(sleeping)
    assert asyncio.run(tried(lambda _: asyncio.wrap_future(rank.ping.remote().future()), QUICK)) != life
    ray.kill(rank)


def test_rllibs_manager_notices_every_restart_of_a_replica(ray_cluster):
    replicas = [made(Replica) for _ in range(2)]
    restarts: list[str] = []
    health = ReplicaHealth(QUICK, lambda role, error: restarts.append(role))
    health.use("reward", replicas)
    pid, main = ray.get(replicas[0].pid.remote())
    assert main, "math-verify's alarm needs the main thread"
    health.start()
    time.sleep(3)
    assert restarts == [] and health.healthy("reward") == 2
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (restarts and health.healthy("reward") == 2):
        time.sleep(0.2)
    assert restarts == ["reward"] and health.healthy("reward") == 2
    health.use("reward", replicas[1:])
    assert health.healthy("reward") == 1
    health.close()


class Absent:
    """Stands for a worker that is being started again: it says when it is ready."""

    def __init__(self):
        self.back = asyncio.Event()
        self.ready = self

    async def remote(self) -> None:
        await self.back.wait()


def test_a_worker_that_died_gets_nothing_until_it_is_ready_again():
    """Its calls would fail at once, one after the other, and innocent tasks be blamed for it."""

    async def run() -> tuple[list[bool], bool]:
        dead, alive = Absent(), Absent()
        pool = WorkerPool([dead, alive])
        with pytest.raises(ActorDiedError):
            async with pool.one(False) as worker:
                assert worker is dead
                raise ActorDiedError()
        given = []
        for _ in range(3):
            async with pool.one(False) as worker:
                given.append(worker is alive)
        dead.back.set()
        await asyncio.sleep(0.5)
        async with pool.one(False) as worker:
            return given, worker is dead

    assert asyncio.run(run()) == ([True] * 3, True)


def test_a_suspected_group_is_alone_with_its_worker():
    async def run() -> list[str]:
        pool, order = WorkerPool(["a", "b"]), []

        async def play(name: str, alone: bool, seconds: float) -> None:
            async with pool.one(alone) as worker:
                order.append(f"{name} on {worker}")
                await asyncio.sleep(seconds)
                order.append(f"{name} off")

        groups = [play("g1", False, 0.05), play("g2", False, 0.05), play("suspect", True, 0.2), play("g3", False, 0.01)]
        await asyncio.gather(*groups, play("g4", False, 0.01))
        return order

    order = asyncio.run(run())
    assert order[:2] == ["g1 on a", "g2 on b"]
    mine = next(x for x in order if x.startswith("suspect on"))[-1]
    began, ended = order.index(f"suspect on {mine}"), order.index("suspect off")
    assert not [x for x in order[began + 1 : ended] if x.endswith(f"on {mine}")]
    assert {"g3 off", "g4 off"} <= set(order[:ended]), "the others go on at the other worker"
    assert f"{'g1' if mine == 'a' else 'g2'} off" in order[:began], "it was played empty first"


def test_a_worker_that_leaves_ends_what_it_has():
    async def run() -> list[str]:
        pool, order = WorkerPool(["a", "b"]), []

        async def play(name: str) -> None:
            async with pool.one(False) as worker:
                await asyncio.sleep(0.1)
                order.append(f"{name} {worker}")

        first = [asyncio.ensure_future(play(f"g{i}")) for i in range(2)]
        await asyncio.sleep(0)
        await pool.use(["a"])
        order.append("gone")
        await asyncio.gather(*first, play("g2"))
        return order

    assert asyncio.run(run()) == ["g0 a", "g1 b", "gone", "g2 a"]


def test_with_one_call_at_a_time_a_death_is_the_fault_of_the_call_that_the_worker_had():
    async def run() -> tuple[int, list[str]]:
        pool, playing, most = WorkerPool(["a", "b"], most=1), Counter(), 0
        given: list[str] = []

        async def play() -> None:
            nonlocal most
            async with pool.one(False) as worker:
                given.append(worker)
                playing[worker] += 1
                most = max(most, playing[worker])
                await asyncio.sleep(0.01)
                playing[worker] -= 1

        await asyncio.gather(*(play() for _ in range(8)))
        return most, given

    most, given = asyncio.run(run())
    assert most == 1 and Counter(given) == {"a": 4, "b": 4}


def test_a_worker_that_was_ended_gets_nothing_until_it_is_ready_again():
    async def run() -> bool:
        ended, alive = Absent(), Absent()
        pool = WorkerPool([ended, alive], most=1)
        with pytest.raises(Ended):
            async with pool.one(False) as worker:
                assert worker is ended
                raise Ended("its call did not return")
        async with pool.one(False) as worker:
            return worker is alive

    assert asyncio.run(run())


def test_nobody_joins_a_suspected_group_at_the_only_worker():
    async def run() -> list[str]:
        pool, order = WorkerPool(["a"]), []

        async def play(name: str, alone: bool) -> None:
            async with pool.one(alone):
                order.append(f"{name} on")
                await asyncio.sleep(0.05)
                order.append(f"{name} off")

        await asyncio.gather(play("g1", False), play("suspect", True), play("g2", False))
        return order

    assert asyncio.run(run()) == ["g1 on", "g1 off", "suspect on", "suspect off", "g2 on", "g2 off"]
