"""Prompts of one's own: files, splits by content, and the errors of rows that cannot be used."""

import asyncio
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rl.config_env import RowsConfig
from rl.env import World
from rl.episode import Identity, Limits, StopReason, run_episode
from rl.policy import Sampling, ScriptedPolicy
from rl.reward import math_answer
from rl.task import BadTask, TaskStream

SUMS = [{"prompt": f"What is {a} + {b}?", "answer": a + b} for a in range(10) for b in range(10)]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def own(prompts: str, held_out: str | None = None, seed: int = 0, **more: Any) -> World:
    return World(RowsConfig(name="rows", prompts=prompts, held_out=held_out, **more), seed)


def asked(task: Any) -> str:
    return task.prompt["prompt"][-1]["content"]


@pytest.fixture
def sums(tmp_path) -> str:
    return jsonl(tmp_path / "sums.jsonl", SUMS)


def test_one_file_is_split_by_content(sums):
    source = own(sums).source
    sizes = {split: source.size(split) for split in ("train", "held_out")}
    questions = {s: {asked(source.task(s, i)) for i in range(n or 0)} for s, n in sizes.items()}
    assert not questions["train"] & questions["held_out"]
    assert questions["train"] | questions["held_out"] == {row["prompt"] for row in SUMS}
    assert 3 < len(questions["held_out"]) < 30
    assert {asked(own(sums, seed=9).source.task("held_out", i)) for i in range(3)} <= questions["held_out"]


def test_train_comes_in_a_seeded_order_and_wraps(sums):
    source = own(sums).source
    size = source.size("train")
    assert size is not None
    order = [t.id for t in TaskStream(source, "train").next(2 * size)]
    assert order[:size] == order[size:]
    assert set(Counter(order).values()) == {2}
    assert [t.id for t in TaskStream(own(sums).source, "train").next(size)] == order[:size]
    assert [t.id for t in TaskStream(own(sums, seed=1).source, "train").next(size)] != order[:size]
    assert source.task("train", size + 3) == source.task("train", 3)


def test_parquet_and_jsonl_give_the_same_tasks(tmp_path):
    rows = [{**row, "id": f"q{i}", "level": i % 3} for i, row in enumerate(SUMS)]
    a = own(jsonl(tmp_path / "a.jsonl", rows)).source
    b = own(parquet(tmp_path / "b.parquet", rows)).source
    assert [a.task("train", i) for i in range(50)] == [b.task("train", i) for i in range(50)]
    assert a.task("train", 0).id.startswith("rows:q")
    assert a.task("train", 0).prompt["level"] in (0, 1, 2)


def test_messages_keep_their_roles(tmp_path):
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}], "answer": "2"},
        {"prompt": [{"role": "user", "content": "2 + 1?", "name": "ann"}], "answer": "3"},
    ]
    held = jsonl(tmp_path / "held.jsonl", SUMS[:1])
    source = own(parquet(tmp_path / "p.parquet", rows), held).source
    by_answer = {t.answer: t for t in (source.task("train", 0), source.task("train", 1))}
    assert by_answer["2"].prompt["prompt"] == rows[0]["prompt"]
    assert by_answer["3"].prompt["prompt"] == rows[1]["prompt"]


def test_what_is_held_out_is_never_trained_on(tmp_path, sums, caplog):
    held = jsonl(tmp_path / "held.jsonl", SUMS[10:20])
    with caplog.at_level(logging.INFO, "repertory"):
        source = own(sums, held).source
    assert (source.size("train"), source.size("held_out")) == (90, 10)
    assert [asked(source.task("held_out", i)) for i in range(10)] == [row["prompt"] for row in SUMS[10:20]]
    assert f"{sums}: 10 prompts also occur in {held}" in caplog.text


def test_a_repeated_prompt_counts_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "repertory"):
        source = own(jsonl(tmp_path / "twice.jsonl", SUMS + SUMS[:5])).source
    assert (source.size("train") or 0) + (source.size("held_out") or 0) == 100
    assert "5 rows repeat an earlier prompt" in caplog.text


