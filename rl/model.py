"""A causal LM as the learner and the reference see it: token log-probs and entropy at chosen positions."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(path: str | Path, dtype: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(path), dtype=DTYPES[dtype], attn_implementation="sdpa", trust_remote_code=trust_remote_code
    )


class TokenScorer(nn.Module):
    """A causal LM whose forward pass returns log-probs of tokens instead of logits.

    The output head runs only at the N positions that are asked for, so the [B, T, V] logits are never held.
    """

    def __init__(self, lm: Any):
        super().__init__()
        self.lm = lm
        cap = getattr(lm.config, "final_logit_softcapping", None)
        self._cap = float(cap) if cap else None

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, float32 [N], at the N positions where `mask_BT` is set (row-major).

        The entry of position t is log p(tokens[t] | tokens[<t]) of the distribution softmax(logits / temperature);
        position 0 has no predecessor and must not be set. Rows are padded on the right.
        """
        # No attention mask: rows are padded on the right, and a causal position never looks to its right.
        hidden_BTD = self.lm.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        picked_ND = hidden_BTD[:, :-1][mask_BT[:, 1:]]
        logits_NV = self.lm.get_output_embeddings()(picked_ND).float()
        if self._cap is not None:
            logits_NV = self._cap * torch.tanh(logits_NV / self._cap)
        log_softmax_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
        targets_N = tokens_BT[:, 1:][mask_BT[:, 1:]]
        logprobs_N = log_softmax_NV.gather(-1, targets_N[:, None]).squeeze(-1)
        with torch.no_grad():
            entropy_N = -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
        return logprobs_N, entropy_N


@torch.no_grad()
def sequence_logprobs(scorer: nn.Module, token_ids: list[int], device: str = "cpu") -> Tensor:
    """log p(token t | tokens < t) for t = 1..T-1 of one sequence, float32 [T-1], at temperature 1: the weight probe."""
    tokens_1T = torch.tensor([token_ids], device=device)
    mask_1T = torch.ones_like(tokens_1T, dtype=torch.bool)
    mask_1T[:, 0] = False
    return scorer(tokens_1T, mask_1T, 1.0)[0].cpu()
