"""Sessions over HTTP: what a client asks for, what it gets, and what comes of it when something goes wrong."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from talking import code, events_of, made, said, types
from websockets.sync.client import connect


def test_a_conversation_goes_on_turn_by_turn(client):
    session = made(client, tools="calculator", seed=3, max_tokens=12)
    first = said(client, session, "12+34")
    assert types(first)[:3] == ["user", "prompt", "turn_start"]
    assert types(first)[-1] == "waiting"
    turns = [e for e in first if e["type"] == "turn"]
    tokens = [e for e in first if e["type"] == "tokens" and e["turn"] == turns[0]["turn"]]
    assert [i for e in tokens for i in e["token_ids"]] == turns[0]["token_ids"]
    assert set(turns[0]["versions"]) == {1}
    second = said(client, session, "and 5?")
    assert types(second)[:2] == ["user", "turn_start"]
    assert [e["seq"] for e in first + second] == list(range(1, len(first) + len(second) + 1))
    shown = client.get(f"/v1/sessions/{session}").json()
    assert (shown["status"], shown["version"], shown["seq"]) == ("waiting", 1, second[-1]["seq"])


def test_the_context_is_that_of_an_episode(client, server):
    """Each turn is sampled after exactly what the episode loop would have put before it."""
    session = made(client, tools="calculator", seed=5, max_tokens=10, system="Be brief.")
    events = said(client, session, "1+2") + said(client, session, "3+4")
    codec = server.service.codec
    turns = [e for e in events if e["type"] == "turn"]
    context = codec.prompt(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+2"}],
        server.service.tools_shown("calculator"),
    )
    assert turns[0]["context"] == len(context) + len(turns[0]["token_ids"])
    for turn in turns:
        prompt = next(e for e in events if e["type"] == "turn_start" and e["turn"] == turn["turn"])
        again = server.run(
            server.service.versions.generate(
                context, _sampling(server, max_tokens=10, seed=prompt["seed"], temperature=0.7), 1
            )
        )
        assert list(again.token_ids) == turn["token_ids"]
        ended = turn["token_ids"][-1] == codec.end_of_turn
        context += turn["token_ids"] + ([] if ended else [codec.end_of_turn])
        seen = [e["messages"] for e in events if e["type"] == "observation" and e["turn"] == turn["turn"]]
        context += codec.observation(seen[0] if seen else [{"role": "user", "content": "3+4"}])


def _sampling(server, **settings):
    from rl.policy import Sampling

    return Sampling(stop=(server.service.codec.end_of_turn,), **settings)


def test_a_training_episode_played_through_the_api_has_the_same_tokens(client, server, trained: Path):
    """What was rewarded is what people get: the rl step's episodes were sampled by the version that is served."""
    rows = []
    for file in sorted((trained / "trajectories").glob("*.parquet")):
        rows += [r for r in pq.read_table(file).to_pylist() if r["stage"] == 3]
    assert len(rows) >= 32
    world = server.service.world("calculator")
    index_of = {world.source.task("train", i).id: i for i in range(64)}
    checked = 0
    for row in rows[::5]:
        session = made(
            client,
            env="calculator",
            task={"split": "train", "index": index_of[row["task"]]},
            seed=0,
            sample=row["sample"],
        )
        events = said(client, session, stream=bool(checked % 2))
        turn, tokens = np.asarray(row["turn"]), np.asarray(row["tokens"])
        mask = np.asarray(row["loss_mask"], bool)
        for event in (e for e in events if e["type"] == "turn"):
            assert event["token_ids"] == tokens[mask & (turn == event["turn"])].tolist()
            np.testing.assert_allclose(
                event["logprobs"], np.asarray(row["logprobs"])[mask & (turn == event["turn"])], atol=1e-3
            )
        assert len([e for e in events if e["type"] == "turn"]) == turn.max() + 1
        assert events[-1]["type"] == "done"
        assert events[-1]["stop_reason"] == row["stop_reason"]
        assert events[-1]["reward"] == pytest.approx(row["reward"])
        checked += 1
    assert checked >= 6


