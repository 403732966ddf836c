"""OpenAI's own client against the real application and engine: turns and texts, whole and streamed."""

import asyncio
import json
import time

import httpx
import openai
import pytest
from asking import ASKED, chat, streamed

from rl.policy import Sampling

# -- models --------------------------------------------------------------------------------------------------------


def test_the_model_is_there_by_its_name_and_by_its_versions(api):
    listed = {m.id: m for m in api.models.list()}
    assert {"agent", "agent@1"} <= set(listed)
    assert api.models.retrieve("agent@1").weight_version == 1
    assert listed["agent"].max_model_len == 320
    for name in ("agent@99", "gpt-4o", "agent@"):
        with pytest.raises(openai.NotFoundError) as refused:
            api.models.retrieve(name)
        assert refused.value.code == "model_not_found"


# -- a turn --------------------------------------------------------------------------------------------------------


def test_a_turn(api, server):
    raw = api.chat.completions.with_raw_response.create(model="agent", messages=ASKED, seed=1, max_tokens=20)
    answer = raw.parse()
    assert raw.headers["x-weight-version"] == "1"
    assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "agent@1", "v1")
    assert answer.weight_version == 1
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    prompt = server.service.codec.prompt(ASKED)
    sampled = server.run(server.service.versions.generate(prompt, sampling(server, seed=1, max_tokens=20), 1))
    ids = [i for i in sampled.token_ids if i != server.service.codec.end_of_turn]
    assert choice.message.content == server.service.codec.text(ids, special=True)
    assert choice.finish_reason == sampled.finish_reason
    count = len(sampled.token_ids)
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(prompt),
        "completion_tokens": count,
        "total_tokens": len(prompt) + count,
    }


def sampling(server, **more) -> Sampling:
    return Sampling(**{"temperature": 0.7, "stop": (server.service.codec.end_of_turn,), **more})


async def test_the_asynchronous_client(server):
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", http_client=httpx.AsyncClient(trust_env=False)
    ) as api:
        asked = {"model": "agent@1", "messages": ASKED, "max_tokens": 12}
        answers = await asyncio.gather(*(api.chat.completions.create(**asked, seed=s) for s in range(4)))
        for seed, answer in enumerate(answers):
            stream = await api.chat.completions.create(**asked, seed=seed, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert text == answer.choices[0].message.content
        assert len({a.choices[0].message.content for a in answers}) > 1


def test_a_stream_is_the_turn_in_pieces(api):
    for seed in range(2):
        whole = chat(api, seed=seed, max_tokens=20, n=3)
        chunks, said = streamed(api, seed=seed, max_tokens=20, n=3, stream_options={"include_usage": True})
        assert said == [(c.message.content, c.finish_reason) for c in whole.choices]
        assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
        assert {(c.weight_version, c.system_fingerprint) for c in chunks} == {(1, "v1")}


def test_a_stream_on_the_wire(server):
    with server.client() as api:
        body = {"model": "agent", "messages": ASKED, "max_tokens": 5, "stream": True}
        answer = api.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-weight-version"] == "1"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(e.removeprefix("data: "))["choices"] for e in events[:-2]), "no usage that was not asked for"


def test_choices_of_a_seeded_request_have_seeds_of_their_own(api):
    first = chat(api, seed=7, n=4, max_tokens=8, temperature=1.5)
    again = chat(api, seed=7, n=4, max_tokens=8, temperature=1.5)
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) > 1
    assert texts[0] == chat(api, seed=7, max_tokens=8, temperature=1.5).choices[0].message.content
    assert [c.index for c in first.choices] == [0, 1, 2, 3]
    assert first.usage.prompt_tokens == chat(api, max_tokens=1).usage.prompt_tokens, "one prompt"


def test_what_a_request_says_of_sampling_is_what_is_sampled_with(api, play):
    played = play("12")
    more = {"top_k": 3}
    chat(api, temperature=0.3, top_p=0.5, max_completion_tokens=9, seed=-5, extra_body=more)
    chat(api)
    chat(api, max_tokens=8)
    asked = [s for s, _ in played.asked]
    assert (asked[0].temperature, asked[0].top_p, asked[0].top_k, asked[0].max_tokens) == (0.3, 0.5, 3, 9)
    assert asked[0].seed == 2**63 - 5
    assert (asked[1].temperature, asked[1].top_p, asked[1].max_tokens, asked[1].seed) == (0.7, 1.0, 40, None)
    assert asked[2].max_tokens == 8


def test_the_length_of_a_turn(api):
    answer = chat(api, max_tokens=1, temperature=2)
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].finish_reason == "length" or answer.choices[0].message.content == ""


def test_content_in_parts_and_a_developer_are_what_they_say(api, play):
    played = play("12")
    parts = [{"type": "text", "text": "17+"}, {"type": "text", "text": "4-9"}]
    chat(api, messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}])
    chat(api, messages=[{"role": "system", "content": "be"}, *ASKED])
    assert played.contexts[0] == played.contexts[1]


# -- stop strings --------------------------------------------------------------------------------------------------


