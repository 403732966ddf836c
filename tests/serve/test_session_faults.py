"""What goes wrong beside and below a session: a full disk, other processes, an environment that is gone, bad timing."""

import asyncio
import errno
import json
import time

import pytest
from talking import code, events_of, made, said, types

from serve.ask import Ask
from serve.journal import Journal, fold
from serve.keys import ANONYMOUS
from serve.schema import FeedbackRequest
from serve.session import Session


def path_of(server, session: str):
    return server.service.source.dir / "sessions" / "anonymous" / f"{session}.jsonl"


def elsewhere(server, session: str) -> Session:
    """The session as another process has it."""
    other = Session(server.service, Journal(path_of(server, session)))
    other.journal.catch_up()
    return other


def test_a_full_disk_ends_the_turn_and_leaves_a_journal_that_can_be_read(client, server, monkeypatch):
    session = made(client, seed=1, max_tokens=30)
    said(client, session, "hello")
    whole = Journal.append
    left = [4]

    def append(self, kind, **data):
        left[0] -= 1
        if left[0] < 0:
            self._file.write(b'{"seq": 1, "half')
            self._file.truncate(self._read_bytes)
            self._file.seek(self._read_bytes)
            raise OSError(errno.ENOSPC, "no space left")
        return whole(self, kind, **data)

    monkeypatch.setattr(Journal, "append", append)
    answer = client.post(f"/v1/sessions/{session}/turns", json={"content": "more"}, timeout=20)
    monkeypatch.undo()
    assert answer.status_code == 200
    last = events_of(answer)[-1]
    assert (last["type"], last["code"], last["resume"]) == ("error", "storage_failed", True)
    assert client.get(f"/v1/sessions/{session}").json()["status"] == "waiting"
    assert types(said(client, session))[-1] == "waiting"
    lines = [json.loads(line) for line in path_of(server, session).read_text().splitlines()]
    assert [e["seq"] for e in lines] == list(range(len(lines)))


def test_an_append_that_fails_half_way_leaves_nothing(tmp_path):
    journal = Journal.create(tmp_path / "ses_x.jsonl", sample=0, version=1)
    with journal.lease():

        class Full:
            def write(self, data):
                file.write(data[:5])
                raise OSError(errno.ENOSPC, "no space left")

            def __getattr__(self, name):
                return getattr(file, name)

        file, journal._file = journal._file, Full()
        with pytest.raises(OSError):
            journal.append("user", content="hello")
        journal._file = file
        journal.append("user", content="again")
    read = Journal(tmp_path / "ses_x.jsonl")
    assert [(e["seq"], e["type"]) for e in read.catch_up()] == [(0, "created"), (1, "user")]
    assert read.events[1]["content"] == "again"


def test_stop_and_retry_takes_back_nothing_that_was_said(client):
    session = made(client, seed=1, max_tokens=12)
    said(client, session, "first")
    said(client, session, "second")
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "third"}) as stream:
        next(line for line in stream.iter_lines() if line == "event: turn_start")
        client.post(f"/v1/sessions/{session}/stop")
    again = said(client, session, retry=True)
    assert types(again)[0] == "retry"
    journal = client.get(f"/v1/sessions/{session}/events", params={"stream": False}).json()["events"]
    history = fold(journal)
    assert [i["content"] for i in history.items if isinstance(i, dict)] == ["first", "second", "third"]
    assert len(history.turns) == 3


def test_a_turn_that_was_stopped_goes_on_in_the_same_environment(client, server):
    """It is not reset and stepped again: what its tools did is not done twice."""
    session = made(client, env="calculator", task={"index": 5}, seed=3)
    inside = server.service.sessions.find(ANONYMOUS, session)
    made_worlds = []
    world = server.service.world("calculator")
    original = world.env
    world.env = lambda: made_worlds.append(1) or original()
    try:

        async def stop_while_it_speaks():
            after = inside.begin(Ask(stream=True))
            follow = inside.follow(after)
            async for event in follow:
                if event["type"] == "turn_start":
                    await asyncio.sleep(0)
                    inside.stop()
                    break
            await follow.aclose()

        server.run(stop_while_it_speaks())
        assert types(said(client, session))[-1] == "done"
    finally:
        world.env = original
    assert len(made_worlds) == 1


def test_a_stop_that_comes_to_another_process_ends_the_turn(client, server, play):
    session = made(client)
    played = play("one two three", slow=True, after=2)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line == "event: turn_start")
        assert elsewhere(server, session).stop()
        assert "event: stopped" in list(lines)
    assert played.under_way == 0
    assert not path_of(server, session).with_suffix(".stop").exists()


def test_a_stop_that_comes_too_late_does_not_end_the_next_turn(client, server, play):
    session = made(client)
    path_of(server, session).with_suffix(".stop").touch()
    play("one two three", slow=True, after=2)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        lines = stream.iter_lines()  # held: a client that lets go of it is gone
        next(line for line in lines if line == "event: tokens")
        time.sleep(0.6)
        assert client.get(f"/v1/sessions/{session}").json()["status"] == "running"
        client.post(f"/v1/sessions/{session}/stop")


def test_a_session_deleted_by_another_process_is_played_no_further(client, server, play):
    session = made(client)
    played = play("one two three", slow=True, after=2)
    inside = server.service.sessions.find(ANONYMOUS, session)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line == "event: turn_start")
        path_of(server, session).unlink()
        list(lines)
    assert not inside.at_work_here
    assert played.under_way == 0
    assert client.get(f"/v1/sessions/{session}").status_code == 404


