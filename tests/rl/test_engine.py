"""The engine against independent forward passes: what it says it sampled from, and what a swap does."""

import asyncio
import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rl.transfer
from rl.adapter import adapter_tensors, attach, write_adapter
from rl.config import LoraConfig
from rl.engine import Engine, EngineError, EngineOptions
from rl.engine_options import allowed_rank
from rl.env import World
from rl.model import TokenScorer, load_causal_lm, sequence_logprobs
from rl.policy import Sampling
from rl.pretrained import prepare_model

PROMPT = [1, 40, 50, 60, 70, 80, 2]
GO_ON = Sampling(max_tokens=40, stop=())


@pytest.fixture(scope="module")
def folder(quickstart_config, tmp_path_factory) -> Path:
    config = quickstart_config("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2")
    return prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def engine(folder):
    made = Engine(str(folder), EngineOptions(max_length=200, max_sequences=16))
    yield made
    made.close()


class Models:
    """The weights of each version, as plain transformers models."""

    def __init__(self, folder: Path):
        self._folder = folder

    def of(self, version: int):
        lm = load_causal_lm(self._folder, "float32").eval()
        if version:
            generator = torch.Generator().manual_seed(version)
            with torch.no_grad():
                for p in lm.parameters():
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))
        return lm

    def update(self, version: int):
        return [{"tensors": list(self.of(version).named_parameters())}]


@pytest.fixture(scope="module")
def models(folder):
    return Models(folder)


def distributions(lm, tokens: list[int], temperature: float) -> torch.Tensor:
    """log-softmax rows for the token after each position, [T, V], double."""
    with torch.no_grad():
        return torch.log_softmax(lm(torch.tensor([tokens])).logits[0].double() / temperature, -1)


def nucleus(row: torch.Tensor, top_p: float) -> torch.Tensor:
    """log-probs renormalised over the smallest set of tokens that holds `top_p`."""
    order = row.argsort(descending=True)
    before = row[order].exp().cumsum(0) - row[order].exp()
    kept = torch.full_like(row, -torch.inf)
    kept[order[before < top_p]] = row[order[before < top_p]]
    return torch.log_softmax(kept, -1)


async def sample(engine: Engine, count: int, sampling: Sampling):
    return await asyncio.gather(*(engine.generate(PROMPT, sampling.with_(seed=i)) for i in range(count)))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.9)])
async def test_logprobs_are_of_the_distribution_sampled_from(engine, models, temperature, top_p):
    lm = models.of(engine.version)
    for completion in await sample(engine, 4, GO_ON.with_(temperature=temperature, top_p=top_p)):
        rows = distributions(lm, [*PROMPT, *completion.token_ids], temperature)[len(PROMPT) - 1 : -1]
        expected = [nucleus(row, top_p)[t].item() for row, t in zip(rows, completion.token_ids, strict=True)]
        assert np.abs(np.asarray(expected) - completion.logprobs).max() < 1e-4


async def test_a_seed_gives_the_same_tokens_in_any_company(engine):
    alone = (await sample(engine, 1, GO_ON))[0]
    crowd = (await sample(engine, 12, GO_ON))[0]
    assert alone.token_ids == crowd.token_ids
    assert len({tuple(c.token_ids) for c in await sample(engine, 12, GO_ON)}) == 12


async def test_a_stop_token_ends_the_turn_and_stays_in_it(engine):
    token = (await sample(engine, 1, GO_ON))[0].token_ids[3]
    completion = (await sample(engine, 1, GO_ON.with_(stop=(token,))))[0]
    assert completion.token_ids[-1] == token and completion.finish_reason == "stop"
    assert (await sample(engine, 1, GO_ON.with_(max_tokens=3)))[0].finish_reason == "length"


async def test_the_probe_score_is_an_independent_forward_pass(engine, models):
    probe = list(range(3, 60))
    scored = engine.score(probe).result()
    expected = sequence_logprobs(TokenScorer(models.of(engine.version)), probe).numpy()
    assert np.abs(scored - expected).max() < 1e-4


