"""`make objectives`: every objective from the same SFT, three seeds, as a table and as objectives.json.

    python tests/benchmarks/objectives.py [OBJECTIVE ...]

A seed is a run of configs/objectives.yaml, all of its objectives or those that are named. What was stopped goes on from
its newest checkpoint, and a finished run is not made again.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from rl import checkpoint
from rl.config_file import load_config
from rl.config_stage import EvalStage, Stage
from rl.metrics import read_lines

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "objectives.yaml"
RUNS = ROOT / "runs" / "objectives"
SEEDS = (0, 1, 2)
PREFERENCE = {"sigmoid": "m_dpo", "kto": "m_kto"}


def name_of(stage: Stage) -> str:
    objective = "" if isinstance(stage, EvalStage) else stage.objective
    return PREFERENCE.get(objective, objective) or stage.kind


def chosen(wanted: list[str]) -> list[Stage]:
    """The config's stages, the SFT and what is wanted of the rest; each is followed by its evaluation."""
    stages = load_config(CONFIG).stages
    trained = [name_of(s) for s in stages[::2]]
    unknown = set(wanted) - set(trained)
    if unknown or not all(isinstance(s, EvalStage) for s in stages[1::2]):
        sys.exit(f"{CONFIG.name} has these objectives, each before its evaluation: {' '.join(trained)}")
    kept = [i for i, name in enumerate(trained) if not wanted or name in {"sft", *wanted}]
    return [stages[k] for i in kept for k in (2 * i, 2 * i + 1)]


def finished(config: Path, run: Path, evaluations: int, *overrides: str) -> list[dict[str, Any]]:
    """The evaluations of a run of a configuration, which is made, or gone on with, unless it has so many."""
    if len(read_lines(run / "eval.jsonl")) < evaluations:
        how = "--resume" if checkpoint.newest(run) else "run.overwrite=true"
        command = [sys.executable, "-m", "actors", "train", str(config), how]
        where = f"run.root={run.parent}", f"run.name={run.name}"
        subprocess.run([*command, *where, *overrides], cwd=ROOT, check=True)
    return read_lines(run / "eval.jsonl")


def train(seed: int, stages: list[Stage], name: str) -> list[dict[str, Any]]:
    """The evaluations of a seed's run."""
    listed = json.dumps([s.model_dump(mode="json") for s in stages])
    evaluations = sum(isinstance(s, EvalStage) for s in stages)
    return finished(CONFIG, RUNS / name, evaluations, f"run.seed={seed}", f"stages={listed}")


def main() -> None:
    wanted = sys.argv[1:]
    stages = chosen(wanted)
    names = [name_of(s) for s in stages[::2]]
    runs = [train(seed, stages, "-".join([f"seed={seed}", *(names[1:] if wanted else [])])) for seed in SEEDS]
    table = Table("objective", "sampled: mean ± std", "by seed", "greedy: mean ± std", "seconds at most")
    results: dict[str, list[dict[str, Any]]] = {}
    for i, name in enumerate(names):
        lines = results[name] = [run[i] for run in runs]
        sampled, greedy = [x["success"] for x in lines], [x["success_greedy"] for x in lines]
        started = [run[i - 1]["time_s"] if i else 0.0 for run in runs]
        seconds = max(x["time_s"] - s for x, s in zip(lines, started, strict=True))
        table.add_row(
            name,
            f"{mean(sampled):.3f} ± {stdev(sampled):.3f}",
            " ".join(f"{s:.3f}" for s in sampled),
            f"{mean(greedy):.3f} ± {stdev(greedy):.3f}",
            f"{seconds:.0f}",
        )
    Console(width=110).print(table)
    (ROOT / "objectives.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
