"""Evaluations side by side: of several runs, or of the stages of one, and what their differences are worth."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rl.config_file import ConfigError
from rl.evaluate import Difference, paired_difference
from rl.metrics import read_lines


@dataclass(frozen=True)
class Evaluation:
    """name: the run, and where in it. rates: success by task."""

    name: str
    line: dict[str, Any]
    rates: dict[str, float]


def show_comparison(runs: Sequence[Path], console: Console, all_stages: bool = False) -> None:
    """The last evaluation of each run (or all of them), each against the first. Raises ConfigError."""
    evaluations = [e for run in runs for e in (evaluations_of(run) if all_stages else evaluations_of(run)[-1:])]
    if len(evaluations) < 2:
        raise ConfigError("one evaluation is nothing to compare: name another run, or give --all for all of this one's")
    for e in evaluations[1:]:
        if isinstance(found := difference(evaluations[0], e), str):
            raise ConfigError(f"{evaluations[0].name} and {e.name}: {found}")
    console.print(comparison_table(evaluations))


def comparison_table(evaluations: Sequence[Evaluation]) -> Table:
    """Each evaluation's success, and its difference to the first one's."""
    table = _table("success on the same tasks, against the first", "evaluation", "tasks", "success", "95 %")
    for column in ("in both", "difference", "95 %", ""):
        table.add_column(column, justify="right")
    first = evaluations[0]
    for e in evaluations:
        own = [str(e.line["n"]), f"{e.line['success']:.3f}", _interval(e.line)]
        table.add_row(e.name, *own, *([""] * 4 if e is first else _cells(difference(first, e))))
    return table


def feedback_table(pairs: Sequence[tuple[Evaluation, Evaluation]]) -> Table:
    """Of each pair, with the environment's feedback and without: what the feedback is worth (MINT's delta_feedback)."""
    table = _table("what feedback is worth: success with it - success without", "evaluation", "with", "without")
    for column in ("in both", "Δ feedback", "95 %", ""):
        table.add_column(column, justify="right")
    for given, without in pairs:
        own = [f"{e.line['success']:.3f}" for e in (given, without)]
        table.add_row(given.name, *own, *_cells(difference(without, given)))
    return table


def figures_table(evaluations: Sequence[Evaluation]) -> Table:
    """Everything that a report holds, a row a figure, an evaluation a column."""
    lines = [e.line for e in evaluations]
    table = _table("evaluation" if len(lines) == 1 else "evaluations", "", *(e.name for e in evaluations))

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        cells = [cell(line) for line in lines]
        if any(cells):
            table.add_row(name, *cells)

    def number(name: str, key: str, form: str) -> None:
        row(name, lambda line: "" if line.get(key) is None else format(line[key], form))

    def by_number(name: str, key: str) -> None:
        for k in sorted({int(k) for line in lines for k in line[key]}):
            row(f"{name}{k}", lambda line: f"{found:.3f}" if (found := _at(line[key], k)) is not None else "")  # noqa: B023

    row("tasks", lambda line: f"{line['n']}" + (f" x {line['samples']}" if line["samples"] > 1 else ""))
    number("success", "success", ".3f")
    row("95 %", _interval)
    number("success, greedy", "success_greedy", ".3f")
    by_number("SR_", "success_by_turn_budget")
    number("a turn more (slope)", "turn_slope", "+.3f")
    by_number("pass@", "pass_at")
    number("turns", "mean_turns", ".2f")
    number("tokens", "mean_tokens", ".0f")
    number("turns with a tool error", "tool_errors", ".1%")
    number("episodes cut short", "truncated", ".1%")
    number("reward", "mean_reward", ".3f")
    number("seconds an episode", "mean_seconds", ".2f")
    number("seconds in all", "wall_s", ".1f")
    for key, name in (("not_played", "episodes not played"), ("not_graded", "episodes not graded")):
        if any(line.get(key) for line in lines):
            number(name, key, "d")
    return table


def difference(first: Evaluation, other: Evaluation) -> Difference | str:
    """other - first, task by task; or why there is none."""
    try:
        return paired_difference(first.rates, other.rates)
    except ValueError as error:
        return str(error)


def as_told(found: Difference | str, to: Evaluation) -> dict[str, Any]:
    """A difference as JSON."""
    return {"to": to.name, **(asdict(found) if isinstance(found, Difference) else {"none": found})}


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _cells(found: Difference | str) -> list[str]:
    if isinstance(found, str):
        return ["", "", "", found]
    noise = "" if found.beyond_noise else "within noise"
    return [str(found.n), f"{found.mean:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}", noise]


def _interval(line: dict[str, Any]) -> str:
    return f"{line['success_low']:.3f} to {line['success_high']:.3f}"


def _at(values: dict[Any, float], k: int) -> float | None:
    """Of a mapping whose numbers JSON has made texts."""
    return values.get(str(k))


def evaluations_of(run: Path) -> list[Evaluation]:
    """A run's evaluations whose episodes were kept, in order. Raises ConfigError when there is none."""
    found = []
    for line in read_lines(run / "eval.jsonl"):
        path = run / "trajectories" / f"eval-{line['stage_index']:02d}-sampled.parquet"
        if line.get("beside") or "success_low" not in line or not path.is_file():
            continue
        by_task = defaultdict(list)
        for row in pq.read_table(path, columns=["task", "success"]).to_pylist():
            by_task[row["task"]].append(row["success"])
        after = f"{line['stage']} {line.get('objective', '')}".strip()
        after += "" if "endpoint" in line else f", step {line['step']}"
        rates = {task: fmean(successes) for task, successes in by_task.items()}
        found.append(Evaluation(f"{run.name}: {after}", line, rates))
    if not found:
        raise ConfigError(f"{run} holds no evaluation: `repertory eval {run}` makes one")
    return found
