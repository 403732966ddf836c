"""Scores of finished episodes."""

import math_verify
import numpy as np
import pytest
from math_verify.errors import TimeoutException

from rl.env import InfraError
from rl.episode import Episode, Identity, StopReason, Turn
from rl.reward import Score, Undecided, final_answer, math_answer, same_answer
from rl.task import Task


def episode(text="12", answer="12", stop=StopReason.DONE, rewards=(0.0,)) -> Episode:
    turns = [Turn([1], [0.0], [0], False, text, reward=r) for r in rewards]
    return Episode(Identity(0, 0, "t"), Task("t", {}, answer), [], [], 2, turns=turns, stop_reason=stop)


def test_a_number_is_the_outcome():
    assert Score.of(lambda task, e: 0.5, episode()) == Score(0.5, {"outcome": 0.5}, success=False)
    assert Score.of(lambda task, e: True, episode()) == Score(1.0, {"outcome": 1.0}, success=True)


def test_parts_add_up_with_what_the_environment_gave():
    found = Score.of(lambda task, e: {"right": 1, "style": -0.25}, episode(rewards=(0.5, 0.125)))
    assert found == Score(1.375, {"right": 1.0, "style": -0.25}, success=True)
    assert found.outcome == 0.75  # what the rule gave, without the environment's 0.625


@pytest.mark.parametrize(("success_at", "success"), [(1.24, True), (1.25, True), (1.26, False)])
def test_success_is_a_total_that_reaches_the_bar(success_at, success):
    """The total, with what the environment gave: the rule's 0.75 alone would reach none of these."""
    assert Score.of(lambda task, e: 0.75, episode(rewards=(0.5,)), success_at).success == success


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(1)], ids=lambda n: type(n).__name__)
def test_numpys_numbers_are_numbers(number):
    assert Score.of(lambda task, e: number, episode()).total == float(number)


@pytest.mark.parametrize(
    "result", [float("nan"), float("inf"), None, "1", {"a": 1.0, "b": float("nan")}, {"a": None}, [1.0]], ids=str
)
def test_what_is_not_a_finite_number_is_refused_by_the_rules_name(result):
    """It must not turn into a reward: a NaN would spread over the whole group."""

    def my_rule(task, e):
        return result

    with pytest.raises(ValueError, match="my_rule"):
        Score.of(my_rule, episode())


def test_an_error_of_the_rule_is_not_a_reward():
    with pytest.raises(ZeroDivisionError):
        Score.of(lambda task, e: 1 / 0, episode())


@pytest.mark.parametrize(
    ("text", "answer", "stop", "expected"),
    [
        ("12", "12", StopReason.DONE, 1.0),
        ("the answer is 12", "12", StopReason.DONE, 1.0),
        ("first 7, then 12", "12", StopReason.DONE, 1.0),
        ("first 12, then 7", "12", StopReason.DONE, 0.0),
        (r"so \boxed{\frac{1}{2}}", "0.5", StopReason.DONE, 1.0),
        ("$x = 3$", "3", StopReason.DONE, 1.0),
        ("13", "12", StopReason.DONE, 0.0),
        ("", "12", StopReason.DONE, 0.0),
        ("I do not know", "12", StopReason.DONE, 0.0),
        ("12", "12", StopReason.MAX_TURNS, 0.0),
    ],
)
def test_math_answer(text, answer, stop, expected):
    e = episode(text, answer, stop)
    assert math_answer(e.task, e) == expected


@pytest.mark.parametrize("stop", [StopReason.MAX_TURNS, StopReason.MAX_TOKENS])
def test_final_answer_wants_a_finished_episode(stop):
    assert final_answer(episode().task, episode()) == 1.0
    assert final_answer(episode().task, episode(stop=stop)) == 0.0
    assert final_answer(episode().task, episode(rewards=())) == 0.0


def test_a_plain_text_answer_is_right_to_the_letter():
    e = episode("Paris ", "Paris")
    assert math_answer(e.task, e) == 1.0


def test_math_verify_s_own_timeout_is_no_wrong_answer():
    """And no TimeoutError, which is a failure of the machinery: its call would be made again until the run gives up."""
    with pytest.raises(Undecided, match="Timeout during comparison") as raised:
        same_answer("5", "$5!!!!!!$")
    assert not isinstance(raised.value, TimeoutError | ConnectionError | InfraError)


@pytest.mark.parametrize("place", ["parse", "verify"])
def test_what_cannot_be_read_is_wrong_and_what_takes_too_long_is_not(place, monkeypatch):
    def fails_with(error):
        def call(*values, raise_on_error=False):
            assert raise_on_error
            raise error

        monkeypatch.setattr(math_verify, place, call)

    fails_with(TypeError("no such operand"))
    assert same_answer("5", "6") == 0
    fails_with(TimeoutException("Timeout during it"))
    with pytest.raises(Undecided, match="Timeout during it"):
        same_answer("5", "6")
    fails_with(MemoryError())
    with pytest.raises(MemoryError):
        same_answer("5", "6")


def test_a_pair_that_is_equal_counts_though_another_took_too_long(monkeypatch):
    def compare(known, given, raise_on_error):
        if given == ["late"]:
            raise TimeoutException("Timeout")
        return given == ["equal"]

    monkeypatch.setattr(math_verify, "parse", lambda text, raise_on_error: text.split())
    monkeypatch.setattr(math_verify, "verify", compare)
    assert same_answer("5", "late equal") == 1
    assert same_answer("5", "different") == 0
