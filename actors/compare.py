"""Evaluations side by side: of several runs, or of the stages of one, and what their differences are worth."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rl.config_file import ConfigError
from rl.evaluate import paired_difference
from rl.metrics import read_lines


@dataclass(frozen=True)
class Evaluation:
    """name: the run, and where in it. rates: success by task."""

    name: str
    line: dict[str, Any]
    rates: dict[str, float]


def show_comparison(runs: Sequence[Path], console: Console, all_stages: bool = False) -> None:
    """The last evaluation of each run (or all of them), each against the first. Raises ConfigError."""
    evaluations = [e for run in runs for e in (_evaluations(run) if all_stages else _evaluations(run)[-1:])]
    if len(evaluations) < 2:
        raise ConfigError("one evaluation is nothing to compare: name another run, or give --all for all of this one's")
    table = Table(title="success on the same tasks, against the first")
    table.add_column("evaluation")
    for column in ("tasks", "success", "95 %", "in both", "difference", "95 %", ""):
        table.add_column(column, justify="right")
    first = evaluations[0]
    for e in evaluations:
        line = e.line
        own = [str(line["n"]), f"{line['success']:.3f}", f"{line['success_low']:.3f} to {line['success_high']:.3f}"]
        table.add_row(e.name, *own, *([""] * 4 if e is first else _difference(first, e)))
    console.print(table)


def _difference(first: Evaluation, other: Evaluation) -> list[str]:
    try:
        found = paired_difference(first.rates, other.rates)
    except ValueError as error:
        raise ConfigError(f"{first.name} and {other.name}: {error}") from None
    noise = "" if found.beyond_noise else "within noise"
    return [str(found.n), f"{found.mean:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}", noise]


def _evaluations(run: Path) -> list[Evaluation]:
    """A run's evaluations whose episodes were kept, in order."""
    found = []
    for line in read_lines(run / "eval.jsonl"):
        path = run / "trajectories" / f"eval-{line['stage_index']:02d}-sampled.parquet"
        if line.get("beside") or "success_low" not in line or not path.is_file():
            continue
        by_task = defaultdict(list)
        for row in pq.read_table(path, columns=["task", "success"]).to_pylist():
            by_task[row["task"]].append(row["success"])
        after = f"{line['stage']} {line.get('objective', '')}".strip()
        rates = {task: fmean(successes) for task, successes in by_task.items()}
        found.append(Evaluation(f"{run.name}: {after}, step {line['step']}", line, rates))
    if not found:
        raise ConfigError(f"{run} holds no evaluation: `repertory eval {run}` makes one")
    return found
