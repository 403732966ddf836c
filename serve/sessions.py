"""All sessions of a server: a journal each, in a folder a caller. A replica holds those ready that it has played last.

<dir>/sessions/<caller>/<session>.jsonl
"""

import asyncio
import contextlib
import logging
import os
import random
import re
import secrets
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.errors import ApiError, not_found
from serve.journal import Journal
from serve.keys import Caller
from serve.schema import SessionRequest
from serve.session import Session

if TYPE_CHECKING:
    from serve.service import Service

log = logging.getLogger("repertory.serve")

_ID = re.compile(r"ses_[0-9a-f]{32}")
_SWEEP_S = 30.0
_LISTED = 100


class Sessions:
    """Makes, finds, lists, deletes and expires sessions. Whose they are is where they lie."""

    def __init__(self, service: "Service", folder: Path):
        self._service, self._folder = service, folder
        self._here: OrderedDict[Path, Session] = OrderedDict()

    def create(self, caller: Caller, asked: SessionRequest) -> Session:
        """Raises ApiError when it names what is not there, or the caller has too many."""
        service, mine = self._service, self._folder / caller.id
        most = service.config.sessions.max_per_key
        if sum(name.endswith(".jsonl") for name in (os.listdir(mine) if mine.is_dir() else ())) >= most:
            raise ApiError(
                429, "too_many_sessions", f"there are {most} sessions of this key: delete some", retry_after_s=60
            )
        identifier = f"ses_{secrets.token_hex(16)}"
        version = service.version_of(asked.model, identifier)
        created = {
            "env": asked.env,
            "task": asked.task.model_dump() if asked.task else None,
            "tools": asked.tools,
            "system": asked.system,
            "seed": random.SystemRandom().randrange(1 << 31) if asked.seed is None else asked.seed,
            "sample": asked.sample,
            "max_turns": asked.max_turns,
            "sampling": service.sampling_of(asked),
            "collect": asked.collect,
            "version": version,
        }
        service.check_session(created)
        session = Session(service, Journal.create(mine / f"{identifier}.jsonl", **created))
        self._hold(session)
        return session

    def find(self, caller: Caller, identifier: str) -> Session:
        """The session, as far as it is written. Raises ApiError 404, also when it is another caller's."""
        if not _ID.fullmatch(identifier):
            raise not_found(identifier)
        path = self._folder / caller.id / f"{identifier}.jsonl"
        session = self._here.get(path)
        try:
            if session is None:
                session = Session(self._service, Journal(path))
                session.journal.catch_up()
                if not session.journal.events:  # its writer died at the first line
                    raise FileNotFoundError
            if not session.at_work_here:
                session.look()
        except FileNotFoundError:
            if (gone := self._here.pop(path, None)) is not None:
                gone.close()
            raise not_found(identifier) from None
        self._hold(session)
        if session.idle_s > self._service.config.sessions.idle_s and session.shown()["status"] == "waiting":
            session.expire()
        return session

    def mine(self, caller: Caller) -> list[dict[str, Any]]:
        """The caller's newest sessions."""
        dated = []
        for path in (self._folder / caller.id).glob("*.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                dated.append((path.stat().st_mtime, path.stem))
        shown = []
        for _, identifier in sorted(dated, reverse=True)[:_LISTED]:
            with contextlib.suppress(ApiError):
                shown.append(self.find(caller, identifier).shown())
        return shown

    async def delete(self, caller: Caller, identifier: str) -> None:
        """The session and all that was kept of it is gone. A turn under way is ended, wherever it is played."""
        session = self.find(caller, identifier)
        self._here.pop(session.journal.path, None)
        session.journal.path.unlink(missing_ok=True)  # whoever plays it sees that it is gone
        session.close()
        await asyncio.to_thread(self._service.feedback.delete, identifier)

    @property
    def count(self) -> int:
        return len(self._here)

    def _hold(self, session: Session) -> None:
        self._here[session.journal.path] = session
        self._here.move_to_end(session.journal.path)
        for path in list(self._here)[: max(0, len(self._here) - self._service.config.sessions.resident)]:
            if not self._here[path].in_use:
                self._here.pop(path).close()

    async def sweep(self) -> None:
        """Let idle sessions go, and delete the journals of those that ended long ago. Never returns."""
        config = self._service.config.sessions
        while True:
            await asyncio.sleep(_SWEEP_S)
            for path, session in list(self._here.items()):
                if not session.in_use and session.idle_s > config.idle_s:
                    self._here.pop(path).close()
            try:
                await asyncio.to_thread(self._delete_old, time.time() - config.idle_s - config.keep_s)
            except OSError as error:  # of a volume that is away for a while
                log.error("old sessions cannot be deleted now: %s", error)

    def _delete_old(self, before: float) -> None:
        """Journals that nobody has written to since. What was collected of a session is kept, and so its journal is:
        with that a caller can have both deleted."""
        collected = self._service.feedback.sessions()
        for path in self._folder.glob("*/ses_*"):  # also what was left of those that are gone: .stop, .new
            with contextlib.suppress(FileNotFoundError):  # another replica was faster
                if path.stem not in collected and path.stat().st_mtime < before:
                    path.unlink()

    def close(self) -> None:
        for session in self._here.values():
            session.close()
        self._here.clear()
