"""The reward model's losses: by hand, and against the padded formula written out again."""

import math

import pytest
import torch

from rl.algo.reward_model import from_divergence_loss, last_token_loss


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    """-log sigmoid(-x)"""
    return math.log(1 + math.exp(x))


def test_last_token_by_hand():
    """Margins 0, 1, -1.5: log 2, log(1 + e^-1), log(1 + e^1.5)."""
    found = last_token_loss(double(0.3, 2.0, -1.0), double(0.3, 1.0, 0.5))
    assert found.tolist() == pytest.approx([0.693147, 0.313262, 1.701413], abs=1e-6)


def test_last_token_far_apart_stays_finite():
    assert last_token_loss(torch.tensor([-300.0]), torch.tensor([300.0])).item() == 600.0


def test_equal_lengths_by_hand():
    """Tokens differ from 2 on: margins 1 and -2, while the 9 before the divergence is none of the pair's."""
    loss = from_divergence_loss(double(0, 9, 2, 1), double(0, 0, 1, 3), first=2)
    assert loss.item() == pytest.approx((softplus(-1) + softplus(2)) / 2)


def test_the_shorter_ones_last_value_holds_to_the_end():
    """Chosen 0, 3 against rejected 0, 1, 2, 4 from 1 on: margins 3 - 1, 3 - 2, 3 - 4; and with the roles exchanged."""
    short, long = double(0, 3), double(0, 1, 2, 4)
    loss = from_divergence_loss(short, long, first=1).item()
    assert loss == pytest.approx((softplus(-2) + softplus(-1) + softplus(1)) / 3)
    loss = from_divergence_loss(long, short, first=1).item()
    assert loss == pytest.approx((softplus(2) + softplus(1) + softplus(-1)) / 3)


def test_the_beginning_of_the_other():
    """The first difference is then where the shorter one has ended: its score against what the longer one added."""
    loss = from_divergence_loss(double(5, 1), double(5, 1, 2, 0), first=2).item()
    assert loss == pytest.approx((softplus(1) + softplus(-1)) / 2)


def test_the_gradient_reaches_the_differing_tokens_only():
    """Margins 0: each of the 3 terms has slope -1/2; the shorter one's last value stands in two of them."""
    chosen, rejected = double(7, 0, 0).requires_grad_(), double(-7, 0, 0, 0).requires_grad_()
    from_divergence_loss(chosen, rejected, first=1).backward()
    assert chosen.grad.tolist() == pytest.approx([0, -1 / 6, -2 / 6])
    assert rejected.grad.tolist() == pytest.approx([0, 1 / 6, 1 / 6, 1 / 6])


def test_agrees_with_the_padded_batch_formula():
    """Rows padded with the value at the last token, the mean of -log sigmoid from the first differing id to the end."""
    generator = torch.Generator().manual_seed(0)
    chosen_ids, rejected_ids = torch.tensor([5, 6, 7, 8, 2]), torch.tensor([5, 6, 9, 2])
    chosen, rejected = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (5, 4))
    padded = torch.nn.utils.rnn.pad_sequence([chosen_ids, rejected_ids], batch_first=True, padding_value=-1)
    first = int((padded[0] != padded[1]).nonzero()[0])
    rows = torch.stack([chosen, torch.tensor([*rejected, rejected[-1]], dtype=torch.float64)])
    theirs = -torch.log(torch.sigmoid(rows[0, first:5] - rows[1, first:5])).mean()
    assert first == 2
    assert from_divergence_loss(chosen, rejected, first).item() == pytest.approx(theirs.item())
