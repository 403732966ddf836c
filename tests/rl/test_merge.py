"""Merged weights against torch's means and hand-worked numbers, and every reason not to merge."""

import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rl.checkpoint import State, write_state
from rl.checkpoint import writing as checkpointing
from rl.config_file import ConfigError
from rl.merge import (
    block_of,
    check_alike,
    find_checkpoint,
    greedy,
    lines,
    lines_coefficients,
    lines_scale,
    open_weights,
    uniform,
    write,
    writing,
)

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.2,
}
KINDS = {
    "tied Llama": lambda **sizes: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes)),
    "Qwen3": lambda **sizes: Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, **sizes)),
}


@pytest.fixture
def models(tmp_path):
    """Random models of a kind, saved by transformers: `models("Qwen3", 3)` -> their folders and the models."""

    def make(kind="Qwen3", count=2, dtype=torch.float32, prefix="", shard="5GB", **sizes):
        folders, made = [], []
        for seed in range(count):
            torch.manual_seed(seed)
            made.append(KINDS[kind](**{**SIZES, **sizes}).to(dtype))
            folders.append(tmp_path / f"{prefix}{seed}")
            made[-1].save_pretrained(folders[-1], max_shard_size=shard)
        return folders, made

    return make


@pytest.fixture
def by_hand(tmp_path):
    """A folder with three blocks of two weights and an embedding, every weight of it `value`."""

    def make(name, value, dtype=torch.float32, blocks=3):
        folder = tmp_path / name
        folder.mkdir()
        names = ["embed.weight", *(f"layers.{i}.weight" for i in range(blocks)), "norm.weight"]
        tensors = {name: torch.full((2,), float(value), dtype=dtype) for name in names}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architectures": ["ByHand"]}))
        return open_weights(folder)

    return make


def opened(folders):
    return [open_weights(folder) for folder in folders]


# -- soups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_soup_is_torchs_mean_and_loads_in_plain_transformers(kind, models, tmp_path):
    folders, made = models(kind, 3)
    members = opened(folders)
    (tmp_path / "out").mkdir()
    write(uniform(members), members[0], tmp_path / "out")
    soup = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(soup) is type(made[0])
    states = [model.state_dict() for model in made]
    for name, value in soup.state_dict().items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-7)
        assert "norm" in name or not torch.equal(value, states[0][name])
    assert (soup.lm_head.weight is soup.model.embed_tokens.weight) == (kind == "tied Llama")


def test_means_are_taken_in_float32(by_hand):
    """In bfloat16 256 + 1 is 256: the mean of 256, 1 and 1 would be 85.5 and not 86."""
    members = [by_hand(f"m{i}", value, torch.bfloat16) for i, value in enumerate((256, 1, 1))]
    merged = uniform(members)("layers.0.weight")
    assert merged.dtype == torch.float32 and merged.tolist() == [86.0, 86.0]


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_is_the_firsts_or_as_asked(dtype, expected, models, tmp_path):
    (first, second), made = models(count=2, dtype=torch.bfloat16)
    made[1].float().save_pretrained(second)
    members = opened([first, second])
    (tmp_path / "out").mkdir()
    write(uniform(members), members[0], tmp_path / "out", dtype=dtype)
    soup = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert soup.dtype == soup.lm_head.weight.dtype == expected
    mean = (made[0].lm_head.weight.float() + made[1].lm_head.weight.float()) / 2
    assert torch.equal(soup.lm_head.weight, mean.to(expected))


def test_whole_numbers_stay_whole_whatever_dtype_is_asked(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    save_file({"ids": torch.tensor([3, 4])}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "counter", "torch_dtype": "float32"}')
    first = open_weights(folder)
    (tmp_path / "out").mkdir()
    write(uniform([first, first]), first, tmp_path / "out", dtype="bfloat16")
    ids = load_file(tmp_path / "out" / "model.safetensors")["ids"]
    assert ids.dtype == torch.int64 and ids.tolist() == [3, 4]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "counter", "dtype": "bfloat16"}


def test_shards_are_laid_out_as_the_firsts(models, tmp_path):
    (first, _), made = models(shard="10KB")
    (whole,), _ = models(count=1, prefix="whole")
    members = opened([first, whole, first])
    (tmp_path / "out").mkdir()
    counted = []
    write(uniform(members), members[0], tmp_path / "out", dtype="bfloat16", written=lambda: counted.append(1))
    shards = {p.name for p in first.glob("*.safetensors")}
    assert len(shards) > 2 and {p.name for p in (tmp_path / "out").glob("*.safetensors")} == shards
    assert len(counted) == len(made[0].state_dict())
    with safe_open(tmp_path / "out" / min(shards), framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}  # some versions of transformers refuse a file without it
    index, before = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path / "out", first))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]
    soup = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(soup.lm_head.weight, made[0].lm_head.weight.bfloat16().float())


