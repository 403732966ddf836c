"""`repertory eval`: checkpoints, runs and endpoints on the same held-out tasks, one after the other, and side by side.

    what was named ──► evaluations to make ──► found in a run folder, or made: by the actors, or over HTTP ──► tables

The first that is named says what is played: environment, reward, seed, evaluation stage and sampling. Of the others
only the model counts.
"""

import asyncio
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actors.compare import Evaluation, as_told, comparison_table, difference, evaluations_of, feedback_table
from actors.compare import figures_table as figures
from actors.endpoint import Endpoint, EndpointError
from actors.endpoint_eval import EndpointEvaluation
from actors.run_folder import owning, refuse_owned
from rl import checkpoint
from rl.config import Config, ModelConfig
from rl.config_file import ConfigError, apply_overrides, dump_config, load_config, validate
from rl.config_stage import EvalStage
from rl.env import World
from rl.metrics import read_lines
from rl.reward import reward_function

_LINE_EVERY_S = 15.0
_SHARED = ("env", "reward", "rollout", "stages")
"""Sections that every evaluation has from the first."""
_KEPT = "What was finished is kept: the same command with --resume goes on"


@dataclass(frozen=True)
class Asked:
    """What the command was asked for. parallel: episodes in flight at an endpoint; feedback: each of them twice."""

    what: Sequence[Path]
    overrides: Sequence[str] = ()
    endpoint: str | None = None
    models: Sequence[str] = ()
    key_variable: str | None = None
    parallel: int = 16
    feedback: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Target:
    """One evaluation to make. Without an endpoint it is the configuration's model, played by the actors.

    numbered: its run's name gets a number, so that every evaluation has a folder of its own.
    """

    config: Config
    endpoint: Endpoint | None = None
    numbered: bool = True


def run_evaluations(asked: Asked, console: Console) -> None:
    """Make the evaluations that are asked for, and show them. Raises ConfigError."""
    named = targets(asked)
    wanted = [t for target in named for t in _with_and_without(target)] if asked.feedback else named
    if len(wanted) > 1 and not all(target.numbered for target in wanted):
        raise ConfigError(f"run.name names one evaluation, and these are {len(wanted)}: put them elsewhere by run.root")
    runs = [_evaluate(target, asked, console) for target in wanted]
    found = [evaluations_of(run)[-1] for run in runs]
    console.print(figures(found))
    _tell_differences(runs, found, asked.feedback, console)


# -- what to evaluate -------------------------------------------------------------------------------------------------


def evaluation_config(what: Path, overrides: Sequence[str]) -> Config:
    """The configuration of an evaluation-only run of a checkpoint, a run's newest checkpoint, or a configuration.

    Its run folder is not there yet. Raises ConfigError when `what` is none of them.
    """
    target = _target(_evaluation_of(what), overrides)
    return _in_folder(target.config, _free(target.config)) if target.numbered else target.config


def targets(asked: Asked) -> list[Target]:
    """The evaluations that are asked for, without those of --feedback.

    With an endpoint, a configuration among `what` says what is played and is not evaluated itself. Raises ConfigError.
    """
    if (asked.endpoint is None) == bool(asked.models):
        raise ConfigError("--endpoint and --model go together: where models are served, and their names there")
    bases = [_evaluation_of(what) for what in asked.what]
    played = {name: getattr(bases[0], name) for name in _SHARED}
    found = []
    for what, base in zip(asked.what, bases, strict=True):
        if asked.endpoint is None or not what.is_file():
            run = base.run.model_copy(update={"seed": bases[0].run.seed})
            found.append(_target(base.model_copy(update={**played, "run": run}), asked.overrides))
    for model in asked.models:
        found.append(_served(_target(bases[0], asked.overrides), asked, model))
    if len({json.dumps(t.config.model.model_dump(mode="json"), sort_keys=True) for t in found}) < len(found):
        raise ConfigError("the same model is named twice")
    return found


