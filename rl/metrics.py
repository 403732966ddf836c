"""Where a run's numbers go: metrics.jsonl and eval.jsonl, and wandb when it is asked for.

Names follow what users of verl and TRL chart already: reward/mean, actor/pg_loss, actor/kl, timing_s/step, ...
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.config import Config
from rl.config_file import dump_config
from rl.reward import Score
from rl.trajectory import Summary


def rollout_metrics(groups: Sequence[tuple[Sequence[Summary], Sequence[Score]]]) -> dict[str, float]:
    """Reward, success, lengths and flags of a step's episodes."""
    summaries = [s for summary, _ in groups for s in summary]
    scores = [s for _, score in groups for s in score]
    n = max(1, len(scores))
    mean = sum(s.total for s in scores) / n
    flags = Counter(flag for s in summaries for flag in set(s.flags))
    told = sorted(flag for flag in flags if flag.startswith("feedback"))
    parts = {name for s in scores for name in s.parts}
    return {
        **{f"reward/{p}": sum(s.parts.get(p, 0.0) for s in scores) / n for p in sorted(parts)},
        "reward/mean": mean,
        "reward/std": math.sqrt(sum((s.total - mean) ** 2 for s in scores) / n),
        "reward/success": sum(s.success for s in scores) / n,
        "reward/zero_variance_groups": sum(len({s.total for s in score}) == 1 for _, score in groups)
        / max(1, len(groups)),
        "response_length/mean": sum(s.sampled_tokens for s in summaries) / n,
        "observation_length/mean": sum(s.observation_tokens for s in summaries) / n,
        "episode_length/mean": sum(s.tokens for s in summaries) / n,
        "num_turns/mean": sum(s.turns for s in summaries) / n,
        **{f"flags/{name}": flags[name] / n for name in ("truncated", "tool_error", "void", *told)},
        **({"num_feedback/mean": sum(s.flags.count("feedback") for s in summaries) / n} if told else {}),
        "stop/done": sum(s.stop_reason == "done" for s in summaries) / n,
    }


class Sinks:
    """Appends a line a step; numbers that are not finite are written as null, so that every line is JSON."""

    def __init__(self, run: Path, config: Config, resume: bool = False):
        self._run, self._wandb = run, None
        self._last_step = 0
        w = config.logging.wandb
        if w.mode != "disabled":
            import wandb

            self._wandb = wandb.init(
                project=w.project,
                name=config.run.name,
                id=config.run.name if resume else None,
                dir=str(run),
                mode=w.mode,
                resume="allow",
                config={"yaml": dump_config(config), **config.model_dump(mode="json")},
            )

    def metrics(self, line: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", line)
        self._last_step = int(line["step"])
        if self._wandb:
            self._wandb.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=int(line["step"]))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self._append("eval.jsonl", line)
        if self._wandb:
            names = [k for k in ("success", "success_greedy", "mean_turns") if line.get(k) is not None]
            values = {f"eval/{k}": line[k] for k in names}
            # One that was played beside the next steps comes after their lines, and wandb takes no step twice.
            self._wandb.log({**values, "eval/step": line["step"]}, step=max(int(line["step"]), self._last_step))

    def consumed(self, line: Mapping[str, Any]) -> None:
        """What became of the groups that a step took: what `repertory audit` reads."""
        self._append("consumed.jsonl", line)

    def version(self, line: Mapping[str, Any]) -> None:
        """A published version and its step. Lines stay when a run goes on from before them: numbers are used once."""
        self._append("versions.jsonl", line)

    def episodes(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of sample episodes."""
        if self._wandb and rows:
            import wandb

            columns: list[Any] = ["step", "task", "reward", "success", "stop_reason", "messages"]
            table = wandb.Table(columns=columns, data=[[step, *(r[c] for c in columns[1:])] for r in rows])
            self._wandb.log({"episodes": table}, step=step)

    def close(self) -> None:
        if self._wandb:
            self._wandb.finish()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with (self._run / name).open("a") as file:
            file.write(json.dumps(clean) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file: a process that was killed while writing may have left a part of one."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def forget_after(run: Path, step: int, stage: int) -> None:
    """Drop the lines of steps and evaluations that a run resumed in `stage` after `step` will do again, and parts of
    lines. step -1: a run that begins again."""
    for name in ("metrics.jsonl", "eval.jsonl", "consumed.jsonl", "versions.jsonl"):
        if not (run / name).is_file():
            continue
        lines = read_lines(run / name)
        if name != "versions.jsonl":  # their numbers are not used again
            lines = [line for line in lines if line["step"] <= step and line["stage_index"] <= stage]
        partial = run / f".{name}"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial.rename(run / name)
