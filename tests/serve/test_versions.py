"""Several versions in one engine, on real weights: whose tokens, whose turn it is, and what a failure costs."""

import asyncio
import gc
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.engine import Engine, EngineError
from rl.engine_options import FROM_FOLDER, EngineOptions
from rl.env import World
from rl.policy import Completion, Sampling
from rl.pretrained import prepare_model
from rl.vllm_io import Chunk
from serve.token_stream import Inbox
from serve.versions import UnknownVersion, Versions

PROMPT = [1, 40, 50, 60, 70, 80, 2]
SHORT = Sampling(max_tokens=12)
LONG = Sampling(max_tokens=1900)


@pytest.fixture(scope="module")
def folders(quickstart_config, tmp_path_factory) -> dict[int, Path]:
    """Models of the same shape, by version."""
    small = ("model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2", "model.max_length=2000")
    config = quickstart_config(*small)
    root = tmp_path_factory.mktemp("models")
    first = prepare_model(config.model, World(config.env, 0), 0, root / "1")
    return {1: first} | {version: perturbed(first, root / str(version), version) for version in (2, 3)}


def perturbed(model: Path, folder: Path, seed: int) -> Path:
    """Other weights, in two files."""
    shutil.copytree(model, folder)
    weights, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(seed)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def engine_of(folder: Path, version: int) -> Engine:
    return Engine(str(folder), EngineOptions(max_length=2000, max_sequences=4, transfer=FROM_FOLDER), version=version)


@pytest.fixture(scope="module")
def bare(folders) -> dict[tuple[int, int], list[int]]:
    """What an engine that was started on a version's folder samples, by version and seed."""
    sampled = {}
    for version, folder in folders.items():
        engine = engine_of(folder, version)
        for seed in range(4):
            sampled[version, seed] = list(engine.submit(PROMPT, SHORT.with_(seed=seed)).result().token_ids)
        engine.close()
        del engine
        gc.collect()  # its end takes vLLM's groups with it, which the next one is to have of its own
    assert len({tuple(ids) for ids in sampled.values()}) == len(sampled)
    return sampled


@pytest.fixture(scope="module")
def engine(folders, bare):
    made = engine_of(folders[1], 1)
    for logprobs in (0, 2):  # vLLM compiles for every size of the batch: not in what is timed
        warm = [Sampling(max_tokens=4 + i, seed=i, top_logprobs=logprobs) for i in range(4)]
        for future in [made.submit(PROMPT, sampling, lambda chunk: None) for sampling in warm]:
            future.result()
    yield made
    made.close()


@pytest.fixture
async def make(engine, folders) -> AsyncIterator[Callable[..., Awaitable[Versions]]]:
    """Makes a Versions with all three on offer; whichever was the last is in the engine. One at a time."""
    all_made = []

    async def made(**settings: float) -> Versions:
        versions = Versions(engine, folders[engine.version], **{"slice_s": 0.3, **settings})
        for version, folder in folders.items():
            await versions.offer(version, folder)
        all_made.append(versions)
        return versions

    yield made
    await until(lambda: not engine.load_in_flight and not any(v.in_flight or v._turns for v in all_made))
    if engine.version not in folders:
        await asyncio.wrap_future(engine.load(1, [{"folder": str(folders[1]), "file": "model.safetensors"}], "drain"))


@pytest.fixture
async def versions(make) -> Versions:
    return await make()


@pytest.fixture
def loads(engine, monkeypatch) -> list[int]:
    """The versions that were loaded, in order."""
    found: list[int] = []
    load = engine.load
    monkeypatch.setattr(engine, "load", lambda version, *rest: found.append(version) or load(version, *rest))
    return found


async def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_each_request_gets_the_tokens_of_its_version(versions, bare):
    wanted = [(version, seed) for seed in range(4) for version in (1, 2, 3)] * 2
    done = await asyncio.gather(*(versions.generate(PROMPT, SHORT.with_(seed=s), v) for v, s in wanted))
    for (version, seed), completion in zip(wanted, done, strict=True):
        assert list(completion.token_ids) == bare[version, seed]
        assert set(completion.versions) == {version}


