"""The processes of a started bubblewrap, held on to before any code has run, so that it can change nothing of it.

    monitor: bubblewrap itself, outside ──► init: its first process inside ──► guest ──► what the code starts

Code inside can do with init what it likes: it is the same user. So nothing relies on init's doing anything, on the
parents of processes, or on a number's still being that of the same process: init is held by a descriptor, with it, by
the kernel's own rule, ends all else, and the others are seen and ended in the namespace's own /proc.
"""

import asyncio
import os
import signal
from contextlib import suppress

from rl import sandbox_watch

_INIT = "1"
_INODE = 1024
"""Bytes that a file takes besides its content, about."""


class Namespace:
    """Of a monitor whose guest is ready, and has not been given code yet. Raises OSError where it is not so."""

    def __init__(self, monitor: int):
        found = sandbox_watch.children(monitor)
        if len(found) != 1:
            raise ProcessLookupError(f"bubblewrap has {len(found)} processes in place of one")
        self._init, self._root = os.pidfd_open(found[0]), -1
        try:
            self._root = os.open(f"/proc/{found[0]}/root", os.O_PATH | os.O_DIRECTORY)
            self.proc = f"/proc/self/fd/{self._root}/proc"
            guests = [pid for pid in self.pids() if pid != _INIT]
            # Still its child: the number was no other's when it was opened.
            if len(guests) != 1 or sandbox_watch.children(monitor) != found:
                raise ProcessLookupError("bubblewrap has ended, or has more processes than it should")
            self._guest = guests[0]
        except BaseException:
            self.close()
            raise

    def pids(self) -> list[str]:
        """Of all processes inside, as they are numbered there."""
        return [name for name in os.listdir(self.proc) if name.isdigit()]

    def files_bytes(self) -> int:
        """Memory of the files inside, were they all empty."""
        places = (os.statvfs(f"/proc/self/fd/{self._root}/{place}") for place in ("tmp", "dev/shm"))
        return sum((place.f_files - place.f_ffree) * _INODE for place in places)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init, signal.SIGKILL)

    def end_others(self) -> bool:
        """All but init and the guest. False: there was none. True too of one that has ended meanwhile: it may have
        started another first."""
        found = False
        for pid in self.pids():
            if pid in (_INIT, self._guest):
                continue
            try:
                found |= self._end_one(f"{self.proc}/{pid}")
            except (FileNotFoundError, ProcessLookupError):
                found = True
        return found

    def _end_one(self, path: str) -> bool:
        """False: it had ended already, and only nobody has asked how."""
        fields = sandbox_watch.stat_of(path)
        if fields[0] in (b"Z", b"X") and int(fields[17]) <= 1:  # no other thread of it lives on
            return False
        process = os.open(path, os.O_DIRECTORY)
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)
        return True

    async def gone(self) -> None:
        """Until the last process inside has ended, which init's own end waits for."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._init, event.set)
        try:
            await event.wait()
        finally:
            loop.remove_reader(self._init)

    def close(self) -> None:
        for descriptor in (self._init, self._root):
            if descriptor >= 0:
                os.close(descriptor)
        self._init = self._root = -1