def test_who_follows_a_session_that_is_deleted_elsewhere_is_told(client, server, play):
    session = made(client)
    play("one two three", slow=True, after=2)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        next(line for line in stream.iter_lines() if line == "event: turn_start")

        async def followed():
            other = elsewhere(server, session)
            path_of(server, session).unlink()
            return [event async for event in other.follow(-1)]

        last = server.run(followed())[-1]
    assert (last["type"], last["code"], last["resume"]) == ("error", "session_not_found", False)


def test_a_session_whose_environment_is_gone_ends_by_name(client, server):
    session = made(client, env="calculator", task={"index": 1}, seed=1)
    world = server.service._worlds.pop("calculator")
    try:
        got = said(client, session)
    finally:
        server.service._worlds["calculator"] = world
    assert (got[-1]["type"], got[-1]["code"], got[-1]["resume"]) == ("error", "env_not_found", False)


def test_an_old_episode_that_fails_late_says_nothing_in_the_next_turn(client, server):
    """It was let go while its environment still closes, and closing fails when another turn is under way."""
    session = made(client, env="calculator", task={"index": 5}, seed=3)
    inside = server.service.sessions.find(ANONYMOUS, session)
    world = server.service.world("calculator")
    original, closed = world.env, []

    def env():
        made_env = original()
        if not closed:
            closed.append(asyncio.Event())

            async def close():
                await closed[0].wait()
                raise RuntimeError("late")

            made_env.close = close
        return made_env

    async def let_go_and_begin_again():
        inside.begin(Ask(stream=True))
        await asyncio.sleep(0.05)
        inside._drop()
        inside._rest("stopped", reason="asked")
        after = inside.begin(Ask(stream=True))
        closed[0].set()
        return [event["type"] async for event in inside.follow(after)]

    world.env = env
    try:
        assert server.run(let_go_and_begin_again())[-1] == "done"
    finally:
        world.env = original


def test_a_turn_has_a_deadline_also_when_its_client_has_gone_and_come_back(client, server, play, monkeypatch):
    session = made(client)
    played = play("one two three", slow=True, after=2)
    http = server.service.config.http.model_copy(update={"deadline_s": 0.8})
    monkeypatch.setattr(server.service, "config", server.service.config.model_copy(update={"http": http}))
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        next(line for line in stream.iter_lines() if line == "event: turn_start")
    got = events_of(client.get(f"/v1/sessions/{session}/events"))
    assert (got[-1]["type"], got[-1]["code"], got[-1]["resume"]) == ("error", "deadline_exceeded", True)
    assert played.under_way == 0


def test_a_version_that_is_forgotten_meanwhile_is_replaced_and_said_to_be(client, server):
    session = made(client, seed=1, max_tokens=8)
    path = path_of(server, session)
    server.service.sessions.close()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    events[0]["version"] = 99
    path.write_text("".join(json.dumps(e) + "\n" for e in events))
    got = said(client, session, "hello")
    moved = next(e for e in got if e["type"] == "version")
    assert (moved["from"], moved["to"]) == (99, 1)
    assert got[-1]["type"] == "waiting"
    assert client.get(f"/v1/sessions/{session}").json()["version"] == 1


def test_feedback_on_a_session_that_is_deleted_meanwhile_is_not_kept(client, server):
    session = made(client, seed=1, max_tokens=8, collect=True)
    said(client, session, "hello")
    inside = server.service.sessions.find(ANONYMOUS, session)
    record = server.service.feedback.record

    def slow(*arguments):
        kept = record(*arguments)
        client.delete(f"/v1/sessions/{session}")
        return kept

    server.service.feedback.record = slow
    try:
        server.run(server.service.rate(inside, FeedbackRequest(turn=0, rating="up")))
    finally:
        del server.service.feedback.record
    assert session not in server.service.feedback.sessions()


def test_ratings_are_refused_where_nothing_is_collected(client):
    session = made(client, seed=1, max_tokens=8)
    said(client, session, "hello")
    answer = client.post(f"/v1/sessions/{session}/feedback", json={"turn": 0, "rating": "up"})
    assert code(answer) == (409, "not_collected")


def test_old_journals_are_swept_but_for_those_whose_data_was_collected(client, server):
    kept, swept = made(client, seed=1, max_tokens=8, collect=True), made(client, seed=1, max_tokens=8)
    for session in (kept, swept):
        said(client, session, "hello")
    assert client.post(f"/v1/sessions/{kept}/feedback", json={"turn": 0, "rating": "up"}).status_code == 200
    server.service.sessions._delete_old(time.time() + 10)
    assert path_of(server, kept).exists()
    assert not path_of(server, swept).exists()
    assert client.delete(f"/v1/sessions/{kept}").status_code == 204
    assert kept not in server.service.feedback.sessions()


def test_nobody_is_refused_while_versions_are_promoted(client, server):
    """Not in the moment before the replica has heard of it, either."""
    book, seen = server.service.book, set()
    deadline = time.monotonic() + 60
    while 2 not in server.service.versions.known and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        for version in (2, 1, 2):
            book.promote(version)
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                got = said(client, made(client, max_tokens=2), "hello", stream=False)
                assert got[-1]["type"] == "waiting", got[-1]
                seen |= {v for e in got if e["type"] == "turn" for v in e["versions"]}
            assert seen >= {version}
    finally:
        book.promote(1)
    assert seen == {1, 2}
    deadline = time.monotonic() + 10
    while server.service.releases.stable != 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_book_that_cannot_be_read_changes_nothing(client, server):
    file = server.service.book.folder / "releases.json"
    text = file.read_text()
    try:
        for broken in ("{", None):
            file.unlink() if broken is None else file.write_text(broken)
            time.sleep(0.7)
            assert said(client, made(client, max_tokens=2), "hello", stream=False)[-1]["type"] == "waiting"
            assert client.get("/v1/models").status_code == client.get("/health").status_code == 200
    finally:
        file.write_text(text)
