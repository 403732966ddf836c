"""From a configuration to a running controller, watched by a progress display, to the closing table."""

import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.run_folder import owning, stop_is_wished, write_status
from rl import checkpoint
from rl.config import Config
from rl.config_file import ConfigError, dump_config, load_config

NAMESPACE = "repertory"
_POLL_S = 0.25


def run_training(config: Config, console: Console, *, resume: bool = False) -> None:
    """Check everything that can be checked, then train and show it.

    Raises ConfigError, before anything is written, for whatever the user can mend; RunFailed when the run ended with
    an error.
    """
    from actors.preflight import preflight

    device = preflight(config, console, resume=resume)
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    folder = config.run.dir.resolve()
    try:
        with owning(folder, resume=resume, overwrite=config.run.overwrite):
            (folder / "config.yaml").write_text(dump_config(config))
            controller, finished = _start_controller(config, folder, device, resume)
            whole = _watch(controller, finished, folder, console)
    except RayTaskError as error:
        raise ConfigError(_cause(error, folder)) from None
    except RayActorError as error:
        raise ConfigError(f"the controller died: {error}\nThe run's log: {folder / 'logs' / 'run.log'}") from None
    finally:
        ray.shutdown()
    from actors.summary import show_summary

    show_summary(folder, console)
    if not whole:
        last = checkpoint.newest(folder)
        how = f"--resume goes on from {last.name}" if last else "there is no checkpoint yet, so start it again"
        console.print(f"\nstopped before its end, as asked: {how}", highlight=False)


def _watch(controller: Any, finished: Any, folder: Path, console: Console) -> bool:
    """Show the run until it ends, and pass on that it is to stop: a file `stop`, SIGTERM, or the first Ctrl-C.

    Returns whether it came to its end.
    """
    import ray

    from actors.display import Display

    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C ends it at once

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    told = False
    try:
        with Display(console) as display:
            while True:
                ready, _ = ray.wait([finished], timeout=_POLL_S)
                status: Any = ray.get(controller.progress.remote())
                write_status(folder, status)
                display.update(status)
                if ready:
                    return ray.get(finished)
                if not told and (asked or stop_is_wished(folder)):
                    told = True
                    controller.stop.remote()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_controller(config: Config, folder: Path, device: str, resume: bool) -> tuple[Any, Any]:
    import ray

    from actors.controller import Controller
    from actors.role import bound_threads

    actor: Any = ray.remote(Controller)
    actor = actor.options(
        num_cpus=0, max_concurrency=100, runtime_env={"env_vars": {**bound_threads(1), "WANDB_SILENT": "true"}}
    )
    controller = actor.remote(config, str(folder), device, f"{NAMESPACE}-{folder.name}-{time.time_ns()}", resume)
    return controller, controller.run.remote()


def connect() -> None:
    """Attach to RAY_ADDRESS, or start a cluster of our own."""
    import ray

    if ray.is_initialized():
        return
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        reachable = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
        if reachable:  # Ray itself tries for minutes
            socket.create_connection((reachable[1], int(reachable[2])), timeout=5).close()
        ray.init(**common)
    else:
        # Ray runs workers at niceness 15, where whatever else the machine does stalls every barrier between threads.
        ray.init(address="local", include_dashboard=False, _system_config={"worker_niceness": 0}, **common)


def _cause(error: Any, folder: Path) -> str:
    """The first cause of a failed run in one message."""
    cause = error
    while getattr(cause, "cause", None) is not None:
        cause = cause.cause
    return f"the run ended: {type(cause).__name__}: {cause}\nThe run's log: {folder / 'logs' / 'run.log'}"


def evaluation_config(what: Path, overrides: list[str]) -> Config:
    """The configuration of an evaluation-only run of a checkpoint, a run's newest checkpoint, or a configuration.

    Raises ConfigError when `what` is none of them.
    """
    from rl.config import ModelConfig
    from rl.config_stage import EvalStage

    if what.is_file():
        base, model = load_config(what), None
    else:
        folder = what if (what / "repertory.yaml").is_file() else checkpoint.newest(what)
        if folder is None or not (folder / "repertory.yaml").is_file():
            raise ConfigError(f"{what}: neither a configuration, nor a checkpoint, nor a run with a checkpoint")
        base, model = load_config(folder / "repertory.yaml"), folder.resolve()
    stage = next((s for s in base.stages if isinstance(s, EvalStage)), EvalStage(kind="eval"))
    name, number = f"{base.run.name}-eval", 1
    while (Path(base.run.root) / f"{name}-{number}").exists():
        number += 1
    changes: dict[str, Any] = {"run": base.run.model_copy(update={"name": f"{name}-{number}"}), "stages": [stage]}
    if model is not None:
        changes["model"] = ModelConfig(
            **{**base.model.model_dump(), "path": str(model), "scratch": None}
        )
    return _with_overrides(base.model_copy(update=changes), overrides)


def _with_overrides(config: Config, overrides: list[str]) -> Config:
    from rl.config_file import apply_overrides, validate

    data = config.model_dump(mode="json")
    apply_overrides(data, overrides)
    return validate(data, "evaluation", overridden=[o.partition("=")[0] for o in overrides])
