"""`make chaos`: the fault matrix. Real SIGKILLs of real processes, a run a row, four kills in it, a table at the end.

    make chaos                  every row that is not there yet
    make chaos ROW=generator    that row once more

A row is a role; its four kills come while the role is idle, inside one of its calls, while weights are published, and
while a checkpoint is written. When a kill landed is proven by the processes' own notes of when calls begin and end
(actors/role.py, REPERTORY_CALL_LOG): a kill that came a moment too late is no kill, and the next opportunity is taken.
Finished rows are kept in runs/chaos/results.json; naming a row makes it again.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.audit import audit
from actors.role import CALL_LOG
from rl import checkpoint
from rl.metrics import read_lines
from rl.trajectory import read_parquet

ROOT = Path(__file__).parent.parent.parent
HOME = ROOT / "runs" / "chaos"
ROWS = ("generator", "rollout", "reference", "reward", "learner", "store", "controller", "job")
MOMENTS = ("idle", "busy", "publish", "checkpoint")
LIMIT_S = 60.0
"""To recover in, beside the engine's start."""

BUSY = {
    "generator": "turn",
    "rollout": "play",
    "reference": "columns",
    "reward": "score",
    "learner": "step",
    "store": "read",
    "controller": "learn",
    "job": "learn",
}
"""The call that a role is busy in. The controller and the job: an optimizer step that the controller waits for."""


@dataclass
class Scale:
    """How large a row's run is."""

    steps: int = 24
    first: int = 2
    every: int = 5
    """Steps before the first kill, and between two."""
    overrides: tuple[str, ...] = ()
    root: Path = HOME


@dataclass
class Kill:
    moment: str
    call: str
    """The note that proves when it came."""
    pid: int
    at: float
    recovered_s: float | None = None
    """Until who took its place had been called, and a training step was done after that."""


@dataclass
class Outcome:
    row: str
    kills: list[Kill] = field(default_factory=list)
    lost: int = -1
    twice: int = -1
    made_up: int = -1
    restarts: int = 0
    success: float = math.nan
    start_s: float = math.nan

    def wrong(self, undisturbed: "Outcome") -> list[str]:
        """What is not as promised."""
        noise = 1.96 * math.sqrt(2 * undisturbed.success * (1 - undisturbed.success) / 200 + 1e-4)
        late = [k for k in self.kills if k.recovered_s is None or k.recovered_s > LIMIT_S + self.start_s]
        return [
            *[f"{k.moment}: not recovered in time ({k.recovered_s})" for k in late],
            *[f"no kill while {m}" for m in MOMENTS if self.kills and m not in [k.moment for k in self.kills]],
            *([f"{self.lost} lost"] if self.lost else []),
            *([f"{self.twice} twice"] if self.twice else []),
            *([f"{self.made_up} rewards made up"] if self.made_up else []),
            *([f"success {self.success}"] if abs(self.success - undisturbed.success) > noise else []),
        ]


# -- what the processes note ------------------------------------------------------------------------------------------


@dataclass
class Process:
    pid: int
    role: str
    depth: dict[str, int]
    """How often each call is under way."""


class Notes:
    """Follows every process's notes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[Path, int] = {}
        self.processes: dict[int, Process] = {}

    def follow(self) -> None:
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                while (line := file.readline()).endswith("\n"):
                    self._read[path] = file.tell()
                    note = json.loads(line)
                    process = self.processes.setdefault(note["pid"], Process(note["pid"], note["role"], {}))
                    step = 1 if note["at"] == "begin" else -1
                    process.depth[note["call"]] = process.depth.get(note["call"], 0) + step

    def of(self, role: str) -> Process | None:
        """The role's process that lives."""
        return next((p for p in reversed(self.processes.values()) if p.role == role and _alive(p.pid)), None)

    def inside(self, role: str, call: str) -> bool:
        process = self.of(role)
        return process is not None and process.depth.get(call, 0) > 0


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def moment_is(notes: Notes, row: str, moment: str) -> str:
    """The note that says that the moment is now, or nothing."""
    role = "controller" if row == "job" else row
    in_call = notes.inside(role, BUSY[row])
    if moment == "busy":
        return f"{role}: {BUSY[row]}" if in_call else ""
    if moment in ("publish", "checkpoint"):
        return f"controller: {moment}" if notes.inside("controller", moment) else ""
    quiet = not (in_call or notes.inside("controller", "publish") or notes.inside("controller", "checkpoint"))
    return f"no {role}: {BUSY[row]}" if quiet else ""


