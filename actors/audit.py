"""What `repertory audit` proves from a run's folder: nothing lost, nothing counted twice.

    drawn (slot by slot)  =  trained + filtered + dropped (consumed.jsonl)  +  under way (the newest checkpoint)
    trained               =  the episodes in trajectories/rl-*.parquet, each sample once
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rl import checkpoint
from rl.config_file import ConfigError, load_config
from rl.config_stage import RlStage
from rl.metrics import read_lines

_FINAL = ("trained", "filtered", "dropped")


@dataclass
class Account:
    """One rl stage: how its groups ended, and what is wrong with that."""

    ends: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    under_way: int | None = None
    """None: not known, and so is what was lost. The run is past its newest checkpoint, or goes on."""
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    episodes: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not (self.lost or self.twice or self.episodes)


def show_audit(run: Path, console: Console) -> bool:
    """Print the account of each rl stage that began. Returns whether all is right. ConfigError: no run is there.

    again: played again because they were too stale; wrong: episodes too many or too few in trajectories/.
    """
    accounts = audit(run)
    columns = ("stage", "steps", *_FINAL, "again", "under way", "lost", "twice", "wrong")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))  # 80 columns
    for index, a in accounts.items():
        counts = (a.steps, *(a.ends[end] for end in _FINAL), a.ends["stale"])
        known = a.under_way is not None
        unsure = (str(a.under_way), str(len(a.lost))) if known else ("?", str(len(a.lost) or "?"))
        table.add_row(str(index), *map(str, counts), *unsure, str(len(a.twice)), str(len(a.episodes)))
    console.print(table)
    if any(a.under_way is None for a in accounts.values()):
        console.print("?: the run is past its newest checkpoint, or goes on. What is under way is in its memory alone.")
    for index, a in accounts.items():
        for text in [*a.lost, *a.twice, *a.episodes]:
            console.print(f"stage {index}: {text}", markup=False, highlight=False, soft_wrap=True)
    return all(a.right for a in accounts.values())


def audit(run: Path) -> dict[int, Account]:
    """The account of each rl stage, by the stage's index."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run folder")
    config = load_config(run / "config.yaml")
    lines = read_lines(run / "consumed.jsonl")
    newest = checkpoint.newest(run)
    state = checkpoint.read_state(newest) if newest else None
    accounts = {}
    for index, stage in enumerate(config.stages):
        own = [line for line in lines if line["stage_index"] == index]
        if isinstance(stage, RlStage) and own:
            at_checkpoint = state if state is not None and state.stage == index else None
            accounts[index] = _account(run, index, stage, own, at_checkpoint)
    return accounts


def _account(
    run: Path, index: int, stage: RlStage, lines: list[dict[str, Any]], state: checkpoint.State | None
) -> Account:
    account = Account(Counter(g["end"] for line in lines for g in line["groups"]), len(lines))
    steps = [line["stage_step"] for line in lines]
    account.twice += [f"step {s} has {n} lines" for s, n in Counter(steps).items() if n > 1]
    account.lost += [f"step {s} has no line" for s in sorted(set(range(1, max(steps) + 1)) - set(steps))]
    ended: Counter[tuple[int, int]] = Counter()
    tasks: dict[tuple[int, int], int] = {}
    for line in lines:
        for g in line["groups"]:
            place = (g["slot"], g["number"])
            ended[place] += g["end"] in _FINAL
            tasks[place] = g["index"]
    account.twice += [f"group {n} of slot {s} ended {times} times" for (s, n), times in ended.items() if times > 1]
    if stage.curriculum is None:
        drawn = Counter(tasks.values())
        account.twice += [f"task number {i} was drawn for {n} groups" for i, n in drawn.items() if n > 1]
    account.lost += _missing(stage, ended, lines, state, account)
    for line in lines:
        account.episodes += _episodes(run, index, line)
    return account


def _missing(
    stage: RlStage,
    ended: Counter[tuple[int, int]],
    lines: list[dict[str, Any]],
    state: checkpoint.State | None,
    account: Account,
) -> list[str]:
    """Groups that were drawn, did not end, and are not under way either.

    They are known where a checkpoint stands at the account's end: a run that goes on has others in its memory.
    """
    sizes = {line["stage_step"] - 1: line["tasks_per_step"] for line in lines}
    steps = max(sizes) + 1
    if steps == stage.steps:
        under_way, opened = set[tuple[int, int]](), stage.steps
    elif state is not None and state.stage_step == steps:
        known = state.under_way
        under_way, opened = {(p[0], p[1]) for p in known["under_way"]}, known["opened"]
    else:
        return []
    account.under_way = len(under_way)
    known_places: dict[int, set[int]] = defaultdict(set)
    for slot, number in {place for place, times in ended.items() if times} | under_way:
        known_places[slot].add(number)
    lost = []
    for slot in range(opened):
        numbers = known_places[slot]
        wanted = range(max(sizes.get(slot, stage.tasks_per_step), max(numbers, default=-1) + 1))
        lost += [f"group {n} of slot {slot} was drawn and never ended" for n in wanted if n not in numbers]
    return lost


def _episodes(run: Path, index: int, line: dict[str, Any]) -> list[str]:
    """How the trajectories of a step differ from the groups that it says it trained on."""
    trained = Counter(
        (g["slot"], g["task"], g["attempt"], sample)
        for g in line["groups"]
        if g["end"] == "trained"
        for sample in range(line["group_size"])
    )
    name = f"rl-{index:02d}-{line['stage_step'] - 1:05d}.parquet"
    path = run / "trajectories" / name
    if not path.is_file():
        return [f"{name} is missing"] if trained else []
    rows = pq.read_table(path, columns=["step", "task", "attempt", "sample"]).to_pylist()
    found = Counter((r["step"], r["task"], r["attempt"], r["sample"]) for r in rows)
    wrong = [f"{name}: no episode {sample} of task {task}" for _, task, _, sample in (trained - found).elements()]
    return wrong + [f"{name}: one episode {k[3]} of task {k[1]} too many" for k in (found - trained).elements()]
