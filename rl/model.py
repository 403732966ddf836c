"""A causal LM as the learner and the reference see it: token log-probs and entropy at chosen positions."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl.batch import Packed, Sample, collate, pack, plan, trained_positions
from rl.trajectory import Trajectory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = "repertory_packed"


def load_causal_lm(path: str | Path, dtype: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(path), dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)


def use_packed_attention(lm: Any) -> None:
    """Every attention layer of `lm` sees packed rows from now on. Raises ValueError where a layer cannot."""
    from transformers import AttentionInterface

    kinds = getattr(lm.config.get_text_config(), "layer_types", None) or []
    strange = set(kinds) - {"full_attention", "sliding_attention"}
    if strange or lm._is_stateful or not lm._supports_attention_backend:
        what = f"layers of {', '.join(sorted(strange))}" if strange else "a state, or an attention of its own kind"
        raise ValueError(f"{type(lm).__name__} has {what}: episodes packed behind a common beginning would mix in it")
    AttentionInterface.register(ATTENTION, packed_attention)
    lm.set_attn_implementation(ATTENTION)


def packed_attention(
    module: nn.Module,
    query_1HUD: Tensor,
    key_1KUD: Tensor,
    value_1KUD: Tensor,
    attention_mask: None,
    *,
    packed: Packed,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: causal attention within each row of `packed`. Returns [1, U, H, D].

    Raises ValueError on capped scores and on attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{type(module).__name__} caps its scores or has attention sinks: not packed yet")
    heads, kv_heads, dim = query_1HUD.shape[1], key_1KUD.shape[1], query_1HUD.shape[3]
    dtype, device = query_1HUD.dtype, query_1HUD.device.type
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return flash_rows(query_1HUD, key_1KUD, value_1KUD, packed, scaling, sliding_window), None
    # Gradients of a shared token are summed over its rows; bfloat16 would lose the small ones on CPU.
    wide = torch.float32 if device == "cpu" else dtype
    tables = [_table(x).to(wide) for x in (query_1HUD, key_1KUD, value_1KUD)]
    outputs = []
    for rows_BL in packed.rows:
        q, k, v = (
            _take(rows_BL, table, n).transpose(1, 2)
            for table, n in zip(tables, (heads, kv_heads, kv_heads), strict=True)
        )
        outputs.append(_causal(q, k, v, scaling, sliding_window).transpose(1, 2).reshape(-1, heads * dim))
    return _take(packed.home_U, torch.cat(outputs), heads).to(dtype)[None], None


def flash_rows(
    query_1HUD: Tensor, key_1KUD: Tensor, value_1KUD: Tensor, packed: Packed, scale: float | None, window: int | None
) -> Tensor:
    """The same by torch's variable-length flash kernel, one call for all rows: bfloat16 or float16 on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    heads, kv_heads = query_1HUD.shape[1], key_1KUD.shape[1]
    positions_S = torch.cat([rows_BL.flatten() for rows_BL in packed.rows])
    q, k, v = (_take(positions_S, _table(x), x.shape[1]) for x in (query_1HUD, key_1KUD, value_1KUD))
    longest = packed.rows[0].shape[1]
    # Up to torch 2.11 the kernel takes fewer key heads without being told.
    wanted = "enable_gqa" in inspect.signature(varlen_attn).parameters
    told: dict[str, Any] = {"enable_gqa": heads != kv_heads} if wanted else {}
    out_SHD = varlen_attn(
        q, k, v, packed.starts_R, packed.starts_R, longest, longest,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **told,
    )  # fmt: skip
    assert isinstance(out_SHD, Tensor)
    return _take(packed.home_U, out_SHD.flatten(1), heads)[None]


def _table(x_1HUD: Tensor) -> Tensor:
    """[U, H x D]."""
    return x_1HUD[0].transpose(0, 1).flatten(1)


def _take(indices: Tensor, table: Tensor, heads: int) -> Tensor:
    """[*indices, H, D]. F.embedding: a gather whose backward pass adds up in parallel."""
    return F.embedding(indices, table).unflatten(-1, (heads, -1))