# -- a run and its killer ---------------------------------------------------------------------------------------------


def training(name: str, scale: Scale, notes: Path, *more: str) -> subprocess.Popen[str]:
    """RL from the shared SFT checkpoint, a process group of its own."""
    command = [sys.executable, "-m", "actors", "train", str(ROOT / "configs" / "quickstart.yaml")]
    stages: list[dict[str, Any]] = [
        {"kind": "rl", "steps": scale.steps, "tasks_per_step": 24, "lr": 2e-4, "schedule": "cosine", "adam_eps": 1e-3,
         "checkpoint_every": 2, "algo": {
            "name": "grpo", "group_size": 8, "normalise": "none", "clip_low": 0.2, "clip_high": 0.28,
            "kl": {"coefficient": 0.01, "estimator": "k3"}, "mini_batches": 2}},
        {"kind": "eval", "n": 200, "greedy": False},
    ]  # fmt: skip
    settings = [
        f"stages={json.dumps(stages)}",
        f"model={json.dumps({'path': str(scale.root / 'sft' / 'checkpoints' / 'latest'), 'max_length': 320})}",
        f"run.root={scale.root}",
        f"run.name={name}",
        "faults.infra_budget=30",
        *scale.overrides,
        *more,
    ]
    notes.mkdir(parents=True, exist_ok=True)
    log = (scale.root / f"{name}.log").open("a")
    environment = {**os.environ, CALL_LOG: str(notes), "COLUMNS": "200"}
    return subprocess.Popen(
        [*command, *settings], cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


def kill_job(leader: int) -> None:
    """Everything that the driver has started, at once: the driver first, so that it sees nothing."""
    family = [leader, *_descendants(leader)]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            after = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(after[1]), []).append(int(stat.parent.name))
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            yield child


class Killer:
    """Kills a row's process at each moment, `every` steps apart, and proves when it did."""

    def __init__(self, row: str, scale: Scale, notes: Notes, run: Path, again: Callable[[], subprocess.Popen[str]]):
        self.row, self.scale, self.notes, self.run, self.again = row, scale, notes, run, again
        self.role = "controller" if row == "job" else row
        self.kills: list[Kill] = []

    def steps_done(self) -> int:
        return sum(line["stage"] == "rl" for line in read_lines(self.run / "metrics.jsonl"))

    def work(self, process: subprocess.Popen[str]) -> None:
        """Until the run has ended."""
        moments = list(MOMENTS)
        seen: int | None = None  # steps done when the killed process's successor was first called
        while process.poll() is None:
            self.notes.follow()
            done = self.steps_done()
            last = self.kills[-1] if self.kills else None
            if last and last.recovered_s is None:
                if seen is None and self.notes.of(self.role) not in (None, self.notes.processes[last.pid]):
                    seen = done
                elif seen is not None and done > seen:
                    last.recovered_s = time.time() - last.at
            due = self.scale.first + self.scale.every * len(self.kills)
            if moments and done >= due and (last is None or last.recovered_s is not None):
                kill = self.kill(process, moments[0], patience_s=20)
                if kill is not None:
                    self.kills.append(kill)
                    moments.pop(0)
                    seen = None
                    if self.row == "job":
                        process.wait()
                        process = self.again()
            time.sleep(0.2)
        assert process.returncode == 0, f"the run of row {self.row} ended with {process.returncode}: see its log"

    def kill(self, process: subprocess.Popen[str], moment: str, patience_s: float) -> Kill | None:
        """At the moment, or None if it did not come."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline and process.poll() is None:
            self.notes.follow()
            call = moment_is(self.notes, self.row, moment)
            victim = getattr(self.notes.of(self.role), "pid", None)
            if not call or victim is None:
                time.sleep(0.002)
                continue
            if self.row != "job":
                os.kill(victim, signal.SIGSTOP)  # so that the moment stays while it is looked at
            self.notes.follow()
            if moment_is(self.notes, self.row, moment) != call:
                if self.row != "job":
                    os.kill(victim, signal.SIGCONT)
                continue
            if self.row == "job":
                kill_job(process.pid)
            else:
                os.kill(victim, signal.SIGKILL)
            return Kill(moment, call, victim, time.time())
        return None


# -- what came of it --------------------------------------------------------------------------------------------------


def made_up(run: Path) -> int:
    """Trained rewards that are not what the task's rule gives for the episode as it was played."""
    wrong = 0
    for path in (run / "trajectories").glob("rl-*.parquet"):
        for row in read_parquet(path):
            last = json.loads(row["messages"])[-1]
            right = row["stop_reason"] == "done" and last["content"].strip() == row["answer"]
            wrong += row["reward"] != float(right)
    return wrong


