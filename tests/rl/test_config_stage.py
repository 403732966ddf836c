"""What the settings of a stage, and of a run around it, must have together; and what follows from them."""

from typing import Any

import pytest
import yaml

from rl.config import Config
from rl.config_file import ConfigError, load_config
from rl.config_stage import ExampleStage, PreferenceStage, RewardModelStage, RlStage, SftStage, Stage

SAMPLE = {"tasks": 8, "samples": 2}
SFT = {"kind": "sft", "steps": 5}
SELF = {**SFT, "sample": SAMPLE, "data_stage": "successes"}
PREFERENCE = {"kind": "preference", "steps": 5, "sample": SAMPLE}
REWARD_MODEL = {"kind": "reward_model", "steps": 5, "sample": SAMPLE}
RL = {"kind": "rl", "steps": 5}
EVAL = {"kind": "eval"}


@pytest.fixture
def load(tmp_path):
    """A run whose first stage stands on line 4, and each of the others a line further."""

    def load(*stages: Any, **sections: Any) -> Config:
        lines = ["model: {path: m}", "env: {name: calculator}", "stages:"]
        for stage in stages:
            lines.append("  - " + yaml.safe_dump(stage, default_flow_style=True, width=10_000).strip())
        text = "\n".join(lines) + "\n" + (yaml.safe_dump(sections) if sections else "")
        (tmp_path / "run.yaml").write_text(text)
        return load_config(tmp_path / "run.yaml")

    return load


@pytest.fixture
def stage(load):
    def stage(settings: Any) -> Stage:
        return load(settings).stages[0]

    return stage


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        # examples
        ({**SFT, "rounds": 2}, r": rounds without `sample` .*same examples again"),
        ({**SELF, "mix_previous": 0.5}, r": mix_previous mixes in the round before, and rounds is 1"),
        ({**SFT, "sample": SAMPLE}, r": `sample` and `data_stage` go together"),
        ({**SFT, "data_stage": "s3ft"}, r": `sample` and `data_stage` go together"),
        # asynchronous
        ({**RL, "max_staleness": 1, "algo": {"name": "rloo"}}, r": max_staleness is 1, and the reinforce surrogate"),
        # pairs
        ({"kind": "preference", "steps": 5}, r": pairs come from .*`sample`.*`pairs\.path`.*one of both"),
        ({**PREFERENCE, "pairs": {"path": "p"}}, r": pairs come from .*`sample`.*`pairs\.path`.*one of both"),
        ({"kind": "reward_model", "steps": 5}, r": pairs come from .*`sample`.*`pairs\.path`.*one of both"),
        ({**PREFERENCE, "sample": {"samples": 1}}, r": pairs\.rule: right_wrong compares .*sample\.samples is 1"),
        (
            {**REWARD_MODEL, "sample": {"samples": 1}, "pairs": {"rule": "margin"}},
            r": pairs\.rule: margin compares .*sample\.samples is 1",
        ),
        *[
            (
                {**PREFERENCE, "loss": loss, "label_smoothing": 0.1},
                rf": label_smoothing is defined for .*loss is {loss}",
            )
            for loss in ("hinge", "ipo", "simpo", "kto")
        ],
        # parameters
        ({**SFT, "param_filter": {"kind": "half", "value": "x"}}, r"\.param_filter: kind half takes no value"),
        ({**SFT, "param_filter": {"kind": "pattern"}}, r"\.param_filter: .*pattern and function need one"),
        ({**RL, "param_filter": {"kind": "function"}}, r"\.param_filter: .*pattern and function need one"),
        # groups
        (
            {**RL, "tasks_per_step": 3, "algo": {"group_size": 5, "mini_batches": 4}},
            r": a batch of 3 tasks x 5 samples = 15 episodes does not divide into algo\.mini_batches = 4",
        ),
        # single settings
        ({**SFT, "masked_thought": {"rate": 1.0}}, r"\.masked_thought\.rate: .*less than 1"),
        ({**SFT, "masked_thought": {"rates": 0.4}}, r"\.masked_thought\.rates .*masked_thought\.rate\?"),
        ({**SFT, "one_token_rollout": {"temperature": 0}}, r"\.one_token_rollout\.temperature: .*greater than 0"),
        ({**SELF, "rounds": 2, "mix_previous": 1}, r"\.mix_previous: .*less than 1"),
        ({**PREFERENCE, "label_smoothing": 0.5}, r"\.label_smoothing: .*less than 0\.5"),
        ({**PREFERENCE, "beta": 0}, r"\.beta: .*greater than 0"),
        ({**PREFERENCE, "loss": "dpo"}, r"\.loss: .*'sigmoid'.* or 'kto'"),
        ({**PREFERENCE, "aux_loss": {"coefficient": 1}}, r"\.aux_loss\.function is required and is not set"),
        ({**RL, "horizon": {"every": 5, "turns": []}}, r"\.horizon\.turns: .*at least 1 item"),
        ({**RL, "curriculum": {"order": "hard"}}, r"\.curriculum\.order: .*'potential' or 'easy_to_hard'"),
        ({"kind": "dpo", "steps": 1}, r": .*'sft'.*'preference'.*'reward_model'.*'eval'.*'rl'"),
    ],
    ids=str,
)
def test_a_stage_that_cannot_be_is_refused_where_it_stands(load, settings, says):
    with pytest.raises(ConfigError, match=rf"run\.yaml:4: stages\[0\]{says}"):
        load(settings)


