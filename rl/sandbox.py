"""Runs Python that a model wrote, where it can harm nothing.

    Sandbox (config) ──► Session: one process tree, shut in by bubblewrap ──► run(code) ──► Result
                             stateless: a session a call        stateful: a session an episode

What shuts it in: bubblewrap's namespaces (no network, own processes, own users without a way to more of them), a file
system of the system's programs, read-only, and a private temporary directory; a filter of system calls on x86_64 and
aarch64 (rl/sandbox_seccomp.py), and none on other machines; resource limits; and this process, which bounds time,
memory and output and ends everything with SIGKILL. See `rl/sandbox_guest.py` for what runs inside.

A result is what the code said: its output, error and status are the code's own word. Never let code grade itself.
"""

import asyncio
import itertools
import logging
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rl import sandbox_seccomp
from rl.config_env import SandboxConfig
from rl.env import InfraError
from rl.sandbox_command import NoSandbox as NoSandbox
from rl.sandbox_command import command, require
from rl.sandbox_namespace import Namespace
from rl.sandbox_pipes import Limit, Pipes
from rl.sandbox_watch import Usage, tree, usage_of

_log = logging.getLogger(__name__)

_START_S = 30.0
_LOOK_S, _IDLE_LOOKS = 0.1, 10
"""How often it is looked how much a sandbox uses: in a call, and between calls so many times less often."""
_ROUNDS = 200
"""How often what a call has left behind is ended before it is taken to come back for ever."""


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
        require(config)

    async def run(self, code: str, echo: bool = False) -> Result:
        """In a process of its own."""
        async with self.session() as session:
            return await session.run(code, echo)

    def session(self) -> "Session":
        """For calls that see what the ones before have left. Its process starts with the first call."""
        return Session(self.config, self._slots)


