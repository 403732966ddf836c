"""What a finished run tells: its evaluations, one task before and after, and where everything lies."""

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rl import checkpoint
from rl.metrics import read_lines
from rl.trajectory import read_parquet

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def show_summary(run: Path, console: Console) -> None:
    evaluations = [line for line in read_lines(run / "eval.jsonl") if not line.get("beside")]
    if evaluations:
        console.print(evaluation_table(evaluations))
    if len(evaluations) > 1:
        show_before_and_after(run, evaluations[-2], evaluations[-1], console)
    if (best := checkpoint.best(run)) is not None:
        told = f"step={best['step']}, held-out success {best['success']:.3f}"
        console.print(f"\nthe best checkpoint: {told}", highlight=False)
    console.print(f"\nEverything lies in {run}", highlight=False, soft_wrap=True)
    for name, what in (
        ("config.yaml", "the resolved configuration"),
        ("metrics.jsonl", "a line a step"),
        ("eval.jsonl", "a line an evaluation"),
        ("trajectories", "every episode as Parquet; `repertory view` shows them"),
        ("checkpoints/best", "the best one by held-out success, as the rl stage went on"),
        ("checkpoints/latest", "Hugging Face format: plain transformers and plain vLLM load it"),
        ("wandb", "the wandb run"),
        ("logs", "the run's log, and every actor's process id and peak memory"),
    ):
        if (run / name).exists():
            console.print(f"  {name:<20} {what}", highlight=False, soft_wrap=True)


def evaluation_table(evaluations: list[dict[str, Any]]) -> Table:
    """base, SFT, RL: one row an evaluation."""
    table = Table(title="held-out tasks" if all(e["split"] == "held_out" for e in evaluations) else "evaluations")
    table.add_column("after")
    success = ("success (sampled)", "95 %", "success (greedy)")
    for column in ("step", "tasks", *success, "mean turns", "tokens", "tool errors"):
        table.add_column(column, justify="right")
    for e in evaluations:
        greedy = "" if e["success_greedy"] is None else f"{e['success_greedy']:.3f}"
        told = "success_low" in e  # or the run is older than intervals are
        table.add_row(
            f"{e['stage']} {e.get('objective', '')}".strip(),
            str(e["step"]),
            str(e["n"]),
            f"{e['success']:.3f}",
            f"{e['success_low']:.3f}-{e['success_high']:.3f}" if told else "",
            greedy,
            f"{e['mean_turns']:.2f}",
            f"{e['mean_tokens']:.0f}" if told and e["mean_tokens"] is not None else "",
            f"{e['tool_errors']:.1%}" if told else "",
        )
    return table


def show_before_and_after(run: Path, before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    """A task that failed in one evaluation and succeeded in the next, turn by turn."""
    rows = [_episodes(run, e) for e in (before, after)]
    task = next((t for t, r in rows[0].items() if not r["success"] and rows[1].get(t, {}).get("success")), None)
    if task is None:
        return
    for name, row in ((before["stage"], rows[0][task]), (after["stage"], rows[1][task])):
        console.print(f"\n[bold]one task after {name}[/]  (answer {escape(row['answer'])}, reward {row['reward']:g})")
        show_messages(row, console)


def show_messages(row: dict[str, Any], console: Console) -> None:
    """A conversation, a line a message."""
    for message in json.loads(row["messages"]):
        content = message["content"] if isinstance(message["content"], str) else json.dumps(message["content"])
        console.print(f"  [cyan]{message['role']:>9}[/]  {escape(printable(content))}", highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Control and direction characters spelled out: what a model says must not steer the terminal."""
    return _UNPRINTABLE.sub(lambda m: f"\\u{ord(m[0]):04x}" if ord(m[0]) > 255 else f"\\x{ord(m[0]):02x}", text)


def _episodes(run: Path, evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    path = run / "trajectories" / f"eval-{evaluation['stage_index']:02d}-sampled.parquet"
    return {row["task"]: row for row in read_parquet(path)} if path.is_file() else {}
