"""An episode as a Parquet row, and back."""

import json

import numpy as np
import pyarrow as pa
import pytest

from rl.envs.calculator import Calculator, Expression
from rl.episode import Identity, Limits, run_episode
from rl.policy import Completion, Sampling
from rl.reward import Score
from rl.task import Task
from rl.trajectory import SCHEMA, Trajectory, read_parquet, summarise, to_row, to_trajectory, write_parquet

TASK = Task("calc:3+9", {"expression": Expression((3, 9), ("+",))}, "12")


class Sampled:
    """Three turns: a call cut short, a call, and the answer, with log-probs that float32 cannot hold in full."""

    def __init__(self, codec):
        call = '<tool_call>{"name": "calculator", "arguments": {"a": 3, "op": "+", "b": 9}}</tool_call>'
        turns = [codec.reply({"content": c}) for c in (call, call, "12 ünd")]
        self._turns = iter([(turns[0][:4], "length"), (turns[1], "stop"), (turns[2], "stop")])

    async def act(self, token_ids, sampling, session):
        ids, reason = next(self._turns)
        return Completion(ids, [-1 / (k + 3) for k in range(len(ids))], [7] * len(ids), reason)


@pytest.fixture
async def episode(codec, world):
    return await run_episode(
        Calculator(world.settings),
        TASK,
        Sampled(codec),
        codec,
        sampling=Sampling(),
        limits=Limits(8, 500),
        identity=Identity(1, 2, TASK.id, 3, 4),
    )


def test_parquet_round_trip_is_exact(episode, tmp_path):
    trajectory = to_trajectory(episode)
    score = Score(0.625, {"outcome": 0.5, "format": 0.125}, True)
    path = tmp_path / "trajectories" / "step=000002.parquet"
    write_parquet(path, [to_row(episode, trajectory, score, -1.375)] * 2)
    first, second = read_parquet(path)
    assert first == second
    assert list(first) == SCHEMA.names
    for name in ("tokens", "loss_mask", "turn", "logprobs", "versions"):
        array = getattr(trajectory, name)
        assert np.array_equal(np.asarray(first[name], array.dtype), array), name
    assert [first[k] for k in ("stage", "step", "task", "sample", "attempt")] == [1, 2, TASK.id, 3, 4]
    assert (first["reward"], first["advantage"], first["success"]) == (0.625, -1.375, True)
    assert dict(first["reward_parts"]) == score.parts
    assert first["turn_flags"] == [["truncated", "tool_error"], [], []]
    assert first["turn_seeds"] == [t.seed for t in episode.turns]
    assert (first["answer"], first["stop_reason"]) == ("12", "done")


@pytest.mark.parametrize("success", [True, False])
def test_a_row_says_what_the_score_calls_a_success(episode, success):
    assert to_row(episode, to_trajectory(episode), Score(1.0, {}, success), 0.0)["success"] is success


def test_a_summary_counts_sampled_tokens_turn_by_turn(episode):
    """The first turn was cut after 4 tokens: the end that was supplied to it is not one of them."""
    assert episode.turns[0].supplied_end
    episode.turns[1].token_ids = episode.turns[1].logprobs = episode.turns[1].versions = []
    for turn, reward in zip(episode.turns, (0.5, -1.0, 0.25), strict=True):
        turn.reward = reward
    trajectory = to_trajectory(episode)
    summary = summarise(episode, trajectory)
    last = len(episode.turns[2].token_ids)
    assert summary.turn_tokens == (4, 0, last)
    assert (summary.turns, summary.sampled_tokens) == (3, 4 + last)
    assert summary.sampled_tokens == trajectory.loss_mask.sum() < summary.tokens == len(trajectory)
    assert summary.turn_rewards == (0.5, -1.0, 0.25)
    between = ~trajectory.loss_mask & (trajectory.turn >= 0)
    assert summary.observation_tokens == between.sum() > 0


def test_messages_are_the_readable_conversation(episode):
    row = to_row(episode, to_trajectory(episode), Score(1.0, {}, True), 0.0)
    messages = json.loads(row["messages"])
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert messages[0]["content"] == "3+9"
    assert messages[4]["content"] == "12"
    assert messages[5]["content"] == "12 ünd"


def test_a_file_is_written_whole_or_not_at_all(episode, tmp_path):
    path = tmp_path / "a.parquet"
    row = to_row(episode, to_trajectory(episode), Score(1.0, {}, True), 0.0)
    write_parquet(path, [row])
    with pytest.raises(pa.ArrowInvalid):
        write_parquet(path, [{**row, "tokens": "no tokens"}])
    assert len(read_parquet(path)) == 1


def test_the_oldest_version_counts_sampled_tokens_only():
    def with_versions(versions, mask):
        n = len(versions)
        zeros = np.zeros(n, np.float32)
        arrays = np.zeros(n, np.int32), np.asarray(mask, bool), np.zeros(n, np.int16), zeros
        return Trajectory(*arrays, np.asarray(versions, np.int32))

    assert with_versions([-1, 4, 3, -1, 5], [0, 1, 1, 0, 1]).oldest_version == 3
    assert with_versions([-1, -1], [0, 0]).oldest_version == -1
