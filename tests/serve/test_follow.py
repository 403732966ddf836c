"""Following a run: from its checkpoints, from its weight store, through a gate; and what goes wrong on the way."""

import itertools
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from run_folders import evaluate, make_checkpoint
from safetensors.torch import load_file

from actors.role import bound_threads, remote_class
from actors.weight_store import WeightStore
from rl.config_file import ConfigError
from rl.weights import Manifest, checksum, pack, plan_buckets
from serve.config import ServeConfig
from serve.follow import Follower, follower_of
from serve.release_files import damage, shapes
from serve.releases import Book

NAMESPACE = "test-follow"
PROBE = (5, 6, 7, 8)


@pytest.fixture
def run(tmp_path) -> Path:
    """Version 1 is a checkpoint at step 10."""
    run = tmp_path / "agent"
    make_checkpoint(run, 10, 1)
    return run


@pytest.fixture
def book(run) -> Book:
    return Book(run / "serve")


def follower(run: Path, book: Book, gate: float | None = None) -> Follower:
    return Follower(run, book, poll_s=0.01, gate=gate)


def numbers(book: Book) -> list[int]:
    return [r.version for r in book.read().ready]


# -- checkpoints ---------------------------------------------------------------------------------------------------


async def test_each_new_checkpoint_is_the_stable_version(run, book):
    following = follower(run, book)
    await following.poll()
    assert (book.read().stable, numbers(book)) == (1, [1])
    make_checkpoint(run, 20, 2)
    make_checkpoint(run, 30, 3)
    await following.poll()
    assert (book.read().stable, book.read().previous, numbers(book)) == (3, (1,), [1, 3])


async def test_while_a_person_holds_versions_are_added_and_not_promoted(run, book):
    following = follower(run, book)
    await following.poll()
    make_checkpoint(run, 20, 2)
    await following.poll()
    book.rollback()
    make_checkpoint(run, 30, 3)
    await following.poll()
    assert (book.read().stable, numbers(book)) == (1, [1, 2, 3])
    book.promote(1)
    await following.poll()
    assert book.read().stable == 3, "promoting lets it follow again"


async def test_another_runs_version_in_the_same_book_is_not_promoted(run, book, tmp_path):
    other = make_checkpoint(tmp_path / "other", 10, 9)
    book.add(other)
    await follower(run, book).poll()
    assert book.read().stable == 1


async def test_old_versions_are_pruned_as_new_ones_come(run):
    book = Book(run / "serve", keep=2)
    following = follower(run, book)
    for version in range(2, 10):
        make_checkpoint(run, 10 * version, version)
        await following.poll()
    assert book.read().stable == 9 and numbers(book) == [6, 7, 8, 9], "the stable one, and three to return to"


async def test_a_corrupt_checkpoint_leaves_the_old_version_and_is_told_once(run, book, caplog):
    following = follower(run, book)
    await following.poll()
    model = make_checkpoint(run, 20, 2) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING, "repertory.serve"):
        for _ in range(3):
            await following.poll()
    assert book.read().stable == 1 and book.read().find(2).state == "refused"
    assert book.read().note == (
        "step=20 is refused: model.safetensors does not have the checksum that it was written with"
    )
    assert len(caplog.records) == 1
    make_checkpoint(run, 30, 3)
    await following.poll()
    assert (book.read().stable, book.read().note) == (3, "")


async def test_beside_a_corrupt_checkpoint_the_newest_whole_one_is_taken(run, book):
    make_checkpoint(run, 20, 2)
    (make_checkpoint(run, 30, 3) / "state.json").write_text("{")
    (make_checkpoint(run, 40, 4) / "config.json").unlink()
    await follower(run, book).poll()
    assert book.read().stable == 2 and book.read().note.startswith("step=40 is refused: config.json is missing")


async def test_a_checkpoint_that_is_written_again_is_looked_at_again(run, book):
    following = follower(run, book)
    (make_checkpoint(run, 20, 2) / "config.json").unlink()
    await following.poll()
    shutil.rmtree(run / "checkpoints" / "step=20")
    make_checkpoint(run, 20, 2)
    await following.poll()
    assert (book.read().stable, book.read().note) == (2, "")


async def test_a_checkpoint_is_read_once(run, book, monkeypatch):
    following = follower(run, book)
    await following.poll()
    monkeypatch.setattr("rl.checkpoint.damage", lambda folder: pytest.fail("gigabytes, every two seconds"))
    await following.poll()


async def test_a_half_written_checkpoint_is_none(run, book):
    partial = run / "checkpoints" / ".step=20.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    await follower(run, book).poll()
    assert (book.read().stable, book.read().note) == (1, "")


