"""The curves by hand, transformers' own where it has one, and what a resumed run must find again."""

import math
from collections import Counter

import pytest

from rl.algo.schedule import coefficient, curriculum_order, draw, horizon, learning_rate, open_tasks, potential

COSINE = {"base": 1.0, "total": 14, "warmup": 4, "schedule": "cosine"}
WEBARENA = {"every": 80, "turns": (8, 12, 15)}  # AgentGym-RL's values


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # (0 + 1) / 4
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),  # 0.1 + 0.45 (1 + cos 0)
        (9, 0.55),  # half way: cos(pi / 2) = 0
        (13, 0.1 + 0.45 * (1 + math.cos(0.9 * math.pi))),  # 0.122025, one step before a tenth
        (14, 0.1),
    ],
)
def test_cosine_by_hand(step, expected):
    assert learning_rate(step, **COSINE) == pytest.approx(expected)


def test_constant_after_the_warm_up():
    constant = {"base": 2e-4, "total": 10, "warmup": 2, "schedule": "constant"}
    assert [learning_rate(s, **constant) for s in range(4)] == pytest.approx([1e-4, 2e-4, 2e-4, 2e-4])


def test_linear_by_hand():
    rates = [learning_rate(s, base=1.0, total=6, warmup=2, schedule="linear") for s in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_linear_agrees_with_transformers_after_the_warm_up():
    """Its warm-up is one step behind: it begins with a step at rate 0."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=10)
    rates = []
    for _ in range(10):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [learning_rate(s, base=3e-4, total=10, warmup=3, schedule="linear") for s in range(10)]
    assert ours[3:] == pytest.approx(rates[3:])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_no_warm_up_starts_at_the_base(schedule):
    assert learning_rate(0, base=3e-4, total=5, warmup=0, schedule=schedule) == pytest.approx(3e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [4, 5, 9])
def test_warm_up_as_long_as_the_stage_or_longer(warmup, schedule):
    """A short smoke run with a long warm-up still has a rate at every step."""
    rates = [learning_rate(s, base=1.0, total=4, warmup=warmup, schedule=schedule) for s in range(4)]
    assert rates == pytest.approx([(s + 1) / warmup for s in range(4)])


@pytest.mark.parametrize(
    ("start", "final", "expected"),
    [
        (0.1, 0.02, [0.1, 0.08, 0.06, 0.04, 0.02]),
        (0.0, 0.4, [0.0, 0.1, 0.2, 0.3, 0.4]),
        (0.1, 0.0, [0.1, 0.075, 0.05, 0.025, 0.0]),  # a final of 0 is a line, unlike None
        (0.1, None, [0.1] * 5),
    ],
)
def test_coefficient_by_hand(start, final, expected):
    assert [coefficient(s, start=start, final=final, total=5) for s in range(5)] == pytest.approx(expected)


def test_coefficient_of_a_single_step_is_the_first():
    assert coefficient(0, start=0.1, final=0.5, total=1) == 0.1


@pytest.mark.parametrize(
    ("step", "turns"), [(0, 8), (79, 8), (80, 12), (159, 12), (160, 15), (239, 15), (240, 15), (1000, 15)]
)
def test_horizon_by_hand(step, turns):
    assert horizon(step, **WEBARENA) == turns


@pytest.mark.parametrize("resumed_at", [79, 80, 81, 160])
def test_a_resume_at_a_boundary_does_not_advance_the_horizon_twice(resumed_at):
    """The step that was cut off is played again; a counter would be a round ahead from there on."""
    uninterrupted = [horizon(s, **WEBARENA) for s in range(250)]
    before = [horizon(s, **WEBARENA) for s in range(resumed_at + 1)]
    after = [horizon(s, **WEBARENA) for s in range(resumed_at, 250)]
    assert before[:resumed_at] + after == uninterrupted


@pytest.mark.parametrize(("success", "expected"), [(0, 0), (0.25, 0.75), (0.5, 1), (0.75, 0.75), (1, 0)])
def test_potential_by_hand(success, expected):
    assert potential(success) == expected


def test_potential_opens_the_half_solved_first_and_ties_in_their_order():
    # potentials 0, 0.75, 1, 0.75, 0
    assert curriculum_order([1.0, 0.25, 0.5, 0.75, 0.0], order="potential") == [2, 1, 3, 0, 4]


@pytest.mark.parametrize("tie", [0.1, 0.2, 3 / 7])
def test_a_success_and_its_mirror_image_tie(tie):
    """Their potentials differ by a rounding, in one direction or the other."""
    for successes in ([tie, 1 - tie, tie, 1 - tie], [1 - tie, tie, 1 - tie, tie]):
        assert curriculum_order(successes, order="potential") == [0, 1, 2, 3]


def test_easy_to_hard_opens_the_most_solved_first_and_ties_in_their_order():
    assert curriculum_order([0.0, 0.5, 1.0, 0.5, 0.25], order="easy_to_hard") == [2, 1, 3, 4, 0]


@pytest.mark.parametrize(
    ("total", "parts", "count", "expected"),
    [
        (8, 4, 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        (4, 4, 10, [3, 5, 8, 10]),  # 2.5, 5, 7.5, 10, rounded up
        (6, 3, 2, [1, 1, 2, 2, 2, 2]),  # fewer tasks than parts: 2/3, 4/3, 2
        (5, 2, 4, [2, 2, 2, 4, 4]),  # 2.5 steps a part
        (3, 1, 7, [7, 7, 7]),
        (2, 4, 8, [2, 6]),  # fewer steps than parts
    ],
)
def test_open_tasks_by_hand(total, parts, count, expected):
    assert [open_tasks(s, total=total, parts=parts, count=count) for s in range(total)] == expected


def test_tasks_stay_open_past_the_last_step():
    assert open_tasks(9, total=8, parts=4, count=8) == 8


def test_a_step_draws_the_same_tasks_again_after_a_resume():
    steps = [draw(s, tasks=4, open_count=50, seed=1) for s in range(20)]
    assert [draw(s, tasks=4, open_count=50, seed=1) for s in reversed(range(20))] == steps[::-1]
    assert len({tuple(drawn) for drawn in steps}) == 20
    assert draw(0, tasks=4, open_count=50, seed=2) != steps[0]


@pytest.mark.parametrize(("tasks", "open_count"), [(1, 1), (3, 7), (7, 7), (8, 7), (17, 7)])
def test_no_task_comes_again_before_all_open_ones_have(tasks, open_count):
    for step in range(20):
        drawn = draw(step, tasks=tasks, open_count=open_count, seed=0)
        assert len(drawn) == tasks
        for start in range(0, tasks, open_count):
            once = drawn[start : start + open_count]
            assert len(set(once)) == len(once)
            assert set(once) <= set(range(open_count))


def test_draws_are_uniform_over_the_open_tasks():
    """2000 steps of 2 of 5 tasks: 800 times each, with a standard deviation of 22."""
    counts = Counter(task for step in range(2000) for task in draw(step, tasks=2, open_count=5, seed=0))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert all(abs(count - 800) < 110 for count in counts.values())
