"""Demonstrations are encoded as if a model had sampled them: by the loop, or from rows, with the same arrays."""

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rl.config_env import CalculatorConfig
from rl.demonstration import demonstrate, draw_batch, encode_messages, encode_pairs, encode_rows, read_rows
from rl.env import World
from rl.envs.calculator import TOOL, answer_call
from rl.episode import Limits
from rl.task import TaskStream

LIMITS = Limits(max_turns=8, max_length=500)
ROW = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}


def conversation(codec, world, task):
    """What demonstrating the task looks like as a log: with the tool's answers, without the loop."""
    messages = [{"role": "user", "content": str(task.prompt["expression"])}]
    for message in world.source.demonstrate(task, random.Random(0), guess=False):
        messages.append(message)
        if "tool_calls" in message:
            messages.append({"role": "tool", "content": answer_call(codec.action(codec.reply(message)))[0]})
    return messages


async def test_rows_and_the_loop_give_the_same_arrays(codec, world):
    for task in TaskStream(world.source, "train").next(5):
        played = await demonstrate(world, task, codec, guess_fraction=0.0, limits=LIMITS, seed=0)
        encoded = encode_messages(codec, conversation(codec, world, task), [TOOL])
        for name in ("tokens", "loss_mask", "turn", "logprobs", "versions"):
            ours, theirs = getattr(encoded, name), getattr(played, name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), name
        assert codec.text(encoded.tokens[encoded.loss_mask], special=True).endswith(f"{task.answer}<|im_end|>")


async def test_the_loss_is_on_what_the_assistant_says(codec, world):
    messages = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "thanks"},
    ]
    t = encode_messages(codec, messages)
    assert codec.text(t.tokens[t.loss_mask], special=True) == "first<|im_end|>second<|im_end|>"
    assert codec.text(t.tokens[t.turn == -1], special=True).endswith("<|im_start|>assistant\n")
    # What follows the last assistant turn trains nothing and is left out.
    assert codec.text(t.tokens, special=True) + "\n" == codec.text(codec.messages(messages[:5]), special=True)


def test_two_assistant_messages_in_a_row_are_two_turns(codec):
    said = [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]
    messages = [{"role": "user", "content": "count"}, *said]
    t = encode_messages(codec, messages)
    assert codec.text(t.tokens, special=True) + "\n" == codec.text(codec.messages(messages), special=True)


def test_a_conversation_is_cut_at_the_context(codec):
    whole = encode_messages(codec, ROW["messages"])
    cut = encode_messages(codec, ROW["messages"], max_length=len(whole) - 1)
    for name in ("tokens", "loss_mask", "turn", "logprobs", "versions"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name)[:-1])
    prompt_only = encode_messages(codec, ROW["messages"], max_length=3)
    assert [bool(t.loss_mask.any()) for t in (whole, prompt_only, cut)] == [True, False, True]


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "hi"}], ROW["messages"][1:]])
def test_there_is_nothing_to_learn_without_a_prompt_and_an_answer(codec, messages):
    with pytest.raises(ValueError, match="before the assistant's first"):
        encode_messages(codec, messages)


async def test_guesses_are_the_asked_share_of_the_tasks_and_always_the_same_ones(codec):
    world = World(CalculatorConfig(name="calculator", max_operations=2), 0)
    tasks = TaskStream(world.source, "train").next(60)

    async def turns(fraction, seed=0):
        arguments = {"guess_fraction": fraction, "limits": LIMITS, "seed": seed}
        return [int((await demonstrate(world, t, codec, **arguments)).turn.max()) + 1 for t in tasks]

    half = await turns(0.5)
    assert 15 <= half.count(1) <= 45
    assert half == await turns(0.5)
    assert half != await turns(0.5, seed=1)
    assert 1 not in await turns(0.0)
    assert set(await turns(1.0)) == {1}


