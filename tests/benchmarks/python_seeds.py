"""`make python`: configs/smollm2_python.yaml with three seeds, as a table and as the README's picture.

A finished run is not made again, and one that was stopped goes on from its newest checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from objectives import finished
from rich.console import Console
from rich.table import Table
from scipy.stats import sem, t

from actors.compare import evaluations_of
from rl.evaluate import paired_difference
from rl.metrics import read_lines

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "smollm2_python.yaml"
PICTURE = ROOT / "configs" / "smollm2_python.svg"
RUNS = ROOT / "runs" / "smollm2-python"
SEEDS = (0, 1, 2)


def main() -> None:
    runs = [RUNS / f"seed={seed}" for seed in SEEDS]
    for seed, run in zip(SEEDS, runs, strict=True):
        finished(CONFIG, run, 3, f"run.seed={seed}")
    table = Table("seed", "plain", "after SFT", "after RL", "RL - SFT, 95 %", "greedy: SFT, RL", "minutes")
    gains = []
    for seed, run in zip(SEEDS, runs, strict=True):
        plain, sft, rl = evaluations_of(run)
        gain = paired_difference(sft.rates, rl.rates)
        gains.append(gain.mean)
        table.add_row(
            str(seed), *(_with_interval(e.line) for e in (plain, sft, rl)),
            f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
            f"{sft.line['success_greedy']:.3f}, {rl.line['success_greedy']:.3f}", f"{rl.line['time_s'] / 60:.1f}",
        )  # fmt: skip
    low, high = t.interval(0.95, len(gains) - 1, fmean(gains), sem(gains))
    table.caption = f"RL - SFT over seeds: {fmean(gains):+.3f}, 95 % {low:+.3f} to {high:+.3f}"
    Console(width=140).print(table)
    PICTURE.write_text(picture(runs))


def _with_interval(line: dict[str, Any]) -> str:
    return f"{line['success']:.3f} ({line['success_low']:.3f} to {line['success_high']:.3f})"


# -- the picture ------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 300, 56, 24, 16, 48
COLOURS = ("#4477aa", "#ee6677", "#228833")


def picture(runs: Sequence[Path]) -> str:
    """Success of each RL step's training episodes by seed, and held-out success before, between and after as dots."""
    curves = [[x["reward/success"] for x in read_lines(r / "metrics.jsonl") if x["stage"] == "rl"] for r in runs]
    last = max(map(len, curves))

    def x(step: float) -> float:  # two more on the left, for the plain model
        return LEFT + (step + 2) / (last + 3) * (WIDTH - LEFT - RIGHT)

    def y(success: float) -> float:
        return TOP + (1 - success) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img"><title>{CONFIG.stem}: success by RL step, three seeds</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for step, label in [(-1.5, "plain"), (0, "SFT"), *((s, str(s)) for s in range(4, last + 1, 4)), (last + 0.7, "RL")]:
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">RL step</text>')
    parts.append(f'<text x="{LEFT}" y="14">success: lines in training, dots on 200 held-out tasks with 95 %</text>')
    for number, (run, curve, colour) in enumerate(zip(runs, curves, COLOURS, strict=True)):
        points = " ".join(f"{x(i):.1f},{y(s):.1f}" for i, s in enumerate(curve, 1))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for at, evaluation in zip((-1.5, 0, last + 0.7), evaluations_of(run), strict=True):
            e, middle = evaluation.line, x(at) + 5 * (number - 1)
            low, high = y(e["success_low"]), y(e["success_high"])
            parts.append(f'<path d="M{middle:.1f} {low:.1f} V{high:.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{middle:.1f}" cy="{y(e["success"]):.1f}" r="3.5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
