"""Runs Python that a model wrote, where it can harm nothing.

    Sandbox (config) ──► Session: one process tree, shut in by bubblewrap ──► run(code) ──► Result
                             stateless: a session a call        stateful: a session an episode

What shuts it in: bubblewrap's namespaces (no network, own processes, own users without a way to more of them), a file
system of the system's programs, read-only, and a private temporary directory; resource limits; and this process, which
bounds time and output and ends everything with SIGKILL. See `rl/sandbox_guest.py` for what runs inside.

A result is what the code said: its output, error and status are the code's own word. Never let code grade itself.
"""

import asyncio
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rl.config_env import SandboxConfig
from rl.env import InfraError
from rl.sandbox_watch import usage_of

Limit = Literal["wall", "cpu", "memory", "processes", "file_size", "open_files", "output"]

_GUEST = (Path(__file__).parent / "sandbox_guest.py").read_text()
_NOBODY = "65534"
_INSTALL = (
    "install it (`apt-get install bubblewrap`), allow user namespaces, or, for code that you trust as you trust your "
    "own, say `unsafe_local` in the config"
)
_LOOK_S, _IDLE_LOOKS = 0.1, 10
"""How often it is looked how much a sandbox uses: in a call, and between calls so many times less often."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class NoSandbox(RuntimeError):
    """Nothing here can shut code in."""


@dataclass(frozen=True)
class Result:
    """exit: the code's status; None: it was killed. limit: the one that ended it, as far as could be told."""

    output: str
    error: str
    exit: int | None
    limit: Limit | None

    @property
    def ok(self) -> bool:
        return self.exit == 0


class Sandbox:
    """Makes sessions. Raises NoSandbox when made where nothing can shut code in."""

    def __init__(self, config: SandboxConfig):
        self.config = config
        self._slots = asyncio.Semaphore(config.parallel)
        _require(config)

    async def run(self, code: str, echo: bool = False) -> Result:
        """In a process of its own."""
        async with self.session() as session:
            return await session.run(code, echo)

    def session(self) -> "Session":
        """For calls that see what the ones before have left. Its process starts with the first call."""
        return Session(self.config, self._slots)


class Session:
    """One process tree, for calls one after the other. Close it, or use it with `async with`.

    After a call that ended the process, by a limit or of itself, the next begins in a new one that remembers nothing.
    """

    def __init__(self, config: SandboxConfig, slots: asyncio.Semaphore):
        self._config, self._slots = config, slots
        self._process: _Process | None = None

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()

    @property
    def alive(self) -> bool:
        """Whether the next call sees what the ones before have left."""
        return self._process is not None

    async def run(self, code: str, echo: bool = False) -> Result:
        """echo: the value of a last line that is an expression is part of the output, as at a prompt.

        Raises InfraError when the sandbox could not be started.
        """
        async with self._slots:
            if self._process is None:
                self._process = await _Process.start(self._config)
            try:
                result = await self._process.call(code, echo)
            except BaseException:
                await self.close()
                raise
            if self._process.ended:
                await self.close()
        return result

    async def close(self) -> None:
        """Leaves no process and no file."""
        process, self._process = self._process, None
        if process is not None:
            await process.close()