async def test_under_steady_load_of_all_versions_none_is_mixed_and_they_take_turns(versions, bare, loads):
    """Callers that ask again at once: the queue of no version is ever empty by itself."""

    async def caller(version: int, seed: int) -> None:
        while len(loads) < 12:
            completion = await versions.generate(PROMPT, SHORT.with_(seed=seed), version)
            assert list(completion.token_ids) == bare[version, seed] and set(completion.versions) == {version}

    await asyncio.gather(*(caller(v, s) for v in (1, 2, 3) for s in range(4)))
    assert all(len(set(loads[i : i + 3])) == 3 for i in range(9)), loads


@pytest.mark.parametrize(("slice_s", "least", "most"), [(60.0, 1, 2), (0.0, 5, 20)])
async def test_a_version_goes_on_for_its_slice_while_another_waits(make, loads, slice_s, least, most):
    versions = await make(slice_s=slice_s)

    async def caller(version: int) -> None:
        for _ in range(5):
            await versions.generate(PROMPT, SHORT, version)

    await asyncio.gather(*(caller(v) for v in (1, 1, 2, 2)))
    assert least <= len(loads) <= most


async def test_one_version_alone_needs_no_turns(versions, engine, folders):
    await versions.generate(PROMPT, SHORT, 2)
    await asyncio.gather(*(versions.generate(PROMPT, SHORT, 2) for _ in range(10)))
    assert versions._turns is None and versions.current == 2 and versions.trouble is None


async def test_a_version_that_is_idle_gives_way_at_once(make):
    patient = await make(slice_s=600)
    started = time.monotonic()
    for version in (2, 3, 1):
        await patient.generate(PROMPT, SHORT, version)
    assert time.monotonic() - started < 100


async def test_an_unknown_version_is_named_before_anything_is_sampled(versions):
    with pytest.raises(UnknownVersion, match="version 9 is not served here"):
        versions.stream(PROMPT, SHORT, 9)
    with pytest.raises(UnknownVersion):
        await versions.generate(PROMPT, SHORT, 9)
    assert versions.in_flight == 0


async def test_what_waits_for_a_forgotten_version_is_told(versions):
    await versions.generate(PROMPT, SHORT, 1)
    running = asyncio.ensure_future(versions.generate(PROMPT, LONG, 1))
    waiting = asyncio.ensure_future(versions.generate(PROMPT, SHORT, 2))
    await until(lambda: versions.waiting == 1)
    await versions.forget(2)
    with pytest.raises(UnknownVersion):
        await waiting
    running.cancel()


# -- broken versions ----------------------------------------------------------------------------------------------


async def fails_alone(versions: Versions, bare, version: int, why: str) -> None:
    """Its requests fail, those beside and after them do not; it is forgotten, and said why."""
    await versions.generate(PROMPT, SHORT, 1)
    good = [asyncio.ensure_future(versions.generate(PROMPT, SHORT.with_(seed=s), v)) for v in (1, 2) for s in range(2)]
    with pytest.raises(UnknownVersion, match=why):
        await versions.generate(PROMPT, SHORT, version)
    for future, (v, s) in zip(good, [(v, s) for v in (1, 2) for s in range(2)], strict=True):
        assert list((await future).token_ids) == bare[v, s]
    assert version not in versions.known and why in versions.broken[version] and versions.trouble is None
    again = await versions.generate(PROMPT, SHORT.with_(seed=3), 1)
    assert list(again.token_ids) == bare[1, 3]
    with pytest.raises(UnknownVersion, match=why):
        await versions.generate(PROMPT, SHORT, version)


async def test_a_file_that_is_damaged_after_it_was_offered_costs_only_its_own_requests(
    versions, engine, bare, folders, tmp_path
):
    """The second of its files: the first has been loaded by then, and half of the weights are others."""
    folder = Path(shutil.copytree(folders[3], tmp_path / "7"))
    await versions.offer(7, folder)
    second = sorted(folder.glob("model-*"))[1]
    second.write_bytes(second.read_bytes()[:-100])
    await fails_alone(versions, bare, 7, "file not fully covered")
    assert not engine.torn


async def test_a_version_that_does_not_say_what_its_learner_said_is_not_served(versions, bare, folders, tmp_path):
    folder = Path(shutil.copytree(folders[3], tmp_path / "8"))
    probe = {"tokens": [5, 6, 7, 8], "logprobs": [-0.1, -0.1, -0.1], "bound": 0.001}
    (folder / "probe.json").write_text(json.dumps(probe))
    await versions.offer(8, folder)
    await fails_alone(versions, bare, 8, "log-probs of the probe")


