"""A configuration that is wrong gets one clear error: which setting, where it stands, what to write instead."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rl.config import Config
from rl.config_file import ConfigError, dump_config, load_config, placing_errors
from rl.config_stage import RlStage

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
model:
  scratch: {layers: 2}
env:
  name: calculator
stages:
  - kind: sft
    steps: 3
  - kind: rl
    steps: 2
    tasks_per_step: 4
    algo:
      group_size: 8
      clip_low: 0.1
"""


@pytest.fixture
def load(tmp_path):
    """Load GOOD with the first `old` replaced by `new`, and overrides."""

    def load(old: str = "", new: str = "", overrides: tuple[str, ...] = ()) -> Config:
        assert old in GOOD
        path = tmp_path / "run.yaml"
        path.write_text(GOOD.replace(old, new, 1))
        return load_config(path, overrides)

    return load


def test_the_good_one_is_good(load):
    config = load()
    assert isinstance(config.stages[1], RlStage)
    assert (config.stages[1].algo.clip_low, config.stages[1].algo.clip_high) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        # an unknown key: its line, its indexed path, the nearest name
        ("clip_low", "clip_lwo", r"run\.yaml:13: stages\[1\]\.algo\.clip_lwo .*mean stages\[1\]\.algo\.clip_low\?"),
        ("tasks_per_step", "task_per_step", r"run\.yaml:10: stages\[1\]\.task_per_step .*stages\[1\]\.tasks_per_step"),
        ("layers: 2", "layer: 2", r"run\.yaml:2: model\.scratch\.layer .*mean model\.scratch\.layers\?"),
        ("env:", "envs:", r"run\.yaml:3: envs is not a setting\. Did you mean env\?"),
        ("  name: calculator", "  name: calculator\n  max_turn: 3", r"run\.yaml:5: env\.max_turn .*env\.max_turns"),
        # nothing near: what there is
        ("clip_low", "zzzzzz", r"stages\[1\]\.algo\.zzzzzz is not a setting\. Known here: .*clip_low"),
        # a wrong type or value
        ("steps: 3", "steps: many", r"run\.yaml:7: stages\[0\]\.steps: .*integer.*'many'"),
        ("steps: 3", "steps: 0", r"run\.yaml:7: stages\[0\]\.steps: .*greater than 0"),
        ("clip_low: 0.1", "clip_low: [0.1]", r"run\.yaml:13: stages\[1\]\.algo\.clip_low: .*number"),
        ("clip_low: 0.1", "baseline: mean", r"run\.yaml:13: stages\[1\]\.algo\.baseline: .*'group_mean'.* or 'none'"),
        ("kind: rl", "kind: rll", r"run\.yaml:8: stages\[1\].*'rl'"),
        ("kind: sft", "kinds: sft", r"run\.yaml:6: stages\[0\].*kind"),
        # missing
        ("    steps: 2\n", "", r"run\.yaml:8: stages\[1\]\.steps is required and is not set"),
        ("env:\n  name: calculator\n", "", r"run\.yaml: env is required and is not set"),
        # settings that do not go together
        ("group_size: 8", "group_size: 1", r"run\.yaml:11: stages\[1\]\.algo: .*group of one has no baseline"),
        ("clip_low: 0.1", "mini_batches: 5", r"4 tasks x 8 samples = 32 episodes .*not divide .*mini_batches = 5"),
        ("clip_low: 0.1", "fixed_length: 0", r"run\.yaml:13: stages\[1\]\.algo\.fixed_length: .*greater than 0"),
        ("env:", "rollout: {top_p: 0.9}\nenv:", r"top_p.*bias every importance ratio"),
        ("env:", "rollout: {top_k: 5}\nenv:", r"top_k.*bias every importance ratio"),
        ("scratch: {layers: 2}", "dtype: float32", r"run\.yaml:1: model: give either `path`.*or `scratch`"),
        ("scratch: {layers: 2}", "scratch: {}\n  path: here", r"model: give either `path`.*or `scratch`"),
        ("  name: calculator", "  name: calculator\n  min_operations: 9", r"env: min_operations 9 is above"),
        # not settings at all
        ("stages:", "stages: [", r"run\.yaml: not valid YAML"),
        (GOOD, "- a list", r"run\.yaml: expected settings"),
        (GOOD, "", r"run\.yaml: expected settings"),
    ],
)
def test_one_clear_error(load, old, new, says):
    with pytest.raises(ConfigError, match=says):
        load(old, new)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.1.algo.clip_lwo=0.1", r"command line: stages\[1\]\.algo\.clip_lwo .*mean stages\[1\]\.algo\.clip_low"),
        ("stages.1.algo.clip_low=wide", r"command line: stages\[1\]\.algo\.clip_low: .*'wide'"),
        ("learnr.micro_batch_tokens=9", r"command line: learnr is not a setting\. Did you mean learner"),
        ("stages.7.steps=1", r"stages is a list of 2 items"),
        ("stages.-1.steps=1", r"stages is a list of 2 items"),
        ("stages.first.steps=1", r"stages is a list of 2 items; use an index from 0 on, not first"),
        ("env.name.first=x", r"env\.name\.first: env\.name is a value"),
        ("stages.1.steps", r"'stages\.1\.steps' is not an override: write key\.sub=value"),
        ("=3", r"is not an override"),
        ("model.scratch={layers: [", r"model\.scratch.*YAML"),
    ],
)
def test_one_clear_error_for_the_command_line(load, override, says):
    with pytest.raises(ConfigError, match=says):
        load(overrides=(override,))


