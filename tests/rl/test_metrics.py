"""A step's numbers by hand, and the files they are written to."""

import json
import math

import pytest

from rl.config import Config
from rl.episode import Identity
from rl.metrics import Sinks, forget_after, read_lines, rollout_metrics
from rl.reward import Score
from rl.trajectory import Summary

CONFIG = Config.model_validate({"model": {"path": "m"}, "env": {"name": "calculator"}, "stages": [{"kind": "eval"}]})


def summary(tokens, turn_tokens, stop, *flags):
    return Summary(Identity(0, 0, "t"), tokens, turn_tokens, (0.0,) * len(turn_tokens), stop, flags, 0, 0.1, 3)


GROUPS = [
    (
        [
            summary(10, (4,), "done"),
            summary(20, (5, 0, 3), "max_turns", "truncated", "tool_error", "void", "tool_error"),
        ],
        [Score(1.0, {"outcome": 1.0}, True), Score(0.0, {"outcome": 0.0}, False)],
    ),
    (
        [summary(30, (4, 8), "done", "tool_error"), summary(40, (15, 1), "max_tokens")],
        [Score(0.5, {"outcome": 0.25, "style": 0.25}, True), Score(0.5, {"outcome": 0.5}, True)],
    ),
]


def test_rollout_metrics_by_hand():
    found = rollout_metrics(GROUPS)
    assert found == pytest.approx(
        {
            "reward/mean": 0.5,  # 1, 0, 0.5, 0.5
            "reward/std": math.sqrt(0.125),  # (0.25 + 0.25 + 0 + 0) / 4
            "reward/success": 0.75,  # as the scores say
            "reward/outcome": 0.4375,  # 1.75 / 4
            "reward/style": 0.0625,  # an episode without the part counts as 0
            "reward/zero_variance_groups": 0.5,  # the second group's rewards are all alike: it teaches nothing
            "response_length/mean": 10.0,
            "observation_length/mean": 12.0,  # 3, 9, 15 and 21: all but the prompt's 3 and the sampled
            "episode_length/mean": 25.0,
            "num_turns/mean": 2.0,
            "flags/truncated": 0.25,
            "flags/tool_error": 0.5,  # episodes, not turns
            "flags/void": 0.25,
            "stop/done": 0.5,
        }
    )


def test_a_step_without_episodes_has_finite_numbers():
    assert all(math.isfinite(v) for v in rollout_metrics([]).values())


def test_a_part_cannot_take_the_name_of_a_metric():
    """A rule that names its parts `mean` or `success` must not change what those charts mean."""
    groups = [([summary(10, (4,), "done")], [Score(0.0, {"success": 7.0, "mean": -7.0}, False)])]
    found = rollout_metrics(groups)
    assert (found["reward/mean"], found["reward/success"]) == (0.0, 0.0)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """json.dumps would write NaN, which is not JSON and stops every strict reader."""
    sinks = Sinks(tmp_path, CONFIG)
    sinks.metrics({"step": 1, "a": float("nan"), "b": float("inf"), "c": 0.5})
    sinks.metrics({"step": 2, "a": -float("inf"), "text": "NaN"})
    sinks.close()

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(x, parse_constant=refuse) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "a": None, "b": None, "c": 0.5}, {"step": 2, "a": None, "text": "NaN"}]


def test_evaluations_have_their_own_file(tmp_path):
    sinks = Sinks(tmp_path, CONFIG)
    sinks.evaluation({"step": 3, "success": 0.5, "success_by_turn_budget": {1: 0.25}})
    assert read_lines(tmp_path / "eval.jsonl") == [{"step": 3, "success": 0.5, "success_by_turn_budget": {"1": 0.25}}]
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_forget_after_drops_what_a_resumed_run_does_again(tmp_path):
    sinks = Sinks(tmp_path, CONFIG)
    for step in (1, 2, 3, 4):
        sinks.metrics({"step": step, "stage_index": 1, "x": None if step == 2 else step / 3})
        sinks.consumed({"step": step, "stage_index": 1, "groups": []})
    for stage, step in ((0, 0), (2, 2), (2, 4)):  # the second stands after the stage that goes on from step 2
        sinks.evaluation({"step": step, "stage_index": stage})
    forget_after(tmp_path, 2, 1)
    assert [(line["step"], line["x"]) for line in read_lines(tmp_path / "metrics.jsonl")] == [(1, 1 / 3), (2, None)]
    assert read_lines(tmp_path / "eval.jsonl") == [{"step": 0, "stage_index": 0}]
    assert [line["step"] for line in read_lines(tmp_path / "consumed.jsonl")] == [1, 2], "or they were consumed twice"
    sinks.metrics({"step": 3})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_line_that_a_killed_process_left_half_written_does_not_stop_the_resume(tmp_path):
    whole = '{"step": 1, "stage_index": 0}\n{"step": 2, "stage_index": 0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "rew')
    forget_after(tmp_path, 2, 0)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
