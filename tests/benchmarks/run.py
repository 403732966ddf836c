"""`make bench`: every figure as a ratio within one run, as a table and as bench.json.

Each measurement is a process of its own, one after the other; the noisy machine is the same for both sides of a ratio.
    python tests/benchmarks/run.py [quickstart] [smollm2] [trl] [learner] [async] [overhead] [sticky] [changes]
        [sandbox] [serving]
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from rl.metrics import read_lines

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WARM_UP = 2  # the first steps pay for what is compiled, cached and faulted in once
SHORT = ["stages.0.n=8", "stages.1.steps=500", "stages.2.n=8", "stages.3.steps=6", "stages.4.n=8"]

Row = tuple[str, float, str]
"""(what, figure, bound); a bound starts with >= or <=, or is empty."""


def train(config: str, root: Path, *overrides: str) -> Path:
    command = [sys.executable, "-m", "actors", "train", f"configs/{config}.yaml", f"run.root={root}", "run.name=bench"]
    own = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=own)
    return root / "bench"


def script(name: str, *arguments: str) -> dict[str, Any]:
    """The last line a benchmark script prints is its result as JSON."""
    done = subprocess.run(
        [sys.executable, str(HERE / name), *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["stage"] == "rl"][WARM_UP:]


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over steps: a machine that is busy for a minute spoils some steps of one side."""
    return median(t / o for t, o in zip(theirs, ours, strict=True))


def system_rows(name: str, run: Path, floor: float) -> list[Row]:
    """The run's steps against the bare engine and a bare training loop on the same episodes."""
    steps = steps_of(run)
    bare = script("bare.py", str(run), str(WARM_UP))
    here = {k: [s.get(f"timing_s/{k}", 0.0) for s in steps] for k in ("generate", "reference", "update", "publish")}
    inside, total = sum(map(sum, here.values())), sum(s["timing_s/step"] for s in steps)

    def ratio(theirs: str, ours: str) -> float:
        return median_ratio(bare[theirs], here[ours])

    rows: list[Row] = [
        (f"{name}: generation, tokens/s in the system", sum(bare["sampled_tokens"]) / sum(here["generate"]), ""),
        (f"{name}: generation, tokens/s of the bare engine", sum(bare["sampled_tokens"]) / sum(bare["generate_s"]), ""),
        (f"{name}: generation, system / bare", ratio("generate_s", "generate"), f">= {floor}"),
        (f"{name}: learner, system / bare loop", ratio("update_s", "update"), ">= 0.8"),
        (f"{name}: learner, system / the same packed forward alone", ratio("packed_s", "update"), ""),
        (f"{name}: share of a step outside the four", 1 - inside / total, "<= 0.15"),
    ]
    peaks: dict[str, float] = {}
    for status in read_lines(run / "logs" / "actors.jsonl"):
        peaks[status["role"]] = max(peaks.get(status["role"], 0), status["peak_rss_bytes"])
    return [*rows, *((f"{name}: peak memory of the {role}, GiB", peak / 2**30, "") for role, peak in peaks.items())]


def sync_rows(run: Path) -> list[Row]:
    steps = steps_of(run)
    copy = script("numpy_copy.py", str(int(steps[0]["publish/bytes"])))["seconds"]
    publish, load = (mean(s[f"publish/{k}"] for s in steps) for k in ("transfer_s", "load_s"))
    return [
        (f"smollm2: publish of {steps[0]['publish/bytes'] / 1e6:.0f} MB, s", publish, "<= 0.6"),
        ("smollm2: load, s", load, "<= 0.8"),
        ("smollm2: publish, numpy copies", publish / copy, ""),
        ("smollm2: load, numpy copies", load / copy, ""),
    ]


def trl_rows(run: Path) -> list[Row]:
    """Whole-step completion tokens a second against TRL's GRPOTrainer, one after the other."""
    theirs = script("trl_step.py", "configs/bench_smollm2.yaml")
    ours = mean(s["perf/tokens_per_second"] for s in steps_of(run))
    length = mean(s["response_length/mean"] for s in steps_of(run))
    return [
        ("smollm2: whole step, completion tokens/s here", ours, ""),
        ("smollm2: whole step, completion tokens/s in TRL", theirs["tokens_per_second"], ""),
        ("smollm2: completion length here / in TRL", length / theirs["length"], ""),
        ("smollm2: whole step, here / TRL", ours / theirs["tokens_per_second"], ">= 3"),
    ]


