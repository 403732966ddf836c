"""What `repertory view` shows of a run: where it stands, its evaluations, its curves, its episodes turn by turn."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from actors.summary import evaluation_table, printable
from rl.config_file import ConfigError
from rl.metrics import read_lines

Row = dict[str, Any]
Reads = Callable[[int], str]
"""What a token id reads as."""

_CURVE_COLUMNS = (
    ("reward", "reward/mean", ".3f"),
    ("success", "reward/success", ".3f"),
    ("kl", "actor/kl", ".2g"),
    ("mismatch", "mismatch/kl", ".2g"),
    ("tok/s", "perf/tokens_per_second", ",.0f"),
    ("s/step", "timing_s/step", ".1f"),
    ("generate", "timing_s/generate", ".1f"),
    ("update", "timing_s/update", ".1f"),
)
_SPARKS = "▁▂▃▄▅▆▇█"
_TAB = 8
_KEYS = ["step", "success", "turn_flags"]


def show_run(
    run: Path,
    console: Console,
    *,
    episodes: int,
    success: bool | None,
    step: int | None,
    flag: str | None,
    tokens: bool,
) -> None:
    """Print a run's state, evaluations and curves, then up to `episodes` of its episodes, the newest first.

    success, step (within its stage, from 0) and flag choose among the episodes; `tokens` prints every one of their
    tokens. Raises ConfigError when `run` is not a run folder, or no episode is as asked.
    """
    config = read_config(run)
    search = find_episodes(run, episodes, Wanted(success, step, flag))
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    evaluations = [line for line in evaluations if not line.get("beside")]
    console.print(header(run, config, metrics, evaluations))
    if evaluations:
        console.print()
        console.print(evaluation_table(evaluations))
    for _, stage in groupby(metrics, key=lambda line: line["stage_index"]):
        console.print(*curve(list(stage), console.width), sep="\n")
    if not search.found:
        if episodes > 0:
            console.print("no episodes yet: trajectories/ is empty")
        return
    reads = token_reader(run, config)
    for number, (file, row) in enumerate(search.found, 1):
        console.print()
        console.print(Rule(Text(f"episode {number} of {len(search.found)} · {file}"), align="left", style="dim"))
        show_episode(row, console, reads, tokens=tokens, learned=file.startswith("rl"))
    console.print(Rule(style="dim"))
    console.print(Text(str(search)))


def read_config(run: Path) -> Row:
    """The run's settings as they stand in config.yaml: also those of a run that an older version made."""
    if (run / "config.yaml").is_file():
        return yaml.safe_load((run / "config.yaml").read_text())
    parents = [p for p in run.resolve().parents[:3] if (p / "config.yaml").is_file()]
    near = parents or sorted(p.parent for folder in (run, run.parent) for p in folder.glob("*/config.yaml"))[:5]
    hint = f" Did you mean {', '.join(map(str, near))}?" if near else " `repertory train` makes one below runs/."
    why = "it has no config.yaml" if run.exists() else "no such folder"
    raise ConfigError(f"{run} is not a run folder: {why}.{hint}")


def header(run: Path, config: Row, metrics: Sequence[Row], evaluations: Sequence[Row]) -> Text:
    """The run's name and state, its model and environment, and its stages with how far each has come."""
    done = Counter({line["stage_index"]: line["stage_step"] for line in metrics})
    done.update({line["stage_index"]: 1 for line in evaluations})
    stages: list[Row] = config["stages"]
    wanted = [stage.get("steps", 1) for stage in stages]
    current = next((i for i, steps in enumerate(wanted) if done[i] < steps), None)
    out = Text.assemble((run.resolve().name, "bold"), "  ")
    if current is None:
        out.append("finished", "green")
    else:
        out.append(f"at stage {current + 1} of {len(stages)}", "yellow")
    last = max([*metrics, *evaluations], key=lambda line: line["step"], default=None)
    if last and last["version"] >= 0:
        out.append(f" · {last['step']} optimizer steps · weight version {last['version']}")
        newest = max(p.stat().st_mtime for p in (run / "metrics.jsonl", run / "eval.jsonl") if p.is_file())
        out.append(f" · last written {_ago(time.time() - newest)}")
    model = config["model"]
    out.append(f"\n  model {model.get('path') or 'from scratch'} · environment {config['env']['name']}\n ", "dim")
    for i, (stage, steps) in enumerate(zip(stages, wanted, strict=True)):
        mark, style = ("✓", "green") if done[i] >= steps else ("▶", "yellow") if i == current else ("·", "dim")
        count = "" if stage["kind"] == "eval" else f" {min(done[i], steps)}/{steps}"
        out.append(f" {mark} {i + 1} {stage['kind']}{count} ", style)
    return out


