"""A request's tokens as they are sampled, and what becomes of one that nobody waits for any longer."""

import asyncio
import time

import pytest

from rl.engine import Engine, EngineOptions
from rl.env import World
from rl.policy import Sampling
from rl.pretrained import prepare_model
from rl.vllm_io import Chunk

PROMPT = [1, 40, 50, 60, 70, 80, 2]


@pytest.fixture(scope="module")
def engine(quickstart_config, tmp_path_factory):
    small = ("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2", "model.max_length=2000")
    config = quickstart_config(*small)
    folder = prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("model") / "m")
    made = Engine(str(folder), EngineOptions(max_length=2000, max_sequences=4))
    yield made
    made.close()


async def test_the_chunks_are_the_completion(engine):
    sampling = Sampling(max_tokens=30, seed=3)
    chunks: list[Chunk] = []
    streamed = await asyncio.wrap_future(engine.submit(PROMPT, sampling, chunks.append))
    whole = await engine.generate(PROMPT, sampling)
    assert len(chunks) > 20  # one a step
    assert [i for c in chunks for i in c.token_ids] == list(streamed.token_ids) == list(whole.token_ids)
    assert [p for c in chunks for p in c.logprobs] == list(streamed.logprobs)
    assert list(streamed.logprobs) == pytest.approx(list(whole.logprobs), abs=1e-5)
    assert {c.version for c in chunks} == {0}
    assert streamed.finish_reason == "length"


async def test_the_most_likely_tokens_come_in_order_and_hold_the_sampled_one_when_it_is_among_them(engine):
    chunks: list[Chunk] = []
    await asyncio.wrap_future(engine.submit(PROMPT, Sampling(max_tokens=8, seed=1, top_logprobs=5), chunks.append))
    for chunk in chunks:
        for token, logprob, top in zip(chunk.token_ids, chunk.logprobs, chunk.top, strict=True):
            values = list(top.values())
            assert len(top) in (4, 5)  # vLLM tells the sampled one apart when it is among them
            assert values == sorted(values, reverse=True)
            assert token not in top or top[token] == logprob


async def test_temperature_0_is_greedy(engine):
    first = await engine.generate(PROMPT, Sampling(max_tokens=12, temperature=0.0, seed=1))
    second = await engine.generate(PROMPT, Sampling(max_tokens=12, temperature=0.0, seed=2))
    top1 = await engine.generate(PROMPT, Sampling(max_tokens=12, top_k=1, seed=3))
    assert first.token_ids == second.token_ids == top1.token_ids


async def test_a_request_that_is_cancelled_leaves_its_place_to_others(engine):
    """The batch has four places: four that would take long, cancelled, and the fifth comes at once."""
    long = [engine.submit(PROMPT, Sampling(max_tokens=1900, seed=s)) for s in range(4)]
    others = [engine.submit(PROMPT, Sampling(max_tokens=1900, seed=s), lambda chunk: None) for s in range(4)]
    while engine.load_in_flight < 8:
        await asyncio.sleep(0.01)
    assert engine.waiting == 4
    for future in long + others:
        assert future.cancel()
    await asyncio.wait_for(engine.generate(PROMPT, Sampling(max_tokens=2)), 5)
    deadline = time.monotonic() + 5
    while engine.load_in_flight and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert engine.load_in_flight == 0


async def test_one_that_is_cancelled_while_it_waits_for_a_swap_is_never_begun(engine):
    running = engine.submit(PROMPT, Sampling(max_tokens=1900, seed=1))
    swap = engine.load(1, [], "drain")
    waiting = engine.submit(PROMPT, Sampling(max_tokens=1900, seed=2))
    waiting.cancel()
    running.cancel()
    await asyncio.wait_for(asyncio.wrap_future(swap), 20)
    assert engine.load_in_flight == 0
    assert set((await engine.generate(PROMPT, Sampling(max_tokens=2))).versions) == {1}


async def test_a_load_that_nobody_waits_for_any_longer_is_not_made_and_ends_nothing(engine):
    version = engine.version
    running = engine.submit(PROMPT, Sampling(max_tokens=300, seed=1))
    swap = engine.load(version + 1, [], "drain")
    waiting = engine.submit(PROMPT, Sampling(max_tokens=2, seed=2))
    assert swap.cancel()
    assert set((await asyncio.wrap_future(waiting)).versions) == {version}
    assert running.done()
    assert engine.version == version