def test_every_mistake_is_named_in_one_go(load):
    with pytest.raises(ConfigError) as error:
        load("clip_low", "clip_lwo", ("stages.0.steps=none",))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("says", "overrides", "where"),
    [
        ("env.datasets[1].dataset: 'x' is no dataset", [], "{path}:7: "),
        ("env.datasets[1].settings.y is not a setting", ["env.datasets.1.settings.y=1"], "command line: "),
        ("env.dataset: none", [], "{path}:3: "),
        ("model.scratch trains its tokenizer", [], "{path}:1: "),
        ("rows.jsonl: row 3: `answer` is missing", [], ""),
        ("the run ended: ValueError", [], ""),
        ("{path}:2: env.name: no", [], ""),
    ],
)
def test_what_only_the_environment_can_judge_is_placed_too(tmp_path, says, overrides, where):
    path = tmp_path / "env.yaml"
    path.write_text(
        "model: {scratch: {}}\n\nenv:\n  name: python\n  datasets:\n    - {dataset: gcd}\n    - {dataset: x}\n"
    )
    says = says.format(path=path)
    with pytest.raises(ConfigError) as error, placing_errors(path, overrides):
        raise ConfigError(says)
    assert str(error.value) == where.format(path=path) + says


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_are_yaml_and_later_ones_win(load):
    config = load(
        overrides=(
            "run.seed=7",
            "run.overwrite=true",
            "stages.1.algo.clip_low=0.3",
            "stages.1.algo.clip_low=0.15",
            "stages.1.algo.kl.coefficient=1e-3",
            "model.scratch={layers: 1, hidden: 256}",
            "learner.betas=[0.8, 0.99]",
            "generator.dtype=null",
            "env.operators=+-*",
        )
    )
    algo = config.stages[1].algo
    assert (config.run.seed, config.run.overwrite) == (7, True)
    assert (algo.clip_low, algo.kl.coefficient) == (0.15, 1e-3)
    assert (config.model.scratch.layers, config.model.scratch.hidden) == (1, 256)
    assert config.learner.betas == (0.8, 0.99)
    assert config.generator.dtype is None
    assert config.env.operators == "+-*"


def test_an_evaluation_may_use_top_p(load):
    """Only an rl stage has importance ratios to bias."""
    rl_stage = GOOD[GOOD.index("  - kind: rl") :]
    assert load(rl_stage, "  - kind: eval\n", ("rollout.top_p=0.9",)).rollout.top_p == 0.9


def test_a_group_of_one_is_fine_without_a_baseline(load):
    config = load(overrides=("stages.1.algo={group_size: 1, baseline: none, normalise: none}",))
    assert config.stages[1].algo.group_size == 1


def test_what_is_dumped_loads_as_the_same_configuration(load, tmp_path):
    """runs/<name>/config.yaml is what a resumed run reads."""
    config = load(overrides=("stages.1.lr=3.3e-05",))
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


def test_an_override_changes_one_of_the_places_that_an_alias_repeats(load):
    text = "stages:\n  - &eval {kind: eval, n: 8}\n  - *eval\n  - {<<: *eval, greedy: false}\n"
    old = GOOD[GOOD.index("stages:") :]
    config = load(old, text, overrides=("stages.1.n=2",))
    assert [(s.n, s.greedy) for s in config.stages] == [(8, True), (2, True), (8, False)]


def test_settings_cannot_be_changed_after_they_were_checked(load):
    with pytest.raises(ValueError, match="frozen"):
        load().run.seed = 3


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path):
    if "stages" not in yaml.safe_load(path.read_text()):
        pytest.skip("not a run: cluster and serving settings have their own schema")
    load_config(path)


def test_there_are_shipped_configurations():
    assert (ROOT / "configs" / "quickstart.yaml").is_file()


def test_reading_a_configuration_imports_no_torch():
    """A mistyped key must answer at once; torch takes seconds."""
    code = "import sys, rl.config, rl.config_file; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
