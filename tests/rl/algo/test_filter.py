"""Filters on groups made by hand: what leaves the loss, what leaves the statistics, and what each filter took."""

import math

import pytest

from rl.algo.filter import judge
from rl.config_algo import FilterConfig

FLAGS = {"void_turn": "void", "truncated": "truncated", "tool_error": "tool_error"}
ALL, NONE = (True,) * 4, (False,) * 4


def verdict(filters, rewards, *, successes=None, flags=None):
    """Filters are names or settings; a reward of 1 or more is a success unless told."""
    return judge(
        [FilterConfig.model_validate({"name": f} if isinstance(f, str) else f) for f in filters],
        rewards=rewards,
        successes=[r >= 1 for r in rewards] if successes is None else successes,
        flags=[()] * len(rewards) if flags is None else flags,
    )


def test_no_filter_takes_nothing():
    got = verdict([], [1, 1, 1, 1], flags=[["void"], ["truncated"], ["tool_error"], []])
    assert (got.trained, got.counted, got.taken, got.empty) == (ALL, ALL, {}, False)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("removes", "in_loss", "in_statistics"),
    [("loss", False, True), ("statistics", True, False), ("both", False, False)],
)
def test_an_episode_filter_takes_the_episodes_with_its_flag(name, removes, in_loss, in_statistics):
    others = [flag for flag in FLAGS.values() if flag != FLAGS[name]]
    flags = [[], [*others, FLAGS[name]], others, [FLAGS[name], FLAGS[name]]]
    got = verdict([{"name": name, "removes": removes}], [1, 0, 0, 1], flags=flags)
    assert got.trained == (True, in_loss, True, in_loss)
    assert got.counted == (True, in_statistics, True, in_statistics)
    assert got.taken == {name: 2}
    assert not got.empty


def test_episode_filters_add_up_and_each_tells_what_it_took():
    filters = [{"name": "void_turn", "removes": "loss"}, {"name": "truncated", "removes": "statistics"}, "tool_error"]
    flags = [["void"], ["truncated"], ["void", "truncated"], ["void", "tool_error"], []]
    got = verdict(filters, [1, 0, 0, 1, 1], flags=flags)
    assert got.trained == (False, True, False, False, True)
    assert got.counted == (True, False, False, False, True)
    assert got.taken == {"void_turn": 3, "truncated": 2, "tool_error": 1}


@pytest.mark.parametrize(
    ("rewards", "gone"),
    [
        ([0, 0, 0, 0], True),
        ([1, 1, 1, 1], True),
        ([0.1, 0.1, 0.1, 0.1], True),
        ([0, 0, 0, 1], False),
        ([0.3, 0.3, 0.3, math.nextafter(0.3, 1)], False),  # no tolerance
    ],
)
def test_zero_variance_takes_groups_of_one_reward(rewards, gone):
    got = verdict(["zero_variance"], rewards)
    assert (got.trained, got.counted) == ((NONE, NONE) if gone else (ALL, ALL))
    assert (got.empty, got.taken) == (gone, {"zero_variance": 4 if gone else 0})


@pytest.mark.parametrize(("removes", "gone"), [("both", True), ("statistics", True), ("loss", False)])
def test_zero_variance_looks_at_what_still_counts(removes, gone):
    """The void episode is the only one with another reward: out of the statistics, it leaves no variance behind."""
    filters = [{"name": "void_turn", "removes": removes}, "zero_variance"]
    for in_either_order in (filters, filters[::-1]):
        got = verdict(in_either_order, [1, 1, 0, 1], flags=[[], [], ["void"], []])
        assert got.empty == gone
        assert got.taken == {"void_turn": 1, "zero_variance": 4 if gone else 0}


@pytest.mark.parametrize("void", [3, 4])
def test_zero_variance_takes_groups_in_which_fewer_than_two_count(void):
    got = verdict(
        [{"name": "void_turn", "removes": "statistics"}, "zero_variance"],
        [1, 0, 0.5, 0.25],
        flags=[["void"]] * void + [[]] * (4 - void),
    )
    assert (got.trained, got.counted) == (NONE, NONE)


@pytest.mark.parametrize(
    ("right", "size", "gone"),
    [(0, 8, True), (1, 8, False), (7, 8, False), (8, 8, True), (1, 10, False), (9, 10, False), (1, 11, True)],
)
def test_accuracy_band_keeps_its_bounds(right, size, gone):
    """SimpleTIR's band, 0.1 to 0.9: 1 of 10 and 9 of 10 lie on it, 1 of 11 is 0.0909."""
    got = verdict(
        [{"name": "accuracy_band", "low": 0.1, "high": 0.9}],
        [0.5] * size,  # successes alone decide
        successes=[True] * right + [False] * (size - right),
    )
    assert (got.empty, any(got.counted)) == (gone, not gone)
    assert got.taken == {"accuracy_band": size if gone else 0}


@pytest.mark.parametrize(("removes", "gone"), [("both", True), ("statistics", True), ("loss", False)])
def test_accuracy_band_looks_at_what_still_counts(removes, gone):
    """3 of 4 succeed, and 3 of the 3 that were not cut short."""
    filters = [{"name": "accuracy_band", "high": 0.9}, {"name": "truncated", "removes": removes}]
    for in_either_order in (filters, filters[::-1]):
        got = verdict(in_either_order, [1, 1, 0, 1], flags=[[], [], ["truncated"], []])
        assert got.empty == gone


def test_accuracy_band_takes_a_group_in_which_nobody_counts():
    filters = [{"name": "void_turn", "removes": "statistics"}, "accuracy_band"]
    assert verdict(filters, [1, 0], flags=[["void"], ["void"]]).empty


@pytest.mark.parametrize("filters", [["zero_variance", "accuracy_band"], ["accuracy_band", "zero_variance"]])
def test_a_group_is_gone_when_one_filter_takes_it(filters):
    """Two rewards, and nobody succeeds: only the band takes it. One reward, and it lies in the band: the other does."""
    settings = [{"name": f, **({"low": 0.1} if f == "accuracy_band" else {})} for f in filters]
    failed = verdict(settings, [0.5, 0], successes=[False, False])
    equal = verdict(settings, [1, 1])
    assert failed.empty and equal.empty
    assert failed.taken == {"accuracy_band": 2, "zero_variance": 0}
    assert equal.taken == {"accuracy_band": 0, "zero_variance": 2}


def test_the_recipe_of_simpletir():
    """Void episodes stay in the statistics, those cut short do not; what counts has two rewards, and is in the band."""
    filters = [
        {"name": "void_turn", "removes": "loss"},
        {"name": "truncated", "removes": "both"},
        "zero_variance",
        {"name": "accuracy_band", "low": 0.1, "high": 0.9},
    ]
    got = verdict(filters, [1, 0, 1, 1], flags=[[], ["void"], ["truncated"], []])
    assert got.trained == (True, False, False, True)
    assert got.counted == (True, True, False, True)
    assert got.taken == {"void_turn": 1, "truncated": 1, "zero_variance": 0, "accuracy_band": 0}


def test_a_group_of_void_episodes_alone_trains_nothing():
    got = verdict([{"name": "void_turn", "removes": "loss"}], [0, 1], flags=[["void"], ["void"]])
    assert got.empty
    assert got.counted == (True, True)