async def test_whatever_fails_is_noted_and_tried_again(run, book, monkeypatch, caplog):
    following = follower(run, book)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("serve.releases.link_files", full)
        await following.poll()
        await following.poll()
    assert "No space left" in book.read().note and len(caplog.records) == 1
    await following.poll()
    assert (book.read().stable, book.read().note) == (1, "")


async def test_what_a_replica_has_noted_stays(run, book):
    following = follower(run, book)
    await following.poll()
    make_checkpoint(run, 20, 2)
    await following.poll()
    book.refuse(2, "the engine would not have it")
    await following.poll()
    assert (book.read().stable, book.read().note) == (1, "version 2 is refused: the engine would not have it")


async def test_a_folder_that_nothing_can_be_written_to_ends_nothing(run, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    await follower(run, Book(tmp_path / "file")).poll()
    assert "the releases cannot be written" in caplog.text


async def test_a_run_that_is_gone_changes_nothing(run, book):
    following = follower(run, book)
    await following.poll()
    (run / "checkpoints").rename(run / "elsewhere")
    await following.poll()
    assert book.read().stable == 1


# -- the gate ------------------------------------------------------------------------------------------------------


async def test_through_a_gate_comes_only_what_is_held_out_good_enough(run, book):
    following = follower(run, book, gate=0.5)
    await following.poll()
    assert (book.read().stable, numbers(book)) == (None, [1]), "never evaluated"
    evaluate(run, 10, 1, 0.9, split="train")
    await following.poll()
    assert book.read().stable is None, "not on held-out tasks"
    evaluate(run, 10, 1, 0.5)
    await following.poll()
    assert book.read().stable == 1
    make_checkpoint(run, 20, 2)
    evaluate(run, 20, 2, 0.49)
    await following.poll()
    assert (book.read().stable, numbers(book)) == (1, [1, 2])


async def test_the_version_that_passed_is_promoted_and_not_the_newest(run, book):
    following = follower(run, book, gate=0.5)
    for version in (2, 3, 4):
        make_checkpoint(run, 10 * version, version)
    evaluate(run, 30, 3, 0.8)
    await following.poll()
    assert (book.read().stable, numbers(book)) == (3, [3, 4]), "fetched, though a newer one was there"


# -- the weight store ----------------------------------------------------------------------------------------------


class Rank:
    """Stands for a learner's rank: publishes tensors that say which version they are, in buckets of one tensor."""

    def _tensors(self, version: int) -> dict[str, torch.Tensor]:
        return {f"layer.{i}": torch.full((8, 8), version + i / 2, dtype=torch.bfloat16) for i in range(3)}

    def prepare(self, version: int, step: int, what: str, against: int | None = None):
        shapes = {name: tensor.shape for name, tensor in self._tensors(version).items()}
        self._buckets = buckets = plan_buckets(shapes, "bfloat16", 1 << 20 if what == "one bucket" else 128)
        logprobs = np.asarray([-0.5, -1.0, -1.5], np.float32)
        base = 0 if what == "adapter" else None
        return Manifest(version, step, "bfloat16", tuple(buckets), PROBE, logprobs, base), 0.0

    def bucket(self, version: int, index: int):
        data = pack(self._buckets[index], self._tensors(version), "bfloat16")
        return data, checksum(data), ray.get_runtime_context().get_node_id(), False


class LyingStore(WeightStore):
    """Its buckets do not have the checksums that it tells."""

    async def bucket(self, version: int, index: int):
        manifest, ref = await super().bucket(version, index)
        wrong = tuple(replace(b, checksum="0" * 16) for b in manifest.buckets)
        return replace(manifest, buckets=wrong), ref

    async def pin(self, version: int, reader: str) -> Manifest:
        await super().pin(version, reader)
        return (await self.bucket(version, 0))[0]


def options() -> dict:
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    return {"num_cpus": 0, "runtime_env": {"env_vars": {**bound_threads(1), "PYTHONPATH": path}}}


@pytest.fixture(scope="module")
def rank(ray_cluster):
    made = ray.remote(Rank).options(**options()).remote()
    yield made
    ray.kill(made)


@pytest.fixture(scope="module")
def shared(rank):
    store = make_store("shared", WeightStore)
    yield store
    ray.kill(store)


@pytest.fixture
def store(shared, run):
    """The run's."""
    tell(run, "shared")
    return shared


def make_store(name: str, cls: type):
    return remote_class(cls).options(name=name, namespace=NAMESPACE, max_concurrency=8, **options()).remote()


def tell(run: Path, name: str) -> None:
    (run / "store.json").write_text(json.dumps({"store": name, "namespace": NAMESPACE}))


NUMBERS = itertools.count(5)
"""Versions of the shared store: none is used twice."""


async def publish(store, rank, version: int, step: int, what: str = "all") -> None:
    await store.publish.remote(version, step, [rank], what)


async def test_while_the_run_trains_its_newest_version_comes_from_the_store(run, book, store, rank):
    v = next(NUMBERS)
    await publish(store, rank, v, 40)
    await follower(run, book).poll()
    release = book.read().release(v)
    assert (book.read().stable, release.step, release.source, numbers(book)) == (v, 40, str(run), [v])
    folder = Path(release.folder)
    assert damage(folder) is None and shapes(folder) == {f"layer.{i}": (8, 8) for i in range(3)}
    files = sorted(p.name for p in folder.glob("model*"))
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    assert float(load_file(folder / files[1])["layer.1"][0, 0]) == v + 0.5
    assert json.loads((folder / "tokenizer.json").read_text()) == {"a": 1}
    assert not (folder / "state.json").exists() and not list(book.folder.glob(".store-*"))
    probe = json.loads((folder / "probe.json").read_text())
    assert probe == {"tokens": list(PROBE), "logprobs": [-0.5, -1.0, -1.5], "bound": 1e-3}
    newer = next(NUMBERS)
    await publish(store, rank, newer, 41)
    await follower(run, book).poll()
    assert book.read().stable == newer and (await store.status.remote())["kept"] == [newer], "nothing stays pinned"


async def test_through_the_gate_a_stores_version_needs_an_evaluation_of_its_own(run, book, store, rank):
    """The store tells the step that was under way: an evaluation of that step is of other weights."""
    v = next(NUMBERS)
    await publish(store, rank, v, 40)
    following = follower(run, book, gate=0.5)
    evaluate(run, 40, v - 1, 0.9)
    await following.poll()
    assert (book.read().stable, book.read().release(v).success) == (None, None)
    evaluate(run, 41, v, 0.6)
    await following.poll()
    assert (book.read().stable, book.read().release(v).success) == (v, 0.6)


async def test_a_version_in_one_file_has_no_index_of_the_checkpoints_files(run, book, store, rank):
    v = next(NUMBERS)
    await publish(store, rank, v, 40, "one bucket")
    await follower(run, book).poll()
    assert [p.name for p in Path(book.read().release(v).folder).glob("model*")] == ["model.safetensors"]


async def test_an_adapter_alone_is_left_and_checkpoints_are_followed(run, book, store, rank):
    v = next(NUMBERS)
    await publish(store, rank, v, 40, "adapter")
    await follower(run, book).poll()
    assert (book.read().stable, numbers(book)) == (1, [1])
    assert f"version {v} in the weight store is a LoRA adapter alone" in book.read().note


async def test_from_an_empty_store_to_the_trainers_end(run, book, rank):
    """A store that holds nothing yet; its version, and the checkpoint of it, which are one release; and no store."""
    store, following = make_store("own", WeightStore), follower(run, book)
    tell(run, "own")
    await following.poll()
    assert book.read().stable == 1 and "holds nothing yet" in book.read().note
    await publish(store, rank, 2, 40)
    await following.poll()
    assert (book.read().stable, book.read().note) == (2, "")
    ray.kill(store)
    make_checkpoint(run, 41, 2)
    await following.poll()
    assert numbers(book) == [1, 2] and "weight store is gone" in book.read().note
    make_checkpoint(run, 50, 8)
    await following.poll()
    assert book.read().stable == 8, "its checkpoints are followed"


async def test_bytes_that_are_not_what_was_published_are_not_served(run, book, rank):
    store = make_store("lying", LyingStore)
    tell(run, "lying")
    await publish(store, rank, 5, 40)
    await follower(run, book).poll()
    assert (book.read().stable, numbers(book)) == (1, [1])
    assert "ChecksumError" in book.read().note and "checkpoints are followed" in book.read().note
    ray.kill(store)


async def test_a_store_file_of_a_run_that_has_ended_is_no_store(run, book, ray_cluster):
    (run / "store.json").write_text(json.dumps({"store": "weights", "namespace": "long-gone"}))
    await follower(run, book).poll()
    assert (book.read().stable, book.read().note) == (1, "")


# -- how it is made ------------------------------------------------------------------------------------------------


def test_a_training_run_says_where_its_store_is(trained):
    where = json.loads((trained / "store.json").read_text())
    assert where["store"] == "weights-agent" and where["namespace"].startswith("repertory-agent-")


@pytest.mark.parametrize(("dtype", "bound"), [(None, 1e-3), ("float32", 1e-3), ("bfloat16", 0.1)])
def test_the_bound_is_that_of_the_precision_that_is_served_in(trained, dtype, bound):
    made = follower_of(ServeConfig.model_validate({"model": str(trained), "engine": {"dtype": dtype}}))
    assert made._bound == bound and made._book.folder == trained / "serve"


def test_a_model_of_no_run_cannot_be_followed(trained):
    config = ServeConfig(model=str(trained / "initial"))
    with pytest.raises(ConfigError, match="is of no run"):
        follower_of(config)
