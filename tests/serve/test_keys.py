"""API keys: who gets in, what it costs to find out, and what is kept of a key."""

import hmac
import json
import logging
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rl.config_file import ConfigError
from serve import deploy, serve_command
from serve.config import KeysConfig, ServeConfig
from serve.errors import ApiError
from serve.keys import ANONYMOUS, KeyRing, handed_on, is_loopback, refuse_public
from serve.keys_command import create_key, keys_file, list_keys, revoke_key

VARIABLE = "REPERTORY_TEST_KEYS"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(ring: KeyRing, header: str | None) -> tuple[int, str, str]:
    with pytest.raises(ApiError) as caught:
        ring.check(header)
    return caught.value.status, caught.value.code, caught.value.message


def test_who_gets_in(tmp_path, monkeypatch):
    own = "a-key-that-somebody-else-made"
    monkeypatch.setenv(VARIABLE, f" {own} ,another-of-sixteen-or-more, ")
    ana, bea = create_key(tmp_path, "ana"), create_key(tmp_path, "bea")
    revoke_key(tmp_path, "bea")
    ring = KeyRing.of(KeysConfig(variable=VARIABLE), tmp_path)
    caller = ring.check(f"Bearer {ana}")
    assert caller.name == "ana" and ana.startswith(f"rep_{caller.id}_")
    assert ring.check(f"bearer  {own} ").id.startswith("env-")
    assert ring.check("Bearer another-of-sixteen-or-more").id != ring.check(f"Bearer {own}").id
    missing = refused(ring, None)
    assert missing[:2] == (401, "missing_key") and refused(ring, "") == missing
    wrong = {refused(ring, f"Bearer {key}") for key in (bea, ana[:-1], ana + "x", f"rep_{caller.id}_x", "", "é" * 40)}
    wrong |= {refused(ring, header) for header in (ana, f"Basic {ana}", "Bearer", f"{own},{ana}")}
    assert len(wrong) == 1  # the same words for all
    assert wrong.pop()[:2] == (401, "invalid_key")


def test_the_same_comparisons_whatever_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "a-key-that-somebody-else-made")
    keys = [create_key(tmp_path, name) for name in ("first", "middle", "revoked", "last")]
    revoke_key(tmp_path, "revoked")
    ring = KeyRing(tmp_path / "keys.json", VARIABLE)
    compared: list[int] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(b)) or real(a, b))
    made = {}
    for case in [*keys, "a-key-that-somebody-else-made", "wrong", "", "rep_x_y", keys[0][:13], keys[0] * 50]:
        compared.clear()
        try:
            ring.check(f"Bearer {case}")
        except ApiError as error:
            assert error.code == "invalid_key"
        made[case] = list(compared)
    assert set(map(tuple, made.values())) == {(64,) * 5}  # every known key, and digests only


def test_no_keys_let_everybody_in_and_no_valid_key_nobody(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    clock = Clock()
    ring = KeyRing(tmp_path / "keys.json", VARIABLE, clock)
    assert not ring.needed and ring.check(None) == ring.check("Bearer whatever") == ANONYMOUS
    key = create_key(tmp_path, "only")
    clock.now += 1.1
    assert ring.needed and refused(ring, None)[1] == "missing_key" and ring.check(f"Bearer {key}").name == "only"
    revoke_key(tmp_path, "only")
    clock.now += 1.1
    assert ring.needed and refused(ring, f"Bearer {key}")[1] == "invalid_key" and refused(ring, None)
    (tmp_path / "keys.json").unlink()  # what has protected does not open by a mistake
    clock.now += 1.1
    assert ring.needed and refused(ring, f"Bearer {key}")[1] == "invalid_key"
    assert refused(KeyRing(_emptied(tmp_path)), "Bearer x")[1] == "invalid_key"


def _emptied(folder: Path) -> Path:
    (folder / "empty.json").write_text('{"keys": []}')
    return folder / "empty.json"


def test_a_revocation_takes_effect_within_a_second_and_the_file_is_not_read_meanwhile(tmp_path, monkeypatch):
    clock = Clock()
    key, other = create_key(tmp_path, "a"), create_key(tmp_path, "b")
    ring = KeyRing(tmp_path / "keys.json", clock=clock)
    looks: list[str] = []
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **k: looks.append(self.name) or real(self, **k))
    for _ in range(100):
        assert ring.check(f"Bearer {key}").name == "a"
        clock.now += 0.0099
    assert len(looks) <= 1
    revoke_key(tmp_path, "a")
    clock.now += 1.0
    assert refused(ring, f"Bearer {key}")[1] == "invalid_key"
    assert ring.check(f"Bearer {other}").name == "b"
    assert looks.count("keys.json") >= 2


