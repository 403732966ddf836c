"""API keys: several, named, revocable, and kept nowhere as they are.

A key is `rep_<id>_<secret>`, and what is kept is its SHA-256. A password needs a slow, salted hash because people
choose among few; a secret of 32 random bytes is not found by guessing, whatever a guess costs, so that a fast hash
keeps it as safely and does not slow each request. The id is for people and logs: no key is looked up by it.
"""

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from rl.config_file import ConfigError
from serve.config import KeysConfig, ServeConfig
from serve.errors import ApiError

_log = logging.getLogger("repertory.serve")
_LOOK_AGAIN_S = 1.0
_LEAST_LENGTH = 16
"""Of a key that somebody else made, in the environment."""


@dataclass(frozen=True)
class Caller:
    """Who asks: the id of a key, and the name that it was given."""

    id: str
    name: str


ANONYMOUS = Caller("anonymous", "anonymous")


@dataclass(frozen=True)
class Key:
    """One key as the file holds it. Times are seconds since 1970."""

    id: str
    name: str
    sha256: str
    created: float
    revoked: float | None = None


def make_key(name: str) -> tuple[Key, str]:
    """A new one, and its text, which is nowhere else."""
    identity = secrets.token_hex(4)
    text = f"rep_{identity}_{secrets.token_urlsafe(32)}"
    return Key(identity, name or identity, _digest(text), time.time()), text


def read_keys(file: Path) -> list[Key]:
    """Raises ConfigError where the file is not one of keys, FileNotFoundError where there is none."""
    try:
        return [Key(**entry) for entry in json.loads(file.read_text())["keys"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file}: not a file of keys ({type(error).__name__}); see `repertory keys`") from None


@contextmanager
def changing_keys(file: Path) -> Iterator[list[Key]]:
    """The file's keys, to be changed in place; written when the block ends well. One process at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        keys = read_keys(file) if file.exists() else []
        yield keys
        partial = file.with_name(f".{file.name}")
        partial.unlink(missing_ok=True)  # or it would keep its mode
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            json.dump({"keys": [asdict(key) for key in keys]}, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        partial.rename(file)


class KeyRing:
    """The keys that let callers in: those of a file, read again when it changes, and those of the environment.

    Without any, everybody is anonymous, unless keys are required. A file in which none is valid lets nobody in, and
    neither does one that has been there and is gone, or cannot be read: what protects must not open by a mistake.
    """

    def __init__(
        self,
        file: Path | None,
        variable: str = "",
        clock: Callable[[], float] = time.monotonic,
        *,
        digests: Sequence[str] = (),
        required: bool = False,
    ):
        """variable: of the environment, with keys as they are, separated by commas; read where none is required.

        digests: of such keys in the environment of another process. required: whether nobody gets in without a key.
        Raises ConfigError for a file or a variable that holds something else.
        """
        self._file, self._clock = file, clock
        environment = "" if required else os.environ.get(variable, "")
        given = [part.strip() for part in environment.split(",") if part.strip()]
        if any(len(part) < _LEAST_LENGTH for part in given):
            raise ConfigError(f"{variable}: a key has fewer than {_LEAST_LENGTH} characters, and could be guessed")
        self.digests = tuple(dict.fromkeys([*digests, *map(_digest, given)]))
        """Of the keys that are in no file."""
        self._given = [(digest, Caller(f"env-{digest[:8]}", variable)) for digest in self.digests]
        self._filed: list[tuple[str, Caller | None]] = []
        self._seen: tuple[int, int, int] | None = None
        self._protects = required or bool(self._given)
        self._look_at = clock()
        if file is not None and file.exists():
            read_keys(file)  # raises
            self._look(file)

    @staticmethod
    def of(config: KeysConfig, folder: Path) -> "KeyRing":
        """folder: the server's."""
        file = Path(config.file) if config.file else folder / "keys.json"
        return KeyRing(file, config.variable, digests=config.digests, required=config.required)

    @property
    def needed(self) -> bool:
        """Whether one needs a key: not where there are none."""
        if self._file is not None and self._clock() >= self._look_at:
            self._look(self._file)
        return self._protects

    def check(self, header: str | None) -> Caller:
        """Who the Authorization header's key belongs to. Raises ApiError 401.

        Takes as long for a key that is unknown, malformed or revoked, and wherever a known one stands.
        """
        if not self.needed:
            return ANONYMOUS
        if not header:
            raise ApiError(401, "missing_key", "An API key is needed: send it as `Authorization: Bearer <key>`")
        scheme, _, key = header.partition(" ")
        offered = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = None
        for digest, caller in (*self._given, *self._filed):
            if hmac.compare_digest(digest, offered):
                found = caller
        if found is None:
            raise ApiError(401, "invalid_key", "The API key is not valid")
        return found

    def _look(self, file: Path) -> None:
        self._look_at = self._clock() + _LOOK_AGAIN_S
        try:
            stat = file.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen == self._seen:
                return
            keys = read_keys(file)
            self._filed = [(k.sha256, None if k.revoked else Caller(k.id, k.name)) for k in keys]
            self._seen, self._protects = seen, True
        except FileNotFoundError:
            self._filed, self._seen = [], None
        except (OSError, ConfigError) as error:
            if self._filed:
                _log.error("the keys cannot be read, so that nobody is let in by them: %s", error)
            self._filed, self._seen, self._protects = [], None, True


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches an address. A name other than localhost may be anybody's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def refuse_public(host: str, keys: KeyRing) -> None:
    """Raises ConfigError for an address that others can reach, where no key would keep them out."""
    if not keys.needed and not is_loopback(host):
        raise ConfigError(
            f"http.host: {host} can be reached from other machines, and there is no API key. Make one with "
            "`repertory keys create`, or listen on 127.0.0.1"
        )


def handed_on(config: ServeConfig, ring: KeyRing) -> ServeConfig:
    """The configuration for replicas, which let in whom the ring of this process lets in, whatever they find.

    A replica's environment is that of its cluster, and a file may be gone when it starts again.
    """
    keys = config.keys.model_copy(update={"digests": ring.digests, "required": ring.needed})
    return config.model_copy(update={"keys": keys})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