def test_streamed_or_not_a_seed_gives_the_same_turns(client):
    ids = []
    for stream in (True, False):
        session = made(client, env="calculator", task={"split": "held_out", "index": 4}, seed=11)
        ids.append([e["token_ids"] for e in said(client, session, stream=stream) if e["type"] == "turn"])
    assert ids[0] == ids[1]
    session = made(client, env="calculator", task={"split": "held_out", "index": 4}, seed=12)
    assert [e["token_ids"] for e in said(client, session) if e["type"] == "turn"] != ids[0]


def test_a_retry_samples_the_last_turns_once_more_and_the_journal_keeps_both(client):
    session = made(client, seed=1, max_tokens=20)
    said(client, session, "hello")
    first = said(client, session, "again")
    second = said(client, session, retry=True)
    assert types(second)[0] == "retry"
    turn = next(e for e in first if e["type"] == "turn")
    retried = next(e for e in second if e["type"] == "turn")
    assert retried["turn"] == turn["turn"] == 1
    assert retried["token_ids"] != turn["token_ids"]
    assert client.get(f"/v1/sessions/{session}").json()["turns"] == 2
    journal = client.get(f"/v1/sessions/{session}/events", params={"stream": False}).json()["events"]
    assert types(journal).count("turn") == 3
    back = said(client, session, retry=True, turn=0)
    assert [e["turn"] for e in back if e["type"] == "turn"] == [0]
    assert client.get(f"/v1/sessions/{session}").json()["turns"] == 1


def test_another_process_goes_on_with_a_session_from_its_journal(client, server):
    """As after a replica's death: this one has forgotten the session, and its next turn is what it would have been."""
    asked = {"tools": "calculator", "seed": 21, "max_tokens": 12}
    whole, broken = made(client, **asked), made(client, **asked)
    expected = [said(client, whole, text) for text in ("1+1", "2+2", "3+3")]
    for text, events in zip(("1+1", "2+2", "3+3"), expected, strict=True):
        server.service.sessions.close()
        got = said(client, broken, text)
        assert [e["token_ids"] for e in got if e["type"] == "turn"] == [
            e["token_ids"] for e in events if e["type"] == "turn"
        ]


