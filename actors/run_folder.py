"""A run's folder: who owns it, how the run stands, and the wish that it stop. Files only, so that any terminal can ask.

owner.lock     locked by the process that trains, for as long as it lives; says which that is
writer.lock    locked by the controller
status.json    what the progress display shows, twice a second
stop           somebody wants the run to save and end
scale.json     somebody wants other numbers of actors; scaled.json: what came of that
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from actors.display import Display
from actors.status import Status
from rl import checkpoint
from rl.config_file import ConfigError

_KEPT = ("owner.lock", "writer.lock", "stop")
_OF_PEOPLE = ("keys.json", "feedback")
"""What a server of the run has in serve/ from people: no run could make it again."""
_ANSWERED = ("stop", "status.json", "scale.json", "scaled.json")
_PROBED_S = 1.0
"""Who asks whether a folder is owned holds its lock for a moment."""
_WRITER_WAIT_S = 60.0
_POLL_S = 0.5


@contextmanager
def owning(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the run's folder, or take it over, and be its only trainer inside the block.

    resume: leave what is in it; overwrite: or else delete it, but for the keys and the feedback in serve/. Releases and
    sessions go: they name versions, whose numbers begin anew.

    Raises ConfigError when another process owns it, and when something is in it that is to be neither kept nor deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "owner.lock").open("a+") as file:
        if not _lock(file, _PROBED_S):
            raise ConfigError(_owned(folder))
        for name in _ANSWERED:
            (folder / name).unlink(missing_ok=True)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}))
        file.flush()
        if not resume:
            found = [path for path in folder.iterdir() if path.name not in _KEPT]
            if found and not overwrite:  # another run has come and gone since this one looked
                raise ConfigError(f"the run folder {folder} exists: choose another run.name, or go on with --resume")
            with lock_for_writing(folder):
                for path in found:
                    if path.name == "serve" and path.is_dir():
                        _clear(path, _OF_PEOPLE)
                    else:
                        _delete(path)
        yield


def _clear(folder: Path, kept: Collection[str]) -> None:
    """Delete what is in a folder, but for this; and the folder where nothing is left in it."""
    for path in list(folder.iterdir()):
        if path.name not in kept:
            _delete(path)
    if not any(folder.iterdir()):
        _delete(folder)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def refuse_owned(folder: Path) -> None:
    """Raises ConfigError when a process trains in the folder."""
    if is_owned(folder):
        raise ConfigError(_owned(folder))


def is_owned(folder: Path) -> bool:
    path = folder / "owner.lock"
    if not path.is_file():
        return False
    with path.open() as file:
        return not _lock(file)


def _owned(folder: Path) -> str:
    who = owner(folder)
    return (
        f"{folder} is being trained by process {who.get('pid')} on {who.get('host')}: look at it with `repertory "
        f"status {folder}`, end it with `repertory stop {folder}`, or choose another run.name"
    )


def owner(folder: Path) -> dict[str, Any]:
    """host, pid and since (seconds since the epoch) of who owns the folder, or did last; {} when nobody has."""
    try:
        return json.loads((folder / "owner.lock").read_text())
    except (OSError, ValueError):
        return {}


def lock_for_writing(folder: Path) -> IO[str]:
    """The controller's own lock, held until its process ends: the controller of a killed run may outlive it a moment.

    Raises TimeoutError after a minute.
    """
    file = (folder / "writer.lock").open("a+")
    if not _lock(file, _WRITER_WAIT_S):
        raise TimeoutError(f"another controller still writes to {folder}: its run was ended, and it was not")
    return file


def _lock(file: IO[str], patience_s: float = 0.0) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)


# -- how it stands ----------------------------------------------------------------------------------------------------


def write_status(folder: Path, status: Status) -> None:
    with suppress(OSError):  # a full disk is the run's to say
        checkpoint.write_whole(folder / "status.json", asdict(status))


def read_status(folder: Path) -> Status | None:
    """How the run stands, or stood when it ended. None before it first said."""
    path = folder / "status.json"
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    return Status(**{**data, "busy": tuple(data["busy"]), "messages": tuple(data["messages"])})


def show_status(folder: Path, console: Console) -> None:
    """Whether the run goes on, since when and where, and the line of its progress display.

    Raises ConfigError when no run ever was there.
    """
    running, status = _running(folder), read_status(folder)
    who = owner(folder)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who.get("since")))
    if running:
        console.print(f"{folder} is being trained by process {who.get('pid')} on {who.get('host')} since {since}")
    else:
        phase = status.phase if status else "starting"
        how = {"done": "is done", "stopped": "was stopped"}.get(phase, "ended before its end: --resume goes on")
        console.print(f"{folder} {how}; last started {since}")
    if status is not None:
        console.print(Display(console).line(status), highlight=False, soft_wrap=True)
        for message in status.messages:
            console.print(f"! {message}", highlight=False, soft_wrap=True, markup=False)


def stop_run(folder: Path, console: Console, *, wait: bool) -> None:
    """Ask the run to save and end, and wait for that. Raises ConfigError when nobody trains there."""
    if not _running(folder):
        raise ConfigError(f"nobody trains in {folder}: `repertory status {folder}` says how it ended")
    (folder / "stop").touch()
    if wait:
        with console.status(f"waiting for {folder} to finish its step and save"):
            while is_owned(folder):
                time.sleep(_POLL_S)
        show_status(folder, console)


def scale_run(folder: Path, wanted: dict[str, int], console: Console, *, wait: bool) -> None:
    """Ask the run for other numbers of actors, and wait for them. Raises ConfigError when they did not come to be."""
    if not _running(folder):
        raise ConfigError(f"nobody trains in {folder}: `repertory status {folder}` says how it ended")
    scaled = folder / "scaled.json"
    scaled.unlink(missing_ok=True)
    checkpoint.write_whole(folder / "scale.json", wanted)
    if not wait:
        return
    what = ", ".join(f"{role}={count}" for role, count in wanted.items())
    with console.status(f"waiting for {folder} to have {what}"):
        while is_owned(folder) and not scaled.is_file():
            time.sleep(_POLL_S)
    if not scaled.is_file():
        raise ConfigError(f"the run in {folder} ended before it was scaled")
    told = json.loads(scaled.read_text())
    if told["error"]:
        raise ConfigError(f"not scaled: {told['error']}")
    sizes = ", ".join(f"{role}: {count}" for role, count in told["sizes"].items())
    console.print(f"{folder} has {sizes}", highlight=False, soft_wrap=True)


def take_scale_wish(folder: Path) -> dict[str, int] | None:
    path = folder / "scale.json"
    if not path.is_file():
        return None
    wanted = json.loads(path.read_text())
    path.unlink()
    return wanted


def write_scaled(folder: Path, sizes: dict[str, int], error: str) -> None:
    checkpoint.write_whole(folder / "scaled.json", {"sizes": sizes, "error": error})


def _running(folder: Path) -> bool:
    if not (folder / "owner.lock").is_file():
        raise ConfigError(f"{folder} is no run folder")
    return is_owned(folder)


def stop_is_wished(folder: Path) -> bool:
    return (folder / "stop").exists()
