"""Peak memory of the log-probs and entropies of 4,096 tokens over SmolLM2's vocabulary and width, float32.

    python head_memory.py chunked|naive

Forward and backward. chunked: rl/'s learner. naive: the whole [T, V] of logits, as one writes it. The body is one
small layer, the same for both. Bytes are the process's peak less what it held before, after a step on a few tokens
that loads what is loaded once; the weights' gradient is in both.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from packed import GradientOnly, one_turn, packed_step
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS, VOCABULARY, HIDDEN = 4096, 49152, 576


def memory(what: str) -> int:
    """VmRSS, now, or VmHWM, the peak, of this process alone: getrusage's maximum may be of the one that started it."""
    kib = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert kib is not None
    return int(kib[1]) * 1024


def naive_step(lm: Any, ids: list[int]) -> torch.Tensor:
    """The entropies."""
    tokens = torch.tensor([ids])
    logits = lm(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    log_softmax = torch.log_softmax(logits, -1)
    logprobs = log_softmax.gather(-1, tokens[0, 1:, None])[:, 0]
    with torch.no_grad():
        entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    (-logprobs.mean()).backward()
    lm.zero_grad()
    return entropies


def main() -> None:
    torch.manual_seed(0)
    lm: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=TOKENS + 1,
        )
    )  # fmt: skip
    trainer = GradientOnly(lm) if sys.argv[1] == "chunked" else None
    for tokens in (16, TOKENS):
        before = memory("VmRSS")
        ids = torch.randint(VOCABULARY, (tokens + 1,)).tolist()
        if trainer:
            packed_step(trainer, [one_turn(ids[:1], ids[1:])], budget=len(ids))
        else:
            naive_step(lm, ids)
    print(json.dumps({"bytes": memory("VmHWM") - before}))


main()