def _evaluation_of(what: Path) -> Config:
    if what.is_file():
        base, model = load_config(what), None
    else:
        folder = what if (what / "repertory.yaml").is_file() else checkpoint.newest(what)
        if folder is None or not (folder / "repertory.yaml").is_file():
            raise ConfigError(f"{what}: neither a configuration, nor a checkpoint, nor a run with a checkpoint")
        base, model = load_config(folder / "repertory.yaml"), folder.resolve()
    stage = next((s for s in base.stages if isinstance(s, EvalStage)), EvalStage(kind="eval"))
    changes: dict[str, Any] = {"run": base.run.model_copy(update={"name": f"{base.run.name}-eval"}), "stages": [stage]}
    if model is not None:
        changes["model"] = ModelConfig(**{**base.model.model_dump(), "path": str(model), "scratch": None})
    return base.model_copy(update=changes)


def _target(config: Config, overrides: Sequence[str]) -> Target:
    return Target(_overridden(config, overrides), numbered=not any(o.startswith("run.name=") for o in overrides))


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    data = config.model_dump(mode="json")
    apply_overrides(data, list(overrides))
    return validate(data, "evaluation", overridden=[o.partition("=")[0] for o in overrides])


def _served(target: Target, asked: Asked, model: str) -> Target:
    """The evaluation of a model at the endpoint. Raises ConfigError for what an endpoint does not go with."""
    config = target.config
    if config.reward.model:
        raise ConfigError("reward.model scores token ids, and an endpoint gives none: add reward.model=null")
    if len(config.stages) != 1 or not isinstance(config.stages[0], EvalStage):
        raise ConfigError("an evaluation has one stage, an eval stage")
    if config.env.feedback.on and config.env.feedback.source == "checkpoint":
        raise ConfigError("env.feedback.source checkpoint needs engines, and an endpoint's evaluation has none")
    try:
        World(config.env, config.run.seed)
        reward_function(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    assert asked.endpoint is not None
    patience_s, answer_s = config.faults.patience_s, min(600.0, config.faults.deadline_s)
    where = Endpoint.at(asked.endpoint, model, asked.key_variable, patience_s=patience_s, answer_s=answer_s)
    name = config.run.name
    if target.numbered:
        name = f"{name}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}"
    changes = {
        "run": config.run.model_copy(update={"name": name}),
        "model": config.model.model_copy(update={"path": str(where), "scratch": None}),
    }
    return replace(target, config=config.model_copy(update=changes), endpoint=where)


def _with_and_without(target: Target) -> list[Target]:
    """The evaluation, and the same without the environment's feedback. Raises ConfigError when it gives none anyway."""
    if not target.config.env.feedback.on:
        raise ConfigError(
            "--feedback compares an environment's feedback with none, and this one gives none: set env.feedback.setting"
        )
    return [target, replace(target, config=_overridden(target.config, ["env.feedback.setting=none"]))]


# -- where it lies ----------------------------------------------------------------------------------------------------


def _in_folder(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": folder.name})})


def _free(config: Config) -> Path:
    number = 1
    while (folder := Path(config.run.root) / f"{config.run.name}-{number}").exists():
        number += 1
    return folder


def _begun(target: Target) -> Path | None:
    """The newest run folder that holds this very evaluation, whole or in part."""
    config = target.config
    if not target.numbered:
        if config.run.dir.exists() and not _is_of(config.run.dir, config):
            raise ConfigError(f"--resume: {config.run.dir} is of an evaluation with other settings")
        return config.run.dir if config.run.dir.exists() else None
    numbered = re.compile(re.escape(config.run.name) + r"-(\d+)")
    found = [(int(m[1]), p) for p in Path(config.run.root).glob("*") if (m := numbered.fullmatch(p.name))]
    return next((path for _, path in sorted(found, reverse=True) if _is_of(path, config)), None)


def _is_of(folder: Path, config: Config) -> bool:
    """Of this configuration, and begun after the checkpoint that it evaluates was written."""
    path, written = folder / "config.yaml", Path(config.model.path or "") / "repertory.yaml"
    if not path.is_file() or (written.is_file() and written.stat().st_mtime > path.stat().st_mtime):
        return False
    try:
        there = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return False
    if not isinstance(there, dict) or not isinstance(there.get("run"), dict):  # a kill has left a part of one
        return False
    here = config.model_dump(mode="json")
    for settings in (there, here):
        settings["run"] = {k: v for k, v in settings["run"].items() if k not in ("name", "overwrite")}
        settings.pop("faults", None)  # how patiently it is made changes nothing of it
    return there == here


def _is_whole(folder: Path) -> bool:
    lines = read_lines(folder / "eval.jsonl")
    return bool(lines) and not any(lines[-1].get(k) for k in ("not_played", "not_graded"))


# -- making one -------------------------------------------------------------------------------------------------------


def _evaluate(target: Target, asked: Asked, console: Console) -> Path:
    """Make an evaluation, go on with it, or find that it is there. Returns its run folder."""
    begun = _begun(target) if asked.resume else None
    if asked.resume and begun is None:
        console.print(f"nothing of {target.config.run.name} with these settings is there to go on with: from the start")
    if begun is not None:
        refuse_owned(begun)
        if _is_whole(begun):
            console.print(f"{begun} is there already", highlight=False, soft_wrap=True)
            return begun
    folder = begun or (_free(target.config) if target.numbered else target.config.run.dir)
    config = _in_folder(target.config, folder)
    if target.endpoint is not None:
        _play_endpoint(config, target.endpoint, asked.parallel, begun is not None, console)
        return folder
    from actors.launch import run_training

    run_training(config, console, resume=begun is not None)
    if not read_lines(folder / "eval.jsonl"):
        raise ConfigError(f"{folder} was stopped before it had evaluated anything. {_KEPT}")
    return folder


def _play_endpoint(config: Config, endpoint: Endpoint, parallel: int, resume: bool, console: Console) -> None:
    folder = config.run.dir
    fresh, kept = not folder.exists(), 0
    try:
        with owning(folder, resume=resume, overwrite=config.run.overwrite), _logging_to(folder / "logs" / "run.log"):
            checkpoint.write_whole(folder / "config.yaml", dump_config(config))
            evaluation = EndpointEvaluation(config, endpoint, folder, parallel)
            kept = evaluation.kept
            if evaluation.left_out:
                told = f"left out: {len(evaluation.left_out)} bad rows; {evaluation.left_out[0]}"
                console.print(told, highlight=False, soft_wrap=True, markup=False)
            try:
                with _progress(evaluation, str(endpoint), console):
                    asyncio.run(evaluation.run())
            finally:
                kept = evaluation.kept
    except (EndpointError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{error}" + (f"\n{kept} episodes are in {folder}. {_KEPT}" if kept else "")) from None
    except KeyboardInterrupt:
        console.print(f"{kept} episodes are in {folder}. {_KEPT}", highlight=False, soft_wrap=True)
        raise
    finally:
        if fresh and not kept:  # a wrong URL leaves nothing behind
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _progress(evaluation: EndpointEvaluation, what: str, console: Console) -> Iterator[None]:
    """A bar on a terminal; elsewhere a line every quarter of a minute."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(escape(what), total=evaluation.wanted, completed=evaluation.done)
        said = time.monotonic()

        def told() -> None:
            nonlocal said
            success = f"{what} · success {evaluation.success:.1%}"
            bars.update(bar, completed=evaluation.done, description=escape(success))
            if not console.is_terminal and time.monotonic() - said > _LINE_EVERY_S:
                said = time.monotonic()
                line = f"{success} · {evaluation.done} of {evaluation.wanted} episodes"
                console.print(line, highlight=False, soft_wrap=True, markup=False)

        evaluation.told = told
        yield


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("repertory")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


# -- what is told of them ---------------------------------------------------------------------------------------------


def _tell_differences(runs: Sequence[Path], found: Sequence[Evaluation], feedback: bool, console: Console) -> None:
    """The tables of differences, and each run's report.json."""
    pairs = list(zip(found[::2], found[1::2], strict=True)) if feedback else []
    if pairs:
        console.print(feedback_table(pairs))
    elif len(found) > 1:
        console.print(comparison_table(found))
    for number, (run, one) in enumerate(zip(runs, found, strict=True)):
        told: dict[str, Any] = {"name": one.name, **one.line}
        if feedback and number % 2 == 0:
            told["delta_feedback"] = as_told(difference(found[number + 1], one), found[number + 1])
        elif not feedback and number:
            told["against_first"] = as_told(difference(found[0], one), found[0])
        checkpoint.write_whole(run / "report.json", told)
        where = f"{run}: report.json, eval.jsonl, and the episodes in trajectories/ (`repertory view {run}`)"
        console.print(where, highlight=False, soft_wrap=True, markup=False)
