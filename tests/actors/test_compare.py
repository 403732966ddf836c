"""`repertory compare`, on run folders written by the functions that write every run's."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from actors.compare import evaluations_of, feedback_table, figures_table, show_comparison
from rl.config_file import ConfigError
from rl.episode import Episode, Identity, StopReason
from rl.evaluate import Outcome, report
from rl.reward import Score
from rl.task import Task
from rl.trajectory import to_row, to_trajectory, write_parquet


def evaluated(run: Path, index: int, stage: str, rates: dict[str, list[bool]], **more) -> Path:
    rows = []
    for task, successes in rates.items():
        for sample, success in enumerate(successes):
            played = Episode(Identity(index, 0, task, sample), Task(task, {}, "1"), [], [1, 2], 9, [], StopReason.DONE)
            rows.append(to_row(played, to_trajectory(played), Score(float(success), {}, success), 0.0))
    write_parquet(run / "trajectories" / f"eval-{index:02d}-sampled.parquet", rows)
    found = asdict(report([[Outcome(s, 1, float(s)) for s in r] for r in rates.values()], 1))
    line = {"stage": stage, "objective": "", "stage_index": index, "step": 5 * index, **found, **more}
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return run


def shown(runs, all_stages=False) -> list[str]:
    text = io.StringIO()
    show_comparison(runs, Console(file=text, width=160), all_stages)
    return text.getvalue().splitlines()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Before: a quarter of the samples of each of 12 tasks; after: three quarters, of one task all."""
    run = tmp_path / "one"
    evaluated(run, 0, "base", {f"t{i}": [True, False, False, False] for i in range(12)})
    return evaluated(run, 2, "rl", {f"t{i}": [True, True, True, i == 0] for i in range(12)})


def test_the_stages_of_a_run_against_its_first(run):
    row = next(line for line in shown([run], all_stages=True) if "one: rl, step 10" in line)
    # of 12 differences eleven are 0.5 and one is 0.75: mean 0.521, standard deviation 0.0722, half-width 0.041
    assert "+0.521" in row and "+0.480 to +0.562" in row and "within noise" not in row


def test_the_last_of_each_run_and_a_difference_within_noise(run, tmp_path):
    other = evaluated(tmp_path / "two", 1, "rl", {f"t{i}": [i % 2 == 0] for i in range(4, 20)})
    row = next(line for line in shown([run, other]) if "two: rl" in line)
    assert " 8 " in row, "the tasks that both have played"
    assert "within noise" in row


def test_what_cannot_be_compared_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match="one evaluation is nothing to compare"):
        shown([run])
    with pytest.raises(ConfigError, match="holds no evaluation"):
        shown([run, tmp_path])
    other = evaluated(tmp_path / "two", 1, "rl", {"elsewhere": [True]})
    with pytest.raises(ConfigError, match="0 tasks were played in both"):
        shown([run, other])
    evaluated(tmp_path / "three", 1, "rl", {"t0": [True]}, beside=True)
    with pytest.raises(ConfigError, match="holds no evaluation"):
        shown([run, tmp_path / "three"])


def printed(table) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue()


def test_what_feedback_is_worth(tmp_path):
    """With it 9 of 12 tasks, without it 3 of those: 6 differences of 1, 6 of 0."""
    given = evaluated(tmp_path / "given", 0, "base", {f"t{i}": [i < 9] for i in range(12)})
    without = evaluated(tmp_path / "without", 0, "base", {f"t{i}": [i < 3] for i in range(12)})
    pairs = [(evaluations_of(given)[-1], evaluations_of(without)[-1])]
    row = next(line for line in printed(feedback_table(pairs)).splitlines() if "given: base" in line)
    # standard deviation 0.5222, half-width 1.96 * 0.5222 / sqrt(12) = 0.2955
    assert "0.750" in row and "0.250" in row and "+0.500" in row and "+0.205 to +0.795" in row


def test_every_figure_of_a_report_has_its_row(run):
    rows = printed(figures_table(evaluations_of(run)))
    for name in ("SR_1", "pass@1", "pass@2", "pass@4", "turns with a tool error", "seconds an episode", "12 x 4"):
        assert name in rows