def assert_each_token_is_of_its_version(model_of: Callable, completions, prompt=PROMPT):
    for completion in completions:
        tokens = [*prompt, *completion.token_ids]
        versions = np.asarray(completion.versions)
        assert (np.diff(versions) >= 0).all()
        for version in set(completion.versions):
            rows = distributions(model_of(version), tokens, 1.0)[len(prompt) - 1 : -1]
            expected = rows[range(len(completion.token_ids)), list(completion.token_ids)].numpy()
            assert np.abs(expected - completion.logprobs)[versions == version].max() < 1e-3


async def test_drain_finishes_running_requests_on_the_old_weights(engine, models):
    old, new = engine.version, engine.version + 1
    running = [engine.submit(PROMPT, GO_ON.with_(seed=i)) for i in range(6)]
    swapped = engine.load(new, models.update(new), "drain")
    after = [engine.submit(PROMPT, GO_ON.with_(seed=i)) for i in range(6)]
    first, second = [f.result() for f in running], [f.result() for f in after]
    assert swapped.done()
    assert {v for c in first for v in c.versions} == {old} and {v for c in second for v in c.versions} == {new}
    assert_each_token_is_of_its_version(models.of, [*first, *second])
    # The same prompt and seeds, served from a cache of the old weights, would have given the old tokens.
    assert [c.token_ids for c in first] != [c.token_ids for c in second]


async def test_swaps_that_are_asked_for_while_one_drains_follow_it_in_order(engine, models):
    start = engine.version
    running = engine.submit(PROMPT, GO_ON)
    swaps = [engine.load(start + 1, models.update(start + 1), "drain")]
    between = engine.submit(PROMPT, GO_ON)
    swaps += [engine.load(start + k, models.update(start + k), policy) for k, policy in ((2, "drain"), (3, "continue"))]
    after = engine.submit(PROMPT, GO_ON)
    await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, swaps)), 60)
    first, second, third = (f.result() for f in (running, between, after))
    assert engine.version == start + 3
    assert set(first.versions) == {start}
    assert start not in {*second.versions, *third.versions} and third.versions[-1] == start + 3
    assert_each_token_is_of_its_version(models.of, [first, second, third])


async def until_sampled(engine: Engine, count: int) -> None:
    """Until every running request has that many tokens."""
    states = engine._llm.output_processor.request_states
    while not states or min(s.detokenizer.num_output_tokens() for s in list(states.values())) < count:
        await asyncio.sleep(0.001)


async def test_continue_swaps_between_two_tokens_of_a_request_twice(engine, models):
    start = engine.version
    long = GO_ON.with_(max_tokens=150)
    running = [engine.submit(PROMPT, long.with_(seed=i)) for i in range(6)]
    for sampled, version in ((5, start + 1), (60, start + 2)):
        await until_sampled(engine, sampled)
        await asyncio.wrap_future(engine.load(version, models.update(version), "continue"))
    completions = [f.result() for f in running]
    seen = {v for c in completions for v in c.versions}
    assert seen == {start, start + 1, start + 2}, "the swaps fell outside the requests"
    assert_each_token_is_of_its_version(models.of, completions)


def torn_off(models, version: int, after: int):
    """Weights of which only the first tensors come."""

    def tensors():
        yield from list(models.of(version).named_parameters())[:after]
        raise ConnectionError("the store is gone")

    return [{"tensors": tensors()}]


@pytest.mark.parametrize("policy", ["drain", "continue"])
async def test_a_load_that_fails_half_way_ends_no_request_and_nothing_is_sampled_until_the_next(engine, models, policy):
    start = engine.version
    running = [engine.submit(PROMPT, GO_ON.with_(seed=i, max_tokens=150)) for i in range(4)]
    await until_sampled(engine, 5)
    with pytest.raises(ConnectionError, match="the store is gone"):
        await asyncio.wrap_future(engine.load(start + 1, torn_off(models, start + 1, 12), policy))
    late = engine.submit(PROMPT, GO_ON.with_(max_tokens=20))
    await asyncio.sleep(0.5)
    assert engine.torn and engine.version == start
    assert not late.done() and engine.stuck_s >= 0.5, "with half of the weights"
    await asyncio.wrap_future(engine.load(start + 2, models.update(start + 2), policy))
    assert not engine.torn
    completions = [f.result() for f in [*running, late]]
    seen = {v for c in completions for v in c.versions}
    assert seen == {start, start + 2}
    assert set(completions[-1].versions) == {start + 2}
    assert_each_token_is_of_its_version(models.of, completions)


