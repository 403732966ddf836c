"""The pool: every turn gets its own answer, an error reaches who asked, and a generator that dies costs no turn."""

import asyncio
import os
import signal

import numpy as np
import pytest
import ray

from actors.faults import Stuck
from actors.generator import Generator
from actors.generator_pool import GeneratorPool
from actors.role import bound_threads, remote_class
from actors.weight_store import WeightStore
from rl.env import World
from rl.policy import Sampling
from rl.pretrained import prepare_model

NAMESPACE = "test-pool"
GREEDY = Sampling(temperature=0.0, max_tokens=6)
SEEDED = Sampling(max_tokens=100, seed=1)
PATIENCE_S = 60.0


SMALL = ("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2")


@pytest.fixture(scope="module")
def model(quickstart_config, tmp_path_factory):
    config = quickstart_config(*SMALL)
    return str(prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("m") / "m"))


@pytest.fixture(scope="module")
def generator(ray_cluster, quickstart_config, model):
    options = {"num_cpus": 0, "max_concurrency": 64, "max_restarts": -1}
    store = remote_class(WeightStore).options(name="store", namespace=NAMESPACE, **options).remote()
    actor = remote_class(Generator).options(**options, runtime_env={"env_vars": bound_threads(1)})
    generator = actor.remote(quickstart_config(*SMALL), "cpu", "store", NAMESPACE)
    ray.get([generator.open.remote(model), store.newest.remote()])
    return generator


def prompts(count: int) -> list[list[int]]:
    return [np.random.default_rng(i).integers(3, 90, 5 + i % 7).tolist() for i in range(count)]


def test_each_turn_gets_its_own_answer_in_few_messages(generator):
    async def play():
        pool = GeneratorPool([generator], PATIENCE_S)
        alone = [await pool.act(p, GREEDY, "s") for p in prompts(12)]
        before = (await generator.status.remote())["calls"]["submit"]
        together = await asyncio.gather(*(pool.act(p, GREEDY, f"s{i}") for i, p in enumerate(prompts(12))))
        return alone, together, (await generator.status.remote())["calls"]["submit"] - before

    alone, together, messages = asyncio.run(play())
    assert [list(c.token_ids) for c in together] == [list(c.token_ids) for c in alone]
    assert len({tuple(c.token_ids) for c in alone}) > 1  # or any answer would do for any turn
    assert messages == 1


def test_an_error_reaches_the_turn_that_asked_for_it(generator):
    async def play():
        pool = GeneratorPool([generator], PATIENCE_S)
        fine, wrong = pool.act([5, 6], GREEDY, "a"), pool.act([5] * 10_000, GREEDY, "b")
        return await asyncio.gather(fine, wrong, return_exceptions=True)

    fine, wrong = asyncio.run(play())
    assert len(fine.token_ids) > 0
    assert isinstance(wrong, ValueError) and "max_length" in str(wrong)


def test_two_callers_do_not_get_each_others_turns(generator):
    async def play():
        pools = [GeneratorPool([generator], PATIENCE_S) for _ in range(2)]  # each numbers its turns from 0
        return await asyncio.gather(*(pool.act(p, GREEDY, "s") for pool, p in zip(pools, prompts(2), strict=True)))

    async def alone():
        return [await GeneratorPool([generator], PATIENCE_S).act(p, GREEDY, "s") for p in prompts(2)]

    assert [list(c.token_ids) for c in asyncio.run(play())] == [list(c.token_ids) for c in asyncio.run(alone())]


def test_a_turn_that_was_lost_with_its_generator_is_sampled_again_when_it_is_back(generator, model):
    async def play():
        pool = GeneratorPool([generator], PATIENCE_S)
        expected = [(await pool.act(p, SEEDED, "s")).token_ids for p in prompts(12)]
        waiting = [asyncio.ensure_future(pool.act(p, SEEDED, f"s{i}")) for i, p in enumerate(prompts(12))]
        await asyncio.sleep(0.02)
        os.kill((await generator.status.remote())["pid"], signal.SIGKILL)
        while True:
            try:
                await generator.open.remote(model)
                break
            except ray.exceptions.RayActorError:  # it is being started again
                await asyncio.sleep(0.2)
        found = [answer.token_ids for answer in await asyncio.wait_for(asyncio.gather(*waiting), timeout=60)]
        return expected, found

    expected, found = asyncio.run(play())
    assert found == expected


def test_nobody_waits_for_a_dead_generator_for_ever(generator):
    async def play():
        pool = GeneratorPool([generator], patience_s=3)
        await pool.act([5, 6], GREEDY, "s")
        waiting = [asyncio.ensure_future(pool.act([5, i], Sampling(max_tokens=200), "s")) for i in range(3, 40)]
        await asyncio.sleep(0.05)
        ray.kill(generator)
        answers = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), timeout=30)
        with pytest.raises(Stuck):  # and whoever asks later hears of it too
            await asyncio.wait_for(pool.act([5, 6], GREEDY, "s"), timeout=30)
        return answers

    assert any(isinstance(answer, Stuck) for answer in asyncio.run(play()))