def _causal(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, scale: float | None, window: int | None) -> Tensor:
    """[B, H, L, D]. On CPU few short rows are computed as one writes it: torch's fused kernel is slower there."""
    batch, heads, length, dim = q_BHLD.shape
    if window is not None and window >= length:
        window = None
    if q_BHLD.device.type == "cpu" and batch * heads * length**2 <= _SCORES_HELD:
        kv_heads = k_BKLD.shape[1]
        banned_LL = torch.full((length, length), -torch.inf).triu(1)
        if window is not None:
            banned_LL += torch.full((length, length), -torch.inf).tril(-window)
        grouped = q_BHLD.reshape(batch, kv_heads, -1, dim)
        scores = (grouped @ k_BKLD.mT).view(batch, heads, length, length) * (dim**-0.5 if scale is None else scale)
        weights = (scores + banned_LL).softmax(-1)
        return (weights.view(batch, kv_heads, -1, length) @ v_BKLD).view(batch, heads, length, dim)
    mask = None
    if window is not None:
        ones = torch.ones(length, length, dtype=torch.bool, device=q_BHLD.device)
        mask = ones.tril() & ones.triu(1 - window)
    return F.scaled_dot_product_attention(
        q_BHLD, k_BKLD, v_BKLD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


_SCORES_HELD = 1 << 22
"""16 MiB of float32 a layer; the scores of more or longer rows are never held."""


_LOGITS_HELD = {True: 1 << 24, False: 1 << 28}
"""Logits at a time, on CPU or not: 64 MiB and 1 GiB of float32, of which four are alive in the backward pass."""


class TokenScorer(nn.Module):
    """A causal LM whose forward pass returns log-probs of tokens instead of logits.

    The output head runs only at the N positions that are asked for, and on a part of them at a time, once more in the
    backward pass: nothing of [U, V] is ever held, and of [N, V] only a part.
    """

    def __init__(self, lm: Any):
        super().__init__()
        use_packed_attention(lm)
        self.lm = lm
        cap = getattr(lm.config, "final_logit_softcapping", None)
        self._cap = float(cap) if cap else None

    def forward(self, packed: Packed, before_N: Tensor, targets_N: Tensor, head: "Head") -> tuple[Tensor, Tensor]:
        """What `head` makes of the logits after `before_N`, two float32 [N]: log-probs of targets_N and entropies."""
        hidden_1UD = self.lm.base_model(
            input_ids=packed.tokens_U[None], position_ids=packed.positions_U[None], use_cache=False, packed=packed
        ).last_hidden_state
        picked_ND = F.embedding(before_N, hidden_1UD[0])
        vocabulary = self.lm.config.get_text_config().vocab_size
        rows = max(1, _LOGITS_HELD[picked_ND.device.type == "cpu"] // vocabulary)
        if len(targets_N) <= rows:
            return self._score(picked_ND, targets_N, head)
        parts = [
            checkpoint(self._score, picked, targets, head, use_reentrant=False)
            for picked, targets in zip(picked_ND.split(rows), targets_N.split(rows), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score(self, picked_ND: Tensor, targets_N: Tensor, head: "Head") -> tuple[Tensor, Tensor]:
        logits_NV = self.lm.get_output_embeddings()(picked_ND).float()
        if self._cap is not None:
            logits_NV = self._cap * torch.tanh(logits_NV / self._cap)
        return head(logits_NV, targets_N)


class Head(Protocol):
    """What is computed where the logits are: [n, V] and targets [n] to two float32 [n], a part of them at a time."""

    def __call__(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class LogprobHead:
    """Log-probs of the targets and entropies under softmax(logits / temperature)."""

    temperature: float = 1.0
    entropy_gradient: bool = False

    def __call__(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        if self.temperature != 1:
            logits_NV = logits_NV / self.temperature
        log_softmax_NV = torch.log_softmax(logits_NV, dim=-1)
        logprobs_N = log_softmax_NV.gather(-1, targets_N[:, None]).squeeze(-1)
        with torch.set_grad_enabled(self.entropy_gradient and torch.is_grad_enabled()):
            entropy_N = -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
        return logprobs_N, entropy_N


class ValueScorer(nn.Module):
    """A model's body with a scalar head: a critic, or a reward model.

    lm: a causal LM, whose output head is left for a scalar one of zeros, or transformers' model for sequence
    classification with one label, as `save` writes it.
    """

    def __init__(self, lm: Any):
        super().__init__()
        use_packed_attention(lm)
        self.body = lm.base_model
        self.score = getattr(lm, "score", None) or nn.Linear(
            lm.config.get_text_config().hidden_size, 1, bias=False, dtype=lm.dtype
        )
        if not hasattr(lm, "score"):
            nn.init.zeros_(self.score.weight)

    def save(self, folder: str | Path) -> None:
        """In Hugging Face's format, for AutoModelForSequenceClassification."""
        from transformers import AutoModelForSequenceClassification

        config = copy.deepcopy(self.body.config)
        config.num_labels = 1
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if config.pad_token_id in ends:
            # transformers reads the score at the last token that is no padding, and an episode ends with an end token.
            config.pad_token_id = None
        with torch.device("meta"):
            whole: Any = AutoModelForSequenceClassification.from_config(config)
        state = {f"{whole.base_model_prefix}.{name}": p for name, p in self.body.state_dict().items()}
        whole.save_pretrained(folder, state_dict={**state, "score.weight": self.score.weight})

    @staticmethod
    def load(folder: str | Path, dtype: str) -> "ValueScorer":
        from transformers import AutoModelForSequenceClassification

        return ValueScorer(AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=DTYPES[dtype]))

    def forward(self, packed: Packed, at_N: Tensor, targets_N: Tensor, head: Any) -> tuple[Tensor, Tensor]:
        """Values, float32 [N], of the states after the tokens at_N; the second [N] is zero, for TokenScorer's sake."""
        hidden_1UD = self.body(
            input_ids=packed.tokens_U[None], position_ids=packed.positions_U[None], use_cache=False, packed=packed
        ).last_hidden_state
        values_N = self.score(F.embedding(at_N, hidden_1UD[0])).float().squeeze(-1)
        return values_N, torch.zeros_like(values_N)


@torch.no_grad()
def sequence_logprobs(scorer: nn.Module, token_ids: list[int], device: str = "cpu") -> Tensor:
    """log p(token t | tokens < t) for t = 1..T-1 of one sequence, float32 [T-1], at temperature 1: the weight probe."""
    packed, (places,) = pack([np.asarray(token_ids)])
    before_N, targets_N = torch.from_numpy(places[:-1]), torch.tensor(token_ids[1:])
    return scorer(packed.to(device), before_N.to(device), targets_N.to(device), LogprobHead())[0].cpu()


@torch.no_grad()
def frozen_scores(
    scorer: nn.Module,
    trajectories: Sequence[Trajectory],
    head: Any,
    token_budget: int,
    device: str = "cpu",
    passes: Callable[[int], int] = lambda own: own,
) -> list[np.ndarray]:
    """For each trajectory float32 [T]: its trained tokens' log-probs, or values, and 0 elsewhere.

    passes: how many forward passes to make when this process needs `own`: under ZeRO-3 ranks must make equally many.
    """
    out = [np.zeros(len(t), np.float32) for t in trajectories]
    batches = plan([t.tokens for t in trajectories], token_budget)
    wanted = passes(len(batches))
    for indices in [*batches, *[batches[0][:1]] * (wanted - len(batches))]:
        samples = [Sample(trajectories[i], np.zeros(len(trajectories[i]), np.float32)) for i in indices]
        micro = collate(samples).to(device)
        scored = scorer(micro.packed, micro.before_N, micro.targets_N, head)[0].cpu().numpy()
        at = [trained_positions(trajectories[i]) for i in indices]
        for i, positions, part in zip(indices, at, np.split(scored, np.cumsum([*map(len, at)])[:-1]), strict=True):
            out[i][positions] = part
    return out


@torch.no_grad()
def last_values(scorer: nn.Module, trajectories: Sequence[Trajectory], token_budget: int) -> list[float]:
    """A reward model's score of each trajectory: the value at its last trained token; 0 where it has none."""
    out = [0.0] * len(trajectories)
    for indices in plan([t.tokens for t in trajectories], token_budget):
        packed, places = pack([trajectories[i].tokens for i in indices])
        at = [trained_positions(trajectories[i]) for i in indices]
        spoken = [k for k, positions in enumerate(at) if len(positions)]
        ends = torch.tensor([places[k][at[k][-1]] for k in spoken], dtype=torch.int64)
        values = scorer(packed, ends, ends, None)[0].tolist()
        for k, value in zip(spoken, values, strict=True):
            out[indices[k]] = value
    return out