def test_a_damaged_file_lets_nobody_in_and_refuses_the_start(tmp_path, caplog):
    clock = Clock()
    key = create_key(tmp_path, "a")
    ring = KeyRing(tmp_path / "keys.json", clock=clock)
    (tmp_path / "keys.json").write_text('{"keys": [{"name"')
    clock.now += 1.1
    with caplog.at_level(logging.ERROR, "repertory.serve"):
        assert refused(ring, f"Bearer {key}")[1] == "invalid_key"
    assert "cannot be read" in caplog.text
    for text in ("[]", '{"keys": [{"who": 1}]}', "\x00"):
        (tmp_path / "keys.json").write_text(text)
        with pytest.raises(ConfigError, match="not a file of keys"):
            KeyRing(tmp_path / "keys.json")


def test_a_key_is_nowhere_but_in_the_hand_of_who_made_it(tmp_path, monkeypatch, caplog):
    own = "a-key-that-somebody-else-made"
    monkeypatch.setenv(VARIABLE, own)
    with caplog.at_level(logging.DEBUG):
        key = create_key(tmp_path, "a")
        ring = KeyRing(tmp_path / "keys.json", VARIABLE)
        callers = [ring.check(f"Bearer {k}") for k in (key, own)]
        told = [refused(ring, f"Bearer {key}x"), refused(ring, f"Bearer {own}x")]
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    everywhere = f"{caplog.text} {written} {callers} {told} {ring!r} {vars(ring)} {list_keys(tmp_path)}"
    secret = key.split("_", 2)[2]
    assert secret not in everywhere and own not in everywhere
    assert len(secret) == 43  # 32 bytes
    assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600


def test_what_the_command_refuses(tmp_path, monkeypatch):
    create_key(tmp_path, "a")
    with pytest.raises(ConfigError, match="'a' already"):
        create_key(tmp_path, "a")
    for name in ("two words", "x" * 65, "../up", "a\nb"):
        with pytest.raises(ConfigError, match="no name for a key"):
            create_key(tmp_path, name)
    with pytest.raises(ConfigError, match=r"no valid key .b.\. Valid: a"):
        revoke_key(tmp_path, "b")
    identity = list_keys(tmp_path)[0].id
    assert revoke_key(tmp_path, identity).revoked is not None
    with pytest.raises(ConfigError, match="Valid: none"):
        revoke_key(tmp_path, "a")
    create_key(tmp_path, "a")  # the name is free again
    assert [(k.name, k.revoked is None) for k in list_keys(tmp_path)] == [("a", False), ("a", True)]
    with pytest.raises(ConfigError, match="there are no keys"):
        list_keys(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="there are no keys"):
        revoke_key(tmp_path / "elsewhere", "a")
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(ConfigError, match="could be guessed") as caught:
        KeyRing(None, VARIABLE)
    assert "short" not in str(caught.value)


