"""However a turn's ids come, a client is shown the same in the end, and never half a character or half a marker."""

import random
import re

import pytest

from rl.chat import ChatCodec, parse_calls
from rl.config_env import CalculatorConfig
from rl.env import World
from rl.pretrained import _train_tokenizer
from serve.text_stream import Calls, Cutter, Decoder, TurnText

CALL = '<tool_call>{"name": "calculator", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    world = World(CalculatorConfig(name="calculator"), seed=0)
    return ChatCodec(_train_tokenizer(400, world, seed=0))


def splits(items, rng):
    """The items in order, in pieces of random length, some of them empty."""
    at = 0
    while at < len(items):
        more = rng.choice([0, 1, 1, 2, 3, 7, 40])
        yield items[at : at + more]
        at += more


# -- characters ----------------------------------------------------------------------------------------------------


WORDS = ["", "plain", "größer — 大きい 🙂🙂", "ends in the middle of 🙂", "a real \ufffd is text too"]


@pytest.mark.parametrize("text", WORDS)
def test_text_comes_in_whole_characters(codec, text):
    ids = codec.reply({"role": "assistant", "content": text})[:-1]
    cut = ids[:-2] if "middle" in text else ids
    whole = codec.text(cut, special=True)
    for seed in range(40):
        decoder, shown = Decoder(codec), ""
        for piece in splits(cut, random.Random(seed)):
            shown += decoder.add(piece)
            assert text.startswith(shown), "what is shown stays"
        assert shown + decoder.flush() == whole
    if "middle" in text:
        assert whole.endswith("\ufffd"), "the test's turn does end within a character"


def test_a_character_is_held_back_until_its_last_byte(codec):
    ids = codec._encode("🙂")
    assert len(ids) > 1
    decoder = Decoder(codec)
    assert [decoder.add([i]) for i in ids] == [""] * (len(ids) - 1) + ["🙂"]


def test_any_ids_at_all_give_the_text_of_the_whole(codec):
    """Bytes that are no characters, control tokens: what an untrained model says."""
    for seed in range(150):
        rng = random.Random(seed)
        ids = [rng.randrange(codec.vocabulary) for _ in range(rng.randrange(60))]
        decoder = Decoder(codec)
        shown = "".join(decoder.add(piece) for piece in splits(ids, rng)) + decoder.flush()
        assert shown == codec.text(ids, special=True)


# -- stop strings --------------------------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> str:
    """By hand: the shortest beginning that holds one, up to where that one begins."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one two three", ["two"]),
        ("one two three", ["four"]),
        ("aaab", ["aab"]),
        ("aaaa", ["aa", "a"]),
        ("abcd", ["abcd", "bc"]),
        ("ababac", ["abac", "zz"]),
        ("ends with the beginning of st", ["stop"]),
        ("x\n\nObservation: 1", ["\nObservation", "\n\n\n"]),
        ("", ["a"]),
        ("whole", []),
    ],
)
def test_a_stop_string_cuts_the_text_wherever_chunks_end(text, stops):
    expected = cut(text, stops)
    for seed in range(40):
        cutter, shown = Cutter(stops), ""
        for piece in splits(text, random.Random(seed)):
            shown += cutter.add(piece)
            assert expected.startswith(shown), "nothing is shown that is cut away later"
        shown += cutter.flush()
        assert shown == expected and cutter.kept == len(expected)
        assert (cutter.end is not None) == (expected != text)
        if cutter.end is not None:
            assert any(text[: cutter.end].endswith(stop) for stop in stops)


def test_random_stop_strings():
    for seed in range(300):
        rng = random.Random(seed)
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        cutter = Cutter(stops)
        shown = "".join(cutter.add(piece) for piece in splits(text, rng)) + cutter.flush()
        assert shown == cut(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    cutter = Cutter(["stop"])
    assert [cutter.add(c) for c in "a sto stop"] == ["a", " ", "", "", "", "sto ", "", "", "", ""]
    assert cutter.end == 10


# -- tool calls ----------------------------------------------------------------------------------------------------

TURNS = [
    "no call, 1 < 2",
    CALL,
    f"I think\n{CALL}\nand {CALL}",
    "<tool_call>not JSON</tool_call> text",
    f"{CALL}<tool_call>",
    f"</tool_call> first {CALL}",
    "it is written <tool_ca",
    "<tool_call>",
]


@pytest.mark.parametrize("text", TURNS)
def test_calls_are_those_of_the_whole_turn_and_bad_ones_are_text(text):
    calls, _ = parse_calls(text)
    content = re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL) if calls else text
    for seed in range(40):
        splitter, shown = Calls(), ""
        for piece in splits(text, random.Random(seed)):
            shown += splitter.add(piece)
            assert content.startswith(shown)
        rest, found = splitter.flush()
        assert (shown + rest, tuple(found)) == (content, calls)


def test_text_before_a_call_is_shown_at_once():
    splitter = Calls()
    assert splitter.add("I look it up. <tool_c") == "I look it up. "
    assert splitter.add("all>") == ""


# -- a turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TURNS)
@pytest.mark.parametrize("stops", [[], ["and", "JSON"], ["tool_call>"]])
def test_a_turn_in_chunks_is_the_turn_at_once(codec, text, stops):
    ids = codec.reply({"role": "assistant", "content": text})

    def play(pieces):
        turn = TurnText(codec, stops, tools=True)
        shown = "".join(turn.add(piece) for piece in pieces if turn.end is None)
        rest, said = turn.finish()
        assert shown + rest == said.content
        return said

    whole = play([ids])
    assert all(play(splits(ids, random.Random(seed))) == whole for seed in range(40))
    assert "<|im_end|>" not in whole.content
    assert whole.kept == len(cut(text, stops))


def test_one_call_ends_the_turn_where_only_one_is_wanted(codec):
    turn = TurnText(codec, tools=True, one_call=True)
    shown = turn.add(codec.reply({"role": "assistant", "content": f"so {CALL} and {CALL}"}))
    assert (shown, turn.end) == ("so ", len(f"so {CALL}"))
    _, said = turn.finish()
    assert (said.content, len(said.calls), said.end) == ("so ", 1, len(f"so {CALL}"))


def test_without_tools_a_call_is_text(codec):
    turn = TurnText(codec)
    assert turn.add(codec.reply({"role": "assistant", "content": CALL})) == CALL
    assert turn.finish()[1].calls == ()