def test_a_turn_whose_process_died_is_said_to_be_over_and_is_sampled_again_the_same(client, server):
    asked = {"seed": 22, "max_tokens": 30}
    whole, broken = made(client, **asked), made(client, **asked)
    expected = said(client, whole, "hello")
    said(client, broken, "hello")
    path = next(server.service.source.dir.glob(f"sessions/*/{broken}.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if json.loads(line)["type"] == "tokens") + 1
    server.service.sessions.close()
    path.write_text("".join(lines[:cut]) + lines[cut][:20])  # died in the middle of a line
    seen = events_of(client.get(f"/v1/sessions/{broken}/events", params={"after": cut - 1}))
    assert [(e["type"], e["code"], e["resume"]) for e in seen] == [("error", "replica_died", True)]
    again = said(client, broken)
    assert [e["token_ids"] for e in again if e["type"] == "turn"] == [
        e["token_ids"] for e in expected if e["type"] == "turn"
    ]


def _with_a_call(server, session: str, observed: str) -> None:
    """Put a call of the calculator, and what it is said to have answered, in the place of what a session holds."""
    path = next(server.service.source.dir.glob(f"sessions/*/{session}.jsonl"))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    turn = next(i for i, e in enumerate(events) if e["type"] == "turn")
    call = '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": "+", "b": 1}}</tool_call>'
    ids = server.service.codec.reply({"role": "assistant", "content": call})
    sampled = {"token_ids": ids, "logprobs": [0.0] * len(ids), "versions": [1] * len(ids)}
    events[turn] |= {**sampled, "asks": False, "text": call}
    messages = [{"role": "tool", "content": observed}]
    more = [{"type": "observation", "turn": 0, "messages": messages, "flags": []}, {"type": "waiting"}]
    server.service.sessions.close()
    events = [*events[: turn + 1], *({**e, "time": time.time()} for e in more)]
    path.write_text("".join(json.dumps({**e, "seq": i}) + "\n" for i, e in enumerate(events)))


def test_an_environment_that_answers_otherwise_than_before_ends_the_session_by_name(client, server):
    session = made(client, env="calculator", task={"index": 2}, seed=1)
    said(client, session)
    _with_a_call(server, session, observed="3")
    got = said(client, session)
    assert (got[-1]["type"], got[-1]["code"], got[-1]["resume"]) == ("error", "env_not_replayable", False)
    assert code(client.post(f"/v1/sessions/{session}/turns", json={})) == (409, "session_over")


def test_a_tool_that_answers_otherwise_than_before_leaves_the_agent_with_what_it_was_told(client, server):
    session = made(client, tools="calculator", seed=1, max_tokens=8)
    said(client, session, "1+1")
    _with_a_call(server, session, observed="3")
    got = said(client, session)
    assert got[-1]["type"] == "waiting"
    turn = next(e for e in got if e["type"] == "turn")
    codec, words = server.service.codec, {"role": "user", "content": "1+1"}
    call = '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": "+", "b": 1}}</tool_call>'
    context = codec.prompt([words], server.service.tools_shown("calculator")) + codec.reply({"content": call})
    context += codec.observation([{"role": "tool", "content": "3"}])
    assert turn["context"] == len(context) + len(turn["token_ids"])


def test_a_stopped_turn_does_not_count_and_the_session_goes_on(client, play):
    session = made(client)
    played = play("one two three", slow=True, after=2)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        lines = stream.iter_lines()
        assert any(line == "event: tokens" for line in lines)
        assert client.post(f"/v1/sessions/{session}/stop").json()["stopped"] is True
        rest = list(lines)
    assert "event: stopped" in rest
    assert played.under_way == 0
    assert client.get(f"/v1/sessions/{session}").json()["turns"] == 0
    assert client.post(f"/v1/sessions/{session}/stop").json()["stopped"] is False
    play("fine")
    assert types(said(client, session))[-1] == "waiting"  # it answers what was said before


def test_a_client_that_comes_back_within_the_grace_finds_its_turn_going_on_and_one_that_does_not_frees_the_engine(
    client, play
):
    session = made(client)
    played = play("one two three", slow=True, after=2)
    for again in (False, True):
        path, method = ("events", "GET") if again else ("turns", "POST")
        body = {} if again else {"json": {"content": "talk"}}
        with client.stream(method, f"/v1/sessions/{session}/{path}", **body) as stream:
            next(line for line in stream.iter_lines() if line == "event: tokens")
            assert played.under_way == 1
    deadline = time.monotonic() + 10
    while played.under_way and time.monotonic() < deadline:
        time.sleep(0.05)
    assert played.under_way == 0
    seen = events_of(client.get(f"/v1/sessions/{session}/events"))
    assert (seen[-1]["type"], seen[-1]["reason"]) == ("stopped", "disconnected")
    assert [e["seq"] for e in seen] == list(range(len(seen)))


def test_one_turn_at_a_time(client, play):
    session = made(client)
    play("one two three", slow=True, after=2)
    with client.stream("POST", f"/v1/sessions/{session}/turns", json={"content": "talk"}) as stream:
        next(line for line in stream.iter_lines() if line == "event: turn_start")
        assert code(client.post(f"/v1/sessions/{session}/turns", json={"content": "more"})) == (409, "turn_under_way")
        client.post(f"/v1/sessions/{session}/stop")


def test_a_message_that_does_not_fit_is_refused_by_how_much_and_the_session_stays(client, server):
    session = made(client, seed=1, max_tokens=8)
    said(client, session, "hello")
    answer = client.post(f"/v1/sessions/{session}/turns", json={"content": "0 1 " * 400})
    assert code(answer) == (400, "context_length_exceeded")
    assert "320" in answer.json()["error"]["message"]
    assert types(said(client, session, "hello"))[-1] == "waiting"
    empty = made(client)
    assert code(client.post(f"/v1/sessions/{empty}/turns", json={"content": "0 1 " * 400}))[0] == 400


def test_a_conversation_that_fills_the_context_is_over_and_says_so(client):
    session = made(client, seed=1, max_tokens=100)
    for _ in range(20):
        answer = client.post(f"/v1/sessions/{session}/turns", json={"content": "go on", "stream": False})
        if answer.status_code != 200 or answer.json()["events"][-1]["type"] == "done":
            break
    if answer.status_code == 200:
        assert answer.json()["events"][-1]["stop_reason"] == "max_tokens"
        answer = client.post(f"/v1/sessions/{session}/turns", json={"content": "go on"})
    assert code(answer) in ((409, "session_over"), (400, "context_length_exceeded"))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"env": "nothing"}, (404, "env_not_found")),
        ({"tools": "nothing"}, (404, "tools_not_found")),
        ({"task": {"index": 1}}, (400, "task_without_env")),
        ({"env": "calculator", "tools": "calculator"}, (400, "env_has_its_own")),
        ({"model": "nothing"}, (404, "model_not_found")),
        ({"model": "agent@99"}, (404, "model_not_found")),
        ({"seed": -1}, (400, "invalid_request")),
        ({"seed": "1"}, (400, "invalid_request")),
        ({"temperature": 3}, (400, "invalid_request")),
        ({"unknown": 1}, (400, "invalid_request")),
        ({"max_tokens": 100_000}, (400, "max_tokens_too_large")),
    ],
)
def test_what_a_session_cannot_be_is_refused(client, body, expected):
    assert code(client.post("/v1/sessions", json=body)) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (400, "content_missing")),
        ({"content": ""}, (400, "invalid_request")),
        ({"content": 3}, (400, "invalid_request")),
        ({"retry": True}, (409, "nothing_to_retry")),
    ],
)
def test_what_a_turn_cannot_be_is_refused(client, body, expected):
    assert code(client.post(f"/v1/sessions/{made(client)}/turns", json=body)) == expected