class _Process:
    """A started sandbox and the pipes to it."""

    def __init__(self, config: SandboxConfig, process: asyncio.subprocess.Process, pipes: "_Pipes", folder: str | None):
        self._config, self._process, self._pipes, self._folder = config, process, pipes, folder
        self.ended = False
        self._in_call = False
        self._looked, self._cpu_s, self._too_large = time.monotonic(), 0.0, False
        self._watching = asyncio.ensure_future(self._watch())

    @classmethod
    async def start(cls, config: SandboxConfig) -> "_Process":
        pipes = _Pipes(config.output_kib * 1024)
        folder = tempfile.mkdtemp(prefix="repertory-") if config.backend == "unsafe_local" else None
        try:
            process = await asyncio.create_subprocess_exec(
                *_command(config, pipes.inside),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=pipes.theirs["output"],
                stderr=pipes.theirs["error"],
                pass_fds=pipes.inside,
                cwd=folder or "/",
                env={},
                start_new_session=True,
            )
        except BaseException as error:
            pipes.close()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise InfraError(f"no sandbox could be started: {error}") from error
            raise
        pipes.started()
        return cls(config, process, pipes, folder)

    async def call(self, code: str, echo: bool) -> Result:
        pipes, limit = self._pipes, None
        pipes.begin()
        self._in_call = True
        text = code.encode("utf-8", "replace")
        line = f"{echo:d} {len(text)}\n".encode() + text
        try:
            async with asyncio.timeout(self._config.wall_s):
                await asyncio.gather(pipes.send(line), pipes.event.wait())
        except TimeoutError:
            limit = "wall"
        self._in_call = False
        # What ran on since the last look may have used as much more on every core; the limit counts in coarse ticks.
        since = (time.monotonic() - self._looked + _LOOK_S) * (os.cpu_count() or 1)
        busy = self._cpu_s + since >= 0.9 * self._config.cpu_s
        if self._too_large:
            limit = "memory"
        elif limit is None and pipes.flooded:
            limit = "output"
        answer = pipes.answer() if limit is None else None
        if answer is None:  # killed, or it has ended of itself
            self.ended = True
            status = await self._end(limit is not None)
            output, error = pipes.text()
            return Result(output, error, *_how_it_ended(status, limit, error, busy))
        output, error = pipes.text()
        exit, said = answer
        return Result(output, error, exit, said)

    async def _watch(self) -> None:
        """End it when all its processes together hold too much memory, which no limit of the system's own bounds."""
        most = self._config.memory_mib * 2**20
        for number in itertools.count():
            await asyncio.sleep(_LOOK_S)
            if not self._in_call and number % _IDLE_LOOKS:
                continue
            usage = usage_of(self._process.pid, most)
            self._looked, self._cpu_s = time.monotonic(), max(self._cpu_s, usage.cpu_s)
            if usage.memory > most:
                self._too_large = True
                self._kill()
                self._pipes.event.set()
                return

    async def _end(self, kill: bool) -> int:
        if kill:
            self._kill()
        else:
            try:
                async with asyncio.timeout(1.0):
                    await self._process.wait()
            except TimeoutError:
                self._kill()
        return await self._process.wait()

    def _kill(self) -> None:
        """bubblewrap's processes die with it; without it, those that are still in the group of the first."""
        if self._process.returncode is None or self._folder:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        self._watching.cancel()
        self._kill()
        await self._process.wait()
        self._pipes.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Pipes:
    """Code in; output, error and answers out, of which no more than so many bytes a call are kept."""

    def __init__(self, most: int):
        self._most = most
        inside_in, self._commands = os.pipe()
        self._ours: dict[str, int] = {}
        self.theirs: dict[str, int] = {}
        for name in ("output", "error", "answers"):
            self._ours[name], self.theirs[name] = os.pipe()
        self.inside: tuple[int, ...] = (inside_in, self.theirs["answers"])
        for descriptor in (self._commands, *self._ours.values()):
            os.set_blocking(descriptor, False)
        self._loop = asyncio.get_running_loop()
        self._got: dict[str, bytearray] = {}
        self.begin()

    def started(self) -> None:
        """The process has its ends now."""
        for descriptor in (self.inside[0], *self.theirs.values()):
            os.close(descriptor)
        self.theirs, self.inside = {}, ()
        for name in self._ours:
            self._loop.add_reader(self._ours[name], self._read, name)

    def begin(self) -> None:
        """A call: what comes from now on is its own. An answer that code has made up before is not."""
        while "answers" in self._ours and self._got and self._read("answers"):
            self._got["answers"].clear()
        self._got = {"output": bytearray(), "error": bytearray(), "answers": bytearray()}
        self.flooded = False
        self.event = asyncio.Event()
        if "answers" not in self._ours:  # the process has ended since the last call
            self.event.set()

    async def send(self, line: bytes) -> None:
        """However long it takes a process that may not read."""
        while line and "answers" in self._ours:
            try:
                line = line[os.write(self._commands, line) :]
            except BlockingIOError:
                await asyncio.sleep(0.001)
            except BrokenPipeError:
                return

    def _read(self, name: str) -> bool:
        """Take what is there. False: nothing more for now."""
        try:
            data = os.read(self._ours[name], 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._ours[name])
            os.close(self._ours.pop(name))
            if name == "answers":
                self.event.set()
            return False
        kept = self._got[name]
        kept += data[: self._most + 1 - len(kept)]
        self.flooded |= len(kept) > self._most
        if self.flooded:  # nobody reads on: until it is killed, the code waits
            for descriptor in self._ours.values():
                self._loop.remove_reader(descriptor)
        if self.flooded or (name == "answers" and b"\n" in kept):
            self.event.set()
        return True

    def answer(self) -> tuple[int, Limit | None] | None:
        """What the process says of the call; None where it says nothing of the kind."""
        found = re.fullmatch(rb"(-?\d{1,9}) (-|memory|processes|file_size|open_files)\n", self._got["answers"])
        if found is None:
            return None
        limit: Any = found[2].decode()
        return int(found[1]), None if limit == "-" else limit

    def text(self) -> tuple[str, str]:
        """Output and error, all that was written before the answer."""
        for name in ("output", "error"):
            while name in self._ours and not self.flooded and self._read(name):
                pass
        return _text(self._got["output"][: self._most]), _text(self._got["error"][: self._most])

    def close(self) -> None:
        for descriptor in self._ours.values():
            self._loop.remove_reader(descriptor)
        for descriptor in (self._commands, *self._ours.values(), *self.theirs.values(), *self.inside[:1]):
            with suppress(OSError):
                os.close(descriptor)
        self._ours, self.theirs, self.inside = {}, {}, ()