async def test_wherever_a_load_fails_the_next_leaves_nothing_of_it(engine, models):
    """In the middle of a layer too, whose first weights have come."""
    probe, version, wrong = list(range(3, 60)), engine.version + 2, {}
    expected = sequence_logprobs(TokenScorer(models.of(version)), probe).numpy()
    for after in range(len(list(models.of(0).named_parameters()))):
        with pytest.raises(ConnectionError):
            engine.load(version - 1, torn_off(models, version - 1, after), "drain").result()
        engine.load(version, models.update(version), "drain").result()
        off = np.abs(engine.score(probe).result() - expected).max()
        if off > 1e-4:
            wrong[after] = off
    assert not wrong


async def test_the_probe_catches_a_stale_tied_head(engine, models, monkeypatch):
    """The planted fault: after a reload the head still computes with its packed copy of the old embedding."""
    probe, version = list(range(3, 60)), engine.version + 1
    expected = sequence_logprobs(TokenScorer(models.of(version)), probe).numpy()
    with monkeypatch.context() as patched:
        patched.setattr(rl.transfer, "refresh_tied_head", lambda model: None)
        engine.load(version, models.update(version), "drain").result()
    assert np.abs(engine.score(probe).result() - expected).mean() > 1e-1
    engine.load(version + 1, models.update(version), "drain").result()
    assert np.abs(engine.score(probe).result() - expected).max() < 1e-4
    engine.load(version + 2, models.update(version + 2), "drain").result()  # version and weights agree again


async def test_a_prompt_that_does_not_fit_is_the_callers_error(engine):
    with pytest.raises(ValueError):
        await engine.generate(list(range(3, 253)), GO_ON)
    assert (await sample(engine, 1, GO_ON))[0].token_ids


@pytest.mark.parametrize(("linger_s", "steps"), [(0.5, 1), (0.0, 2)])
async def test_an_idle_engine_lets_a_burst_share_its_first_step(engine, monkeypatch, linger_s, steps):
    counted, step = [], engine._llm.step
    monkeypatch.setattr(engine, "_options", replace(engine._options, linger_s=linger_s))
    monkeypatch.setattr(engine._llm, "step", lambda: (counted.append(1), step())[1])
    # The thread already waits, by the options before: its first command only tells it of these.
    await asyncio.wrap_future(engine._call(lambda: None))
    first = engine.submit(PROMPT, Sampling(max_tokens=1))
    await asyncio.sleep(0.1)
    await asyncio.gather(*map(asyncio.wrap_future, (first, engine.submit([*PROMPT, 3], Sampling(max_tokens=1)))))
    assert len(counted) == steps


LORA = LoraConfig(rank=3, alpha=6.0)
PROBE = list(range(3, 60))
LONG = list(range(3, 43))
"""Longer than a block of the prefix cache."""


class Serving:
    """An engine with room for an adapter, and the transformers model that each version it was given should be."""

    def __init__(self, folder: Path, models: Models, adapters: Path):
        self.engine = Engine(str(folder), EngineOptions(max_length=200, max_sequences=16, lora_rank=LORA.rank))
        self.is_version = {0: models.of(0)}
        self.adapters = adapters
        self._models, self._base = models, 0

    def load(self, policy="drain"):
        """Full weights of the next version."""
        self._base = version = max(self.is_version) + 1
        self.is_version[version] = self._models.of(version)
        return self.engine.load(version, self._models.update(version), policy)

    def load_adapter(self, policy="drain"):
        """An adapter of the next version on those weights."""
        version = max(self.is_version) + 1
        self.is_version[version] = lm = self._models.of(self._base)
        attach(lm, LORA, seed=version)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape))
        write_adapter(self.adapters / str(version), adapter_tensors(lm), LORA, "base")
        return self.engine.load_adapter(version, self.adapters / str(version), policy)

    def off_by(self, version: int) -> float:
        """How far the engine's log-probs of the probe are from what that version's model says."""
        expected = sequence_logprobs(TokenScorer(self._copy(version)), PROBE).numpy()
        return float(np.abs(self.engine.score(PROBE).result() - expected).max())

    def _copy(self, version: int):
        return copy.deepcopy(self.is_version[version])