def test_an_env_session_takes_no_words(client):
    session = made(client, env="calculator", task={"index": 1})
    assert code(client.post(f"/v1/sessions/{session}/turns", json={"content": "hi"})) == (400, "content_unexpected")


def test_a_session_that_is_not_there_is_not_found(client):
    for path in ("ses_" + "0" * 32, "nothing", "..%2f..%2fkeys", "%00"):
        assert client.get(f"/v1/sessions/{path}").status_code == 404
    session = made(client)
    said(client, session, "hello", stream=False)
    assert client.delete(f"/v1/sessions/{session}").status_code == 204
    assert code(client.get(f"/v1/sessions/{session}")) == (404, "session_not_found")


def test_sessions_are_listed_newest_first(client):
    one, two = made(client), made(client)
    listed = [s["id"] for s in client.get("/v1/sessions").json()["data"]]
    assert listed.index(two) < listed.index(one)


def test_the_same_over_a_websocket(client, server):
    asked = {"seed": 9, "max_tokens": 12}
    over_sse, over_ws = made(client, **asked), made(client, **asked)
    expected = said(client, over_sse, "hello")
    with connect(f"{server.url.replace('http', 'ws')}/v1/sessions/{over_ws}/ws") as socket:
        socket.send("not json")
        assert json.loads(socket.recv())["code"] == "invalid_request"
        socket.send(json.dumps({"content": "hello"}))
        got = []
        while not got or got[-1]["type"] not in ("waiting", "error"):
            got.append(json.loads(socket.recv()))
    assert types([e for e in got if e["type"] != "tokens"]) == types([e for e in expected if e["type"] != "tokens"])
    assert [e["token_ids"] for e in got if e["type"] == "turn"] == [
        e["token_ids"] for e in expected if e["type"] == "turn"
    ]


def test_what_sessions_can_be_about_is_listed(client):
    shown = client.get("/v1/envs").json()
    assert [(e["name"], e["kind"]) for e in shown["envs"]] == [("calculator", "calculator")]
    assert shown["tools"] == ["calculator", "python"]
    question = client.get("/v1/envs/calculator/tasks", params={"split": "held_out", "index": 3}).json()
    assert question["id"] == "calc:" + question["messages"][0]["content"]
    assert code(client.get("/v1/envs/none/tasks")) == (404, "env_not_found")


def test_a_session_that_nobody_used_for_long_is_over(client, server, monkeypatch):
    session = made(client)
    monkeypatch.setattr(type(server.service.sessions.find(_anyone(), session)), "idle_s", property(lambda self: 1e9))
    assert client.get(f"/v1/sessions/{session}").json()["status"] == "failed"
    assert code(client.post(f"/v1/sessions/{session}/turns", json={"content": "hi"})) == (409, "session_over")


def _anyone():
    from serve.keys import ANONYMOUS

    return ANONYMOUS
