"""What is sent to an endpoint and read from it, message by message."""

import json

import pytest

from actors.endpoint import UnreadableReply, read_reply, wire_messages
from rl.chat import parse_calls

CALL = '<tool_call>{"name": "calculator", "arguments": {"a": 1}}</tool_call>'


def reply(message: dict, finish: str = "stop", **more):
    return read_reply({"choices": [{"message": message, "finish_reason": finish}], **more})


def called(arguments, content=None):
    function = {"name": "python", "arguments": arguments}
    call = {"id": "x", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


@pytest.mark.parametrize(
    "arguments", ['{"code": "print(1)"}', '{"code": "x = \'</tool_call><tool_call>\'"}', "{}", '{"s": "\\u00e9 é\\n"}']
)
def test_a_structured_call_is_what_the_environment_reads(arguments):
    (call,), error = parse_calls(reply(called(arguments, "so:")).text)
    assert error is None and call.name == "python" and dict(call.arguments) == json.loads(arguments)


def test_an_empty_and_an_unreadable_call():
    (call,), error = parse_calls(reply(called("")).text)
    assert error is None and dict(call.arguments) == {}
    assert parse_calls(reply(called('{"code": ')).text) == ((), "malformed call: not JSON")
    assert parse_calls(reply(called("[1]")).text) == ((), "malformed call: arguments are not an object")


def test_text_limit_usage_and_parts():
    found = reply({"content": "hi"}, "length", usage={"prompt_tokens": 5, "completion_tokens": 2})
    assert (found.text, found.truncated, found.usage.prompt, found.usage.completion) == ("hi", True, 5, 2)
    assert reply({"content": None}).text == "" and reply({"content": "x"}).usage.completion is None
    assert reply({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}).text == "ab"


@pytest.mark.parametrize("answer", [{}, [], None, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": None}]}])
def test_what_is_no_completion_is_told(answer):
    with pytest.raises(UnreadableReply):
        read_reply(answer)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def test_calls_are_sent_as_calls_and_each_is_answered():
    history = [user("q"), said(f"so {CALL}{CALL}"), tool("one a turn"), said(CALL), tool("2")]
    sent = wire_messages(history, tools=True)
    first, second = sent[1], sent[4]
    assert first["content"] == "so " and len(first["tool_calls"]) == 2 and second["content"] == ""
    assert json.loads(first["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    ids = [c["id"] for m in (first, second) for c in m["tool_calls"]]
    assert len(set(ids)) == 3 and [m["tool_call_id"] for m in sent if m["role"] == "tool"] == ids
    assert [m["content"] for m in sent if m["role"] == "tool"] == ["one a turn", "one a turn", "2"]


def test_an_answer_to_no_call_is_the_users():
    broken = said("<tool_call>oh")
    sent = wire_messages([user("q"), broken, tool("error: x")], tools=True)
    assert sent[1] == broken and sent[2] == user("<tool_response>\nerror: x\n</tool_response>")


def test_calls_that_a_message_answers_are_closed():
    sent = wire_messages([user("q"), said(CALL), user("Observation: 3")], tools=True)
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "user"]


def test_without_tools_text_stays_text():
    history = [user("q"), said(CALL), user("no")]
    assert wire_messages(history, tools=False) == history