def learner_rows() -> list[Row]:
    """The learner's forward and backward alone: what packing is worth, against TRL, and what the head holds."""
    packing, trl = script("packing.py"), script("learner.py", "configs/bench_smollm2.yaml")
    chunked, naive = (script("head_memory.py", side)["bytes"] for side in ("chunked", "naive"))
    speed_up, padding = median_ratio(packing["padded_s"], packing["packed_s"]), packing["padded"] / packing["real"]
    here, there = (trl["real"] / median(trl[side]) for side in ("here_s", "trl_s"))
    return [
        ("packing: padded / real tokens, quickstart's SFT", padding, ""),
        ("packing: unique / real tokens", packing["packed"] / packing["real"], ""),
        ("packing: speed-up, packed / padded", speed_up, f">= {0.85 * padding:.3g}"),
        ("smollm2: forward and backward, tokens/s here", here, ""),
        ("smollm2: forward and backward, tokens/s in TRL", there, ""),
        ("smollm2: unique / real tokens", trl["packed"] / trl["real"], ""),
        ("smollm2: forward and backward, here / TRL", median_ratio(trl["trl_s"], trl["here_s"]), ">= 1.2"),
        ("head: 4,096 x 49k log-probs, chunked, MiB", chunked / 2**20, ""),
        ("head: 4,096 x 49k log-probs, naive, MiB", naive / 2**20, ""),
        ("head: peak memory, chunked / naive", chunked / naive, "<= 0.5"),
    ]


def asynchronous_rows(root: Path) -> list[Row]:
    """The same SFT, then the same number of steps with a slow tool: synchronous, and at most two versions stale."""
    env = {"name": "custom", "path": "slow_calculator.SlowCalculator", "max_turns": 4,
           "args": {"min_operations": 1, "max_operations": 2, "max_digits": 2, "max_turns": 4}}  # fmt: skip
    rl = {"kind": "rl", "start": 0, "steps": 14, "tasks_per_step": 16, "lr": 2e-4, "adam_eps": 1e-3,
          "algo": {"name": "grpo", "clip_high": 0.28, "aggregation": "token"}}  # fmt: skip
    stages = [
        {"kind": "sft", "steps": 300, "batch_size": 32, "demonstrations": {"count": 4096, "guess_fraction": 0.5}},
        *({**rl, "max_staleness": staleness} for staleness in (0, 2)),
    ]
    run = train(
        "quickstart", root, f"stages={json.dumps(stages)}", f"env={json.dumps(env)}", "model.max_length=192",
        "rollout.max_turn_tokens=48",
    )  # fmt: skip
    lines = read_lines(run / "metrics.jsonl")
    steps = [[line for line in lines if line["stage_index"] == index][WARM_UP:] for index in (1, 2)]
    seconds = [(s[-1]["time_s"] - s[0]["time_s"]) / (len(s) - 1) for s in steps]
    reached = [mean(line["reward/success"] for line in s[-4:]) for s in steps]
    return [
        ("slow tool: seconds a step, synchronous", seconds[0], ""),
        ("slow tool: seconds a step, max_staleness 2", seconds[1], ""),
        ("slow tool: steps an hour, asynchronous / synchronous", seconds[0] / seconds[1], ">= 1.8"),
        ("slow tool: success of the last 4 steps, synchronous", reached[0], ""),
        ("slow tool: success of the last 4 steps, asynchronous", reached[1], f">= {reached[0] - 0.1:.2f}"),
        ("slow tool: staleness, mean", mean(line["staleness/mean"] for line in steps[1]), ""),
        ("slow tool: groups dropped as stale, of those played", _share_dropped(steps[1]), ""),
    ]


def _share_dropped(steps: list[dict[str, Any]]) -> float:
    dropped = sum(line["staleness/dropped_groups"] for line in steps)
    return dropped / (dropped + 16 * len(steps))


def overhead_rows() -> list[Row]:
    """Everything but model and tools: rollout, reward, buffer and batch."""
    told = script("overhead.py")
    names = list(told["late"])
    growth = {n: (told["late"][n] - told["early"][n]) / 2**20 for n in names}
    return [
        ("overhead: three-turn episodes a second", told["episodes"] / told["seconds"], ">= 100"),
        ("overhead: episodes", told["episodes"], ""),
        *((f"overhead: MiB of the {n} after a quarter of them", told["early"][n] / 2**20, "") for n in names),
        *((f"overhead: MiB that the {n} grew by from then on", growth[n], "<= 4") for n in names),
    ]


def sandbox_rows() -> list[Row]:
    """Shutting a model's code in."""
    told = script("sandbox.py")
    return [
        ("sandbox: stateless runs a second", told["stateless_per_s"], ">= 40"),
        ("sandbox: ms that a stateful call takes over its code", told["call_ms"], "<= 5"),
        ("sandbox: MiB of 200 sessions at once", told["memory_mib"], "<= 2048"),
    ]


