"""A server's releases: who gets which version, what is added and what is refused, many processes at it. No engine."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from run_folders import evaluate, make_checkpoint
from safetensors.numpy import load_file, save_file

from rl import checkpoint
from rl.config_file import ConfigError
from serve.errors import ApiError
from serve.release import Release, Releases
from serve.release_command import list_releases, promote, rollback
from serve.releases import Book


@pytest.fixture
def run(tmp_path) -> Path:
    """Checkpoints of versions 1, 2 and 3 at steps 10, 20 and 30; a book is in `serve`."""
    run = tmp_path / "agent"
    for version in (1, 2, 3):
        make_checkpoint(run, 10 * version, version)
    return run


@pytest.fixture
def book(run) -> Book:
    book = Book(run / "serve")
    for step in (10, 20, 30):
        book.add(run / "checkpoints" / f"step={step}")
    return book


def of(*numbers: int, **settings) -> Releases:
    return Releases(tuple(Release(v, 10 * v, "", "run", 0.0) for v in numbers), **settings)


# -- who gets which ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_the_canary_gets_its_share_of_keys_and_always_the_same(share):
    releases = of(1, 2).promoted(1).with_canary(2, share)
    keys = [f"session-{i}" for i in range(20_000)]
    chosen = [releases.choose(key) for key in keys]
    expected = share * len(keys)
    assert abs(chosen.count(2) - expected) <= 4 * np.sqrt(expected * (1 - share))
    assert chosen == [of(1, 2).promoted(1).with_canary(2, share).choose(key) for key in keys]


def test_a_larger_share_takes_nobody_back():
    few, many = (of(1, 2).promoted(1).with_canary(2, share) for share in (0.1, 0.3))
    keys = [str(i) for i in range(2000)]
    assert {k for k in keys if few.choose(k) == 2} < {k for k in keys if many.choose(k) == 2}


def test_models_are_named_with_or_without_a_version():
    releases = of(1, 2, 3).promoted(3).without(2, "broken")
    assert releases.named("agent", "agent", "k") == 3
    assert releases.named("agent@1", "agent", "k") == 1
    for unknown in ("agent@9", "agent@2", "agent@", "agent@x", "agent@01", "other", "other@1", ""):
        with pytest.raises(ApiError) as refused:
            releases.named(unknown, "agent", "k")
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_before_anything_is_promoted_there_is_nothing_to_choose():
    with pytest.raises(ApiError) as refused:
        of(1).choose("k")
    assert refused.value.status == 503


# -- promote, roll back --------------------------------------------------------------------------------------------


def test_promoting_remembers_where_to_return_to(book):
    for version in (1, 2, 3):
        book.promote(version)
    now = book.read()
    assert (now.stable, now.previous, now.held) == (3, (1, 2), False)
    back = book.rollback()
    assert (back.stable, back.previous, back.held) == (2, (1,), True)
    assert book.rollback().stable == 1
    with pytest.raises(ConfigError, match="no version to return to"):
        book.rollback()
    assert book.promote(1).held is False
    assert book.promote(1).previous == ()


def test_an_older_version_can_be_promoted_again(book):
    for version in (1, 2, 3, 1):
        book.promote(version)
    assert book.read().previous == (2, 3)


def test_a_canary_stands_beside_the_stable_version_until_it_is_cleared(book):
    book.promote(1)
    now = book.promote(2, 0.25)
    assert (now.stable, now.canary, now.share, now.previous) == (1, 2, 0.25, ())
    assert book.promote(3).canary == 2, "another one's promotion leaves it"
    assert (book.promote(2).canary, book.read().share, book.read().stable) == (None, 0.0, 2)
    book.promote(3, 0.1)
    assert book.promote(3, 0).canary is None and book.read().stable == 2
    book.promote(1, 0.1)
    back = book.rollback()
    assert (back.canary, back.share, back.stable) == (None, 0.0, 3)


def test_a_rollback_with_a_canary_alone_ends_it(book):
    book.promote(1)
    book.promote(2, 0.5)
    back = book.rollback()
    assert (back.stable, back.canary, back.held) == (1, None, True)


@pytest.mark.parametrize(
    ("version", "share", "says"),
    [
        (9, None, "There are: 1, 2, 3"),
        (1, 0.5, "beside another"),
        (2, 1.5, "at most 1"),
        (2, -0.1, "above 0"),
        (2, 0, "not the canary"),
    ],
)
def test_a_promotion_that_cannot_be_says_why_and_changes_nothing(book, version, share, says):
    before = book.promote(1)
    with pytest.raises(ConfigError, match=says):
        book.promote(version, share)
    assert book.read() == before


def test_following_promotes_only_what_is_newer_than_all_that_were_stable_and_not_while_held(book, run):
    assert book.advance(lambda r: r.version < 3) == 2
    book.promote(1)
    assert book.advance(lambda r: r.version < 3) is None, "a person has gone back to 1: 2 is no news"
    assert book.advance(lambda r: True) == 3
    book.rollback()
    book.add(make_checkpoint(run, 40, 4))
    assert book.advance(lambda r: True) is None and book.read().held
    book.promote(1)
    assert book.advance(lambda r: r.version != 4) is None, "nor is 3, that was rolled back"
    assert book.advance(lambda r: True) == 4


# -- adding --------------------------------------------------------------------------------------------------------


def test_a_release_outlives_its_checkpoint_and_leaves_the_learners_state_behind(book, run):
    release = book.read().release(2)
    folder = Path(release.folder)
    assert (release.step, release.source, release.state) == (20, str(run), "ready")
    shutil.rmtree(run / "checkpoints" / "step=20")
    served = {"config.json", "model.safetensors", "model.safetensors.index.json", "state.json", "tokenizer.json"}
    assert {p.name for p in folder.iterdir()} == served
    assert folder == run / "serve" / "versions" / "2"


def test_files_are_links_where_they_can_be_and_copies_where_not(run, monkeypatch):
    source = run / "checkpoints" / "step=10" / "model.safetensors"
    linked = Path(Book(run / "a").add(source.parent).folder) / "model.safetensors"
    assert os.path.samefile(source, linked)

    def other_device(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    copied = Path(Book(run / "b").add(source.parent).folder) / "model.safetensors"
    assert not os.path.samefile(source, copied) and copied.read_bytes() == source.read_bytes()


def test_a_damaged_checkpoint_is_refused_with_its_reason_until_it_is_whole(book, run):
    whole = make_checkpoint(run, 40, 4)
    good = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(good[:-1] + b"?")
    refused = book.add(whole)
    assert refused.state == "refused" and "model.safetensors does not have the checksum" in refused.note
    assert not Path(refused.folder).exists()
    with pytest.raises(ConfigError, match="version 4 was refused: model"):
        book.promote(4)
    (whole / "model.safetensors").write_bytes(good)
    assert book.add(whole).state == "ready" and book.promote(4).stable == 4


def test_a_checkpoint_whose_list_of_files_is_gone_is_refused(book, run):
    folder = make_checkpoint(run, 40, 4)
    (folder / "files.json").unlink()
    assert "files.json is missing" in book.add(folder).note


def test_a_model_of_another_maker_is_version_0_and_its_files_must_open(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"weight": np.zeros(3, np.float32)}, model / "model-00001-of-00002.safetensors")
    index = {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}
    book = Book(tmp_path / "serve")
    assert "config.json" in book.add(model).note
    (model / "config.json").write_text("{}")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "model-00002-of-00002.safetensors cannot be read" in book.add(model).note
    (model / "model-00002-of-00002.safetensors").write_bytes(b"nothing")
    assert "model-00002-of-00002.safetensors cannot be read" in book.add(model).note
    save_file({"bias": np.zeros(3, np.float32)}, model / "model-00002-of-00002.safetensors")
    release = book.add(model)
    assert (release.version, release.state, release.source) == (0, "ready", str(model))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "there is no model" in Book(tmp_path / "serve2").add(tmp_path / "empty").note


def test_a_model_that_was_put_in_anothers_place_is_a_release_anew_when_serving_starts(tmp_path, monkeypatch):
    model, book = tmp_path / "model", Book(tmp_path / "serve")

    def put(value: int) -> None:
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        (model / "config.json").write_text("{}")
        save_file({"weight": np.full(3, value, np.float32)}, model / "model.safetensors")

    def served() -> float:
        book.renew(model)
        folder = Path(book.begin(model).release(0).folder)
        assert book.read().stable == 0
        return float(load_file(folder / "model.safetensors")["weight"][0])

    put(1)
    assert served() == 1.0
    since = book.read().release(0).time
    assert (served(), book.read().release(0).time) == (1.0, since), "the same is left alone"
    put(2)
    book.begin(model)
    assert served() == 2.0


def test_a_checkpoint_whose_version_came_otherwise_is_left_alone(book, run):
    """From the weight store: other files, the same weights."""
    folder = Path(book.read().release(2).folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(run / "checkpoints" / "step=20" / "model.safetensors", folder / "model.safetensors")
    before = book.read()
    book.renew(run / "checkpoints" / "step=20")
    assert book.read() == before


def test_the_same_again_is_left_alone_and_another_of_the_same_number_is_refused(book, run, tmp_path):
    before = book.read()
    assert book.add(run / "checkpoints" / "step=20") == before.release(2) and book.read() == before
    other = make_checkpoint(tmp_path / "other", 20, 2)
    with pytest.raises(ConfigError, match=r"version 2 .*other has one of the same number.*two folders"):
        book.add(other)
    assert book.read() == before


def test_a_run_that_is_moved_keeps_its_releases(run, tmp_path):
    first = Book(run / "serve").begin(run / "checkpoints" / "step=10")
    moved = tmp_path / "elsewhere" / "agent"
    shutil.copytree(run, moved)
    book = Book(moved / "serve")
    assert book.begin(moved / "checkpoints" / "step=10").stable == first.stable
    (release,) = book.read().versions
    assert (release.source, Path(release.folder).parent.parent) == (str(moved), moved / "serve")


def test_a_checkpoint_that_does_not_say_its_version_is_a_mistake_with_a_name(book, run):
    (run / "checkpoints" / "step=20" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json cannot be read"):
        book.add(run / "checkpoints" / "step=20")


def test_what_a_server_starts_with_is_stable_only_where_nothing_is(run):
    book = Book(run / "serve")
    assert book.begin(run / "checkpoints" / "step=10").stable == 1
    after = book.begin(run / "checkpoints" / "step=20")
    assert after.stable == 1 and after.find(2).state == "ready"


def test_a_server_does_not_start_with_what_is_damaged(run):
    (run / "checkpoints" / "step=10" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        Book(run / "serve").begin(run / "checkpoints" / "step=10")


# -- successes -----------------------------------------------------------------------------------------------------


def test_a_success_is_the_runs_last_held_out_one_of_the_version_or_of_the_checkpoints_step(run):
    evaluate(run, 10, 1, 0.3)
    evaluate(run, 10, 1, 0.4)
    evaluate(run, 10, 1, 0.9, split="train")
    evaluate(run, 20, 7, 0.5)  # the run was resumed at step 20, and the weights have another number
    book = Book(run / "serve")
    found = [book.add(run / "checkpoints" / f"step={step}").success for step in (10, 20, 30)]
    assert found == [0.4, 0.5, None]
    evaluate(run, 30, 3, 0.6)
    book.score()
    assert [r.success for r in book.read().versions] == [0.4, 0.5, 0.6]


# -- pruning, refusing later ---------------------------------------------------------------------------------------


def test_pruning_leaves_what_is_used_and_the_newest(run):
    book = Book(run / "serve", keep=2)
    for version in range(1, 10):
        book.add(make_checkpoint(run, 10 * version, version))
    book.promote(2)
    book.promote(4)
    book.promote(1, 0.1)
    book._change(lambda r: r.with_release(replace(r.find(3), state="refused")))
    book._change(lambda r: r.with_release(Release(10, 100, "", str(run), 0.0, "refused", "broken")))
    book.prune()
    assert [r.version for r in book.read().versions] == [1, 2, 4, 8, 9, 10]
    assert sorted(p.name for p in (run / "serve" / "versions").iterdir()) == ["1", "2", "4", "8", "9"]


def test_a_version_that_cannot_be_served_after_all_is_stable_no_longer(book):
    book.promote(1)
    book.promote(2)
    book.promote(3, 0.5)
    after = book.refuse(3, "vLLM would not have it")
    assert (after.stable, after.canary, after.share) == (2, None, 0.0)
    after = book.refuse(2, "nor this")
    assert (after.stable, after.previous, after.note) == (1, (), "version 2 is refused: nor this")
    assert after.find(2).state == "refused" and after.ready == [after.find(1)]
    assert book.refuse(1, "nor that").stable is None


def test_a_rollback_passes_over_what_was_refused_meanwhile(book):
    for version in (1, 2, 3):
        book.promote(version)
    book.refuse(2, "damaged")
    assert book.rollback().stable == 1


# -- the file ------------------------------------------------------------------------------------------------------


def test_what_is_shown_to_clients_names_no_folder(book, run):
    book.promote(2)
    shown = json.loads(json.dumps(book.read().shown()))
    assert shown["stable"] == 2 and [v["version"] for v in shown["versions"]] == [1, 2, 3]
    assert str(run) not in json.dumps(shown)


def test_a_book_reads_what_another_has_written_and_survives_a_move(book, run, tmp_path):
    other = Book(run / "serve")
    assert other.read() == book.read()
    other.promote(3)
    assert book.read().stable == 3
    run.rename(tmp_path / "moved")
    moved = Book(tmp_path / "moved" / "serve").read().release(3)
    assert (Path(moved.folder) / "model.safetensors").is_file()


def test_a_file_that_is_no_json_is_named(book):
    (book.folder / "releases.json").write_text("{")
    with pytest.raises(ConfigError, match=r"releases\.json cannot be read.*Delete it"):
        book.read()


def test_what_a_process_left_that_died_in_the_middle_is_no_obstacle(book, run):
    (book.folder / "versions" / "4").mkdir()
    (book.folder / "versions" / "4" / "half").write_text("")
    folder = Path(book.add(make_checkpoint(run, 40, 4)).folder)
    assert (folder / "model.safetensors").is_file() and not (folder / "half").exists()


def _add_all(run: Path, start, failures) -> None:
    start.wait()
    try:
        book = Book(run / "serve")
        for step in range(10, 90, 10):
            version = book.add(run / "checkpoints" / f"step={step}").version
            book.promote(version)
    except BaseException as error:
        failures.put(repr(error))


def test_many_processes_add_and_promote_and_nothing_is_lost(run):
    for version in range(1, 9):
        make_checkpoint(run, 10 * version, version)
    context = multiprocessing.get_context("fork")
    start, failures = context.Event(), context.Queue()
    processes = [context.Process(target=_add_all, args=(run, start, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert failures.empty(), failures.get()
    releases = Book(run / "serve").read()
    assert [r.version for r in releases.versions] == list(range(1, 9)) and releases.stable == 8
    folders = run / "serve" / "versions"
    assert sorted(p.name for p in folders.iterdir()) == [str(v) for v in range(1, 9)]
    assert all((folders / str(v) / "model.safetensors").is_file() for v in range(1, 9))


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def test_promote_makes_a_release_of_a_checkpoint_and_the_list_shows_it(run, console):
    evaluate(run, 20, 2, 0.625)
    promote(run, "step=10", None, console)
    promote(run, "2", None, console)
    promote(run, "latest", 0.1, console)
    list_releases(run, console)
    text = console.export_text()
    assert "version 3 is the canary, for 10% of sessions" in text and "0.625" in text
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "stable" in rows["2"] and "canary, 10%" in rows["3"] and "previous" in rows["1"]
    promote(run, "3", 0, console)
    assert Book(run / "serve").read().canary is None


def test_best_is_the_best_held_out_success(run, console):
    for version, success in ((1, 0.2), (2, 0.7), (3, 0.5)):
        evaluate(run, 10 * version, version, success)
    promote(run, "best", None, console)
    assert Book(run / "serve").read().stable == 2
    checkpoint.mark_best(run, 30, 0.8)
    promote(run, "best", None, console)
    assert Book(run / "serve").read().stable == 3


def test_a_servers_own_folder_will_do_and_knows_its_run(run, console, tmp_path):
    promote(run, "1", None, console)
    promote(run / "serve", "step=20", None, console)
    assert Book(run / "serve").read().stable == 2
    apart = Book(tmp_path / "apart")
    evaluate(run, 10, 1, 0.9)
    for step in (10, 20, 30):
        apart.add(run / "checkpoints" / f"step={step}")
    for wanted, version in (("latest", 3), ("best", 1), ("step=20", 2)):
        promote(tmp_path / "apart", wanted, None, console)
        assert apart.read().stable == version


def test_rollback_says_what_is_stable_and_that_following_holds(run, console):
    promote(run, "1", None, console)
    promote(run, "2", None, console)
    rollback(run, console)
    list_releases(run, console)
    text = console.export_text()
    assert "version 1 is the stable one again" in text and "held:" in text


def test_the_list_shows_what_is_wrong(run, console):
    (run / "checkpoints" / "step=30" / "model.safetensors").write_bytes(b"")
    book = Book(run / "serve")
    book.add(run / "checkpoints" / "step=30")
    book.note("the [store] is gone")
    list_releases(run, console)
    text = console.export_text()
    assert "refused: model.safetensors has 0 bytes" in text and "! the [store] is gone" in text


def test_mistakes_are_named(run, console, tmp_path):
    with pytest.raises(ConfigError, match="has no release yet: `repertory release promote"):
        list_releases(run, console)
    with pytest.raises(ConfigError, match="neither a run's folder"):
        promote(tmp_path, "1", None, console)
    for wanted in ("9", "step=15", "nonsense"):
        with pytest.raises(ConfigError, match=rf"no version {wanted}.*step=30, step=20, step=10"):
            promote(run, wanted, None, console)
    with pytest.raises(ConfigError, match="no version best"):
        promote(run, "best", None, console)
    (run / "checkpoints" / "step=30" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"version 3 was refused: config\.json is missing"):
        promote(run, "3", None, console)
    promote(run, "latest", None, console)
    assert Book(run / "serve").read().stable == 2, "the newest that is whole"
