"""The scalar head beside transformers' own model for sequence classification, scores that are held fast, and the
variable-length kernel."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from rl.batch import Sample, collate, pack
from rl.model import LogprobHead, TokenScorer, ValueScorer, flash_rows, frozen_scores, last_values, packed_attention


@pytest.fixture
def scorer(tiny_lm):
    """A head of random numbers: that of zeros, which a new one has, would agree with anything."""
    made = ValueScorer(copy.deepcopy(tiny_lm))
    torch.nn.init.normal_(made.score.weight)
    return made.eval()


@pytest.fixture
def value_of(plain_lm, scorer):
    """[T]: the score's weights times the raw model's last hidden state at each token of one sequence."""

    @torch.no_grad()
    def values(tokens) -> np.ndarray:
        hidden = plain_lm.model(torch.tensor(tokens, dtype=torch.int64)[None]).last_hidden_state[0]
        return (hidden @ scorer.score.weight[0]).numpy()

    return values


@pytest.fixture
def trajectories(make_trajectory):
    """Five that begin alike: ended by an observation, by the model, one trained token, none, and two tokens in all."""
    masks = [[0, 0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0], [0, 1]]
    made = [make_trajectory(len(mask), seed, mask) for seed, mask in enumerate(masks)]
    for t in made:
        t.tokens[:2] = made[0].tokens[:2]
    return made


class Counts(torch.nn.Module):
    """A scorer that counts its forward passes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, *arguments):
        self.passes += 1
        return self.inner(*arguments)


# -- the scalar head ----------------------------------------------------------------------------------------------


def test_a_new_value_model_says_nothing_yet_and_its_head_learns(tiny_lm, make_trajectory):
    micro = collate([Sample(make_trajectory(9), np.ones(9, np.float32))])
    scorer = ValueScorer(tiny_lm)
    values, _ = scorer(micro.packed, micro.at_N, micro.targets_N, None)
    assert values.tolist() == [0.0] * 6
    values.sum().backward()
    assert scorer.score.weight.grad is not None and scorer.score.weight.grad.abs().min() > 0
    assert not any(name.startswith("lm_head") for name, _ in scorer.named_parameters()), "the output head is left"


@pytest.mark.parametrize("where", ["before_N", "at_N"])
def test_values_are_the_heads_product_with_the_raw_models_states(scorer, value_of, trajectories, where):
    micro = collate([Sample(t, np.ones(len(t), np.float32)) for t in trajectories])
    with torch.no_grad():
        values, nothing = scorer(micro.packed, getattr(micro, where), micro.targets_N, None)
    shift = {"before_N": -1, "at_N": 0}[where]
    wanted = np.concatenate([value_of(t.tokens)[np.flatnonzero(t.loss_mask) + shift] for t in trajectories])
    np.testing.assert_allclose(values.numpy(), wanted, atol=2e-5)
    assert np.ptp(wanted) > 1
    assert nothing.tolist() == [0.0] * len(wanted)


@pytest.mark.parametrize("pad", [None, 2, 0], ids=["none", "eos", "own"])
def test_a_saved_model_is_read_by_transformers_with_the_same_scores(scorer, value_of, make_trajectory, tmp_path, pad):
    """At the last token, also where that is the end token, which many models pad with: as padding it would be skipped,
    and the score read one token too early."""
    scorer.body.config.eos_token_id, scorer.body.config.pad_token_id = 2, pad
    whole, other = make_trajectory(7, 1), make_trajectory(7, 2)
    whole.tokens[-1] = 2
    other.tokens[other.tokens == 0] = 1
    scorer.save(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (theirs.config.num_labels, theirs.config.architectures) == (1, ["LlamaForSequenceClassification"])
    ids = torch.tensor(np.stack([whole.tokens, other.tokens]), dtype=torch.int64)
    with torch.no_grad():
        found = [theirs(row[None]).logits[0, 0].item() for row in ids]
        if pad == 0:
            ids = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], 1)
            padded = theirs(ids, attention_mask=ids != 0).logits[:, 0].tolist()
            assert padded == pytest.approx(found, abs=2e-5)
    wanted = [value_of(t.tokens)[-1] for t in (whole, other)]
    assert found == pytest.approx(wanted, abs=2e-5)
    assert last_values(ValueScorer(theirs), [whole, other], 99) == pytest.approx(wanted, abs=2e-5)
    assert abs(wanted[0] - value_of(whole.tokens)[-2]) > 0.1, "one token earlier would be seen"


