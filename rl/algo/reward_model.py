"""Losses of a reward model: a value at every token, of which the last one is the trajectory's score."""

import torch
import torch.nn.functional as F
from torch import Tensor


def last_token_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected) of each pair of scores, unreduced, [P].

    Bradley-Terry, as in InstructGPT (https://arxiv.org/abs/2203.02155, equation 1).
    """
    return -F.logsigmoid(chosen_P - rejected_P)


def from_divergence_loss(chosen_T: Tensor, rejected_T: Tensor, first: int) -> Tensor:
    """Loss of one pair from the values at its tokens, [T] of each one's own length; scalar.

    Zhongjing (https://arxiv.org/abs/2308.03549, as its code has it): the mean over t = first..end - 1 of
    -log sigmoid(chosen[t] - rejected[t]), where `first` is the first token that differs and `end` the longer length.
    Past its end the shorter one's last value, which is its score, holds: a padded batch reads the values at padding.
    """
    end = max(len(chosen_T), len(rejected_T))
    margins = _held(chosen_T, end)[first:] - _held(rejected_T, end)[first:]
    return -F.logsigmoid(margins).mean()


def _held(values_T: Tensor, length: int) -> Tensor:
    return torch.cat([values_T, values_T[-1:].expand(length - len(values_T))])
