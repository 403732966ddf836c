"""What people think of turns becomes data that a preference stage trains on: the conversation that the model had."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rl.chat import ChatCodec
from rl.config_env import CalculatorConfig
from rl.demonstration import encode_pairs
from rl.env import Message, World
from rl.envs.calculator import TOOL
from rl.episode import Episode, Identity, Limits, run_episode
from rl.policy import Completion, Sampling
from rl.pretrained import load_tokenizer, prepare_model
from rl.task import TaskStream
from serve.errors import ApiError
from serve.feedback import Feedback


@pytest.fixture(scope="module")
def model(quickstart_config, tmp_path_factory) -> Path:
    small = ("model.scratch.layers=1", "model.scratch.hidden=32", "model.scratch.heads=1")
    config = quickstart_config(*small)
    return prepare_model(config.model, World(config.env, 0), 0, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def codec(model) -> ChatCodec:
    return ChatCodec(load_tokenizer(model))


def journal(*events: dict[str, Any]) -> list[dict[str, Any]]:
    created = {"type": "created", "sample": 0, "version": 1}
    return [{**event, "seq": seq, "time": 0.0} for seq, event in enumerate((created, *events))]


def said(turn: int, text: str, ids: list[int] | None = None) -> dict[str, Any]:
    return {"type": "turn", "turn": turn, "text": text, "token_ids": ids or [], "asks": True}


def user(text: str) -> dict[str, Any]:
    return {"type": "user", "content": text}


PROMPT: dict[str, Any] = {"type": "prompt", "messages": [{"role": "system", "content": "brief"}], "tools": []}
RETRY: dict[str, Any] = {"type": "retry", "turn": 0, "sample": 1}


def last(conversation: str) -> str:
    return json.loads(conversation)[-1]["content"]


def plain(conversation: str) -> list[Message]:
    return [{"role": m["role"], "content": m["content"]} for m in json.loads(conversation)]


class Sampled:
    """A policy that says things by other tokens than an encoder would, one at a time; and is cut short once."""

    def __init__(self, codec: ChatCodec, texts: list[str]):
        self._codec, self._texts = codec, texts

    async def act(self, token_ids: list[int], sampling: Sampling, session: str) -> Completion:
        text = self._texts.pop(0)
        ids = [i for character in text for i in self._codec.reply({"role": "assistant", "content": character})[:-1]]
        cut = len(self._texts) == 1
        ids += [] if cut else [self._codec.end_of_turn]
        return Completion(ids, [0.0] * len(ids), [3] * len(ids), "length" if cut else "stop")


async def played(codec: ChatCodec) -> Episode:
    world = World(CalculatorConfig(name="calculator"), 0)
    task = TaskStream(world.source, "train").next(1)[0]
    call = '<tool_call>{"name": "calculator", "arguments": {"a": 12, "op": "+", "b": 34}}</tool_call>'
    return await run_episode(
        world.env(), task, Sampled(codec, [call, call, "46"]), codec, sampling=Sampling(max_tokens=200),
        limits=Limits(8, 2000), identity=Identity(0, 0, task.id),
    )  # fmt: skip


def events_of(episode: Episode) -> list[dict[str, Any]]:
    events = [{"type": "prompt", "messages": episode.prompt, "tools": episode.tools}]
    for k, turn in enumerate(episode.turns):
        events.append({"type": "turn_start", "turn": k})
        events.append({**said(k, turn.text, list(turn.token_ids)), "asks": False})
        if turn.observation:
            events.append({"type": "observation", "turn": k, "messages": turn.observation, "flags": []})
    return json.loads(json.dumps(journal(*events)))


async def test_what_is_trained_on_is_the_context_that_the_model_had(codec, tmp_path):
    """Token by token, loss mask included, at every turn of a calculator episode."""
    episode = await played(codec)
    feedback = Feedback(tmp_path)
    assert len(episode.turns) == 3 and episode.turns[1].supplied_end
    feedback.record("s", events_of(episode), 2, None, "right")
    (pair,) = encode_pairs(str(tmp_path / "feedback"), codec, 2000)
    corrected, as_it_was = pair.trajectories
    assert as_it_was.tokens.tolist() == episode.context_ids
    sampled = sum(len(turn.token_ids) for turn in episode.turns)
    assert int(as_it_was.loss_mask.sum()) == sampled
    reply = codec.reply({"role": "assistant", "content": "right"})
    before = len(episode.context_ids) - len(episode.turns[2].token_ids)
    assert corrected.tokens.tolist() == [*episode.context_ids[:before], *reply]
    for turn in episode.turns[:2]:
        assert codec.reply({"role": "assistant", "content": turn.text})[: len(turn.token_ids)] != turn.token_ids
    (row,) = feedback.rows()
    assert plain(row["rejected"])[-1]["content"] == episode.final_text
    assert json.loads(row["tools"]) == [TOOL]


def test_a_correction_is_set_against_what_was_said(tmp_path):
    feedback = Feedback(tmp_path)
    events = journal(PROMPT, user("1+1"), said(0, "3"), user("sure?"), said(1, "yes"))
    assert feedback.record("s", events, 0, None, "2") == {"turn": 0, "rating": None, "correction": "2"}
    (row,) = feedback.rows()
    before = [{"role": "system", "content": "brief"}, {"role": "user", "content": "1+1"}]
    assert plain(row["chosen"]) == [*before, {"role": "assistant", "content": "2"}]
    assert plain(row["rejected"]) == [*before, {"role": "assistant", "content": "3"}]


def test_attempts_at_a_turn_make_pairs_when_one_is_up_and_one_is_down(tmp_path):
    feedback = Feedback(tmp_path)
    events = [PROMPT, user("1+1"), said(0, "3")]
    feedback.record("s", journal(*events), 0, "down", None)
    assert feedback.rows() == []
    events += [RETRY, said(0, "2")]
    feedback.record("s", journal(*events), 0, "up", None)
    assert [(last(r["chosen"]), last(r["rejected"])) for r in feedback.rows()] == [("2", "3")]
    events += [RETRY, said(0, "11")]
    feedback.record("s", journal(*events), 0, "down", "2")
    found = {(last(r["chosen"]), last(r["rejected"])) for r in feedback.rows()}
    assert found == {("2", "3"), ("2", "11")}


def test_turns_after_different_words_are_not_compared(tmp_path):
    feedback = Feedback(tmp_path)
    events = [PROMPT, user("1+1"), said(0, "3"), user("sure?"), said(1, "yes")]
    feedback.record("s", journal(*events), 1, "down", None)
    events += [RETRY, said(0, "2"), user("sure?"), said(1, "no")]
    feedback.record("s", journal(*events), 1, "up", None)
    assert feedback.rows() == []
    labels = {last(r["messages"]): r["label"] for r in pq.read_table(tmp_path / "feedback" / "ratings").to_pylist()}
    assert labels == {"yes": -1, "no": 1}


def test_what_is_taken_back_or_deleted_is_gone(tmp_path):
    feedback = Feedback(tmp_path)
    events = journal(PROMPT, user("my secret"), said(0, "3"))
    for session in ("mine", "other"):
        feedback.record(session, events, 0, "down", "2")
    assert len(feedback.rows()) == 2
    feedback.record("mine", events, 0, "down", None)
    assert [row["session"] for row in feedback.rows()] == ["other"]
    feedback.record("mine", events, 0, "down", "2")
    feedback.delete("mine")
    feedback.delete("mine")
    assert [row["session"] for row in feedback.rows()] == ["other"]
    feedback.record("other", events, 0, None, None)
    left = [p for p in (tmp_path / "feedback").rglob("*") if p.is_file() and p.stat().st_size]
    assert left == []


@pytest.mark.parametrize("turn", [-1, 1, 7])
def test_a_turn_that_is_not_there_is_refused(tmp_path, turn):
    with pytest.raises(ApiError, match="has not had this turn") as refused:
        Feedback(tmp_path).record("s", journal(PROMPT, user("1+1"), said(0, "3")), turn, "up", None)
    assert refused.value.status == 400


def _rate(folder: Path, events: list[dict[str, Any]], turn: int) -> None:
    Feedback(folder).record("s", events, turn, "up", None)


def test_processes_that_rate_one_session_do_not_lose_each_others_ratings(tmp_path):
    events = journal(PROMPT, *(e for k in range(8) for e in (user(f"{k}?"), said(k, str(k)))))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rate, args=(tmp_path, events, k)) for k in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = pq.read_table(tmp_path / "feedback" / "ratings" / "s.parquet").to_pylist()
    assert sorted(row["turn"] for row in rows) == list(range(8))