async def test_an_environment_without_a_demonstrator_says_what_to_set(codec):
    world: Any = SimpleNamespace(source=object())
    task: Any = None
    with pytest.raises(ValueError, match=r"demonstrations\.path"):
        await demonstrate(world, task, codec, guess_fraction=0, limits=LIMITS, seed=0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n\n{"a": 2\n', r"rows\.jsonl:3: not JSON"),
        ('{"a": 1}\n[1]\n', r"rows\.jsonl:2: expected an object"),
        ("\n\n", r"rows\.jsonl: no rows"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, says):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        read_rows(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "bad", [{}, {"messages": None}, {"messages": [{"content": "?"}]}, {"messages": "[not json"}, {"messages": [1]}]
)
def test_a_row_that_is_no_demonstration_is_named(tmp_path, codec, bad):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 2: "):
        encode_rows(str(path), codec, 500)


def test_rows_may_hold_structured_calls_as_openai_writes_them(tmp_path, codec):
    """There `content` is null beside a call, and the arguments are JSON in a string."""
    function = {"name": "calculator", "arguments": '{"a": 1, "op": "+", "b": 1}'}
    call = {"type": "function", "id": "1", "function": function}
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "2", "tool_call_id": "1"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "tools": [TOOL]}))
    (example,) = encode_rows(str(tmp_path / "rows.jsonl"), codec, 500)
    (t,) = example.trajectories
    assert (example.labels, example.source) == ((1.0,), "demonstration")
    said = codec.text(t.tokens[t.loss_mask & (t.turn == 0)])
    assert said == '<tool_call>{"name": "calculator", "arguments": {"a": 1, "op": "+", "b": 1}}</tool_call>'


def test_jsonl_and_parquet_hold_the_same_demonstrations(tmp_path, codec):
    rows = [ROW, {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pa.Table.from_pylist([{"messages": json.dumps(r["messages"])} for r in rows])
    pq.write_table(table, tmp_path / "rows.parquet")
    first, second = (encode_rows(str(tmp_path / f"rows.{kind}"), codec, 500) for kind in ("jsonl", "parquet"))
    assert len(first) == 2
    tokens = [[t.tokens.tolist() for example in both for t in example.trajectories] for both in (first, second)]
    assert tokens[0] == tokens[1] == [encode_messages(codec, row["messages"]).tokens.tolist() for row in rows]


def talk(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": answer}]


def test_a_pair_is_two_conversations_the_chosen_one_first(tmp_path, codec):
    rows = [{"rejected": talk("3"), "chosen": json.dumps(talk("2"))}, {"chosen": talk("two"), "rejected": talk("")}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = encode_pairs(str(tmp_path / "pairs.jsonl"), codec, 500)
    said = [[codec.text(t.tokens[t.loss_mask]) for t in pair.trajectories] for pair in pairs]
    assert said == [["2", "3"], ["two", ""]]
    assert [(pair.labels, pair.source) for pair in pairs] == [((1.0, -1.0), "rows")] * 2


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_a_pair_with_one_side_is_named_with_what_is_wanted(tmp_path, codec, missing):
    good = {"chosen": talk("2"), "rejected": talk("3")}
    bad = {side: said for side, said in good.items() if side != missing}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [good, bad])))
    with pytest.raises(ValueError, match=rf"pairs\.jsonl: row 2: .*`chosen` and `rejected`.*{missing}"):
        encode_pairs(str(tmp_path / "pairs.jsonl"), codec, 500)


def test_a_folder_holds_the_rows_of_all_its_files(tmp_path, codec):
    """As a server's feedback does: a file a session. Other files, and what is still being written, are passed over."""
    pairs = [{"chosen": talk(str(i)), "rejected": talk("no")} for i in range(3)]
    pq.write_table(pa.Table.from_pylist([{k: json.dumps(v) for k, v in pairs[0].items()}]), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, pairs[1:])))
    (tmp_path / "c.partial").write_text("{")
    found = encode_pairs(str(tmp_path), codec, 500)
    assert [codec.text(p.trajectories[0].tokens[p.trajectories[0].loss_mask]) for p in found] == ["0", "1", "2"]
    assert [number for number, _ in read_rows(str(tmp_path))] == [1, 1, 2]
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"b\.jsonl: row 1: not an example with `chosen` and `rejected`"):
        encode_pairs(str(tmp_path), codec, 500)


