"""The learning rate's curve."""

import math

import pytest

from rl.algo.schedule import learning_rate

COSINE = {"base": 1.0, "total": 14, "warmup": 4, "schedule": "cosine"}


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


def test_no_warm_up_starts_at_the_base():
    assert learning_rate(0, base=3e-4, total=5, warmup=0, schedule="cosine") == pytest.approx(3e-4)


@pytest.mark.parametrize("warmup", [4, 5, 9])
def test_warm_up_as_long_as_the_stage_or_longer(warmup):
    """A short smoke run with a long warm-up still has a rate at every step."""
    rates = [learning_rate(s, base=1.0, total=4, warmup=warmup, schedule="cosine") for s in range(4)]
    assert rates == pytest.approx([(s + 1) / warmup for s in range(4)])