def test_what_belongs_to_the_model_comes_along_and_the_run_does_not(models, tmp_path):
    (first, second), _ = models()
    beside = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "repertory.yaml"]
    for name in [*beside, "state.json", "adapter_config.json", "notes.md"]:
        (first / name).write_text(f"{name} of the first")
        (second / name).write_text("of the second")
    (first / "learner").mkdir()
    (tmp_path / "out").mkdir()
    write(uniform(opened([first, second])), open_weights(first), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {*beside, "config.json", "generation_config.json", "model.safetensors"}
    assert all((tmp_path / "out" / n).read_text() == f"{n} of the first" for n in beside)


@pytest.mark.parametrize(
    ("scores", "chosen", "asked"),
    [
        # The best is 1. With 2 it is a tie, which is no gain; with 3 it rises; then with 0 a tie again.
        ({"0": 5, "1": 7, "2": 6, "3": 6, "12": 7, "13": 8, "130": 8}, [1, 3], ["12", "13", "130"]),
        # Each joins a soup that the one before has joined.
        ({"0": 5, "1": 7, "2": 6, "12": 8, "120": 9}, [1, 2, 0], ["12", "120"]),
        # Nobody helps. Equals are tried in the order given.
        ({"0": 4, "1": 4, "2": 4, "01": 3, "02": 3}, [0], ["01", "02"]),
    ],
)
def test_greedy_soup_by_hand(scores, chosen, asked):
    calls = []

    def score(members):
        calls.append("".join(map(str, members)))
        return scores[calls[-1]] / 10

    alone = [key for key in scores if len(key) == 1]
    assert greedy(len(alone), score) == chosen
    assert calls == [*alone, *asked]


# -- LiNeS ---------------------------------------------------------------------------------------------------------


def values(rule, weights):
    return {name: set(rule(name).tolist()) for name in weights.shapes}


def test_lines_of_one_by_hand(by_hand):
    """τ = 3 - 1 = 2; λ = 0.25, 0.25 + 0.75/2 = 0.625, 1 in the blocks and 0.25 outside them."""
    base, tuned = by_hand("base", 1), by_hand("tuned", 3)
    merged = values(lines([tuned], base, *lines_coefficients(1, 0.25, None)), base)
    assert merged == {
        "embed.weight": {1.5},
        "layers.0.weight": {1.5},
        "layers.1.weight": {2.25},
        "layers.2.weight": {3.0},
        "norm.weight": {1.5},
    }


def test_lines_of_two_by_hand(by_hand):
    """τ = (3 - 1) + (5 - 1) = 6; α = 1/2; β = 1/2: λ = 0.5, 0.75, 1."""
    base, members = by_hand("base", 1), [by_hand("a", 3), by_hand("b", 5)]
    merged = values(lines(members, base, *lines_coefficients(2, None, None)), base)
    assert merged == {
        "embed.weight": {4.0},
        "layers.0.weight": {4.0},
        "layers.1.weight": {5.5},
        "layers.2.weight": {7.0},
        "norm.weight": {4.0},
    }


def test_lines_without_slope_is_the_uniform_soup(models):
    (base, *tuned), _ = models(count=4)
    base, *members = opened([base, *tuned])
    flat, soup = lines(members, base, *lines_coefficients(3, None, 0.0)), uniform(members)
    for name in base.shapes:
        torch.testing.assert_close(flat(name), soup(name), rtol=0, atol=1e-6)


def test_lines_of_a_transformer_leaves_its_last_block_and_frees_its_first(models):
    folders, _ = models("tied Llama")
    base, tuned = opened(folders)
    rule = lines([tuned], base, 0.0, 1.0)
    for name in base.shapes:
        before, after = base.read(name), tuned.read(name)
        expected = {None: before, 0: before, 1: (before + after) / 2, 2: after}[block_of(name)]
        torch.testing.assert_close(rule(name), expected, rtol=0, atol=1e-6)
    assert {block_of(name) for name in base.shapes} == {None, 0, 1, 2}


@pytest.mark.parametrize(
    ("count", "alpha", "beta", "expected"),
    [
        (1, 0.3, None, (0.3, 0.7)),
        (1, 0.0, 0.5, (0.0, 0.5)),
        (4, None, None, (0.25, 0.75)),
        (4, None, 0.0, (0.25, 0.0)),
        (4, 0.5, 0.2, (0.5, 0.2)),
    ],
)
def test_coefficients(count, alpha, beta, expected):
    assert lines_coefficients(count, alpha, beta) == pytest.approx(expected)


def test_the_slope_ends_at_the_last_block():
    assert [lines_scale(i, 5, 0.5, 1.0) for i in (None, 0, 1, 2, 3, 4)] == [0.5, 0.5, 0.75, 1.0, 1.25, 1.5]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11),
        ("transformer.h.3.mlp.c_fc.weight", 3),
        ("visual.blocks.0.norm1.weight", 0),
        ("h.7.ln_1.bias", 7),
        ("model.layers.2.mlp.experts.9.up_proj.weight", 2),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.sublayers.4.weight", None),
    ],
)
def test_a_block_is_read_from_the_name(name, block):
    assert block_of(name) == block


