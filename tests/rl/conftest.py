"""What the tests of rl/ share: one small tokenizer, the calculator's world, and trajectories made by hand."""

import copy

import numpy as np
import pytest
import torch

from rl.chat import ChatCodec
from rl.config_env import CalculatorConfig
from rl.env import World
from rl.pretrained import _train_tokenizer
from rl.trajectory import Trajectory


@pytest.fixture(scope="session")
def world():
    return World(CalculatorConfig(name="calculator"), seed=0)


@pytest.fixture(scope="session")
def tokenizer(world):
    """The tokenizer of a scratch model, without the model."""
    return _train_tokenizer(400, world, seed=0)


@pytest.fixture(scope="session")
def codec(tokenizer):
    return ChatCodec(tokenizer)


@pytest.fixture
def tiny_lm():
    """A random Llama of 50 tokens: float32, on CPU, the same weights in every test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def plain_lm(tiny_lm):
    """The same weights under transformers' own attention: an independent forward pass."""
    return copy.deepcopy(tiny_lm)


@pytest.fixture
def make_trajectory():
    """A random trajectory of a length: trained on `mask` (default: all but the first third), junk off the mask."""

    def make(length: int, seed: int = 0, mask=None, junk: float = 0.0) -> Trajectory:
        rng = np.random.default_rng([seed, length])
        loss_mask = np.arange(length) >= max(1, length // 3) if mask is None else np.asarray(mask, bool)
        logprobs = np.where(loss_mask, rng.normal(-3.5, 0.7, length), junk).astype(np.float32)
        tokens = rng.integers(0, 50, length).astype(np.int32)
        turn = np.where(loss_mask, 0, -1).astype(np.int16)
        return Trajectory(tokens, loss_mask, turn, logprobs, np.where(loss_mask, 1, -1).astype(np.int32))

    return make
