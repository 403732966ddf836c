"""Sums and means by owner: interleaved tokens, an owner without any, gradients."""

import pytest
import torch

from rl.algo.sequence import means_by, sums_by

OWNER = torch.tensor([0, 3, 0, 1, 3, 3])  # owner 2 has no token
VALUES = [1.0, 10.0, 3.0, -5.0, 20.0, 60.0]


def test_sums_by_hand():
    assert sums_by(torch.tensor(VALUES), OWNER, 4).tolist() == [4.0, -5.0, 0.0, 90.0]


def test_means_by_hand_and_an_owner_without_tokens_has_zero():
    assert means_by(torch.tensor(VALUES), OWNER, 4).tolist() == [2.0, -5.0, 0.0, 30.0]


@pytest.mark.parametrize("gather", [sums_by, means_by])
def test_no_tokens_at_all(gather):
    assert gather(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("gather", "expected"),
    [
        # Owner 0's quantity has factor 1, owner 1's 2, owner 2's 4, owner 3's 8; a mean passes on a share of it.
        (sums_by, [1, 8, 1, 2, 8, 8]),
        (means_by, [1 / 2, 8 / 3, 1 / 2, 2, 8 / 3, 8 / 3]),
    ],
)
def test_gradients_by_hand(gather, expected):
    values = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([1, 2, 4, 8], dtype=torch.float64)
    (gather(values, OWNER, 4) * factors).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("gather", [sums_by, means_by])
def test_nan_of_one_owner_stays_with_it(gather):
    spoilt = torch.tensor([1.0, float("nan"), 3.0, -5.0, 20.0, 60.0])
    found, whole = gather(spoilt, OWNER, 4), gather(torch.tensor(VALUES), OWNER, 4)
    assert torch.equal(found[:3], whole[:3])
    assert found[3].isnan()
