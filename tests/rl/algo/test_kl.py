"""KL estimators: hand numbers, exact expectations over a small distribution, gradients."""

import math

import pytest
import torch

from rl.algo.kl import kl_estimate

# A policy and a reference over three tokens. KL = 0.5 ln(0.5/0.25) + 0.3 ln(0.3/0.25) + 0.2 ln(0.2/0.5)
#    = 0.346574 + 0.054696 - 0.183258 = 0.218012
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
KL = 0.218012


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # log r = log(ref / pi) of the three tokens: ln 0.5 = -0.693147, ln 0.833333 = -0.182322, ln 2.5 = 0.916291
        ("k1", [0.693147, 0.182322, -0.916291]),
        ("k2", [0.240227, 0.016621, 0.419795]),  # (log r)^2 / 2
        ("k3", [0.193147, 0.015655, 0.583709]),  # r - 1 - log r: 0.5 - 1 + 0.693147, ..., 2.5 - 1 - 0.916291
    ],
)
def test_by_hand(estimator, expected):
    found = kl_estimate(POLICY.log(), REFERENCE.log(), estimator)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_by_enumeration(estimator):
    """The expectation under the policy, taken over every token, is the KL itself."""
    expectation = (POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), estimator)).sum()
    assert expectation.item() == pytest.approx(KL, abs=1e-6)


def test_the_gradient_of_k2_is_unbiased_by_enumeration():
    """E[grad k2] under a softmax policy is the gradient of KL with respect to its logits."""
    logits = POLICY.log().requires_grad_()
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - REFERENCE.log())).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    estimate = (POLICY * kl_estimate(logits.log_softmax(-1), REFERENCE.log(), "k2")).sum()
    (found,) = torch.autograd.grad(estimate, logits)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 3.0, 100.0])
def test_k3_is_never_negative_and_finite(scale):
    """expm1 keeps it so near 0 in float32, where exp(x) - 1 - x would round below."""
    torch.manual_seed(0)
    logprobs, reference = -torch.rand(2000) * scale, -torch.rand(2000) * scale
    k3 = kl_estimate(logprobs, reference, "k3")
    assert (k3 >= 0).all()
    assert torch.isfinite(k3).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_zero_where_policy_and_reference_agree(estimator):
    logprobs = torch.tensor([-0.1, -5.0, -40.0])
    assert kl_estimate(logprobs, logprobs.clone(), estimator).abs().max() == 0


def test_k3_gradient_by_hand():
    """d k3 / d log pi = 1 - r: at r = 2.5 it is -1.5, towards the reference."""
    logprob = torch.tensor([math.log(0.2)], dtype=torch.float64, requires_grad=True)
    kl_estimate(logprob, torch.tensor([math.log(0.5)], dtype=torch.float64), "k3").sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(-1.5)
