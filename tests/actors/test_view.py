"""`repertory view`, on a run folder written by the functions that write every run's."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from actors.view import shares, show_run, sparkline, split_messages
from rl.config import Config
from rl.config_file import ConfigError, dump_config
from rl.episode import Episode, Identity, StopReason, Turn
from rl.metrics import Sinks
from rl.reward import Score
from rl.task import Task
from rl.trajectory import to_row, to_trajectory, write_parquet

CONFIG = Config.model_validate(
    {
        "run": {"name": "tiny"},
        "model": {"scratch": {}},
        "env": {"name": "calculator"},
        "stages": [{"kind": "eval", "n": 1}, {"kind": "rl", "steps": 12}, {"kind": "eval", "n": 1}],
    }
)


def episode(step: int, text: str, flags: tuple[str, ...] = ()) -> Episode:
    """Prompt of 3 tokens; a turn of 2 under version 4 and an observation of 1; a turn of 2 under versions 4 and 5."""
    call = Turn(
        [10, 11], [-0.5, -7.25], [4, 4], False, text, 0.0, flags, [{"role": "tool", "content": "\x1b[31m"}], [20]
    )
    final = Turn([12, 13], [-0.25, -0.75], [4, 5], False, "final 12", 1.0)
    task = Task(f"task{step}", None, "12", 0)
    prompt = [{"role": "user", "content": "5+7"}]
    return Episode(Identity(1, step, task.id), task, prompt, [1, 2, 3], 9, [call, final], StopReason.DONE, 0.5)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(CONFIG))
    sinks = Sinks(folder, CONFIG)
    for step in range(12):
        sinks.metrics(
            {
                "stage": "rl", "stage_index": 1, "step": step + 1, "stage_step": step + 1, "version": step + 1,
                "reward/mean": step / 11, "reward/success": step / 11, "actor/kl": float("nan"),
                "mismatch/kl": 2e-5, "perf/tokens_per_second": 1234.0, "timing_s/step": 2.5,
            }
        )  # fmt: skip
        success = step % 2 == 1
        played = episode(step, "[red]call[/nothing]", () if success else ("tool_error",))
        row = to_row(played, to_trajectory(played), Score(float(success), {"outcome": float(success)}, success), 0.5)
        write_parquet(folder / "trajectories" / f"rl-01-{step:05d}.parquet", [row])
    sinks.evaluation(
        {
            "stage": "base", "stage_index": 0, "step": 0, "version": 0, "split": "held_out", "n": 1,
            "success": 0.125, "success_greedy": None, "mean_turns": 2.0,
        }
    )  # fmt: skip
    return folder


def shown(run: Path, **options: object) -> str:
    """What a terminal of 120 columns would be given, escape sequences included."""
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=bool(options.pop("terminal", False)))
    asked = {"episodes": 1, "success": None, "step": None, "flag": None, "tokens": False, **options}
    show_run(run, console, **asked)  # type: ignore[arg-type]
    return out.getvalue()


def test_says_where_the_run_stands_and_how_it_went(run: Path) -> None:
    text = shown(run)
    assert "tiny  at stage 3 of 3 · 12 optimizer steps · weight version 12" in text
    assert "✓ 2 rl 12/12" in text and "▶ 3 eval" in text
    assert "0.125" in text
    assert "▁" in text and "█" in text
    rows = [line.split() for line in text.splitlines() if "1,234" in line]
    assert len(rows) == 10 and rows[0][0] == "0" and rows[-1][0] == "10-11"
    assert rows[0][3] == "-", "a KL that was not finite is no number"


def test_an_episode_turn_by_turn(run: Path) -> None:
    text = shown(run, step=3)
    assert "success · reward 1 (outcome 1) · advantage +0.50 · stopped: done" in text
    assert "turn 1 · 2 tokens · v4 · log-prob -3.88 a token, least likely '#11' -7.25 · reward 0" in text
    assert "turn 2 · 2 tokens · v4→v5 · log-prob -0.50 a token, least likely '#13' -0.75 · reward 1" in text


def test_what_a_model_said_is_neither_markup_nor_a_control_sequence(run: Path) -> None:
    text = shown(run, terminal=True)
    assert "[red]call[/nothing]" in text
    assert "\\x1b[31m" in text, "spelled out"
    assert "tool" in text and "\x1b[31m\x1b" not in text


@pytest.mark.parametrize(
    ("asked", "files"),
    [
        ({"episodes": 2}, [11, 10]),
        ({"episodes": 2, "success": False}, [10, 8]),
        ({"episodes": 9, "step": 4}, [4]),
        ({"episodes": 2, "flag": "tool_error"}, [10, 8]),
        ({"episodes": 9, "success": False, "step": 6, "flag": "tool_error"}, [6]),
    ],
)
def test_the_newest_episodes_that_match(run: Path, asked: dict[str, object], files: list[int]) -> None:
    text = shown(run, **asked)
    found = [line for line in text.splitlines() if line.startswith("episode ")]
    assert [int(line.split("rl-01-")[1][:5]) for line in found] == files


def test_files_are_opened_only_until_enough_is_found(run: Path) -> None:
    (run / "trajectories" / "rl-01-00000.parquet").write_text("not Parquet: opening it would fail")
    text = shown(run, episodes=2, flag="tool_error")
    assert "2 shown · 2 match --flag tool_error of 4 episodes looked at, in the newest 4 of 12 files" in text


def test_tokens_are_told_apart_by_the_mask(run: Path) -> None:
    lines = [line.strip() for line in shown(run, tokens=True).splitlines()]
    assert lines[lines.index("prompt: 3 tokens, not trained on") + 1] == "#1│#2│#3"
    assert lines[lines.index("observation: 1 tokens, not trained on") + 1] == "#20"
    cells = " ".join(lines)
    assert "'#10' -0.50 v4" in cells and "'#11' -7.25 v4" in cells and "'#13' -0.75 v5" in cells


def test_nothing_matches(run: Path) -> None:
    with pytest.raises(ConfigError, match="none of 12 episodes matches --success --step 4") as error:
        shown(run, success=True, step=4)
    assert "steps: rl 0-11" in str(error.value) and "tool_error (6)" in str(error.value)


def test_a_run_without_episodes_is_shown(run: Path) -> None:
    for path in (run / "trajectories").iterdir():
        path.unlink()
    assert "no episodes yet" in shown(run)
    with pytest.raises(ConfigError, match="has written none yet"):
        shown(run, flag="truncated")


def test_not_a_run_folder_is_one_line_and_exit_code_2(run: Path) -> None:
    command = [str(Path(sys.executable).parent / "repertory"), "view"]
    done = subprocess.run([*command, "/nonexistent"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nonexistent is not a run folder: no such folder")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(ConfigError, match=f"Did you mean {run}"):
        shown(run / "trajectories")


def test_a_prompt_may_hold_assistant_messages() -> None:
    messages = [{"role": role} for role in ("user", "assistant", "user", "assistant", "tool", "assistant")]
    prompt, turns = split_messages(messages, 2)
    assert prompt == messages[:3] and turns == [messages[3:5], messages[5:]]
    assert split_messages(messages[:3], 0) == (messages[:3], [])


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 60) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0], 60) == "▁▁"
    assert [list(part) for part in shares(range(7), 3)] == [[0, 1], [2, 3], [4, 5, 6]]
