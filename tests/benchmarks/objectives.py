"""`make objectives`: every objective from the same SFT checkpoints, as a table and as objectives.json.

    python tests/benchmarks/objectives.py [OBJECTIVE ...]

A seed's SFT is the quickstart's; then each objective has a run of its own from it, which is kept once it is finished.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from rl.metrics import read_lines

ROOT = Path(__file__).parent.parent.parent
RUNS = Path("runs/objectives")
SEEDS = (0, 1, 2)
GROUPED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline")
ALONE = ("reinforce_pp", "remax", "ppo", "epo")
PREFERENCE = {"m_dpo": "sigmoid", "m_kto": "kto", "ipo": "ipo", "hinge": "hinge", "simpo": "simpo"}


def overrides(objective: str) -> list[str]:
    """What makes a run of configs/objectives.yaml one of this objective; as many episodes for each: 192 a step."""
    if objective in PREFERENCE:
        stage = {
            "kind": "preference", "loss": PREFERENCE[objective], "steps": 12, "rounds": 3, "batch_size": 32,
            "lr": 2e-4, "adam_eps": 1e-3, "beta": 2.5 if objective == "simpo" else 0.1,
            "sample": {"tasks": 144, "samples": 8},
        }  # fmt: skip
        return [f"stages.0={json.dumps(stage)}"]
    algo: dict[str, Any] = {"name": objective}
    if objective == "ppo":
        algo |= {"critic": {"lr": 1e-3, "warmup_steps": 3}, "lam": 1.0}
    if objective == "epo":
        algo |= {"credit": "turn"}
    tasks = 24 if objective in GROUPED else 192
    return [f"stages.0.algo={json.dumps(algo)}", f"stages.0.tasks_per_step={tasks}"]


def train(config: str, run: str, *settings: str) -> dict[str, Any]:
    """The last evaluation of a run, which is made unless it is finished."""
    lines = read_lines(ROOT / RUNS / run / "eval.jsonl")
    if not lines:
        command = [sys.executable, "-m", "actors", "train", f"configs/{config}.yaml", f"run.root={RUNS}"]
        subprocess.run([*command, f"run.name={run}", "run.overwrite=true", *settings], cwd=ROOT, check=True)
        lines = read_lines(ROOT / RUNS / run / "eval.jsonl")
    return lines[-1]


def seed_of(objective: str, seed: int) -> dict[str, Any]:
    sft = f"sft-{seed}"
    # The quickstart's stages, its RL left out.
    only_sft = [
        {"kind": "sft", "steps": 1000, "batch_size": 32, "lr": 1e-3, "demonstrations": {"guess_fraction": 0.5}},
        {"kind": "eval", "n": 200},
    ]
    start = train("quickstart", sft, f"run.seed={seed}", f"stages={json.dumps(only_sft)}")
    if objective == "sft":
        return start
    path = f"model.path={RUNS / sft / 'checkpoints' / 'latest'}"
    return train("objectives", f"{objective}-{seed}", f"run.seed={seed}", path, *overrides(objective))


def main() -> None:
    wanted = sys.argv[1:] or ["sft", *PREFERENCE, *GROUPED, *ALONE]
    results = {o: [seed_of(o, seed) for seed in SEEDS] for o in wanted}
    table = Table("objective", "sampled: mean ± std", "by seed", "greedy: mean", "seconds at most")
    for objective, lines in results.items():
        sampled = [line["success"] for line in lines]
        table.add_row(
            objective,
            f"{mean(sampled):.3f} ± {stdev(sampled):.3f}",
            " ".join(f"{s:.3f}" for s in sampled),
            f"{mean(line['success_greedy'] for line in lines):.3f}",
            f"{max(line['time_s'] for line in lines):.0f}",
        )
    Console(width=110).print(table)
    (ROOT / "objectives.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