async def test_without_a_tool_the_first_turn_is_the_answer(sums, codec):
    world = own(sums)
    task = world.source.task("train", 0)
    assert world.default_reward == "rl.reward.math_answer"
    for reply, reward in ((f"That makes {task.answer}.", 1.0), ("That makes 1000.", 0.0)):
        policy = ScriptedPolicy(codec, iter([{"role": "assistant", "content": reply}]))
        episode = await run_episode(
            world.env(),
            task,
            policy,
            codec,
            sampling=Sampling(),
            limits=Limits(1, 4096),
            identity=Identity(0, 0, task.id),
        )
        assert (len(episode.turns), episode.stop_reason) == (1, StopReason.DONE)
        assert math_answer(task, episode) == reward


async def test_with_the_calculator_a_call_is_answered(sums, codec):
    world = own(sums, tool="calculator", max_turns=3)
    task = world.source.task("train", 0)
    call = {"name": "calculator", "arguments": {"a": 20, "op": "*", "b": 3}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "assistant", "content": task.answer},
    ]
    episode = await run_episode(
        world.env(),
        task,
        ScriptedPolicy(codec, iter(messages)),
        codec,
        sampling=Sampling(),
        limits=Limits(3, 4096),
        identity=Identity(0, 0, task.id),
    )
    assert episode.turns[0].observation == [{"role": "tool", "content": "60"}]
    assert math_answer(task, episode) == 1.0


GOOD, GO = SUMS[0], {"role": "user", "content": "go"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": 1}, "`prompt` is missing"),
        ({"prompt": "x"}, "`answer` is missing"),
        ({"prompt": " ", "answer": 1}, "`prompt` is empty"),
        ({"prompt": 7, "answer": 1}, "neither a text nor a list of messages"),
        ({"prompt": [], "answer": 1}, "`prompt` is empty"),
        ({"prompt": [{"role": "human", "content": "x"}], "answer": 1}, "role is 'human'"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "without `content`"),
        ({"prompt": [GO, {"role": "assistant", "content": "y"}], "answer": 1}, "ends with an assistant message"),
        ({"prompt": "x", "answer": [1]}, r"`answer` is \[1\]"),
        ({"prompt": "x", "answer": True}, "`answer` is True"),
        ({"prompt": "x", "answer": ""}, "`answer` is empty"),
        ({"prompt": "x", "answer": float("nan")}, "`answer` is nan"),
        ({"prompt": "x", "answer": 1, "id": "same"}, "its id 'same' is that of row 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    path = jsonl(tmp_path / "rows.jsonl", [{**GOOD, "id": "same"}, row])
    with pytest.raises(ValueError, match=rf"rows\.jsonl: row 2: .*{said}"):
        own(path)


def test_the_other_bad_rows_are_counted(tmp_path):
    bad = [{"prompt": "x"}, {"answer": 1}, {"prompt": "", "answer": 1}]
    path = tmp_path / "rows.jsonl"
    for count, said in ((1, "missing"), (2, "missing; and 1 more bad rows"), (3, "missing; and 2 more bad rows")):
        with pytest.raises(ValueError, match=rf"rows\.jsonl: row 2: `answer` is {said}$"):
            own(jsonl(path, [GOOD, *bad[:count]]))
    path.write_text('{"prompt": "x"}\n{\n[]')
    with pytest.raises(ValueError, match=rf"{path}:2: not JSON.*; and 2 more bad rows$"):
        own(str(path))
    path.write_text("{\n[]")
    with pytest.raises(ValueError, match=rf"{path}:1: not JSON"):
        own(str(path))


def test_bad_files_are_named(tmp_path, sums):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        own(str(tmp_path / "none.jsonl"))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"broken\.parquet: neither JSONL nor Parquet"):
        own(str(tmp_path / "broken.parquet"))
    with pytest.raises(ValueError, match=r"empty\.parquet: no rows"):
        own(parquet(tmp_path / "empty.parquet", []))
    with pytest.raises(ValueError, match=r"few\.jsonl: of 1 different prompts, .* name a second file in env\.held_out"):
        own(jsonl(tmp_path / "few.jsonl", SUMS[:1]))
    with pytest.raises(ValueError, match="every prompt also occurs in"):
        own(sums, sums)
    with pytest.raises(ValueError, match=r"env\.max_turns is 1"):
        own(sums, tool="calculator")


def test_whole_numbers_lose_their_point(tmp_path):
    held = jsonl(tmp_path / "held.jsonl", SUMS)
    rows = [{"prompt": "a", "answer": 4.0}, {"prompt": "b", "answer": 0.5}]
    source = own(parquet(tmp_path / "p.parquet", rows), held).source
    assert {source.task("train", i).answer for i in range(2)} == {"4", "0.5"}


def test_bad_rows_are_skipped_and_named_by_line_where_the_config_says_so(tmp_path):
    lines = [json.dumps(row) for row in SUMS]
    lines[3:3] = ["", "{not json", json.dumps({"prompt": "no answer"}), json.dumps([1])]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"{path}:5: not JSON"):
        own(str(path))
    source: Any = own(str(path), bad_rows="skip").source
    assert source.size("train") + source.size("held_out") == 100
    assert [told.removeprefix(str(path)).split(": ")[:2] for told in source.left_out] == [
        [":5", "not JSON"], [":7", "expected an object"], ["", "row 6"],
    ]  # fmt: skip
    assert source.left_out[2].endswith("`answer` is missing")
    first = next(t for t in TaskStream(source, "train").next(100) if asked(t) == SUMS[3]["prompt"])
    assert first.where == f"{path}: row 8", "the line of the file, blank and bad ones counted"