def test_a_folder_or_a_table_without_rows_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("{}")
    with pytest.raises(ValueError, match=r"no \*\.parquet or \*\.jsonl in this folder"):
        read_rows(str(tmp_path))
    pq.write_table(pa.Table.from_pylist([], schema=pa.schema([("chosen", pa.string())])), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no rows"):
        read_rows(str(tmp_path))


def test_tools_may_be_json_in_a_string(tmp_path, codec):
    """A table has one type a column, and would fill one schema's fields into another's."""
    row = {"messages": json.dumps(talk("2")), "tools": json.dumps([TOOL])}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (example,) = encode_rows(str(tmp_path / "rows.parquet"), codec, 500)
    assert example.trajectories[0].tokens.tolist() == encode_messages(codec, talk("2"), [TOOL]).tokens.tolist()


def judged(path, *labelled):
    path.write_text("\n".join(json.dumps({"messages": talk(said), "label": label}) for said, label in labelled))
    return str(path)


def test_kto_takes_conversations_that_were_judged_alone(tmp_path, codec):
    """One of either label in the place of a pair; of which there are fewer, they come again."""
    path = judged(tmp_path / "rows.jsonl", ("a", 1), ("b", -1), ("c", 1), ("d", 1), ("e", -0.5))
    pairs = encode_pairs(path, codec, 500, unpaired=True)
    said = [[codec.text(t.tokens[t.loss_mask]) for t in pair.trajectories] for pair in pairs]
    assert said == [["a", "b"], ["c", "e"], ["d", "b"]]
    assert {pair.labels for pair in pairs} == {(1.0, -1.0)}
    with pytest.raises(ValueError, match="`chosen` and `rejected`"):
        encode_pairs(path, codec, 500)


@pytest.mark.parametrize(
    ("labels", "says"),
    [((1, 1), "2 rows have a label above 0 and 0 one below"), ((1, 0), "and not 0"), ((1, "-"), "and not '-'")],
)
def test_judgements_that_kto_cannot_use_are_named(tmp_path, codec, labels, says):
    path = judged(tmp_path / "rows.jsonl", *(("a", label) for label in labels))
    with pytest.raises(ValueError, match=says):
        encode_pairs(path, codec, 500, unpaired=True)


def test_a_message_counts_by_the_tokens_that_were_sampled_for_it(codec):
    """A text has many encodings, and the model saw one. Of another text, or another tokenizer, they say nothing."""
    question, end = talk("")[:1], codec.end_of_turn
    letters = [codec.reply({"content": c})[0] for c in "calculator"]
    assert codec.reply({"content": "calculator"}) != [*letters, end]

    def encoded(content, ids):
        said = {"role": "assistant", "content": content, "token_ids": ids}
        return encode_messages(codec, [*question, said, *talk("2")])

    prompt = codec.prompt(question)
    for ids, supplied in (([*letters, end], 0), (letters, 1)):
        t = encoded("calculator", ids)
        assert t.tokens[len(prompt) : len(prompt) + 11].tolist() == [*letters, end]
        assert int(t.loss_mask[t.turn == 0].sum()) == 11 - supplied
    plain = encode_messages(codec, [*question, {"role": "assistant", "content": "calculator"}, *talk("2")])
    for ids in ([*letters[:-1], end], [10**6], []):
        assert encoded("calculator", ids).tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize(("batch", "count"), [(4, 12), (5, 12), (16, 12), (12, 12), (1, 3)])
def test_an_epoch_draws_every_demonstration_once(batch, count):
    """Also where a batch reaches into the next epoch, or is larger than one."""
    steps = 5 * count
    drawn = [i for step in range(steps) for i in draw_batch(step, batch, count, seed=0)]
    assert len(drawn) == steps * batch
    epochs = [drawn[e : e + count] for e in range(0, len(drawn), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 3:
        assert epochs[0] != epochs[1]
        assert draw_batch(0, batch, count, seed=0) != draw_batch(0, batch, count, seed=1)