async def test_a_version_that_says_what_its_learner_said_is_served(versions, engine, folders, tmp_path):
    await versions.generate(PROMPT, SHORT, 3)
    said = (await asyncio.wrap_future(engine.score(PROMPT))).tolist()
    folder = Path(shutil.copytree(folders[3], tmp_path / "8"))
    (folder / "probe.json").write_text(json.dumps({"tokens": PROMPT, "logprobs": said, "bound": 1e-4}))
    await versions.offer(8, folder)
    await versions.generate(PROMPT, SHORT, 1)
    assert set((await versions.generate(PROMPT, SHORT, 8)).versions) == {8}


async def test_weights_of_another_shape_or_not_all_of_them_are_not_offered(versions, folders, tmp_path):
    """vLLM leaves what a file lacks as it was: two versions' weights in one model."""
    folder = Path(shutil.copytree(folders[1], tmp_path / "5"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    await versions.offer(5, folder)
    assert "model.layers.1.mlp.down_proj.weight" in versions.broken[5]
    await versions.offer(6, tmp_path / "nowhere")
    assert versions.known == {1, 2, 3} and set(versions.broken) == {5, 6}


async def test_when_no_version_can_be_loaded_everybody_is_told_and_the_next_good_one_mends_it(
    engine, folders, bare, tmp_path
):
    first, second = (Path(shutil.copytree(folders[v], tmp_path / str(v))) for v in (1, 2))
    await asyncio.wrap_future(engine.load(1, [{"folder": str(first), "file": "model.safetensors"}], "drain"))
    alone = Versions(engine, first, slice_s=0.3)
    await alone.offer(2, second)
    for file in [*first.glob("model*"), *second.glob("model-*")]:
        file.write_bytes(b"")
    with pytest.raises(UnknownVersion):
        await alone.generate(PROMPT, SHORT, 2)
    await until(lambda: alone.trouble == "no version could be loaded")
    await alone.offer(3, folders[3])
    assert list((await alone.generate(PROMPT, SHORT.with_(seed=1), 3)).token_ids) == bare[3, 1]
    assert alone.trouble is None


# -- ending requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["task", "cancel", "leave"])
async def test_a_request_that_is_ended_frees_its_place(versions, engine, how):
    """The batch has four: four long ones, ended, and a short one comes at once."""
    await versions.generate(PROMPT, SHORT, 1)
    ending = []
    if how == "task":
        ending = [asyncio.ensure_future(versions.generate(PROMPT, LONG, 1)) for _ in range(4)]
        await until(lambda: engine.load_in_flight == 4)
    streams = [versions.stream(PROMPT, LONG, 1) for _ in range(4)] if not ending else []
    for stream in streams:
        await anext(stream)
    if how == "leave":
        for stream in streams:
            async with stream:
                pass
    for one in ending or streams:
        one.cancel()
    await asyncio.wait_for(versions.generate(PROMPT, Sampling(max_tokens=2), 1), 10)
    assert [chunk async for chunk in streams[0]] == [] if how == "cancel" else True
    await until(lambda: engine.load_in_flight == 0 and versions.in_flight == 0)


async def test_one_that_is_ended_while_it_is_held_back_is_never_begun(versions, engine):
    await versions.generate(PROMPT, SHORT, 1)
    running = [asyncio.ensure_future(versions.generate(PROMPT, LONG, 1)) for _ in range(2)]
    held = asyncio.ensure_future(versions.generate(PROMPT, LONG, 2))
    stream = versions.stream(PROMPT, LONG, 2)
    await until(lambda: versions.waiting == 2)
    held.cancel()
    stream.cancel()
    await until(lambda: versions.waiting == 0)
    for one in running:
        one.cancel()
    await until(lambda: engine.load_in_flight == 0)
    assert versions.in_flight == 0


async def test_a_drain_of_requests_that_are_ended_lets_the_next_version_in_at_once(versions):
    await versions.generate(PROMPT, SHORT, 1)
    running = asyncio.ensure_future(versions.generate(PROMPT, LONG, 1))
    other = asyncio.ensure_future(versions.generate(PROMPT, Sampling(max_tokens=2), 2))
    await asyncio.sleep(0.5)
    running.cancel()
    assert set((await asyncio.wait_for(other, 10)).versions) == {2}


async def test_what_vllm_refuses_fails_alone(versions):
    with pytest.raises(ValueError, match="max_length"):
        await versions.generate(PROMPT, Sampling(max_tokens=5000), versions.current)
    with pytest.raises(ValueError, match="max_length"):
        async with versions.stream(PROMPT, Sampling(max_tokens=5000), versions.current) as stream:
            async for _ in stream:
                pass


# -- streams ------------------------------------------------------------------------------------------------------


async def chunks_of(stream) -> tuple[list[Chunk], list[float], Completion]:
    chunks, times = [], [time.monotonic()]
    async with stream:
        async for chunk in stream:
            chunks.append(chunk)
            times.append(time.monotonic())
        return chunks, times, await stream.completion()


async def test_a_stream_is_its_completion_in_a_chunk_every_so_often(versions, bare):
    await versions.generate(PROMPT, SHORT, 2)
    asked = Sampling(max_tokens=400, seed=3, top_logprobs=2)
    chunks, times, whole = await chunks_of(versions.stream(PROMPT, asked, 2))
    assert [t for c in chunks for t in c.token_ids] == list(whole.token_ids)
    assert [p for c in chunks for p in c.logprobs] == list(whole.logprobs)
    assert [len(c.top) for c in chunks] == [len(c.token_ids) for c in chunks]
    assert list(whole.token_ids)[:12] == bare[2, 3] and {c.version for c in chunks} == {2}
    gaps = [b - a for a, b in pairwise(times[1:-1])]
    assert len(chunks) > 3 and min(gaps) > 0.15, "but for the last, which comes when the request ends"


async def test_the_first_token_comes_at_once_and_the_end_is_not_waited_for(make):
    versions = await make(chunk_s=600)
    await versions.generate(PROMPT, SHORT, 2)
    chunks, _, whole = await chunks_of(versions.stream(PROMPT, Sampling(max_tokens=100, seed=3), 2))
    first, rest = (len(chunk.token_ids) for chunk in chunks)
    assert first < 10 and first + rest == len(whole.token_ids) > 20


async def test_many_streams_wake_the_event_loop_only_for_what_is_waited_for(make, monkeypatch):
    """Not for every chunk, and once for all streams that a step has something for."""
    versions = await make(chunk_s=600)
    await versions.generate(PROMPT, SHORT, 2)
    loop = asyncio.get_running_loop()
    woken = []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: woken.append(args) or wake(*args))
    streams = [versions.stream(PROMPT, Sampling(max_tokens=60, seed=seed), 2) for seed in range(4)]
    done = await asyncio.gather(*map(chunks_of, streams))
    assert sum(len(whole.token_ids) for _, _, whole in done) > 100 and len(woken) <= 8


def test_an_inbox_wakes_once_for_many_calls_and_again_for_later_ones():
    woken, made = [], []

    class Loop:
        def call_soon_threadsafe(self, call):
            woken.append(call)

    inbox = Inbox(Loop())
    for i in range(5):
        inbox.put(lambda i=i: made.append(i))
    assert len(woken) == 1 and made == []
    woken[0]()
    inbox.put(lambda: made.append(5))
    assert len(woken) == 2 and made == list(range(5))


async def test_ending_while_a_version_is_loaded_leaves_the_engine_alive(engine, make):
    versions = await make()
    other = 1 if engine.version == 2 else 2
    asked = asyncio.ensure_future(versions.generate(PROMPT, SHORT, other))
    running = [asyncio.ensure_future(versions.generate(PROMPT, LONG, engine.version)) for _ in range(2)]
    await until(lambda: versions._serving is None)
    versions._turns.cancel()
    for one in (asked, *running):
        one.cancel()
    await until(lambda: engine.version == other and not engine.load_in_flight)
    await asyncio.wrap_future(engine.score(PROMPT))


async def test_the_engines_death_reaches_everybody(folders):
    engine = engine_of(folders[1], 1)
    dying = Versions(engine, folders[1], slice_s=0.1)
    await dying.offer(2, folders[2])
    running = asyncio.ensure_future(dying.generate(PROMPT, LONG, 1))
    held = asyncio.ensure_future(dying.generate(PROMPT, SHORT, 2))
    await until(lambda: engine.load_in_flight)
    engine._call(lambda: 1 / 0)
    for one in (running, held):
        with pytest.raises(EngineError):
            await one
    assert "ZeroDivisionError" in dying.trouble and dying.known == {1, 2}
    with pytest.raises(EngineError):
        await dying.generate(PROMPT, SHORT, 1)