@pytest.fixture(scope="module")
def serving(folder, models, tmp_path_factory):
    made = Serving(folder, models, tmp_path_factory.mktemp("adapters"))
    yield made
    made.engine.close()


def test_an_adapter_goes_on_the_weights_and_comes_off_with_the_next(serving):
    """Each state is told from all the others: version 0 is the folder's, 1 and 2 adapters on it, 3 full weights..."""
    newest = max(serving.is_version)
    assert serving.off_by(newest) < 1e-4
    for load in (serving.load_adapter, serving.load_adapter, serving.load, serving.load_adapter, serving.load):
        load().result()
        newest = max(serving.is_version)
        assert serving.engine.version == newest
        assert serving.off_by(newest) < 1e-4
        assert serving.off_by(newest - 1) > 0.1


def test_an_adapter_is_read_once(serving):
    serving.load_adapter().result()
    shutil.rmtree(serving.adapters / str(serving.engine.version))
    completions = [f.result() for f in [serving.engine.submit(LONG, GO_ON.with_(seed=i)) for i in range(3)]]
    assert_each_token_is_of_its_version(serving.is_version.get, completions, LONG)


def test_drain_finishes_running_requests_without_the_new_adapter(serving):
    serving.load_adapter().result()
    old = serving.engine.version
    running = [serving.engine.submit(LONG, GO_ON.with_(seed=i)) for i in range(4)]
    swapped = serving.load_adapter()
    after = [serving.engine.submit(LONG, GO_ON.with_(seed=i)) for i in range(4)]
    first, second = [f.result() for f in running], [f.result() for f in after]
    assert swapped.done()
    assert {v for c in first for v in c.versions} == {old} and {v for c in second for v in c.versions} == {old + 1}
    # The prompt fills a block: from a cache of the old adapter the second half would be wrong.
    assert_each_token_is_of_its_version(serving.is_version.get, [*first, *second], LONG)


async def test_continue_puts_an_adapter_on_running_requests_changes_it_and_takes_it_off(serving):
    serving.load().result()
    start, engine = serving.engine.version, serving.engine
    running = [engine.submit(LONG, GO_ON.with_(max_tokens=150, seed=i)) for i in range(6)]
    for sampled, load in ((5, serving.load_adapter), (40, serving.load_adapter), (80, serving.load)):
        await until_sampled(engine, sampled)
        await asyncio.wrap_future(load("continue"))
        assert serving.off_by(engine.version) < 1e-4, "a probe in the company of running requests"
    completions = [f.result() for f in running]
    seen = {v for c in completions for v in c.versions}
    assert seen == {start, start + 1, start + 2, start + 3}, "the swaps fell outside the requests"
    assert_each_token_is_of_its_version(serving.is_version.get, completions, LONG)


def test_an_engine_made_without_a_rank_refuses_adapters(engine, tmp_path):
    with pytest.raises(ValueError, match="lora_rank"):
        engine.load_adapter(1, tmp_path, "drain")


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (3, 8), (8, 8), (17, 32), (300, 320), (512, 512)])
def test_a_rank_is_given_the_least_room_that_vllm_has(rank, room):
    assert allowed_rank(rank) == room


def test_a_rank_above_vllms_largest_is_refused():
    with pytest.raises(ValueError, match="publish = merged"):
        allowed_rank(513)


def test_an_error_in_the_thread_reaches_everyone_who_waits(folder, models, monkeypatch):
    dying = Engine(str(folder), EngineOptions(max_length=200, max_sequences=4))

    def fail():
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(dying._llm, "step", fail)
    waiting = dying.submit(PROMPT, GO_ON.with_(max_tokens=150))
    for future in (waiting, dying.died):
        with pytest.raises(EngineError, match="no kernel image"):
            future.result(timeout=60)
    with pytest.raises(EngineError):
        dying.submit(PROMPT, GO_ON)
