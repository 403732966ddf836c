"""The pipes between us and a sandbox's process: rl/sandbox_guest.py says what goes over them."""

import asyncio
import os
import re
from contextlib import suppress
from typing import Any, Literal

Limit = Literal["wall", "cpu", "memory", "processes", "file_size", "open_files", "output"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Pipes:
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

    def ready(self) -> bool:
        """Whether the process has said that it waits for code."""
        return self._got["answers"] == b"ready\n"

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
