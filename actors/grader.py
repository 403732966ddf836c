"""A reward function in a process of its own: it may hang, die or raise, and its alarms need a main thread.

    evaluation ──(length, pickle)──► stdin │ grader process │ stdout ──(length, pickle)──► Score, or what it raised
"""

import asyncio
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import IO, Any

from rl.config import Config
from rl.episode import Episode
from rl.reward import Score, reward_function

_HEAD = struct.Struct(">Q")


class NotGraded(RuntimeError):
    """The grader raised, hung or died: the episode has no score, which is not a score of 0."""


class Grader:
    """Scores episodes one at a time. A process that hangs or dies is started again. Use it as an async context.

    secret: an environment variable that a reward function has no business with.
    """

    def __init__(self, config: Config, log: Path, secret: str | None = None):
        self._config, self._log, self._secret = config, log, secret
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> "Grader":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._end()

    async def score(self, episode: Episode) -> Score:
        """Raises NotGraded: at once when the function raises or takes longer than faults.grading_s, after
        faults.attempts when the process dies at it."""
        grading_s = self._config.faults.grading_s
        async with self._turn:
            for attempt in range(1, self._config.faults.attempts + 1):
                try:
                    if self._process is None:
                        await asyncio.wait_for(self._start(), self._config.faults.start_s)
                    answer = await asyncio.wait_for(self._asked(episode), grading_s)
                except TimeoutError:
                    await self._end()
                    raise NotGraded(f"it took longer than faults.grading_s = {grading_s:g} s") from None
                except (asyncio.IncompleteReadError, ConnectionError):
                    code = await self._end()
                    if attempt == self._config.faults.attempts:
                        raise NotGraded(f"the grader's process died {attempt} times (exit code {code})") from None
                    continue
                except asyncio.CancelledError:
                    await self._end()  # half an answer may be in the pipe
                    raise
                if isinstance(answer, Score):
                    return answer
                raise NotGraded(answer)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _asked(self, value: Any) -> Any:
        assert self._process is not None and self._process.stdin and self._process.stdout
        self._process.stdin.write(_framed(value))
        await self._process.stdin.drain()
        (length,) = _HEAD.unpack(await self._process.stdout.readexactly(_HEAD.size))
        return pickle.loads(await self._process.stdout.readexactly(length))

    async def _start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != self._secret}
        # What is importable here is importable there.
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "actors.grader",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment,
            )  # fmt: skip
        await self._asked(self._config)  # answered when the function is loaded, which takes its time

    async def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            try:  # one that has died says how, one that has not is ended
                await asyncio.wait_for(process.wait(), 0.2)
            except TimeoutError:
                process.kill()
        return await process.wait()


def _framed(value: Any) -> bytes:
    data = pickle.dumps(value)
    return _HEAD.pack(len(data)) + data


def _read(source: IO[bytes]) -> Any:
    """Raises EOFError when the evaluation has ended."""
    head = source.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise EOFError
    return pickle.loads(source.read(_HEAD.unpack(head)[0]))


def serve() -> None:
    """Score what comes in until nothing more does. Runs in the main thread, where alarms ring."""
    source, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a function prints is no answer
    config: Config = _read(source)
    function = reward_function(config)
    answer: Any = None
    while True:
        out.write(_framed(answer))
        out.flush()
        try:
            episode = _read(source)
        except EOFError:
            return
        try:
            answer = Score.of(function, episode, config.reward.success_at)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    serve()