def test_stop_strings_cut_the_text_and_end_the_turn(api, play):
    for stop in ("two", ["four", " two"], ["o t"]):
        play("one two three")
        answer = chat(api, stop=stop)
        expected = "one two three".split(stop if isinstance(stop, str) else stop[-1])[0]
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
        _, said = streamed(api, stop=stop)
        assert said == [(expected, "stop")]
    whole = chat(api)
    assert whole.choices[0].message.content == "one two three"
    assert answer.usage.completion_tokens < whole.usage.completion_tokens


def test_a_stop_string_ends_what_the_engine_samples(api, server):
    text = ""
    for seed in range(50):
        text = chat(api, seed=seed, max_tokens=40, temperature=1.2).choices[0].message.content
        if len(text) > 20:
            break
    stop = text[8:10]
    answer = chat(api, seed=seed, max_tokens=40, temperature=1.2, stop=stop)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    deadline = time.monotonic() + 5
    while server.service.versions.in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.service.versions.in_flight == 0


# -- log-probs -----------------------------------------------------------------------------------------------------


def test_log_probs(api, server):
    answer = chat(api, seed=3, max_tokens=15, logprobs=True, top_logprobs=4, temperature=1)
    told = answer.choices[0].logprobs.content
    assert "".join(t.token for t in told) == answer.choices[0].message.content or any(t.bytes is None for t in told)
    prompt = server.service.codec.prompt(ASKED)
    asked = sampling(server, seed=3, max_tokens=15, temperature=1)
    sampled = server.run(server.service.versions.generate(prompt, asked, 1))
    assert [t.logprob for t in told] == pytest.approx(list(sampled.logprobs)[: len(told)], abs=1e-4)
    for t in told:
        values = [likely.logprob for likely in t.top_logprobs]
        assert len(values) == 4 and values == sorted(values, reverse=True)
        assert t.logprob <= values[0] and (t.logprob < values[-1] or t.token in [x.token for x in t.top_logprobs])
    plain = chat(api, seed=3, max_tokens=15, logprobs=True, temperature=1).choices[0].logprobs.content
    assert [t.token for t in plain] == [t.token for t in told] and plain[0].top_logprobs == []
    chunks, _ = streamed(api, seed=3, max_tokens=15, logprobs=True, top_logprobs=4, temperature=1)
    pieces = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [t.token for p in pieces for t in p.content] == [t.token for t in told]


def test_greedy_log_probs_are_json(server):
    """Under top-k 1 every other token has none: minus infinity."""
    with server.client() as api:
        body = {"model": "agent", "messages": ASKED, "max_tokens": 4, "top_k": 1, "logprobs": True, "top_logprobs": 3}
        text = api.post("/v1/chat/completions", json=body).text
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["choices"][0]["logprobs"]["content"][0]["top_logprobs"][2]["logprob"] == -9999.0


# -- texts ---------------------------------------------------------------------------------------------------------


def test_texts_go_on(api, server):
    answer = api.completions.create(model="agent", prompt="17+", seed=1)
    assert (answer.object, answer.model, answer.weight_version) == ("text_completion", "agent@1", 1)
    assert answer.usage.completion_tokens <= 16
    ids = server.service.codec.plain("17+")
    same = api.completions.create(model="agent", prompt=ids, seed=1)
    assert same.choices[0].text == answer.choices[0].text
    echoed = api.completions.create(model="agent", prompt=ids, seed=1, echo=True)
    assert echoed.choices[0].text == "17+" + answer.choices[0].text
    chunks = list(api.completions.create(model="agent", prompt="17+", seed=1, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == echoed.choices[0].text
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_several_prompts_and_choices_come_in_order(api, play):
    played = play("12")
    answer = api.completions.create(model="agent", prompt=["1+", "2+"], n=2, seed=4)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert played.contexts[0] == played.contexts[1] != played.contexts[2] == played.contexts[3]
    assert len({s.seed for s, _ in played.asked}) == 4
    assert answer.usage.prompt_tokens == len(played.contexts[0]) + len(played.contexts[2])
    several = api.completions.create(model="agent", prompt=[[5, 6], [7]], max_tokens=2)
    assert len(several.choices) == 2 and played.contexts[4:] == [[5, 6], [7]]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_of_texts(api, stream):
    asked = {"model": "agent", "prompt": "17+", "seed": 2, "logprobs": 2, "max_tokens": 8, "temperature": 1}
    if stream:
        chunks = [c.choices[0] for c in api.completions.create(**asked, stream=True)]
        told = [c.logprobs for c in chunks if c.logprobs]
        tokens, offsets = [t for p in told for t in p.tokens], [o for p in told for o in p.text_offset]
        top, text = [t for p in told for t in p.top_logprobs], "".join(c.text for c in chunks)
    else:
        choice = api.completions.create(**asked).choices[0]
        tokens, offsets, top, text = *_told(choice.logprobs), choice.text
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert "".join(tokens) == text or "\ufffd" in "".join(tokens)
    assert all(len(likely) in (1, 2) for likely in top)


def _told(logprobs):
    return logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs
