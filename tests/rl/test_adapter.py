"""The adapter against peft's own wrapper, and against the base it sits on."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rl.adapter import (
    adapter_parts,
    adapter_tensors,
    attach,
    disabled,
    fold,
    merged_tensors,
    parts,
    target_names,
    target_names_in,
    write_adapter,
)
from rl.config import LoraConfig
from rl.model import TokenScorer, sequence_logprobs

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
LORA = LoraConfig(rank=3, alpha=12.0)
LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYERS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@torch.no_grad()
def logits(lm):
    return lm(TOKENS).logits[0]


@torch.no_grad()
def trained(lm, config: LoraConfig = LORA, seed: int = 7):
    """`lm` with an adapter that has learned something: B is no longer zero."""
    attach(lm, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lm.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lm.eval()


@torch.no_grad()
def wrapped(lm, tensors, config: LoraConfig = LORA):
    """peft's own wrapper around another copy of the base, with these A and B."""
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules="all-linear")  # type: ignore[arg-type]
    model = peft.get_peft_model(lm, settings)
    peft.set_peft_model_state_dict(model, tensors)
    return model.eval()


def test_a_new_adapter_changes_nothing_and_keeps_the_class(tiny_lm, plain_lm):
    attach(tiny_lm, LORA, seed=0)
    assert type(tiny_lm) is LlamaForCausalLM and tiny_lm.base_model is tiny_lm.model
    assert torch.equal(logits(tiny_lm), logits(plain_lm))
    assert not torch.equal(logits(trained(plain_lm)), logits(tiny_lm))


def test_all_linear_is_every_linear_layer_but_the_output_head(tiny_lm):
    every = [f"model.layers.{i}.{name}" for i in range(2) for name in LAYERS]
    assert target_names(tiny_lm, "all-linear") == every
    untied = type(tiny_lm.config)(**{**tiny_lm.config.to_dict(), "tie_word_embeddings": False})
    assert target_names(LlamaForCausalLM(untied), "all-linear") == every
    attach(tiny_lm, LORA, seed=0)
    assert [name for name, module in tiny_lm.named_modules() if isinstance(module, LoraLayer)] == every


def test_targets_are_names_or_ends_of_names(tiny_lm):
    chosen = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    attach(tiny_lm, LoraConfig(rank=3, targets=("self_attn.v_proj", "layers.1.mlp.down_proj")), seed=0)
    assert [name for name, module in tiny_lm.named_modules() if isinstance(module, LoraLayer)] == chosen


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "proj", "qkv_proj", "self_attn"])
def test_a_target_that_is_no_layer_is_refused_by_name(tiny_lm, target):
    with pytest.raises(
        ValueError, match=f"'{target}' is no linear layer of LlamaForCausalLM. Its layers are down_proj, gate"
    ):
        attach(tiny_lm, LoraConfig(targets=("q_proj", target)), seed=0)


def test_the_layers_of_a_folder_are_those_of_its_model(tiny_lm, tmp_path):
    tiny_lm.save_pretrained(tmp_path)
    assert target_names_in(str(tmp_path), ("q_proj", "down_proj")) == target_names(tiny_lm, ("q_proj", "down_proj"))


def test_the_merged_tensors_are_those_of_peft(tiny_lm, plain_lm):
    adapted = trained(tiny_lm)
    before = [p.clone() for p in adapted.parameters()]
    merged = dict(merged_tensors(adapted))
    expected = wrapped(copy.deepcopy(plain_lm), adapter_tensors(adapted)).merge_and_unload()
    assert list(merged) == [name for name, _ in plain_lm.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert (merged[name] - parameter).abs().max() < 1e-6
        assert torch.equal(merged[name], plain_lm.get_parameter(name)) == (not name.endswith("proj.weight"))
    assert all(map(torch.equal, before, adapted.parameters()))


def test_without_an_adapter_the_parts_are_the_parameters(tiny_lm):
    assert [(n, part.base) for n, part in parts(tiny_lm).items()] == list(tiny_lm.named_parameters())
    assert all(tensor.data_ptr() == tiny_lm.get_parameter(n).data_ptr() for n, tensor in merged_tensors(tiny_lm))
    assert adapter_parts(tiny_lm) == {}


def test_a_bias_keeps_its_checkpoint_name(tiny_lm):
    biased = LlamaForCausalLM(type(tiny_lm.config)(**{**tiny_lm.config.to_dict(), "attention_bias": True}))
    names = [name for name, _ in biased.named_parameters()]
    assert "model.layers.0.self_attn.q_proj.bias" in names
    assert list(parts(trained(biased))) == names


@pytest.mark.parametrize("cast", [False, True], ids=["as attached", "as DeepSpeed casts it"])
def test_a_bfloat16_weight_is_merged_in_float32_and_rounded_once(tiny_lm, cast):
    """Against the sum in float64. The same sum in bfloat16 is off in a good part of the weights."""
    adapted = trained(tiny_lm.bfloat16())
    if cast:
        adapted.bfloat16()
    name = "model.layers.1.mlp.up_proj.weight"
    part, merged = parts(adapted)[name], dict(merged_tensors(adapted))[name]
    assert part.a is not None and part.b is not None
    assert part.a.dtype == part.b.dtype == (torch.bfloat16 if cast else torch.float32)
    exact = part.base.double() + 12 / 3 * (part.b.double() @ part.a.double())
    assert part.value().dtype == torch.float32 and (part.value() - exact).abs().max() < 1e-6
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.float().bfloat16())
    in_bfloat16 = part.base + 12 / 3 * (part.b.bfloat16() @ part.a.bfloat16())
    assert (in_bfloat16 != merged).float().mean() > 0.05


def test_a_part_names_what_to_gather_and_its_whole_shape(tiny_lm):
    """Under ZeRO-3 a parameter is empty until it is gathered, and DeepSpeed keeps its shape beside it."""
    attach(tiny_lm, LORA, seed=0)
    part = parts(tiny_lm)["model.layers.0.self_attn.k_proj.weight"]
    layer = tiny_lm.model.layers[0].self_attn.k_proj
    wanted = [layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    assert [id(p) for p in part.parameters] == [id(p) for p in wanted]
    assert {name: p.shape for name, p in adapter_parts(tiny_lm).items() if ".0.self_attn.k_proj" in name} == {
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": (3, 32),
        "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight": (16, 3),
    }
    layer.base_layer.weight.ds_shape = torch.Size((16, 32))
    layer.base_layer.weight.data = torch.empty(0)
    assert part.shape == (16, 32)


def test_disabled_is_the_base_to_the_bit(tiny_lm, plain_lm):
    adapted = trained(tiny_lm)
    changed = logits(adapted)
    with disabled(adapted):
        assert torch.equal(logits(adapted), logits(plain_lm))
    assert torch.equal(logits(adapted), changed) and not torch.allclose(changed, logits(plain_lm), atol=0.1)


def test_an_error_inside_disabled_leaves_the_adapter_on(tiny_lm):
    adapted = trained(tiny_lm)
    changed = logits(adapted)
    with pytest.raises(RuntimeError), disabled(adapted):
        raise RuntimeError
    assert torch.equal(logits(adapted), changed)


def test_a_fold_keeps_the_function_and_makes_it_the_base(tiny_lm, plain_lm):
    adapted = trained(tiny_lm)
    before, old = logits(adapted), {name: t.clone() for name, t in adapter_tensors(adapted).items()}
    other = copy.deepcopy(adapted)
    fold(adapted, seed=8)
    fold(other, seed=9)
    assert (logits(adapted) - before).abs().max() < 1e-5
    with disabled(adapted):
        folded = logits(adapted)
    assert torch.equal(folded, logits(adapted))
    new = adapter_tensors(adapted)
    assert all(not torch.equal(new[name], old[name]) for name in old)
    assert not torch.equal(next(iter(new.values())), next(iter(adapter_tensors(other).values())))
    assert all(bool((tensor == 0).all()) == ("lora_B" in name) for name, tensor in new.items())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.2)
    assert not torch.allclose(logits(adapted), folded, atol=0.1), "the new adapter is not trained on"
    with disabled(adapted):
        assert torch.equal(logits(adapted), folded)


def test_a_fold_gathers_a_layer_at_a_time(tiny_lm):
    adapted, asked = trained(tiny_lm), []

    def gathered(parameters):
        asked.append([id(p) for p in parameters])
        return torch.no_grad()

    adaptable = [p.parameters for p in parts(adapted).values() if p.a is not None]
    fold(adapted, seed=8, gathered=gathered)
    assert asked == [[id(p) for p in parameters] for parameters in adaptable] and len(asked) == 14


def test_what_is_drawn_follows_from_the_seed_alone(tiny_lm):
    def drawn(seed: int):
        lm = copy.deepcopy(tiny_lm)
        attach(lm, LORA, seed)
        return [t for name, t in adapter_tensors(lm).items() if "lora_A" in name]

    first = drawn(1)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, drawn(1)))
    assert not torch.equal(first[0], drawn(2)[0]) and not torch.equal(first[0], first[1])
    # kaiming_uniform_ with a = sqrt(5): uniform within 1 / sqrt(fan in).
    assert all(0.9 < float(a.abs().max()) * a.shape[1] ** 0.5 <= 1 for a in first)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("used_before", [False, True])
def test_the_gradient_reaches_a_and_b_alone(tiny_lm, checkpointing, used_before):
    adapted = trained(tiny_lm).train()
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    if used_before:
        with disabled(adapted):
            logits(adapted)
    adapted(TOKENS).logits.logsumexp(-1).sum().backward()
    moved = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert moved == {name for name, p in adapted.named_parameters() if p.requires_grad} and len(moved) == 28


def test_the_scorer_of_the_learner_sees_the_adapter(tiny_lm, plain_lm):
    scorer = TokenScorer(trained(tiny_lm))
    merged = copy.deepcopy(plain_lm)
    merged.load_state_dict(dict(merged_tensors(tiny_lm)), strict=False)
    expected = logits(merged).log_softmax(-1)[:-1].gather(-1, TOKENS[0, 1:, None]).squeeze(-1)
    assert (sequence_logprobs(scorer, TOKENS[0].tolist()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_checkpoint_loads_in_plain_transformers(tiny_lm, tmp_path, tied):
    lm = LlamaForCausalLM(type(tiny_lm.config)(**{**tiny_lm.config.to_dict(), "tie_word_embeddings": tied})).eval()
    adapted = trained(lm)
    adapted.save_pretrained(tmp_path, state_dict=dict(merged_tensors(adapted)))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (logits(loaded.eval()) - logits(adapted)).abs().max() < 1e-5


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "layers.1.mlp.down_proj")])
def test_peft_loads_the_folder(tiny_lm, plain_lm, tmp_path, targets):
    config = LoraConfig(rank=3, alpha=12.0, targets=targets)
    adapted = trained(tiny_lm, config)
    write_adapter(tmp_path, adapter_tensors(adapted), config, "some/base")
    loaded = peft.PeftModel.from_pretrained(plain_lm, str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(adapted))
    layers = [[m for m in lm.modules() if isinstance(m, LoraLayer)] for lm in (loaded, adapted)]
    assert len(layers[0]) == len(layers[1])
    assert loaded.peft_config["default"].base_model_name_or_path == "some/base"