def test_where_the_keys_of_a_run_are(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert keys_file(tmp_path / "run") == tmp_path / "run" / "serve" / "keys.json"
    assert keys_file(tmp_path / "served") == tmp_path / "served" / "keys.json"
    assert keys_file(tmp_path / "mine.json") == tmp_path / "mine.json"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()  # its first checkpoint is to come
    create_key(tmp_path / "begun")
    (key,) = list_keys(tmp_path / "begun" / "serve")
    assert key.name == key.id


@pytest.mark.parametrize("name", ["quikstart", "new/keys.json"])
def test_keys_for_what_is_not_there_are_refused(tmp_path, name):
    """They would protect nothing, and nobody would hear of it."""
    with pytest.raises(ConfigError, match="no such folder"):
        create_key(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_keys_made_at_the_same_time_are_all_kept(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: create_key(tmp_path, f"k{i}"), range(40)))
    ring = KeyRing(tmp_path / "keys.json")
    assert [ring.check(f"Bearer {key}").name for key in made] == [f"k{i}" for i in range(40)]
    assert len(json.loads((tmp_path / "keys.json").read_text())["keys"]) == 40


def test_a_public_address_needs_a_key(tmp_path, monkeypatch):
    bare = KeyRing(tmp_path / "keys.json")
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        assert is_loopback(host)
        refuse_public(host, bare)
    public = ("0.0.0.0", "::", "192.168.1.4", "my-laptop", "localhost.example.org", "127.0.0.1.example.org", "")
    for host in public:
        with pytest.raises(ConfigError, match="no API key"):
            refuse_public(host, bare)
    monkeypatch.setenv(VARIABLE, "a-key-that-somebody-else-made")
    for host in public:
        refuse_public(host, KeyRing(None, VARIABLE))


def _replica(settings: dict[str, Any], folder: Path) -> KeyRing:
    """The keys of a replica that is started with such settings."""
    return KeyRing.of(ServeConfig.model_validate(json.loads(json.dumps(settings))).keys, folder)


def test_a_replica_lets_in_whom_the_process_that_deploys_lets_in(tmp_path, monkeypatch):
    own, stale = "a-key-that-somebody-else-made", "a-key-of-an-older-cluster"
    config = ServeConfig(model="m", keys=KeysConfig(variable=VARIABLE))
    monkeypatch.setenv(VARIABLE, own)
    ring = KeyRing.of(config.keys, tmp_path)
    settings = handed_on(config, ring).model_dump(mode="json")
    assert own not in json.dumps(settings)
    for environment in ("", stale):
        monkeypatch.setenv(VARIABLE, environment)
        replica = _replica(settings, tmp_path)
        assert refused(replica, None)[1] == "missing_key"
        assert refused(replica, f"Bearer {stale}")[1] == "invalid_key"
        assert replica.check(f"Bearer {own}") == ring.check(f"Bearer {own}")  # whose sessions are the same caller's
    key = create_key(tmp_path, "later")
    assert _replica(settings, tmp_path).check(f"Bearer {key}").name == "later"


def test_a_file_of_keys_that_is_gone_when_a_replica_starts_again_opens_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    config = ServeConfig(model="m", keys=KeysConfig(variable=VARIABLE))
    assert handed_on(config, KeyRing.of(config.keys, tmp_path)) == config
    assert not _replica(config.model_dump(mode="json"), tmp_path).needed
    key = create_key(tmp_path, "only")
    settings = handed_on(config, KeyRing.of(config.keys, tmp_path)).model_dump(mode="json")
    assert _replica(settings, tmp_path).check(f"Bearer {key}").name == "only"
    (tmp_path / "keys.json").unlink()
    replica = _replica(settings, tmp_path)
    assert replica.needed and refused(replica, None)[1] == "missing_key"
    assert refused(replica, f"Bearer {key}")[1] == "invalid_key"


def _by_command() -> None:
    serve_command.serve("what", [], Console(quiet=True))


def _by_service() -> None:
    deploy.app({"what": "what"})


@pytest.mark.parametrize("start", [_by_command, _by_service])
def test_what_deploys_hands_its_keys_on(tmp_path, monkeypatch, start: Callable[[], None]):
    config = ServeConfig.model_validate({"model": "m", "http": {"port": 0}, "keys": {"variable": VARIABLE}})
    deployed: list[ServeConfig] = []

    class Deployed(Exception):
        pass

    def deploying(made: ServeConfig) -> None:
        deployed.append(made)
        raise Deployed

    for module in (serve_command, deploy):
        monkeypatch.setattr(module, "resolve", lambda *_: (config, SimpleNamespace(dir=tmp_path)))
    monkeypatch.setattr(serve_command, "_begin", lambda *_: None)
    monkeypatch.setattr(serve_command, "_deploy", deploying)
    monkeypatch.setattr(deploy, "_listens_on", lambda _: "0.0.0.0")
    monkeypatch.setattr(deploy, "application", deploying)
    monkeypatch.setattr("os.environ", {**os.environ, VARIABLE: "a-key-that-somebody-else-made"})
    with pytest.raises(Deployed):
        start()
    (made,) = deployed
    assert made.keys.required and len(made.keys.digests) == 1
    assert "somebody" not in made.model_dump_json()