class Session:
    """One process tree, for calls one after the other. Close it, or use it with `async with`.

    After a call nothing goes on but threads of the Python that ran it. After a call that ended the process, by a limit
    or of itself, the next begins in a new one that remembers nothing.
    """

    def __init__(self, config: SandboxConfig, slots: asyncio.Semaphore):
        self._config, self._slots = config, slots
        self._process: _Process | None = None
        self._turn, self._starting = asyncio.Lock(), asyncio.Lock()
        self._closed = 0

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

        Raises InfraError when the sandbox could not be started, or was closed meanwhile.
        """
        closed = self._closed
        async with self._turn, self._slots:
            process = self._process or await self._start(closed)
            try:
                result = await process.call(code, echo)
            except BaseException:
                await self._drop()
                raise
            self._refuse_if_closed_since(closed)
            if process.ended:
                await self._drop()
        return result

    async def _start(self, closed: int) -> "_Process":
        async with self._starting:
            self._refuse_if_closed_since(closed)
            process = await _Process.start(self._config)
            if self._closed != closed:
                await process.close()
            self._refuse_if_closed_since(closed)
            self._process = process
        return process

    def _refuse_if_closed_since(self, closed: int) -> None:
        if self._closed != closed:
            raise InfraError("the sandbox's session was closed while code was to run in it")

    async def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.close()

    async def close(self) -> None:
        """Leaves no process and no file. Calls that run or wait raise InfraError; later ones begin anew."""
        self._closed += 1
        await self._drop()
        async with self._starting:  # one that is just being started is ended by the call that starts it
            pass


class _Process:
    """A started sandbox and the pipes to it."""

    def __init__(self, config: SandboxConfig, process: asyncio.subprocess.Process, pipes: Pipes, folder: str | None):
        self._config, self._process, self._pipes, self._folder = config, process, pipes, folder
        self._inside: Namespace | None = None
        self._watching: asyncio.Future[None] | None = None
        self.ended = False
        self._in_call = False
        self._looked, self._cpu_s, self._too_large = time.monotonic(), 0.0, False

    @classmethod
    async def start(cls, config: SandboxConfig) -> "_Process":
        """Until it is ready for code."""
        pipes = Pipes(config.output_kib * 1024)
        local = config.backend == "unsafe_local"
        folder = tempfile.mkdtemp(prefix="repertory-") if local else None
        calls = None if local else sandbox_seccomp.as_pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *command(config, pipes.inside, calls),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=pipes.theirs["output"],
                stderr=pipes.theirs["error"],
                pass_fds=pipes.inside if calls is None else (*pipes.inside, calls),
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
        finally:
            if calls is not None:
                os.close(calls)
        pipes.started()
        made = cls(config, process, pipes, folder)
        try:
            await made._ready()
        except BaseException:
            await made.close()
            raise
        return made

    async def _ready(self) -> None:
        """Hold on to its processes before any code can have changed them."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                await self._pipes.event.wait()
        if not self._pipes.ready():
            said = (self._pipes.text()[1].strip().splitlines() or ["nothing"])[-1]
            raise InfraError(f"no sandbox could be started: it says {said}")
        if self._folder is None:
            try:
                self._inside = Namespace(self._process.pid)
            except OSError as error:
                raise InfraError(f"no sandbox could be started: {error}") from error
        self._watching = asyncio.ensure_future(self._watch())

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
        cores = min(os.cpu_count() or 1, self._config.processes)
        since = (time.monotonic() - self._looked + _LOOK_S) * cores
        busy = self._cpu_s + since >= 0.9 * self._config.cpu_s
        if self._too_large:
            limit = "memory"
        elif limit is None and pipes.flooded:
            limit = "output"
        answer = pipes.answer() if limit is None else None
        if answer is not None and not await self._end_what_is_left():
            limit, answer = "processes", None
        if answer is None:  # killed, or it has ended of itself
            self.ended = True
            status = await self._end(limit is not None)
            output, error = pipes.text()
            return Result(output, error, *_how_it_ended(status, limit, error, busy))
        output, error = pipes.text()
        exit, said = answer
        return Result(output, error, exit, said)

    async def _end_what_is_left(self) -> bool:
        """Nothing but the guest outlives a call. False: some come back however often they are ended."""
        if self._inside is None:
            return True
        for number in range(_ROUNDS):
            if not self._inside.end_others():
                return True
            await asyncio.sleep(0.0 if number < _ROUNDS // 2 else 0.01)
        return False

    async def _watch(self) -> None:
        """End it when all its processes together hold too much memory, which no limit of the system's own bounds."""
        try:
            await self._until_too_large()
            self._too_large = True
        except Exception:
            _log.exception("what a sandbox uses could not be seen, so it is ended")
        self._kill()
        self._pipes.event.set()

    async def _until_too_large(self) -> None:
        most = self._config.memory_mib * 2**20
        for number in itertools.count():
            await asyncio.sleep(_LOOK_S)
            if not self._in_call and number % _IDLE_LOOKS:
                continue
            usage = self._usage(most)
            self._looked, self._cpu_s = time.monotonic(), max(self._cpu_s, usage.cpu_s)
            if usage.memory > most:
                return

    def _usage(self, most: int) -> Usage:
        inside = self._inside
        if inside is None:
            return usage_of("/proc", tree(self._process.pid), most)
        try:
            return usage_of(inside.proc, inside.pids(), most, inside.files_bytes())
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            return Usage(0, 0.0)

    async def _end(self, kill: bool) -> int:
        if kill:
            self._kill()
        else:
            try:
                async with asyncio.timeout(1.0):
                    await self._process.wait()
            except TimeoutError:
                self._kill()
        return await self._wait()

    def _kill(self) -> None:
        """The namespace's processes die with its first; without one, those that are still in the group of the first."""
        if self._inside is not None:
            self._inside.end()
        else:
            self._kill_group()

    def _kill_group(self) -> None:
        if self._process.returncode is None or self._folder:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _wait(self) -> int:
        """After _kill: bubblewrap ends when its first process inside has, and is ended where it does not."""
        try:
            async with asyncio.timeout(1.0):
                await self._process.wait()
        except TimeoutError:
            self._kill_group()
        return await self._process.wait()

    async def close(self) -> None:
        """A process is left for no longer than the kernel takes to end it, even when this is cancelled."""
        if self._watching is not None:
            self._watching.cancel()
        self._kill()
        self._pipes.event.set()
        try:
            await self._wait()
            if self._inside is not None:
                await self._inside.gone()
        finally:
            self._pipes.close()
            if self._inside is not None:
                self._inside.close()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)


def _how_it_ended(status: int, limit: Limit | None, error: str, busy: bool) -> tuple[int | None, Limit | None]:
    """Exit status and limit of a process that gave no answer. bubblewrap says 128 + the signal, as a shell does.

    busy: it had used about as much CPU time as it may.
    """
    if limit is not None:
        return None, limit
    number = -status if status < 0 else status - 128
    if number >= signal.NSIG:  # a status that the code has chosen
        number = 0
    if number in (signal.SIGXCPU, signal.SIGKILL) and busy:
        return None, "cpu"  # at the soft limit, which can be caught, or at the hard one
    if number == signal.SIGXFSZ:
        return None, "file_size"
    return (None if number > 0 else status), ("memory" if "MemoryError" in error else None)
