"""The server as a user starts it, with Ray Serve and two replicas; and everything that can die, killed."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from running import COMMAND, ROOT, repertory
from talking import events_of, made, said


@dataclass
class Deployed:
    """A server in a process of its own."""

    url: str
    run: Path
    process: subprocess.Popen[str]

    def client(self, **more) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=90, trust_env=False, **more)

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's own names: ray::ServeReplica:repertory:Agent, ray::ProxyActor."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in found if name in " ".join(p.cmdline() if p.status() != psutil.STATUS_ZOMBIE else [])]

    def ready(self, timeout: float = 60, replicas: int = 2) -> None:
        """Wait until so many replicas answer."""
        deadline, seen = time.monotonic() + timeout, set()
        with self.client() as client:
            while time.monotonic() < deadline:
                try:
                    answer = client.get("/health", headers={"x-session-id": os.urandom(4).hex()})
                except httpx.TransportError:
                    answer = None
                if answer is not None and answer.status_code == 200:
                    seen.add(answer.json()["pid"])
                    seen = {pid for pid in seen if psutil.pid_exists(pid)}
                    if len(seen) >= replicas:
                        return
                time.sleep(0.1)
        raise AssertionError(f"only {seen} of {replicas} replicas answer")


@pytest.fixture(scope="module")
def deployed(trained: Path, tmp_path_factory) -> Iterator[Deployed]:
    run = tmp_path_factory.mktemp("deployed") / "agent"
    shutil.copytree(trained, run, symlinks=True)
    settings = ["http.port=0", "engine.cpus=0.5", "follow.poll_s=0.2", "http.deadline_s=60"]
    settings += ["autoscale.min=2", "autoscale.max=3", "autoscale.target_in_flight=16", "autoscale.upscale_delay_s=1"]
    process = subprocess.Popen(
        [COMMAND, "serve", str(run), "--follow", *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    try:
        yield _started(process, run)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        process.kill()


def _started(process: subprocess.Popen[str], run: Path) -> Deployed:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"is served at (\S+)", line):
            made = Deployed(found[1], run, process)
            made.ready()
            return made
    raise AssertionError("".join(lines))


@pytest.fixture
def client(deployed: Deployed) -> Iterator[httpx.Client]:
    deployed.ready()
    with deployed.client() as client:
        yield client


def test_the_official_client_talks_to_it(deployed, client):
    api = openai.OpenAI(base_url=f"{deployed.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
    assert "agent" in [m.id for m in api.models.list()]
    answer = api.chat.completions.create(model="agent", messages=[{"role": "user", "content": "1+2"}], max_tokens=5)
    assert answer.usage.completion_tokens <= 5
    stream = api.chat.completions.create(
        model="agent", messages=[{"role": "user", "content": "1+2"}], max_tokens=5, stream=True
    )
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] in ("stop", "length")


def test_a_turn_is_stopped_whichever_replica_is_asked_to(deployed, client):
    """Without a header that says which session it is about: the path does."""
    for seed in range(4):
        session = made(client, seed=seed, max_tokens=250, temperature=1.3)
        got = ""
        with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
            for part in stream.iter_text():
                if not got:
                    assert client.post(f"/v1/sessions/{session}/stop").status_code == 200
                got += part
        assert "event: stopped" in got, got[-300:]


def test_a_person_talks_to_it_at_its_page(deployed, client):
    pytest.importorskip("selenium", reason="selenium is not installed")
    from page_driver import CHROMIUM, DRIVER, Page, chromium

    if not (CHROMIUM and DRIVER):
        pytest.skip("Debian's chromium and chromium-driver are not here: the page is not tried")
    driver = chromium()
    try:
        page = Page(driver, deployed.url)
        page.open()
        page.start()
        for turns in (1, 2):
            page.say("12+34")
            page.finished(turns)
        (session,) = page.session_ids()
        events = client.get(f"/v1/sessions/{session}/events", params={"stream": False}).json()["events"]
        assert page.texts(".turn .raw, .turn .said") and sum(e["type"] == "turn" for e in events) == 2
        page.check_logs()
    finally:
        driver.quit()


def _killed_mid_stream(deployed: Deployed, client: httpx.Client, kill) -> tuple[str, list[dict], list[list[int]]]:
    """A session whose turn was killed after its first tokens: its id, what the client got, and what it would have."""
    asked = {"seed": 7, "max_tokens": 250, "temperature": 1.3}
    whole = made(client, **asked)
    expected = [e["token_ids"] for e in said(client, whole, "talk") if e["type"] == "turn"]
    session = made(client, **asked)
    body = ""
    with client.stream(
        "POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}, headers={"x-session-id": session}
    ) as stream:
        for part in stream.iter_text():
            body += part
            if kill is not None and "event: tokens" in body:
                kill(session)
                kill = None
    return session, events_of(httpx.Response(200, text=body)), expected


def test_a_replica_killed_mid_stream_is_an_error_event_and_the_session_goes_on_by_its_id(deployed, client):
    def kill(session: str) -> None:
        for replica in deployed.processes("ServeReplica:repertory:Agent"):
            if any(session in f.path for f in replica.open_files()):
                replica.kill()

    session, got, expected = _killed_mid_stream(deployed, client, kill)
    assert got[-1]["type"] == "error", got[-1]
    assert got[-1]["error"]["code"] == "replica_died"
    again = said(client, session)
    assert [e["token_ids"] for e in again if e["type"] == "turn"] == expected


def test_all_replicas_killed(deployed, client):
    def kill(session: str) -> None:
        for replica in deployed.processes("ServeReplica:repertory:Agent"):
            replica.kill()

    session, got, expected = _killed_mid_stream(deployed, client, kill)
    assert got[-1]["type"] == "error"
    answer = client.get("/v1/models")
    assert answer.status_code in (200, 503), answer.text  # and no 500 of Serve's own
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "unavailable"
    deployed.ready()
    again = said(client, session)
    assert [e["token_ids"] for e in again if e["type"] == "turn"] == expected


def test_the_ingress_killed(deployed, client):
    session = made(client, seed=3, max_tokens=20)
    first = said(client, session, "hello")
    for proxy in deployed.processes("ProxyActor"):
        proxy.kill()
    deployed.ready()
    with deployed.client() as again:
        assert said(again, session, "again")[-1]["type"] == "waiting"
        shown = again.get(f"/v1/sessions/{session}/events", params={"stream": False}).json()["events"]
    assert shown[1 : len(first) + 1] == first


def test_what_the_trainer_leaves_is_served_and_a_corrupt_checkpoint_is_not(deployed, client):
    """The trainer is gone; its folder gets a checkpoint more, and then one that is damaged."""
    checkpoints = deployed.run / "checkpoints"
    newest = max(checkpoints.glob("step=*"), key=lambda p: int(p.name[5:]))
    before = client.get("/health").json()["stable"]
    bad = _next(newest, checkpoints, before + 1, damage=True)
    time.sleep(1.5)
    said_so = repertory("release", "list", str(deployed.run)).stdout
    assert bad.name in said_so or "damaged" in said_so, said_so
    assert client.get("/health").json()["stable"] == before
    good = _next(newest, checkpoints, before + 2)
    deadline = time.monotonic() + 20
    while client.get("/health").json()["stable"] != before + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)  # the other replica has heard of it too
    for _ in range(4):
        answer = client.post(
            "/v1/chat/completions", json={"model": "agent", "messages": [{"role": "user", "content": "1"}]}
        )
        assert answer.headers["x-weight-version"] == str(before + 2), good
        assert answer.json()["weight_version"] == before + 2
    back = repertory("release", "rollback", str(deployed.run))
    assert back.returncode == 0, back.stdout + back.stderr
    deadline = time.monotonic() + 10
    while client.get("/health").json()["stable"] != before and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # the other replica has heard of it too
    assert client.get("/health").json()["stable"] == before


def _next(newest: Path, checkpoints: Path, version: int, damage: bool = False) -> Path:
    """A checkpoint as a trainer would write it: of a later step, under another version."""
    from dataclasses import replace

    from rl.checkpoint import read_state, write_state, writing

    step = max(int(p.name[5:]) for p in checkpoints.glob("step=*")) + 1
    with writing(checkpoints.parent, step) as folder:
        for path in newest.iterdir():
            if path.is_file() and path.name != "files.json":
                shutil.copy2(path, folder / path.name)
        write_state(folder, replace(read_state(newest), step=step, version=version))
    made = checkpoints / f"step={step}"
    if damage:
        with (made / "model.safetensors").open("r+b") as file:
            file.seek(2000)
            file.write(b"\xff" * 100)
    return made


def test_under_load_with_weights_that_change_nothing_is_lost_or_crossed_and_a_replica_is_added(deployed, client):
    """64 sessions at a time, each with a secret number, while promoted versions come and go."""
    from serve.releases import Book

    book = Book(deployed.run / "serve")
    older = book.add(deployed.run / "checkpoints" / "step=20").version
    versions = [older, next(r.version for r in book.read().ready if r.version != older)]
    until, found, errors = time.monotonic() + 10, Counter(), []
    ended = threading.Event()

    def change() -> None:
        for at in range(1000):
            book.promote(versions[at % 2])
            if ended.wait(1.0):
                return

    def talk(number: int) -> None:
        try:
            with deployed.client() as mine:
                while True:
                    talk_once(mine, number)
                    if time.monotonic() > until:
                        return
        except BaseException as error:
            errors.append(error)

    def talk_once(mine: httpx.Client, number: int) -> None:
        session = made(mine, max_tokens=8, seed=number)
        for turn in range(4):
            events = said(mine, session, f"my number is {number} {turn}", stream=bool(number % 2))
            assert events[-1]["type"] == "waiting", events[-1]
            used = {v for e in events if e["type"] == "turn" for v in e["versions"]}
            assert len(used) == 1
            found.update(used)
        journal = mine.get(f"/v1/sessions/{session}/events", params={"stream": False}).json()["events"]
        assert [e["content"] for e in journal if e["type"] == "user"] == [
            f"my number is {number} {turn}" for turn in range(4)
        ]
        assert len({v for e in journal if e["type"] == "turn" for v in e["versions"]}) == 1  # it stays
        assert mine.delete(f"/v1/sessions/{session}").status_code == 204

    changer = threading.Thread(target=change)
    talkers = [threading.Thread(target=talk, args=(n,)) for n in range(64)]
    for thread in (changer, *talkers):
        thread.start()
    for thread in talkers:
        thread.join(120)
    ended.set()
    changer.join(10)
    assert not errors, errors[0]
    assert set(found) == set(versions)
    assert found.total() >= 64 * 4 and found.total() % 4 == 0
    deployed.ready(replicas=3)  # for the load, one was added
