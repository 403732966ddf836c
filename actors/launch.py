"""From a configuration to a running controller, watched by a progress display, to the closing table."""

import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.run_folder import owning, stop_is_wished, take_scale_wish, write_scaled, write_status
from rl import checkpoint
from rl.config import Config, FaultsConfig
from rl.config_file import ConfigError, dump_config
from rl.metrics import read_lines

NAMESPACE = "repertory"
_POLL_S = 0.25
_TRY_AGAIN = 75
"""sysexits.h's EX_TEMPFAIL."""


def run_training(config: Config, console: Console, *, resume: bool = False, job: bool = False) -> None:
    """Check everything that can be checked, then train and show it.

    job: one that its scheduler may end and try again. It resumes where something has been saved, starts over where
    nothing has, and exits with _TRY_AGAIN when it was stopped before its end.

    Raises ConfigError, before anything is written, for whatever the user can mend; RunFailed when the run ended with
    an error.
    """
    from actors.preflight import has_saved, preflight

    checked = config
    if job:
        resume = has_saved(config)
        checked = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": True})})
    device = preflight(checked, console, resume=resume)
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    from actors.faults import BudgetSpent

    folder = config.run.dir.resolve()
    try:
        with owning(folder, resume=resume, overwrite=checked.run.overwrite):
            checkpoint.write_whole(folder / "config.yaml", dump_config(config))
            whole = _train(config, folder, device, resume, console)
    except BudgetSpent as error:
        raise ConfigError(f"{error}\nThe run's log: {folder / 'logs' / 'run.log'}") from None
    except RayTaskError as error:
        raise ConfigError(_cause(error, folder)) from None
    except RayActorError as error:
        raise ConfigError(f"the controller died: {error}\nThe run's log: {folder / 'logs' / 'run.log'}") from None
    finally:
        ray.shutdown()
    from actors.summary import show_summary

    show_summary(folder, console)
    if not whole and not config.only_evaluates:
        last = checkpoint.newest(folder)
        how = f"--resume goes on from {last.name}" if last else "there is no checkpoint yet, so start it again"
        console.print(f"\nstopped before its end, as asked: {how}", highlight=False)
        if job:
            raise SystemExit(_TRY_AGAIN)


def _train(config: Config, folder: Path, device: str, resume: bool, console: Console) -> bool:
    """One controller after the other until one ends the run. Returns whether the run came to its end.

    A controller that died, or met a failure of ours that nobody could make good, is followed by another, which goes on
    from the newest checkpoint. Raises what is no failure of ours, and BudgetSpent.
    """
    import ray

    from actors.display import Display
    from actors.faults import Ledger, is_infra, named

    ledger, before, done = Ledger(config.faults), "", 0
    with _StopWish(folder) as wish, Display(console) as display:
        while True:
            controller, finished = _start_controller(config, folder, device, resume, before)
            try:
                return _watch(controller, finished, folder, display, wish, config.faults)
            except Exception as error:
                if not is_infra(error):
                    raise
                if (steps := len(read_lines(folder / "metrics.jsonl"))) > done:
                    ledger.progress()
                done = steps
                ledger.infra("controller", error)
                write_scaled(folder, {}, "the controller was started again meanwhile")
                before, resume = named(error), True
                ray.kill(controller)  # and with it what it has started


class _StopWish:
    """Whether the run is to stop: a file `stop`, SIGTERM, or the first Ctrl-C; the second ends it at once."""

    def __init__(self, folder: Path):
        self._folder, self._asked = folder, False

    def __enter__(self) -> "_StopWish":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def given(self) -> bool:
        return self._asked or stop_is_wished(self._folder)


def _watch(controller: Any, finished: Any, folder: Path, display: Any, wish: _StopWish, faults: FaultsConfig) -> bool:
    """Show the run until its controller ends, and pass on that it is to stop. Returns whether it came to its end."""
    import ray

    told, patience_s = False, faults.start_s  # until its first answer
    while True:
        ready, _ = ray.wait([finished], timeout=_POLL_S)
        whole: Any = ray.get(finished) if ready else None  # or why not, before its progress is asked for
        status: Any = ray.get(controller.progress.remote(), timeout=patience_s)
        patience_s = faults.heartbeat_s
        write_status(folder, status)
        display.update(status)
        if ready:
            return whole
        if not told and wish.given:
            told = True
            controller.stop.remote()
        if (wanted := take_scale_wish(folder)) is not None:
            controller.scale.remote(wanted)


def _start_controller(config: Config, folder: Path, device: str, resume: bool, before: str) -> tuple[Any, Any]:
    """On this node. before: why there was another before."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.controller import Controller
    from actors.placement import inherited
    from actors.role import bound_threads, remote_class

    environment = {**bound_threads(1), "WANDB_SILENT": "true", **inherited()}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = remote_class(Controller).options(
        num_cpus=0, max_concurrency=100, scheduling_strategy=here, runtime_env={"env_vars": environment}
    )
    namespace = f"{NAMESPACE}-{folder.name}-{time.time_ns()}"
    controller = actor.remote(config, str(folder), device, namespace, resume, before)
    return controller, controller.run.remote()


def connect(variables: Mapping[str, str] | None = None) -> None:
    """Attach to RAY_ADDRESS, or start a cluster of our own.

    variables: for the environment of the job's processes on a cluster that has its own; one of ours has this process's.
    """
    import ray

    if ray.is_initialized():
        return
    common: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        reachable = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
        if reachable:  # Ray itself tries for minutes
            socket.create_connection((reachable[1], int(reachable[2])), timeout=5).close()
        ray.init(**common, runtime_env={"env_vars": dict(variables)} if variables else None)
    else:
        # Ray runs workers at niceness 15, where whatever else the machine does stalls every barrier between threads.
        ray.init(address="local", include_dashboard=False, _system_config={"worker_niceness": 0}, **common)


def _cause(error: Any, folder: Path) -> str:
    """The first cause of a failed run in one message."""
    from actors.faults import cause_of

    cause = cause_of(error)
    return f"the run ended: {type(cause).__name__}: {cause}\nThe run's log: {folder / 'logs' / 'run.log'}"
