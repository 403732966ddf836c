"""What stays of a run's folder that another run takes over."""

import pytest

from actors.run_folder import owning


@pytest.fixture
def folder(tmp_path):
    for name in ("config.yaml", "checkpoints/step=1/state.json", "serve/releases.json", "serve/versions/1/model",
                 "serve/sessions/a.jsonl", "serve/keys.json", "serve/feedback/a.parquet"):  # fmt: skip
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "run"


def left(folder) -> list[str]:
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    return sorted(name for name in files if not name.endswith(".lock"))


def test_overwriting_keeps_what_people_have_given(folder):
    with owning(folder, resume=False, overwrite=True):
        assert left(folder) == ["serve/feedback/a.parquet", "serve/keys.json"]
        assert sorted(p.name for p in (folder / "serve").iterdir()) == ["feedback", "keys.json"]


def test_a_server_with_neither_keys_nor_feedback_leaves_nothing(folder):
    (folder / "serve" / "keys.json").unlink()
    (folder / "serve" / "feedback" / "a.parquet").unlink()
    (folder / "serve" / "feedback").rmdir()
    with owning(folder, resume=False, overwrite=True):
        assert not (folder / "serve").exists()


def test_resuming_keeps_all_of_it(folder):
    before = left(folder)
    with owning(folder, resume=True, overwrite=False):
        assert left(folder) == before