def outcome(row: str, run: Path, kills: list[Kill]) -> Outcome:
    account = audit(run)[0]
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step is missing or there twice"
    return Outcome(
        row,
        kills,
        len(account.lost),
        len(account.twice) + len(account.episodes),
        made_up(run),
        int(sum(line.get("faults/restarts", 0) for line in lines)),
        read_lines(run / "eval.jsonl")[-1]["success"],
        engine_start_s(run),
    )


def engine_start_s(run: Path) -> float:
    """From the room in the cluster to the generator's being ready, when the run began."""

    def when(what: str) -> float:
        line = next(s for s in (run / "logs" / "run.log").read_text().splitlines() if what in s)
        return time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))

    return when("generator is ready") - when("has room for every role")


def one_row(row: str, scale: Scale) -> Outcome:
    """`undisturbed` has no kills."""
    run, notes = scale.root / row, scale.root / "notes" / row
    for old in notes.glob("*.jsonl"):
        old.unlink()
    (scale.root / f"{row}.log").unlink(missing_ok=True)
    process = training(row, scale, notes, "run.overwrite=true")
    killer = Killer(row, scale, Notes(notes), run, lambda: training(row, scale, notes, "--resume"))
    if row == "undisturbed":
        assert process.wait() == 0, "the undisturbed run ended with an error: see its log"
    else:
        killer.work(process)
    return outcome(row, run, killer.kills)


def warm_up(root: Path, *overrides: str) -> None:
    """The model that every row starts from: the quickstart's, after SFT."""
    if checkpoint.newest(root / "sft") is not None:
        return
    stages = [{"kind": "sft", "steps": 1000, "batch_size": 32, "lr": 1e-3, "schedule": "cosine",
               "demonstrations": {"count": 8192, "guess_fraction": 0.5}}]  # fmt: skip
    command = [sys.executable, "-m", "actors", "train", str(ROOT / "configs" / "quickstart.yaml")]
    settings = [f"stages={json.dumps(stages)}", f"run.root={root}", "run.name=sft", "run.overwrite=true", *overrides]
    subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def table(results: dict[str, Outcome]) -> Table:
    columns = ("killed", *MOMENTS, "lost", "twice", "made up", "restarts", "success", "engine's start")
    shown = Table(*columns, title="seconds until a step was done after the restart", box=None)
    for row, o in results.items():
        seconds = {k.moment: f"{k.recovered_s:.0f}" if k.recovered_s else "never" for k in o.kills}
        cells = [seconds.get(m, "-") for m in MOMENTS]
        counts = (o.lost, o.twice, o.made_up, o.restarts)
        shown.add_row(row, *cells, *map(str, counts), f"{o.success:.2f}", f"{o.start_s:.0f}")
    return shown


def load(path: Path) -> dict[str, Outcome]:
    if not path.is_file():
        return {}
    kept = json.loads(path.read_text())
    return {row: Outcome(**{**o, "kills": [Kill(**k) for k in o["kills"]]}) for row, o in kept.items()}


def main() -> int:
    console, wanted = Console(width=120), sys.argv[1:]
    unknown = set(wanted) - {*ROWS, "undisturbed"}
    if unknown:
        console.print(f"no such row: {', '.join(unknown)}. Rows: undisturbed, {', '.join(ROWS)}")
        return 2
    HOME.mkdir(parents=True, exist_ok=True)
    path, scale = HOME / "results.json", Scale()
    results = load(path)
    with console.status("the quickstart's SFT, once"):
        warm_up(HOME)
    for row in ("undisturbed", *ROWS):
        if (row in results and row not in wanted) or (wanted and row not in (*wanted, "undisturbed")):
            continue
        with console.status(f"{row}: a run of {scale.steps} steps"):
            results[row] = one_row(row, scale)
        path.write_text(json.dumps({r: asdict(o) for r, o in results.items()}, indent=1))
        wrong = results[row].wrong(results["undisturbed"])
        console.print(f"{row}: {', '.join(wrong) or 'as promised'}", highlight=False)
    console.print(table(results))
    return int(any(o.wrong(results["undisturbed"]) for o in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