# -- what cannot be merged -----------------------------------------------------------------------------------------


def test_a_run_means_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        with checkpointing(tmp_path / "run", step) as folder:
            write_state(folder, State(0, 0, step, 0, 0))
    newest = tmp_path / "run" / "checkpoints" / "step=10"
    assert find_checkpoint(str(tmp_path / "run")) == newest
    assert find_checkpoint(str(newest.with_name("step=9"))).name == "step=9"
    with pytest.raises(ConfigError, match="no such folder"):
        find_checkpoint(str(tmp_path / "nothing"))


def refuse_shape(models):
    (a, _), _ = models()
    (b, _), _ = models(prefix="wide", intermediate_size=32)
    check_alike(*opened([a, b]))


def refuse_kind(models):
    (a, _), _ = models()
    (b, _), _ = models("tied Llama", prefix="llama")
    check_alike(*opened([a, b]))


def refuse_missing(models):
    (a, _), _ = models()
    (b, _), _ = models(prefix="shallow", num_hidden_layers=2)
    check_alike(*opened([a, b]))


def refuse_surplus(models):
    (a, _), _ = models(num_hidden_layers=2)
    (b, _), _ = models(prefix="deep")
    check_alike(*opened([a, b]))


def refuse_adapter(models):
    (a, _), _ = models()
    (a / "model.safetensors").rename(a / "adapter_model.safetensors")
    (a / "adapter_config.json").write_text("{}")
    open_weights(a)


def refuse_no_weights(models):
    (a, _), _ = models()
    (a / "model.safetensors").unlink()
    open_weights(a)


def refuse_no_config(models):
    (a, _), _ = models()
    (a / "config.json").unlink()
    open_weights(a)


def refuse_quantised(models):
    (a, _), _ = models()
    settings = json.loads((a / "config.json").read_text())
    (a / "config.json").write_text(json.dumps({**settings, "quantization_config": {"bits": 4}}))
    open_weights(a)


def refuse_torn(models):
    (a, _), _ = models()
    (a / "model.safetensors").write_bytes((a / "model.safetensors").read_bytes()[:1000])
    open_weights(a)


def refuse_lost_shard(models):
    (a, _), _ = models(shard="10KB")
    next(a.glob("model-00002-*")).unlink()
    open_weights(a)


def refuse_one_block(models):
    (a, b), _ = models(num_hidden_layers=1)
    lines(opened([a]), open_weights(b), 0.5, 0.5)


def refuse_no_alpha(models):
    lines_coefficients(1, None, 0.5)


REFUSALS = {
    refuse_shape: r"model\.layers\.0\.mlp\.\w+_proj\.weight is \[\d+, \d+\] in .*0 and \[\d+, \d+\] in .*wide0",
    refuse_kind: "0 is a Qwen3ForCausalLM and .*llama0 a LlamaForCausalLM",
    refuse_missing: r"model\.layers\.2\.\S+ is in .*/0 and missing in .*shallow0",
    refuse_surplus: r"model\.layers\.2\.\S+ is in .*deep0 and missing in .*/0",
    refuse_adapter: "holds a LoRA adapter and not the full weights: merge it into its model first",
    refuse_no_weights: "neither a checkpoint, nor a run with a checkpoint, nor a model",
    refuse_no_config: "neither a checkpoint, nor a run with a checkpoint, nor a model",
    refuse_quantised: "is quantised",
    refuse_torn: r"model\.safetensors cannot be read",
    refuse_lost_shard: r"model-00002-of-\d+\.safetensors cannot be read",
    refuse_one_block: r"1 block\(s\) are found by name",
    refuse_no_alpha: "needs --alpha",
}


@pytest.mark.parametrize("attempt", REFUSALS, ids=lambda attempt: attempt.__name__.removeprefix("refuse_"))
def test_what_cannot_be_merged_is_refused_in_one_message(attempt, models):
    with pytest.raises(ConfigError, match=REFUSALS[attempt]) as refused:
        attempt(models)
    assert "\n" not in str(refused.value)


def test_models_of_one_kind_are_alike(models):
    folders, _ = models()
    check_alike(*opened(folders))


# -- the folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_out_appears_whole(there, tmp_path):
    out = tmp_path / "a" / "out"
    if there:
        out.mkdir(parents=True)
    with writing(out) as partial:
        (partial / "x").write_text("whole")
        assert not (out / "x").exists() and partial.parent == out.parent
    assert (out / "x").read_text() == "whole"
    assert list(out.parent.iterdir()) == [out]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out") as partial:
        (partial / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(ConfigError, match="is not an empty folder"), writing(out):
            pass
    with pytest.raises(ConfigError, match="cannot be made"), writing(tmp_path / "out" / "mine" / "below"):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_disk_that_refuses_is_one_message(models, tmp_path):
    folders, _ = models()
    members = opened(folders)
    (tmp_path / "out").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*model\.safetensors"):
            write(uniform(members), members[0], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