def test_the_line_is_that_of_the_stage(load):
    with pytest.raises(ConfigError, match=r"run\.yaml:5: stages\[1\]: rounds without `sample`"):
        load(SFT, {**SFT, "rounds": 2}, SFT)


@pytest.mark.parametrize(
    "settings",
    [
        {**SELF, "rounds": 3, "mix_previous": 0.5},
        {**SFT, "param_filter": {"kind": "half"}},
        {**RL, "param_filter": {"kind": "pattern", "value": "mlp"}},
        {**PREFERENCE, "label_smoothing": 0.1},
        {**PREFERENCE, "sample": {"samples": 1}, "pairs": {"rule": "demonstration"}, "reference": "last_iterate"},
        {"kind": "reward_model", "steps": 5, "pairs": {"path": "pairs.jsonl"}},
        {**RL, "tasks_per_step": 3, "algo": {"group_size": 4, "mini_batches": 6}},
    ],
    ids=str,
)
def test_what_can_be_is_taken(stage, settings):
    assert stage(settings).kind == settings["kind"]


# -- a run around it --------------------------------------------------------------------------------------------------

FILTERED = {**SFT, "param_filter": {"kind": "half"}}
LORA = {"learner": {"lora": {}}}


@pytest.mark.parametrize(
    ("stages", "sections", "says"),
    [
        ([RL], {"rollout": {"top_p": 0.9}}, r"an rl stage refuses rollout\.top_p and rollout\.top_k: .*bias every"),
        ([SFT, {**RL, "start": 1}], {}, r"stages\[1\]\.start: 1 is not a stage before it that trains\. Those are: 0"),
        ([{**RL, "max_staleness": 1}], {"placement": {"time_share": True}}, r"stages\[0\]\.max_staleness has the gen"),
        ([SFT], {"placement": {"time_share": True}}, r"placement\.time_share moves .*zero_stage to 1"),
        ([EVAL, {**RL, "start": 0}], {}, r"stages\[1\]\.start: 0 is not a stage .*: none"),
        ([SFT, RL], {"rollout": {"top_k": 5}}, r"an rl stage refuses rollout\.top_p and rollout\.top_k: .*bias every"),
        (
            [SFT, FILTERED],
            {"learner": {"weight_decay": 0.1}},
            r"stages\[1\]\.param_filter freezes parameters, and learner\.weight_decay = 0\.1 would shrink them",
        ),
        ([RL], {"reward": {"model": "trained"}}, r"reward\.model is `trained`, and no stage is a reward_model"),
        ([SFT, REWARD_MODEL], LORA, r"a reward_model stage trains a full model beside .*drop learner\.lora"),
    ],
)
def test_stages_that_do_not_go_with_the_run_are_refused_with_the_remedy(load, stages, sections, says):
    with pytest.raises(ConfigError, match=rf"run\.yaml: {says}"):
        load(*stages, **sections)


