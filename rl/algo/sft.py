"""Supervised fine-tuning."""

from torch import Tensor


def negative_log_likelihood(logprobs_N: Tensor) -> Tensor:
    """Per-token loss at the assistant's tokens, unreduced, [N]."""
    return -logprobs_N