def _ago(seconds: float) -> str:
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    return next((f"{seconds // length:.0f} {unit} ago" for unit, length in units if seconds >= 2 * length), "just now")


def curve(lines: Sequence[Row], width: int) -> Iterator[Any]:
    """A stage's main number as a line of blocks; for RL also its columns, each row the mean over a tenth."""
    first = lines[0]
    name = "sft/loss" if first["stage"] == "sft" else "reward/mean"
    values = [line[name] for line in lines if line.get(name) is not None]
    title = f"stage {first['stage_index'] + 1} {first['stage']}"
    if values:
        blocks = sparkline(values, max(10, min(60, width - 50)))
        yield Text.assemble(
            "\n", (title, "bold"), f"  {name} {values[0]:.3f} ", (blocks, "cyan"),
            f" {values[-1]:.3f}  (from {min(values):.3f} to {max(values):.3f})",
        )  # fmt: skip
    if first["stage"] != "rl":
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("step", justify="right")
    for column, _, _ in _CURVE_COLUMNS:
        table.add_column(column, justify="right")
    for part in shares(lines, 10):
        # Numbered as --step and the files number them: the first step of a stage is 0.
        ends = [part[0]["stage_step"] - 1, part[-1]["stage_step"] - 1]
        cells = [_mean(part, metric, form) for _, metric, form in _CURVE_COLUMNS]
        table.add_row("-".join(map(str, dict.fromkeys(ends))), *cells)
    yield table
    yield Text("means over a tenth of the steps; mismatch: kl, generator to learner", "dim")


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` blocks, each the mean of its share of the values, between their lowest and highest."""
    means = [sum(share) / len(share) for share in shares(values, width)]
    low, span = min(means), max(means) - min(means)
    return "".join(_SPARKS[int((m - low) / span * 7.99)] if span else _SPARKS[0] for m in means)


def shares(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """`items` in order, cut into at most `count` parts of about the same length."""
    n = min(count, len(items))
    return [items[i * len(items) // n : (i + 1) * len(items) // n] for i in range(n)]


def _mean(lines: Sequence[Row], metric: str, form: str) -> str:
    values = [line[metric] for line in lines if line.get(metric) is not None]
    return format(sum(values) / len(values), form) if values else "-"


@dataclass(frozen=True)
class Wanted:
    """Which episodes to show."""

    success: bool | None
    step: int | None
    flag: str | None

    def matches(self, row: Row) -> bool:
        return (
            (self.success is None or row["success"] == self.success)
            and (self.step is None or row["step"] == self.step)
            and (self.flag is None or any(self.flag in flags for flags in row["turn_flags"]))
        )

    def __str__(self) -> str:
        outcome = [] if self.success is None else ["--success" if self.success else "--failure"]
        others = [f"--{k} {v}" for k, v in (("step", self.step), ("flag", self.flag)) if v is not None]
        return " ".join([*outcome, *others])


@dataclass
class Search:
    """What was found, as (file name, row), and how much was looked through for it."""

    wanted: Wanted
    files: int
    found: list[tuple[str, Row]] = field(default_factory=list)
    matched: int = 0
    seen: int = 0
    opened: int = 0

    def __str__(self) -> str:
        match = f"{self.matched} match {self.wanted} of " if str(self.wanted) else ""
        looked = f"{self.seen} episodes looked at, in the newest {self.opened} of {self.files} files"
        return f"{len(self.found)} shown · {match}{looked}"


def find_episodes(run: Path, count: int, wanted: Wanted) -> Search:
    """Look file by file, the newest first, until `count` are found. Raises ConfigError when there is none."""
    files = sorted((run / "trajectories").glob("*.parquet"), key=_age, reverse=True)
    search = Search(wanted, len(files))
    for path in files:
        if len(search.found) >= count:
            break
        keys = pq.read_table(path, columns=_KEYS).to_pylist()
        chosen = [i for i, key in enumerate(keys) if wanted.matches(key)]
        search.opened += 1
        search.seen += len(keys)
        search.matched += len(chosen)
        if chosen:
            rows = pq.read_table(path).take(chosen[: count - len(search.found)]).to_pylist()
            search.found += [(path.name, row) for row in rows]
    if count > 0 and not search.found and str(wanted):
        raise ConfigError(_no_match(run, files, wanted))
    return search


def _age(path: Path) -> tuple[int, int, str]:
    """rl-STAGE-STEP and eval-STAGE-MODE in the order in which a run writes them."""
    _, stage, rest = [*path.stem.split("-", 2), "0", ""][:3]
    return int(stage) if stage.isdigit() else -1, int(rest) if rest.isdigit() else 0, {"sampled": "0"}.get(rest, rest)


def _no_match(run: Path, files: Sequence[Path], wanted: Wanted) -> str:
    """That nothing matches, and what there would be to ask for."""
    steps: dict[str, set[int]] = {}
    flags: Counter[str] = Counter()
    successes: Counter[bool] = Counter()
    for path in files:
        for row in pq.read_table(path, columns=_KEYS).to_pylist():
            steps.setdefault(path.name.partition("-")[0], set()).add(row["step"])
            flags.update({flag for turn in row["turn_flags"] for flag in turn})
            successes[row["success"]] += 1
    total = successes.total()
    if not total:
        return f"{run}: no episode matches {wanted}: the run has written none yet"
    known = "; ".join(f"{kind} {_ranges(sorted(found))}" for kind, found in sorted(steps.items(), reverse=True))
    marked = ", ".join(f"{name} ({count})" for name, count in flags.most_common()) or "none"
    return (
        f"{run}: none of {total} episodes matches {wanted}. There are: {successes[True]} with --success and "
        f"{successes[False]} with --failure; steps: {known}; flags: {marked}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def show_episode(row: Row, console: Console, reads: Reads, *, tokens: bool, learned: bool) -> None:
    outcome, style = ("success", "green") if row["success"] else ("failure", "red")
    parts = ", ".join(f"{name} {value:g}" for name, value in row["reward_parts"])
    facts = Text.assemble(
        (outcome, f"bold {style}"), f" · reward {row['reward']:g}{f' ({parts})' if parts else ''}",
        f" · advantage {row['advantage']:+.2f}" if learned else "",
        f" · stopped: {row['stop_reason']} · {row['duration_s']:.1f} s",
        f"\ntask {printable(row['task'])}, sample {row['sample']}, step {row['step']}",
        f", attempt {row['attempt'] + 1}" if row["attempt"] else "",
        f" · {len(row['tokens'])} tokens, {sum(row['loss_mask'])} sampled · answer {printable(row['answer'])}",
    )  # fmt: skip
    console.print(facts)
    if tokens:
        show_tokens(row, console, reads)
        return
    prompt, turns = split_messages(json.loads(row["messages"]), len(row["turn_rewards"]))
    console.print(_conversation(prompt))
    for k, messages in enumerate(turns):
        console.print(_indented(turn_facts(row, k, reads), 2))
        console.print(_conversation(messages))


def split_messages(messages: Sequence[Row], turns: int) -> tuple[Sequence[Row], list[Sequence[Row]]]:
    """The prompt's messages, and each turn's: the model's own and what answered it.

    A prompt may hold assistant messages too: the model's are the last `turns` of them.
    """
    spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    starts = [*spoken[len(spoken) - turns :], len(messages)]
    return messages[: starts[0]], [messages[a:b] for a, b in pairwise(starts)]


def turn_facts(row: Row, k: int, reads: Reads) -> Text:
    """Turn k's tokens, versions, log-probs, reward and flags in a line."""
    at = [i for i, turn in enumerate(row["turn"]) if turn == k and row["loss_mask"][i]]
    out = Text.assemble((f"turn {k + 1}", "bold"), f" · {len(at)} tokens")
    if at and row["tokens"][at[0]] >= 0:  # an endpoint's tokens are counted and not known
        versions = dict.fromkeys(row["versions"][i] for i in at)
        least = min(at, key=lambda i: row["logprobs"][i])
        mean = sum(row["logprobs"][i] for i in at) / len(at)
        out.append(f" · {'→'.join(f'v{v}' for v in versions)} · log-prob {mean:.2f} a token, least likely ")
        out.append(one_line(reads(row["tokens"][least])), "magenta").append(f" {row['logprobs'][least]:.2f}")
    reward = row["turn_rewards"][k]
    out.append(f" · reward {reward:g}", "bold" if reward else "")
    for flag in row["turn_flags"][k]:
        out.append(" · ").append(flag, "yellow")
    return out


def _conversation(messages: Sequence[Row]) -> Table:
    """Role and text side by side; long texts keep to their column."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", width=13, style="cyan")
    table.add_column(overflow="fold")
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        calls = message.get("tool_calls")
        text += json.dumps(calls, ensure_ascii=False) if calls else ""
        table.add_row(Text(printable(message["role"])), Text(printable(text)))
    return table


def show_tokens(row: Row, console: Console, reads: Reads) -> None:
    """Every token, in runs of the same turn and mask: those given to the model, those it sampled."""
    width = max(40, console.width - 4)
    for (turn, sampled), group in groupby(
        range(len(row["tokens"])), key=lambda i: (row["turn"][i], row["loss_mask"][i])
    ):
        at = list(group)
        if sampled:
            console.print(_indented(turn_facts(row, turn, reads), 2))
            cells = [_sampled(row, i, reads) for i in at]
            body = flow(cells, width)
        else:
            what = "prompt" if turn < 0 else "observation"
            console.print(Text(f"  {what}: {len(at)} tokens, not trained on", "dim"))
            body = Text("│".join(one_line(reads(row["tokens"][i]), quote="") for i in at), "dim", overflow="fold")
        console.print(_indented(body, 4))


def _indented(text: Text, by: int) -> Padding:
    return Padding(text, (0, 0, 0, by), expand=False)


def _sampled(row: Row, i: int, reads: Reads) -> Text:
    logprob = row["logprobs"][i]
    style = "green" if logprob > -0.1 else "default" if logprob > -1 else "yellow" if logprob > -3 else "red"
    return Text.assemble(
        (one_line(reads(row["tokens"][i])), style), f" {logprob:.2f} ", (f"v{row['versions'][i]}", "dim")
    )


def flow(cells: Sequence[Text], width: int) -> Text:
    """Cells from left to right, each starting at a tab stop, on lines of at most `width`."""
    out, used = Text(no_wrap=True, overflow="fold"), 0
    for cell in cells:
        if used and used + cell.cell_len > width:
            out.append("\n")
            used = 0
        gap = _TAB - cell.cell_len % _TAB
        out.append_text(cell).append(" " * gap)
        used += cell.cell_len + gap
    return out


def token_reader(run: Path, config: Row) -> Reads:
    """Reads token ids by the run's tokenizer; without one, an id stands for itself."""
    folders = (run / "checkpoints" / "latest", run / "initial", Path(config["model"].get("path") or run / "no model"))
    folder = next((f for f in folders if (f / "tokenizer_config.json").is_file()), None)
    if folder is None:
        return lambda token: f"#{token}"
    decode = _decoder(folder, bool(config["model"].get("trust_remote_code")))
    # A token that is a part of a character cannot be read on its own.
    return lambda token: text if "�" not in (text := decode([token])) else f"#{token}"


def _decoder(folder: Path, trust_remote_code: bool) -> Callable[[list[int]], str]:
    if (folder / "tokenizer.json").is_file():  # seconds quicker than importing transformers
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    from rl.pretrained import load_tokenizer

    loaded = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return lambda ids: loaded.decode(ids, skip_special_tokens=False)


def one_line(text: str, quote: str = "'") -> str:
    return quote + printable(text).replace("\n", "↵").replace("\t", "⇥") + quote
