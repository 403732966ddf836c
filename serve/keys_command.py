"""`repertory keys create|list|revoke RUN|DIR [NAME]`: a server's keys. ConfigError for a user's mistakes.

A running server takes a change within about a second.
"""

import re
import time
from dataclasses import replace
from pathlib import Path

from rl.config_file import ConfigError
from serve.keys import Key, changing_keys, make_key, read_keys


def keys_file(place: Path) -> Path:
    """Of a run's folder, a server's folder, or a file of keys."""
    if place.suffix == ".json":
        return place
    return (place / "serve" if _is_run(place) else place) / "keys.json"


def _is_run(place: Path) -> bool:
    """Also before its first checkpoint."""
    return (place / "checkpoints").is_dir() or (place / "config.yaml").is_file()


def create_key(place: Path, name: str = "") -> str:
    """A new key's text, to be shown once: the file has only its hash. Without a name it goes by its id."""
    if not re.fullmatch(r"[\w.\-]{0,64}", name):
        raise ConfigError(f"{name!r} is no name for a key: use up to 64 letters, digits, dots, dashes and underscores")
    if place.is_file() and place.suffix != ".json":
        raise ConfigError(f"{place} is a file: name a run's folder, or a server's")
    folder = place.parent if place.suffix == ".json" else place
    if not folder.is_dir():  # keys that no server reads would protect nothing
        raise ConfigError(f"{folder}: no such folder: name a run's folder, or a server's own (make a new one first)")
    with changing_keys(keys_file(place)) as keys:
        if name and any(name in (key.name, key.id) for key in keys if key.revoked is None):
            raise ConfigError(f"there is a key {name!r} already: revoke it first, or choose another name")
        key, text = make_key(name)
        keys.append(key)
    return text


def list_keys(place: Path) -> list[Key]:
    """All that were ever made, in the order in which they were."""
    file = keys_file(place)
    try:
        return read_keys(file)
    except OSError:
        raise ConfigError(f"{file}: there are no keys; make one with `repertory keys create {place} NAME`") from None


def revoke_key(place: Path, name: str) -> Key:
    """By its name or its id."""
    list_keys(place)
    with changing_keys(keys_file(place)) as keys:
        valid = [i for i, key in enumerate(keys) if key.revoked is None]
        found = next((i for i in valid if name in (keys[i].name, keys[i].id)), None)
        if found is None:
            known = ", ".join(keys[i].name for i in valid) or "none"
            raise ConfigError(f"there is no valid key {name!r}. Valid: {known}")
        keys[found] = replace(keys[found], revoked=time.time())
    return keys[found]