@pytest.fixture
def model(tmp_path, tokenizer) -> str:
    """As much of a model as it takes to encode a question."""
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_a_question_longer_than_the_context_is_named_and_refused_or_left_out(tmp_path, model):
    from rl.config import Config
    from rl.fitting import open_world

    rows = jsonl(tmp_path / "long.jsonl", [*SUMS[:50], {"prompt": "and " * 300, "answer": 1}, *SUMS[50:]])

    def config(**env: Any) -> Config:
        return Config(
            model={"path": model, "max_length": 200}, env={"name": "rows", "prompts": rows, **env},
            stages=[{"kind": "eval"}],
        )  # fmt: skip

    with pytest.raises(ValueError, match=rf"bad rows, 1: {rows}: row 51: the question takes \d+ tokens.*bad_rows=skip"):
        asyncio.run(open_world(config()))
    source: Any = asyncio.run(open_world(config(bad_rows="skip"))).source
    whole = own(rows).source
    assert sum(source.size(s) for s in ("train", "held_out")) == 100
    assert len(source.left_out) == 1 and "row 51" in source.left_out[0]
    for split in ("train", "held_out"):
        kept = [t for t in TaskStream(whole, split).next(whole.size(split) or 0) if not asked(t).startswith("and")]
        assert TaskStream(source, split).next(source.size(split)) == kept, "the same tasks in the same order"
    with pytest.raises(ValueError, match="no question of the train split leaves room"):
        asyncio.run(open_world(config(bad_rows="skip").model_copy(update={"model": config().model.model_copy(
            update={"max_length": 4})})))  # fmt: skip


async def test_a_question_without_room_for_an_answer_is_no_episode(sums, codec):
    world = own(sums)
    task = world.source.task("train", 0)
    with pytest.raises(BadTask, match=rf"{sums}: row \d+: the question takes"):
        await run_episode(
            world.env(), task, ScriptedPolicy(codec, iter([])), codec,
            sampling=Sampling(), limits=Limits(1, 10), identity=Identity(0, 0, task.id),
        )  # fmt: skip
