"""`repertory merge` as a user runs it: soups of runs, a greedy soup by the real evaluation, and a user's mistakes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Run, repertory
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from actors.cli import main
from actors.merge import Merge, merge
from rl.checkpoint import State, write_state, writing
from rl.metrics import read_lines


def make_run(run, seed, *, step=5, intermediate=24):
    """A run folder with one checkpoint, as a run leaves it: a random Qwen3 with its tokenizer."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), chat_template=f"template of {seed}"
    )
    with writing(run, step) as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "learner").mkdir()
        (folder / "repertory.yaml").write_text(f"# of {seed}\n")
        write_state(folder, State(0, 0, step, 0, 0))
    return run


@pytest.fixture
def runs(tmp_path):
    return [str(make_run(tmp_path / f"seed-{seed}", seed)) for seed in range(3)]


def newest(runs):
    return [f"{run}/checkpoints/step=5" for run in runs]


def norm(folder):
    """One number of a model, another for every model."""
    return float(load_file(folder / "model.safetensors")["lm_head.weight"].norm())


def test_a_uniform_soup_of_runs(runs, tmp_path):
    out = tmp_path / "soups" / "out"
    done = repertory("merge", str(out), *runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"repertory eval {out}" in done.stdout
    members = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in newest(runs)]
    for name, value in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        mean = torch.stack([m[name].double() for m in members]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-7)
    assert AutoTokenizer.from_pretrained(out).chat_template == "template of 0"
    assert (out / "repertory.yaml").read_text() == "# of 0\n"
    assert json.loads((out / "merge.json").read_text()) == {"method": "uniform", "checkpoints": newest(runs)}
    assert not (out / "state.json").exists() and not (out / "learner").exists()
    assert list(out.parent.iterdir()) == [out]


def test_lines_says_what_it_used(runs, tmp_path):
    base, *tuned = runs
    merge(Merge(tmp_path / "out", tuned, "lines", base=base, beta=0.25), Console(quiet=True))
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    where, *others = newest(runs)
    assert record == {"method": "lines", "checkpoints": others, "base": where, "alpha": 0.5, "beta": 0.25}
    start, a, b, merged = (
        load_file(f"{folder}/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        for folder in (*newest(runs), tmp_path / "out")
    )
    torch.testing.assert_close(merged, start + 0.75 * (a + b - 2 * start), rtol=0, atol=1e-6)


def test_a_greedy_soup_takes_who_helps(runs, tmp_path, monkeypatch):
    """Scored by closeness to the soup of the last two: the first must stay out."""
    wanted = tmp_path / "wanted"
    merge(Merge(wanted, runs[1:], "uniform"), Console(quiet=True))
    target = load_file(wanted / "model.safetensors")["lm_head.weight"]

    def closeness(model, like, n):
        assert like == tmp_path / "seed-0" / "checkpoints" / "step=5" and n == 7
        return -float((load_file(model / "model.safetensors")["lm_head.weight"] - target).norm()), model

    monkeypatch.setattr("actors.merge.held_out_success", closeness)
    console = Console(record=True, width=300, file=(tmp_path / "shown").open("w"))
    merge(Merge(tmp_path / "out", runs, "greedy", eval_n=7), console)
    assert norm(tmp_path / "out") == pytest.approx(norm(wanted), rel=1e-6)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert sorted(record["checkpoints"]) == newest(runs)[1:]
    assert [s["checkpoints"] for s in record["scores"][:3]] == [[f] for f in newest(runs)]
    assert len(record["scores"]) == 5 and max(s["success"] for s in record["scores"]) == pytest.approx(0, abs=1e-6)
    shown = console.export_text()
    for score, names in zip(record["scores"], runs, strict=False):
        assert f"{score['success']:.3f}  {names}  (" in shown
    assert "2 of 3 checkpoints merged into" in shown


def test_a_greedy_soup_by_the_real_evaluation(small_run: Run, tmp_path):
    steps = [str(small_run.folder / "checkpoints" / f"step={n}") for n in (15, 12)]
    done = repertory("merge", str(tmp_path / "out"), *steps, "--method", "greedy", "--eval-n", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    evaluated = []
    for score in record["scores"]:
        (line,) = read_lines(Path(score["run"]) / "eval.jsonl")
        assert line["n"] == 4 and line["split"] == "held_out" and line["success"] == score["success"]
        assert line["success_greedy"] is None
        evaluated.append(yaml.safe_load((Path(score["run"]) / "config.yaml").read_text())["model"]["path"])
    assert evaluated == [*steps, str(tmp_path / ".out.partial")]
    best = max(record["scores"][:2], key=lambda s: s["success"])
    joined = record["scores"][2]["success"] > best["success"]
    assert len(record["checkpoints"]) == 1 + joined
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def mistakes(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "bare").mkdir()
    out, wide = str(tmp_path / "out"), str(make_run(tmp_path / "wide", 0, intermediate=32))
    anonymous = make_run(tmp_path / "anonymous", 0) / "checkpoints" / "step=5"
    (anonymous / "repertory.yaml").unlink()
    cut = make_run(tmp_path / "cut", 0)
    (cut / "checkpoints" / "step=5" / "model.safetensors").write_bytes(b"half")
    lines = ["--method", "lines"]
    return {
        "one for a soup": ([out, runs[0]], "two checkpoints or more"),
        "out is full": ([str(tmp_path / "full"), *runs], "not an empty folder"),
        "no such folder": ([out, runs[0], str(tmp_path / "none")], "no such folder"),
        "not a model": ([out, runs[0], str(tmp_path / "bare")], "neither a checkpoint"),
        "damaged": ([out, runs[0], str(cut)], "step=5 is damaged, and passed over: model.safetensors has 4 bytes"),
        "another shape": ([out, runs[0], wide], "model.layers.0.mlp."),
        "another base": ([out, runs[0], *lines, "--base", wide, "--alpha", "0"], "model.layers.0.mlp."),
        "no base": ([out, *runs, *lines], "--base"),
        "no alpha": ([out, runs[0], *lines, "--base", runs[1]], "--alpha"),
        "base for a soup": ([out, *runs, "--base", runs[0]], "--base does not belong to --method uniform"),
        "alpha for a soup": ([out, *runs, "--alpha", "0"], "--alpha does not belong to --method uniform"),
        "tasks for lines": ([out, *runs, *lines, "--base", wide, "--eval-n", "3"], "--eval-n does not belong"),
        "nothing to score by": ([out, str(anonymous), *runs, "--method", "greedy"], "no repertory.yaml"),
    }


def test_a_mistake_is_one_message(runs, tmp_path, monkeypatch, capsys):
    cases = mistakes(runs, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    capsys.readouterr()
    for arguments, says in cases.values():
        monkeypatch.setattr(sys, "argv", ["repertory", "merge", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and says in err and err.startswith("error:"), (arguments, out, err)
        assert "Traceback" not in err and len(err.splitlines()) == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_help_shows_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["repertory", "merge", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "repertory merge runs/soup" in out and "Example" in out
