"""Parameter filters, on the parameter names of transformers' own models."""

import re

import pytest
import torch

from rl.config_stage import ParameterFilter
from rl.param_filter import trainable

HALF = ParameterFilter(kind="half")
BLOCKS = 5


def causal_lm(kind: str, **settings):
    """A model of `kind` without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def shapes():
    """A Llama of five blocks: 2 + 5 x (4 attention + 3 feed-forward + 2 norms) + 1 parameters."""
    small = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "num_attention_heads": 2}
    found = shapes_of(causal_lm("llama", num_hidden_layers=BLOCKS, **small))
    assert len(found) == 3 + BLOCKS * 9
    return found


def trains_odd_blocks_in_odd_rounds(name: str, round: int) -> bool:
    found = re.search(r"layers\.(\d+)", name)
    return found is not None and int(found[1]) % 2 == round % 2


def counts(chosen: set[str], pattern: str) -> list[int]:
    """How many chosen names of each block match."""
    return [sum(f".layers.{b}." in n and re.search(pattern, n) is not None for n in chosen) for b in range(BLOCKS)]


def test_no_filter_trains_everything(shapes):
    assert trainable(shapes, None, seed=0, round=0) == set(shapes)


def test_a_pattern_is_searched_for_anywhere_in_a_name(shapes):
    chosen = trainable(shapes, ParameterFilter(kind="pattern", value=r"\.[13]\.mlp|lm_head"), seed=0, round=0)
    projections = ("gate", "up", "down")
    expected = {f"model.layers.{b}.mlp.{p}_proj.weight" for b in (1, 3) for p in projections}
    assert chosen == expected | {"lm_head.weight"}


def test_a_pattern_without_a_match_is_named(shapes):
    with pytest.raises(ValueError, match=r"pattern layer\\.0 .*like model\.embed_tokens\.weight"):
        trainable(shapes, ParameterFilter(kind="pattern", value=r"layer\.0"), seed=0, round=0)


def test_a_function_is_asked_by_name_and_round(shapes):
    config = ParameterFilter(kind="function", value=f"{__name__}.trains_odd_blocks_in_odd_rounds")
    even, odd = (trainable(shapes, config, seed=0, round=r) for r in (0, 1))
    assert counts(even, "") == [9, 0, 9, 0, 9]
    assert counts(odd, "") == [0, 9, 0, 9, 0]


def test_half_takes_half_of_every_category(shapes):
    """The paper's counts: 2 of 4 attention matrices and 1 of 2 norms in every block, 1 or 2 of 3 feed-forward matrices.

    Over the model 10 of 20, 5 of 10, and 7 of 15: rounded down.
    """
    for round in range(20):
        chosen = trainable(shapes, HALF, seed=0, round=round)
        assert counts(chosen, "self_attn") == [2] * BLOCKS
        assert counts(chosen, "layernorm") == [1] * BLOCKS
        assert sorted(counts(chosen, "mlp")) == [1, 1, 1, 2, 2]


def test_half_always_trains_what_lies_outside_the_blocks(shapes):
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for round in range(20):
        assert {n for n in trainable(shapes, HALF, seed=0, round=round) if ".layers." not in n} == outside


def test_half_trains_every_parameter_in_about_half_of_the_rounds(shapes):
    """400 rounds: a standard deviation of 0.025. In five blocks a feed-forward matrix has 7 chances in 15."""
    rounds = [trainable(shapes, HALF, seed=0, round=r) for r in range(400)]
    for name in shapes:
        if ".layers." in name:
            expected = 7 / 15 if "mlp" in name else 0.5
            assert sum(name in chosen for chosen in rounds) / 400 == pytest.approx(expected, abs=0.12), name


def test_half_depends_on_seed_and_round_alone(shapes):
    first = trainable(shapes, HALF, seed=3, round=1)
    reordered = dict(sorted(shapes.items(), reverse=True))
    assert trainable(reordered, HALF, seed=3, round=1) == first
    assert trainable(shapes, HALF, seed=3, round=2) != first
    assert trainable(shapes, HALF, seed=4, round=1) != first


@pytest.mark.parametrize("round", range(5))
def test_half_keeps_a_bias_with_its_matrix(round):
    """GPT-2: 2 matrices, 2 matrices and 2 norms in a block, each with a bias."""
    shapes = shapes_of(causal_lm("gpt2", n_layer=3, n_embd=16, n_head=2, vocab_size=50))
    chosen = trainable(shapes, HALF, seed=0, round=round)
    for block in range(3):
        for category in (".attn.", ".mlp.", ".ln_"):
            names = {n for n in chosen if f".h.{block}." in n and category in n}
            assert {n.rpartition(".")[2] for n in names} == {"weight", "bias"}
            assert len({n.rpartition(".")[0] for n in names}) == 1


def test_half_counts_norms_inside_the_attention_with_the_norms():
    """Qwen3 has a norm of queries and one of keys: 4 matrices, and 2 + 2 norms."""
    small = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    shapes = shapes_of(causal_lm("qwen3", num_hidden_layers=BLOCKS, **small, **heads))
    for round in range(5):
        chosen = trainable(shapes, HALF, seed=0, round=round)
        assert counts(chosen, r"self_attn\.\w_proj") == [2] * BLOCKS
        assert counts(chosen, "norm") == [2] * BLOCKS


def test_half_keeps_the_two_matrices_of_an_adapter_together():
    """With one of A and B frozen at 0 the other would have no gradient."""
    from peft import LoraConfig, get_peft_model

    small = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "num_attention_heads": 2}
    model = causal_lm("llama", num_hidden_layers=BLOCKS, **small)
    shapes = shapes_of(get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)))
    for round in range(5):
        chosen = trainable(shapes, HALF, seed=0, round=round)
        assert counts(chosen, "self_attn.*lora_A") == counts(chosen, "self_attn.*lora_B") == [2] * BLOCKS
        assert {n.replace("lora_A", "lora_B") for n in chosen if "lora_A" in n} == {n for n in chosen if "lora_B" in n}


def test_half_of_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="finds no blocks"):
        trainable({"embed.weight": (4, 2), "head.weight": (4, 2)}, HALF, seed=0, round=0)