def _text(data: bytes | bytearray) -> str:
    """UTF-8 as far as it is that; control characters, which a terminal or a tokenizer may obey, by their numbers."""
    text = bytes(data).decode("utf-8", "replace").replace("\r\n", "\n")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _how_it_ended(status: int, limit: Limit | None, error: str, busy: bool) -> tuple[int | None, Limit | None]:
    """Exit status and limit of a process that gave no answer. bubblewrap says 128 + the signal, as a shell does.

    busy: it had used about as much CPU time as it may.
    """
    if limit is not None:
        return None, limit
    number = -status if status < 0 else status - 128
    if number == signal.SIGXCPU or (number == signal.SIGKILL and busy):
        return None, "cpu"  # at the soft limit, which can be caught, or at the hard one
    if number == signal.SIGXFSZ:
        return None, "file_size"
    return (None if number > 0 else status), ("memory" if "MemoryError" in error else None)


def _command(config: SandboxConfig, inside: Sequence[int]) -> list[str]:
    megabyte = 2**20
    limits = {
        "RLIMIT_AS": config.memory_mib * megabyte,
        "RLIMIT_CPU": config.cpu_s,
        "RLIMIT_NPROC": config.processes,
        "RLIMIT_FSIZE": config.file_mib * megabyte,
        "RLIMIT_NOFILE": config.open_files,
        "RLIMIT_CORE": 0,
    }
    limit = ",".join(f"{name}={value}" for name, value in limits.items())
    guest = [config.python, "-I", "-S", "-X", "utf8", "-c", _GUEST, *map(str, inside), limit]
    if config.backend == "unsafe_local":
        return guest
    size = str(config.file_mib * megabyte)
    folders = [part for path in ("/usr", *config.read_only) for part in ("--ro-bind", path, path)]
    links = [
        part
        for name in ("bin", "sbin", "lib", "lib32", "lib64")
        if Path("/", name).is_symlink()
        for part in ("--symlink", f"usr/{name}", f"/{name}")
    ]
    return [
        *_as_nobody(),
        "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "PATH", "/usr/bin",
        "--hostname", "sandbox", *folders, *links,
        "--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--size", size, "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--",
        *guest,
    ]  # fmt: skip


def _as_nobody() -> list[str]:
    """Limits on processes are not kept for root."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups", "--no-new-privs"]


def _require(config: SandboxConfig) -> None:
    """Raises NoSandbox unless a sandbox starts here."""
    programs = [] if config.backend == "unsafe_local" else ["bwrap", *_as_nobody()[:1]]
    for program in programs:
        if shutil.which(program) is None:
            raise NoSandbox(f"running a model's code needs {program}, which is not here: {_INSTALL}")
    if shutil.which(config.python) is None:
        raise NoSandbox(f"sandbox.python: there is no {config.python}")
    for folder in config.read_only:
        if not Path(folder).is_dir():
            raise NoSandbox(f"sandbox.read_only: there is no folder {folder}")
    tried = subprocess.run(_command(config, (0, 1)), stdin=subprocess.DEVNULL, capture_output=True, text=True, env={})
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or ["nothing"])[-1]
        raise NoSandbox(f"bubblewrap does not start here (it says: {said}): {_INSTALL}")
