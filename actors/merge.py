"""What `repertory merge` does: checks, the merge with a progress bar, and the held-out scores of a greedy soup."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from rl.config import Dtype
from rl.config_file import ConfigError
from rl.merge import (
    Rule,
    Weights,
    check_alike,
    find_checkpoint,
    greedy,
    lines,
    lines_coefficients,
    open_weights,
    uniform,
    write,
    writing,
)
from rl.metrics import read_lines

Method = Literal["uniform", "greedy", "lines"]


@dataclass(frozen=True)
class Merge:
    """What is asked for. base, alpha and beta belong to lines, eval_n to greedy."""

    out: Path
    checkpoints: Sequence[str]
    method: Method
    base: str | None = None
    alpha: float | None = None
    beta: float | None = None
    eval_n: int | None = None
    dtype: Dtype | None = None


def merge(asked: Merge, console: Console) -> None:
    """Check everything, then merge into `out`; merge.json there says of what and how.

    Raises ConfigError for whatever the user can mend; `out` is then as it was.
    """
    check_options(asked)
    members = [open_weights(find_checkpoint(path)) for path in asked.checkpoints]
    base = open_weights(find_checkpoint(asked.base)) if asked.base else None
    for other in [*members[1:], *([base] if base else [])]:
        check_alike(members[0], other)
    record: dict[str, Any] = {"method": asked.method, "checkpoints": _folders(members)}
    with writing(asked.out) as partial, Progress(console=console, transient=True) as bars:

        def save(rule: Rule) -> None:
            bar = bars.add_task("merging", total=len(members[0].shapes))
            write(rule, members[0], partial, dtype=asked.dtype, written=lambda: bars.advance(bar))
            bars.remove_task(bar)

        if base:
            alpha, beta = lines_coefficients(len(members), asked.alpha, asked.beta)
            record |= {"base": str(base.folder), "alpha": alpha, "beta": beta}
            save(lines(members, base, alpha, beta))
        elif asked.method == "greedy":
            chosen, scores = choose(asked, members, partial, save, bars)
            record |= {"checkpoints": _folders(chosen), "scores": scores}
            save(uniform(chosen))
        else:
            save(uniform(members))
        (partial / "merge.json").write_text(json.dumps(record, indent=1))
    done = f"{len(record['checkpoints'])} of {len(members)} checkpoints merged into {asked.out}"
    if (asked.out / "repertory.yaml").is_file():
        done += f"\nScore it:  repertory eval {asked.out}"
    console.print(done, highlight=False, soft_wrap=True, markup=False)


def check_options(asked: Merge) -> None:
    """Raises ConfigError when options do not go together, or a method lacks what it needs."""
    foreign = {"--eval-n": asked.eval_n} if asked.method != "greedy" else {}
    if asked.method != "lines":
        foreign |= {"--base": asked.base, "--alpha": asked.alpha, "--beta": asked.beta}
        if len(asked.checkpoints) < 2:
            raise ConfigError(f"a {asked.method} soup is made of two checkpoints or more, and one was given")
    elif asked.base is None:
        raise ConfigError("--method lines scales the change from a base: say with --base which model was trained from")
    given = [name for name, value in foreign.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} does not belong to --method {asked.method}")


def choose(
    asked: Merge, members: Sequence[Weights], partial: Path, save: Callable[[Rule], None], bars: Progress
) -> tuple[list[Weights], list[dict[str, Any]]]:
    """The greedy soup's members, and every score on the way; soups to be scored are written to `partial`.

    All are scored by the first checkpoint's evaluation. Raises ConfigError when it has none.
    """
    like = members[0].folder
    if not (like / "repertory.yaml").is_file():
        raise ConfigError(f"{like} has no repertory.yaml, whose environment and eval stage a greedy soup is scored by")
    bar = bars.add_task("scoring", total=2 * len(members) - 1)
    scores: list[dict[str, Any]] = []

    def score(chosen: Sequence[int]) -> float:
        soup = [members[i] for i in chosen]
        names = " + ".join(asked.checkpoints[i] for i in chosen)
        bars.update(bar, description=f"scoring {escape(names)}")
        folder = soup[0].folder
        if len(soup) > 1:
            save(uniform(soup))
            folder = partial
        success, run = held_out_success(folder, like, asked.eval_n)
        scores.append({"checkpoints": _folders(soup), "success": success, "run": str(run)})
        bars.console.print(f"{success:.3f}  {names}  ({run})", highlight=False, soft_wrap=True, markup=False)
        bars.advance(bar)
        return success

    chosen = [members[i] for i in greedy(len(members), score)]
    bars.remove_task(bar)
    return chosen, scores


def _folders(members: Sequence[Weights]) -> list[str]:
    return [str(member.folder) for member in members]


def held_out_success(model: Path, like: Path, n: int | None) -> tuple[float, Path]:
    """Success of a model on sampled held-out tasks, by the evaluation that checkpoint `like` names, and its run folder.

    An evaluation run like that of `repertory eval`, in a Ray of its own and without the greedy half. n: how many tasks;
    default: as many as the evaluation has.
    """
    from actors.eval_command import evaluation_config
    from actors.launch import run_training

    config = evaluation_config(like, [])
    changes = {"greedy": False, "split": "held_out"} | ({"n": n} if n else {})
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": str(model.resolve())}),
            "stages": [config.stages[0].model_copy(update=changes)],
        }
    )
    # Its own display would draw over the progress bar.
    run_training(config, Console(quiet=True, force_terminal=False))
    return read_lines(config.run.dir / "eval.jsonl")[-1]["success"], config.run.dir