def serving_rows(root: Path) -> list[Row]:
    """A server against the bare engine on the same conversations, 64 at once; and while versions change."""
    run = ROOT / "runs" / "quickstart"
    if not (run / "checkpoints" / "latest").exists():
        run = train("quickstart", root, *SHORT)
    told = script("serving.py", str(run))
    updates, rows = told.pop("updates"), []
    floors = {"short turns, sessions": 0.2, "short turns, chat": 0.2, "64-token turns": 0.5, "smollm2, streamed": 0.5}
    for name, floor in floors.items():
        served, bare = told[name]["served"], told[name]["bare"]
        ratio = median_ratio([s["tokens_per_s"] for s in served], [b["tokens_per_s"] for b in bare])
        rows += [
            (f"{name}: tokens/s of the server", median(s["tokens_per_s"] for s in served), ""),
            (f"{name}: tokens/s of the bare engine", median(b["tokens_per_s"] for b in bare), ""),
            (f"{name}: server / bare", ratio, f">= {floor}"),
            (f"{name}: requests/s", median(s["requests_per_s"] for s in served), ""),
            (f"{name}: latency, p99, s", median(s["latency_s"]["p99"] for s in served), ""),
            (f"{name}: share of a core that the client takes", median(s["client_cpu"] for s in served), ""),
            (f"{name}: errors, lost and crossed", sum(map(wrong, served)), "<= 0"),
        ]
    streamed = told["smollm2, streamed"]
    first = [(s["first_token_s"]["p50"], b["first_token_s"]) for s, b in zip(*streamed.values(), strict=True)]
    changed, steady = updates["updated"], updates["steady"]
    return [
        *rows,
        ("smollm2, streamed: time to first token, p50, s", median(s for s, _ in first), ""),
        ("smollm2, streamed: the same, server / bare", median(s / b for s, b in first), ""),
        *(
            (f"smollm2, streamed: s between chunks, {q}", median(s["between_s"][q] for s in streamed["served"]), bound)
            for q, bound in (("p50", "<= 0.25"), ("p99", ""), ("max", ""))
        ),
        ("update every 5 s: versions that answered", len(changed["versions"]), ">= 2"),
        ("update every 5 s: errors, lost and crossed", wrong(changed), "<= 0"),
        ("update every 5 s: tokens/s, of those without", changed["tokens_per_s"] / steady["tokens_per_s"], ""),
    ]  # fmt: skip


def wrong(load: dict[str, Any]) -> float:
    return sum(load["errors"].values()) + len(load["lost"]) + len(load["crossed"])


def sticky_rows() -> list[Row]:
    """Sessions of many turns on two generators: each on its own, and each turn on any."""
    told = script("sticky.py")
    return [
        ("sessions: prefix hit rate, sticky", told["sticky"]["hit_rate"], ""),
        ("sessions: prefix hit rate, any generator each turn", told["any"]["hit_rate"], ""),
        ("sessions: prompt tokens computed, any / sticky", told["any"]["computed"] / told["sticky"]["computed"], ""),
        ("sessions: seconds, any / sticky", told["any"]["seconds"] / told["sticky"]["seconds"], ">= 1"),
    ]


def changes_rows(root: Path) -> list[Row]:
    """SmolLM2's arithmetic run, its RL in short: what publishes of changes alone send, against whole ones."""
    run = train(
        "smollm2_arithmetic", root, "weights.full_every=1000", "stages.0.steps=3", "stages.1.n=8", "stages.2.steps=6",
        "stages.3.n=8",
    )  # fmt: skip
    steps = [line for line in read_lines(run / "metrics.jsonl") if line["stage"] == "rl"]
    part = [line["publish/bytes"] / line["publish/full_bytes"] for line in steps]
    return [
        ("smollm2: bytes of a whole publish, MB", steps[0]["publish/full_bytes"] / 1e6, ""),
        ("smollm2: sent by a publish of changes, MB", mean(line["publish/bytes"] for line in steps) / 1e6, ""),
        ("smollm2: sent by a publish of changes / whole", mean(part), "<= 0.5"),
        ("smollm2: publish of changes, s", mean(line["publish/transfer_s"] for line in steps), ""),
        ("smollm2: load, s", mean(line["publish/load_s"] for line in steps), ""),
    ]


def holds(figure: float, bound: str) -> bool | None:
    if not bound:
        return None
    sign, _, number = bound.partition(" ")
    return figure >= float(number) if sign == ">=" else figure <= float(number)


def main() -> None:
    wanted = sys.argv[1:] or [
        "quickstart", "smollm2", "trl", "learner", "async", "overhead", "sticky", "changes", "sandbox",
        "serving",
    ]  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if "quickstart" in wanted:
            rows += system_rows("quickstart", train("quickstart", Path(folder) / "q", *SHORT), 0.55)
        if "smollm2" in wanted or "trl" in wanted:
            run = train("bench_smollm2", Path(folder) / "s")
            if "smollm2" in wanted:
                rows += [*system_rows("smollm2", run, 0.9), *sync_rows(run)]
            if "trl" in wanted:
                rows += trl_rows(run)
        if "learner" in wanted:
            rows += learner_rows()
        if "async" in wanted:
            rows += asynchronous_rows(Path(folder) / "a")
        if "overhead" in wanted:
            rows += overhead_rows()
        if "sticky" in wanted:
            rows += sticky_rows()
        if "changes" in wanted:
            rows += changes_rows(Path(folder) / "c")
        if "sandbox" in wanted:
            rows += sandbox_rows()
        if "serving" in wanted:
            rows += serving_rows(Path(folder) / "v")
    table = Table("figure", "measured", "bound", "")
    for what, figure, bound in rows:
        table.add_row(what, f"{figure:.3g}", bound, {True: "✓", False: "✗", None: ""}[holds(figure, bound)])
    Console(width=110).print(table)
    results = [{"figure": w, "measured": f, "bound": b or None, "holds": holds(f, b)} for w, f, b in rows]
    (ROOT / "bench.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
