"""What goes wrong beside and below a session: a full disk, other processes, an environment that is gone, bad timing."""

import asyncio
import contextlib
import errno
import json
import time
from contextlib import ExitStack

import pytest
from talking import code, events_of, made, said, types
from websockets.sync.client import connect

from actors.grader import Grader, NotGraded
from serve.ask import Ask
from serve.errors import ApiError
from serve.journal import Journal, fold
from serve.keys import ANONYMOUS
from serve.live import Conversation
from serve.schema import FeedbackRequest
from serve.session import Session
from serve.sessions import Sessions
from serve.versions import UnknownVersion


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
            after = inside.begin(Ask(stream=True), ExitStack())
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
        inside.begin(Ask(stream=True), ExitStack())
        await asyncio.sleep(0.05)
        inside._drop()
        inside._rest("stopped", reason="asked")
        after = inside.begin(Ask(stream=True), ExitStack())
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


def gives_up(times: int, monkeypatch, played) -> None:
    """Versions that are forgotten while a turn waits for them, so many times."""
    left = [times]
    for name in ("generate", "stream"):
        real = getattr(played, name)

        def asked(*args, real=real):
            left[0] -= 1
            if left[0] >= 0:
                raise UnknownVersion("version 1 is not served here")
            return real(*args)

        monkeypatch.setattr(played, name, asked)


@pytest.mark.parametrize(("times", "ends"), [(2, "waiting"), (3, "error")])
@pytest.mark.parametrize("stream", [True, False])
def test_a_turn_that_waits_for_a_version_that_is_given_up_takes_another(
    client, play, monkeypatch, times, ends, stream
):
    session = made(client)
    gives_up(times, monkeypatch, play("yes"))
    last = said(client, session, "hello", stream=stream)[-1]
    assert last["type"] == ends and last.get("code") in (None, "unavailable")


@pytest.mark.parametrize("stream", [True, False])
def test_so_does_a_chat_unless_it_names_its_version(client, play, monkeypatch, stream):
    asked = {"model": "agent", "messages": [{"role": "user", "content": "x"}], "stream": stream}
    gives_up(2, monkeypatch, play("yes"))
    assert client.post("/v1/chat/completions", json=asked).status_code == 200
    gives_up(1, monkeypatch, play("yes"))
    answer = client.post("/v1/chat/completions", json={**asked, "model": "agent@1"})
    assert code(answer) == (503, "version_unavailable")


@pytest.mark.parametrize("how", ["deleted", "stopped", "closed"])
def test_the_environment_of_a_session_that_ends_in_a_turn_is_closed(client, server, play, monkeypatch, how):
    """A sandbox would live on. After a stop it is kept: the same turn can be asked for again."""
    closed, close = [], Conversation.close

    async def counted(self):
        await close(self)
        closed.append(1)

    monkeypatch.setattr(Conversation, "close", counted)
    session = made(client)
    play("one two three", slow=True, after=2)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line == "event: tokens")
        if how == "deleted":
            assert client.delete(f"/v1/sessions/{session}").status_code == 204
        elif how == "stopped":
            client.post(f"/v1/sessions/{session}/stop")
        else:
            server.loop.call_soon_threadsafe(server.service.sessions.find(ANONYMOUS, session).close)
        list(lines)
    expected = [] if how == "stopped" else [1]
    time.sleep(0.3)  # for what should not be
    deadline = time.monotonic() + 10
    while closed != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert closed == expected


def test_a_turn_keeps_its_place_among_those_under_way_until_it_ends(client, server, play, monkeypatch):
    """Not until its client leaves: who hangs up and asks again would have more at a time than the key may."""
    given_back, begin = [], Session.begin

    def begun(self, ask, place):
        place.callback(lambda: given_back.append(self.id))
        return begin(self, ask, place)

    monkeypatch.setattr(Session, "begin", begun)
    patient = server.service.config.sessions.model_copy(update={"disconnect_grace_s": 30.0})
    monkeypatch.setattr(server.service, "config", server.service.config.model_copy(update={"sessions": patient}))
    play("one two three", slow=True, after=2)
    session = made(client)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        next(line for line in stream.iter_lines() if line == "event: tokens")
    time.sleep(0.2)
    assert given_back == [] and client.get(f"/v1/sessions/{session}").json()["status"] == "running"
    client.post(f"/v1/sessions/{session}/stop")
    assert given_back == [session]
    assert code(client.post(f"/v1/sessions/{session}/turns", json={"retry": True, "turn": 9})) == (400, "no_such_turn")
    deadline = time.monotonic() + 10
    while len(given_back) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert given_back == [session] * 2, "also one that has not begun"