@pytest.mark.parametrize(
    ("stages", "sections"),
    [
        ([SFT, PREFERENCE], {"rollout": {"top_p": 0.9, "top_k": 5}}),
        ([FILTERED, {"kind": "eval"}], {"learner": {"weight_decay": 0.0}}),
        ([SFT], {"learner": {"weight_decay": 0.1}}),
        ([REWARD_MODEL, RL], {"reward": {"model": "trained"}}),
        ([RL], {"reward": {"model": "a/folder"}}),
        ([SFT, PREFERENCE, RL], LORA),
    ],
)
def test_a_run_that_goes_together_is_taken(load, stages, sections):
    assert len(load(*stages, **sections).stages) == len(stages)


# -- what follows from the settings -----------------------------------------------------------------------------------


def test_rounds_take_the_stages_steps_each(stage):
    found = [stage(settings) for settings in (SFT, {**SELF, "rounds": 3})]
    assert [s.total_steps for s in found if isinstance(s, ExampleStage)] == [5, 15]


@pytest.mark.parametrize(
    ("settings", "lora", "source", "needs"),
    [
        (SFT, False, "stage_start", False),
        (REWARD_MODEL, False, "stage_start", False),
        (RL, False, "stage_start", False),
        ({**RL, "algo": {"kl": {"coefficient": 0.1}}}, False, "stage_start", True),
        ({**RL, "algo": {"kl": {"final": 0.1}}}, False, "stage_start", True),
        ({**RL, "algo": {"kl": {"final": 0.0}}}, False, "stage_start", False),
        ({**RL, "algo": {"kl": {"coefficient": 0.1}}}, True, "stage_start", False),
        ({**RL, "algo": {"kl": {"coefficient": 0.1}}}, True, "initial", True),
        (PREFERENCE, False, "stage_start", True),
        (PREFERENCE, True, "stage_start", False),
        ({**PREFERENCE, "reference": "last_iterate"}, False, "stage_start", False),
        ({**PREFERENCE, "loss": "simpo"}, False, "stage_start", False),
        ({**PREFERENCE, "loss": "kto"}, False, "stage_start", True),
    ],
)
def test_who_asks_the_reference_actors(load, settings, lora, source, needs):
    """With an adapter the learner is its own reference, as long as that is where the stage began."""
    config = load(settings, reference={"source": source}, **(LORA if lora else {}))
    assert config.needs_reference == needs == config.stage_needs_reference(config.stages[0])


def test_defaults_of_the_methods_are_their_papers(stage):
    masked, rolled = stage({**SFT, "masked_thought": {}}), stage({**SFT, "one_token_rollout": {}})
    assert isinstance(masked, SftStage) and isinstance(rolled, SftStage)
    assert masked.masked_thought is not None and rolled.one_token_rollout is not None
    m, o = masked.masked_thought, rolled.one_token_rollout
    assert (m.rate, m.warmup, m.replacement) == (0.4, pytest.approx(2 / 3), "random")
    assert (o.samples, o.temperature, o.wrong_reward) == (256, 1.3, -0.1)
    preference, reward_model, rl = stage(PREFERENCE), stage(REWARD_MODEL), stage(RL)
    assert isinstance(preference, PreferenceStage) and preference.loss == "sigmoid" and preference.beta == 0.1
    assert isinstance(reward_model, RewardModelStage) and reward_model.loss == "last_token"
    assert isinstance(rl, RlStage) and rl.algo.name == "grpo"
