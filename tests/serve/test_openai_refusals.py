"""What OpenAI's routes refuse, and how a request ends that cannot go on."""

import json
import time

import httpx
import openai
import pytest
from asking import ASKED, chat

from rl.engine import EngineError
from rl.envs.calculator import TOOL
from serve.token_memory import TokenMemory

# -- refusals ------------------------------------------------------------------------------------------------------

MESSAGE = {"role": "user", "content": "x"}
REFUSED = [
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities.1"),
    ({"functions": []}, "functions"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": True}, "n"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": 3}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"user": 3}, "user"),
    ({"model": ""}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
    (
        {"messages": [MESSAGE, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "messages.1.tool_calls.0.function.arguments",
    ),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[str(param) + str(i) for i, (_, param) in enumerate(REFUSED)])
def test_what_cannot_be_done_is_refused_by_the_fields_name(server, body, param):
    with server.client() as api:
        answer = api.post("/v1/chat/completions", json={"model": "agent", "messages": [MESSAGE], **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")
    assert error["param"] == param and param.split(".")[0] in error["message"]


TEXTS_REFUSED = [
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 3, "n": 2}, "best_of"),
    ({"logprobs": 6}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["", "x"]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["x"] * 100, "n": 2}, "n"),
]


@pytest.mark.parametrize(("body", "param"), TEXTS_REFUSED)
def test_texts_that_cannot_go_on(server, body, param):
    with server.client() as api:
        answer = api.post("/v1/completions", json={"model": "agent", "prompt": "x", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "agent", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "agent", "messages": [{"role": "user", "content": "a\x00b"}]}',
        b'{"model": "agent", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "agent", "messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
        b'{"model": "agent", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "bytes", "surrogate", "nul", "nan", "huge", "deep"],
)
def test_what_is_no_json_is_refused(server, raw):
    with server.client() as api:
        answer = api.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_what_json_can_say_is_text(api, play, server):
    played = play("12")
    chat(api, messages=[{"role": "user", "content": "a\u0000b \u2028 \U0010ffff"}])
    assert "a\u0000b \u2028 \U0010ffff" in server.service.codec.text(played.contexts[0])


def test_an_argument_that_is_half_a_character_is_refused(server):
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    body = {"model": "agent", "messages": [MESSAGE, {"role": "assistant", "tool_calls": [call]}]}
    with server.client() as api:
        assert api.post("/v1/chat/completions", json=body).status_code == 400


def test_unknown_fields_are_ignored(api, play):
    play("12")
    assert chat(api, extra_body={"service_tier": "auto", "reasoning_effort": "low", "anything": [1]}).choices


def test_unknown_models(api):
    for model in ("gpt-4o", "agent@77", "agent@01"):
        with pytest.raises(openai.NotFoundError) as refused:
            chat(api, model=model)
        assert refused.value.code == "model_not_found"


def test_a_prompt_that_is_too_long_says_by_how_much(api, server):
    codec, text = server.service.codec, "12+" * 150
    over = len(codec.prompt([{"role": "user", "content": text}])) + 1 - 320
    assert over > 0
    with pytest.raises(openai.BadRequestError) as refused:
        chat(api, messages=[{"role": "user", "content": text}])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert f": {over} too many" in refused.value.message and "320" in refused.value.message


def test_ten_thousand_turns_are_counted_and_only_what_fits_is_looked_up(api, server, monkeypatch):
    """A turn is looked up by all that is before it: for each of so many that took as long as their number squared."""
    looked_up, recall = [], TokenMemory.recall
    monkeypatch.setattr(
        TokenMemory, "recall", lambda memory, ids, said: looked_up.append(len(ids)) or recall(memory, ids, said)
    )
    turns = [MESSAGE if k % 2 == 0 else {"role": "assistant", "content": "x"} for k in range(20_001)]
    with pytest.raises(openai.BadRequestError, match=r"takes \d{5,} tokens: \d{5,} too many") as refused:
        api.chat.completions.create(model="agent", messages=turns)
    assert refused.value.code == "context_length_exceeded"
    assert len(looked_up) > 0 and max(looked_up) < server.service.max_length


def test_max_tokens_beyond_the_room(api, server, play):
    codec = server.service.codec
    long = [{"role": "user", "content": "1" * 290}]
    room = 320 - len(codec.prompt(long))
    assert 0 < room < 40
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(api, messages=long, **{name: room + 3})
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", name)
        assert f"is 3 more than the {room} tokens" in refused.value.message
    played = play("12")
    chat(api, messages=long)
    assert played.asked[0][0].max_tokens == room


def test_a_template_that_refuses_messages_is_the_clients_error(api, server, monkeypatch):
    def refuses(*_):
        raise ValueError("roles must alternate")

    monkeypatch.setattr(server.service.codec, "conversation", refuses)
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        chat(api)


# -- ends ----------------------------------------------------------------------------------------------------------


def left(played) -> None:
    deadline = time.monotonic() + 5
    while played.under_way and time.monotonic() < deadline:
        time.sleep(0.01)
    assert played.under_way == 0


def begun(played, count=1) -> None:
    deadline = time.monotonic() + 5
    while played.under_way < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert played.under_way == count


def test_a_client_that_leaves_a_stream_frees_the_engine(api, play):
    played = play("one two three", slow=True, after=4)
    stream = chat(api, stream=True, n=3)
    next(iter(stream))
    begun(played, 3)
    stream.close()
    left(played)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_frees_the_engine(server, play, stream):
    played = play("one", slow=True, after=-9)
    body = {"model": "agent", "messages": ASKED, "n": 2, "stream": stream}
    with server.client() as api, pytest.raises(httpx.ReadTimeout):
        api.post("/v1/chat/completions", json=body, timeout=0.5)
    assert len(played.asked) == 2
    left(played)


@pytest.fixture
def hurried(server, monkeypatch):
    http = server.service.config.http.model_copy(update={"deadline_s": 0.3})
    monkeypatch.setattr(server.service, "config", server.service.config.model_copy(update={"http": http}))


def test_a_request_that_takes_too_long_is_ended(api, play, hurried):
    for stream in (False, True):
        played = play("one two", slow=True, after=-9)
        with pytest.raises(openai.APIStatusError) as late:
            chat(api, stream=stream)
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        left(played)


def test_a_stream_that_takes_too_long_ends_with_an_error(api, play, hurried):
    played = play("one two three", slow=True, after=3)
    stream = chat(api, stream=True)
    next(iter(stream))
    with pytest.raises(openai.APIError) as late:
        list(stream)
    assert late.value.code == "deadline_exceeded"
    left(played)


def test_an_engine_that_has_died(api, play):
    for stream in (False, True):
        play("one two three", error=EngineError("the engine has died: private words"), after=-99)
        with pytest.raises(openai.InternalServerError) as dead:
            chat(api, stream=stream)
        assert (dead.value.status_code, dead.value.code) == (503, "unavailable")
        assert "private" not in dead.value.message
    play("one two three", error=EngineError("dead"), after=3)
    stream = chat(api, stream=True)
    next(iter(stream))
    with pytest.raises(openai.APIError) as dead:
        list(stream)
    assert dead.value.code == "unavailable"


def test_the_schema_says_what_is_refused(server):
    with server.client() as api:
        paths = api.get("/openapi.json").json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "messages"] and "$ref" not in json.dumps(body)
    assert body["properties"]["audio"]["type"] == "null"
    assert "/v1/completions" in paths and "/v1/models/{model}" in paths