def test_who_speaks_over_a_websocket_is_told_of_any_error(client, server, monkeypatch):
    session = made(client)

    def full(self, ask, place):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Session, "begin", full)
    with connect(f"{server.url.replace('http', 'ws')}/v1/sessions/{session}/ws") as socket:
        socket.send(json.dumps({"content": "hello"}))
        told = json.loads(socket.recv(timeout=10))
        assert (told["type"], told["code"]) == ("error", "storage_failed")


def test_a_template_that_takes_no_system_text_is_the_clients_error(client, server, monkeypatch):
    def refused(*_):
        raise ValueError("System role not supported")

    session = made(client, system="brief")
    monkeypatch.setattr(server.service.codec, "prompt", refused)
    answer = client.post("/v1/sessions", json={"system": "brief"})
    assert code(answer) == (400, "invalid_request") and "System role" in answer.json()["error"]["message"]
    answer = client.post(f"/v1/sessions/{session}/turns", json={"content": "hello"})
    assert code(answer) == (400, "invalid_request")


def test_words_that_were_not_answered_count_too(client, server, play):
    """Else the session would be over for a message that could have been refused."""
    for before in ("", "first"):
        session = made(client)
        if before:
            play("yes")
            said(client, session, before)
        play("one two three", slow=True, after=2)
        with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "7" * 160}) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line == "event: tokens")
            client.post(f"/v1/sessions/{session}/stop")
            list(lines)
        answer = client.post(f"/v1/sessions/{session}/turns", json={"content": "7" * 160})
        assert code(answer) == (400, "context_length_exceeded")
        assert "takes 16" in answer.json()["error"]["message"]
        assert client.get(f"/v1/sessions/{session}").json()["status"] == "waiting"
        play("yes")
        assert types(said(client, session, "7"))[-1] == "waiting"


def test_what_is_deleted_while_a_turn_is_asked_for_is_not_there(client, server):
    inside = server.service.sessions.find(ANONYMOUS, made(client))
    inside.journal.path.unlink()

    async def asked():
        with ExitStack() as place:
            inside.begin(Ask("hello"), place)

    for ask in (asked, lambda: server.service.rate(inside, FeedbackRequest(turn=0, rating="up"))):
        with pytest.raises(ApiError) as refused:
            server.run(ask())
        assert refused.value.status in (404, 409)


def test_old_sessions_are_swept_also_after_a_time_without_the_volume(server, monkeypatch, tmp_path):
    swept: list[float] = []

    def away(self, before):
        swept.append(before)
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr("serve.sessions._SWEEP_S", 0.01)
    monkeypatch.setattr(Sessions, "_delete_old", away)

    async def sweeping():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(Sessions(server.service, tmp_path).sweep(), 0.3)

    server.run(sweeping())
    assert len(swept) > 2


def test_what_is_left_of_a_session_is_swept_and_counts_for_none(server, tmp_path):
    (tmp_path / "anonymous").mkdir()
    for name in ("ses_1.stop", "ses_2.new", "ses_3.jsonl"):
        (tmp_path / "anonymous" / name).touch()
    sessions = Sessions(server.service, tmp_path)
    sessions._delete_old(time.time() - 100)
    assert len(list((tmp_path / "anonymous").iterdir())) == 3
    sessions._delete_old(time.time() + 100)
    assert list((tmp_path / "anonymous").iterdir()) == []


def test_the_log_has_nothing_of_what_an_ungraded_episode_said(client, server, play, monkeypatch, caplog):
    async def failed(self, episode):
        raise NotGraded("ValueError: could not convert 'my secret'")

    monkeypatch.setattr(Grader, "score", failed)
    session = made(client, env="calculator")
    play("my secret")
    assert said(client, session)[-1]["type"] == "done"
    assert "not graded: ValueError" in caplog.text and "secret" not in caplog.text


def test_who_has_no_key_does_not_read_this_machines_folders(server, monkeypatch):
    monkeypatch.setattr(server.service, "_trouble", "/runs/agent/releases.json cannot be read")
    assert "/runs" in server.service.health()["note"]
    monkeypatch.setattr(type(server.service.keys), "needed", True)
    assert server.service.health()["note"] == ""