def test_loading_restores_every_number(scorer, tmp_path):
    scorer.save(tmp_path)
    loaded = ValueScorer.load(tmp_path, "float32")
    before, after = scorer.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    half = ValueScorer.load(tmp_path, "bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.score.weight, scorer.score.weight.bfloat16())


# -- scores that are held fast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 10, 99])
def test_a_trajectorys_score_is_the_value_at_its_last_trained_token(scorer, value_of, trajectories, budget):
    """What follows it, an observation, is not the model's; who says nothing scores 0."""
    ends = [6, 5, 4, None, 1]
    wanted = [0.0 if end is None else value_of(t.tokens)[end] for t, end in zip(trajectories, ends, strict=True)]
    assert last_values(scorer, trajectories, budget) == pytest.approx(wanted, abs=2e-5)
    assert min(abs(w) for w, end in zip(wanted, ends, strict=True) if end) > 0.01
    assert last_values(scorer, trajectories[3:4], budget) == [0.0]
    assert last_values(scorer, [], budget) == []


@pytest.mark.parametrize(("budget", "own"), [(1, 5), (10, 3), (99, 1)])
def test_frozen_values_are_those_before_each_trained_token(scorer, value_of, trajectories, budget, own):
    """0 off the mask. As many forward passes are made as are asked for; those beyond the own ones change nothing."""
    wanted = []
    for t in trajectories:
        at = np.flatnonzero(t.loss_mask)
        wanted.append(np.zeros(len(t), np.float32))
        wanted[-1][at] = value_of(t.tokens)[at - 1]
    for more in (0, 3):
        counts, asked = Counts(scorer), []

        def passes(number: int, more=more, asked=asked) -> int:
            asked.append(number)
            return number + more

        found = frozen_scores(counts, trajectories, None, budget, passes=passes)
        assert (asked, counts.passes) == ([own], own + more)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
            assert not ours[theirs == 0].any()


def test_frozen_log_probs_are_those_of_the_raw_model_and_carry_no_gradient(tiny_lm, plain_lm, trajectories):
    """Nor do they ask for one: the scorer's parameters keep theirs as they were."""
    scorer = TokenScorer(tiny_lm)
    found = frozen_scores(scorer, trajectories, LogprobHead(0.7), 10)
    for t, ours in zip(trajectories, found, strict=True):
        ids = torch.tensor(t.tokens, dtype=torch.int64)
        with torch.no_grad():
            logprobs = (plain_lm(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        np.testing.assert_allclose(ours, np.where(t.loss_mask, np.r_[0, logprobs.numpy()], 0), atol=2e-5)
    assert all(p.grad is None and p.requires_grad for p in scorer.parameters())


def test_frozen_scores_read_the_tokens_and_not_the_recorded_numbers(scorer, trajectories):
    """NaN in place of what was recorded: a demonstration has nothing there."""
    bare = [replace(t, logprobs=np.full(len(t), np.nan, np.float32)) for t in trajectories]
    ours, theirs = (frozen_scores(scorer, some, None, 10) for some in (trajectories, bare))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("wanted", [True, False])
def test_an_entropy_carries_a_gradient_where_it_is_wanted(wanted):
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs, entropy = LogprobHead(0.5, entropy_gradient=wanted)(logits, torch.tensor([0, 6, 3]))
    assert logprobs.requires_grad
    assert entropy.requires_grad == wanted
    expected = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    torch.testing.assert_close(entropy, expected)
    if wanted:
        torch.testing.assert_close(
            *(torch.autograd.grad(e.square().sum(), logits, retain_graph=True)[0] for e in (entropy, expected))
        )


# -- attention by the variable-length kernel ----------------------------------------------------------------------


@pytest.fixture
def rows():
    """Three rows of different length that begin alike, and queries, keys and values: 4 heads over 2."""
    packed, _ = pack([np.asarray(x) for x in ([5, 6, 7, 8, 9, 1, 2], [5, 6, 7, 4, 4, 4], [5, 9, 9])])
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(packed.tokens_U), 32, generator=random) for heads in (4, 2, 2))
    return packed, query, key, value


def as_documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's varlen_attn in plain torch: row after row, each position sees `left` before it and `right` after it."""
    left, right = window_size
    outs = []
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        apart = torch.arange(end - start)[None] - torch.arange(end - start)[:, None]
        seen = (apart <= right) & ((apart >= -left) | torch.tensor(left < 0))
        one = (x[start:end].transpose(0, 1) for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*one, attn_mask=seen, scale=scale, enable_gqa=enable_gqa))
        assert end - start <= max_q == max_k
    assert cu_q is cu_k and cu_q.dtype == torch.int32 and cu_q[-1] == len(q)
    return torch.cat(outs, 1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_variable_length_kernel_is_asked_for_the_attention_of_the_cpu(rows, monkeypatch, window, scale):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", as_documented)
    packed, query, key, value = rows
    wanted, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, packed=packed, scaling=scale, sliding_window=window
    )
    found = flash_rows(query, key, value, packed, scale, window)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on a GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_the_variable_length_kernel_computes_the_attention_of_the_cpu(rows, window):
    packed, *tensors = rows
    given = [x.bfloat16().requires_grad_() for x in tensors]
    on_gpu = [x.detach().cuda().requires_grad_() for x in given]
    wanted, _ = packed_attention(torch.nn.Module(), *given, None, packed=packed, sliding_window=window)
    found, _ = packed_attention(torch.nn.Module(), *on_gpu, None, packed=packed.to("cuda"), sliding_window=window)
    torch.testing.assert_close(found.cpu(), wanted, atol=2e-2, rtol=2e-2)
    wanted.square().sum().backward()
    found.square().sum().backward()
    for here, there in zip(given, on_gpu, strict=True):
        torch.testing.assert_close(there.grad.cpu(), here.grad, atol=5e-2, rtol=5e-2)
