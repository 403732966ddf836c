"""What a name sets, what a user's own keys do to it, and every pair of settings that do not go together."""

from typing import Any, get_args

import pytest
import yaml

from rl.config_algo import AlgoConfig, AlgoName, CriticConfig
from rl.config_file import ConfigError, dump_config, load_config
from rl.config_stage import RlStage

NAMES = get_args(AlgoName)


@pytest.fixture
def load(tmp_path):
    """The algorithm of a run's only stage, as its file has it on line 6."""

    def load(algo: Any, *overrides: str) -> AlgoConfig:
        text = "model: {path: m}\nenv: {name: calculator}\nstages:\n  - kind: rl\n    steps: 1\n    algo: "
        (tmp_path / "run.yaml").write_text(text + yaml.safe_dump(algo, default_flow_style=True, width=10_000))
        (stage,) = load_config(tmp_path / "run.yaml", overrides).stages
        assert isinstance(stage, RlStage)
        return stage.algo

    return load


# -- what a name sets -------------------------------------------------------------------------------------------------

PAPERS = """
                       group  credit   advantage  baseline       normalise   surrogate      low    high   aggregation   kl
grpo                   8      outcome  episode    group_mean     group_std   clip           0.2    0.2    sequence      loss/k3
dr_grpo                8      outcome  episode    group_mean     none        clip           0.2    0.2    fixed_length  loss/k3
dapo                   8      outcome  episode    group_mean     group_std   clip           0.2    0.28   token         loss/k3
gspo                   8      outcome  episode    group_mean     group_std   sequence_clip  0.0003 0.0004 sequence      loss/k3
cispo                  8      outcome  episode    group_mean     group_std   cispo          None   5.0    token         loss/k3
rloo                   8      outcome  episode    leave_one_out  none        reinforce      0.2    0.2    sum           reward/k1
reinforce_pp           1      outcome  token      none           batch_std   clip           0.2    0.2    token         reward/k1
reinforce_pp_baseline  8      outcome  episode    group_mean     batch_std   clip           0.2    0.2    token         loss/k2
remax                  1      outcome  episode    greedy         none        reinforce      0.2    0.2    sum           reward/k1
ppo                    1      outcome  gae        none           batch_std   clip           0.2    0.2    token         reward/k1
epo                    1      turn     turn       none           max_return  reinforce      0.2    0.2    turn          loss/k3
"""  # noqa: E501
ROWS = {name: row for name, *row in map(str.split, PAPERS.strip().splitlines()[1:])}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_sets_what_its_paper_has(load, name):
    algo = load({"name": name})
    found = [
        algo.group_size, algo.credit, algo.advantage, algo.baseline, algo.normalise, algo.surrogate,
        algo.clip_low, algo.clip_high, algo.aggregation, f"{algo.kl.place}/{algo.kl.estimator}",
    ]  # fmt: skip
    assert [str(value) for value in found] == ROWS[name]
    assert (algo.kl.coefficient, algo.kl.used) == (0.0, False), "none has a KL term until it is told how much"
    assert (algo.needs_critic, algo.critic is not None) == ((name == "ppo",) * 2)
    assert algo.gamma == (0.99 if name == "epo" else 1.0)
    assert (algo.mini_batches, algo.epochs, algo.importance, algo.entropy_coefficient) == (1, 1, None, 0.0)
    assert (algo.proximal, algo.dual_clip) == ("behaviour", None)


def test_dapo_draws_again_and_punishes_length(load):
    algo = load({"name": "dapo"})
    assert [(f.name, f.removes) for f in algo.filters] == [("zero_variance", "both")]
    assert (algo.oversample, algo.overlong is not None) == (3.0, True)
    others = [load({"name": name}) for name in NAMES if name != "dapo"]
    assert not any(a.filters or a.overlong or a.oversample != 1 for a in others)


def test_without_a_name_it_is_grpo(load):
    assert load({}) == load({"name": "grpo"}) == AlgoConfig()


# -- a user's own keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_users_key_wins_and_changes_nothing_else(load, name):
    ours, theirs = load({"name": name, "clip_high": 0.37, "group_size": 6}), load({"name": name})
    assert (ours.clip_high, ours.group_size) == (0.37, 6)
    changed = {"clip_high": theirs.clip_high, "group_size": theirs.group_size}
    assert ours.model_copy(update=changed) == theirs
    assert load({"name": name}, "stages.0.algo.clip_high=0.37", "stages.0.algo.group_size=6") == ours


@pytest.mark.parametrize("name", NAMES)
def test_a_kl_coefficient_keeps_the_papers_place_and_estimator(load, name):
    theirs = load({"name": name}).kl
    both = (({"name": name, "kl": {"coefficient": 0.05}},), ({"name": name}, "stages.0.algo.kl.coefficient=0.05"))
    for algo in (load(*given) for given in both):
        assert (algo.kl.coefficient, algo.kl.place, algo.kl.estimator) == (0.05, theirs.place, theirs.estimator)
        assert algo.kl.used
    ours = load({"name": name, "kl": {"estimator": "k2", "final": 0.1}}).kl
    assert (ours.estimator, ours.place, ours.coefficient, ours.used) == ("k2", theirs.place, 0.0, True)


def test_lists_and_sections_of_a_name_can_be_emptied(load):
    algo = load({"name": "dapo", "filters": [], "oversample": 1, "overlong": None})
    assert (algo.filters, algo.overlong) == ((), None)
    assert load({"name": "ppo", "critic": {"lr": 1e-3}}).critic == CriticConfig(lr=1e-3, clip=0.2)


def test_what_is_dumped_loads_as_the_same_algorithm(tmp_path):
    """Every key is written out then, and none of the name's own may win over it."""
    algo = {"name": "reinforce_pp", "kl": {"coefficient": 0.1, "place": "loss", "estimator": "k3"}, "clip_high": 0.3}
    stage = {"kind": "rl", "steps": 1, "algo": algo}
    run = {"model": {"path": "m"}, "env": {"name": "calculator"}, "stages": [stage]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = load_config(tmp_path / "run.yaml")
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


# -- settings that do not go together ---------------------------------------------------------------------------------

ALONE = {"group_size": 1, "baseline": "none", "normalise": "none"}
AGAIN = {"proximal": "recompute"}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 1}, r"group_size is 1, .*group of one has no baseline"),
    ({"group_size": 1, "normalise": "none"}, r"group_size is 1, .*group of one has no baseline"),
    ({"group_size": 1, "baseline": "none"}, r"group_size is 1, .*group of one has no baseline"),
    ({"name": "rloo", "group_size": 1}, r"group_size is 1, .*group of one has no baseline"),
    ({**ALONE, "filters": [{"name": "zero_variance"}]}, r"group_size is 1, .*no variance.*drop the filter"),
    ({**ALONE, "filters": [{"name": "accuracy_band"}]}, r"group_size is 1, .*no variance.*drop the filter"),
    ({"name": "gspo", **AGAIN, "importance": {"level": "token"}}, r"whole sequence.*Use importance\.level: sequence"),
    ({"name": "gspo", "aggregation": "token"}, r"aggregation: token would weigh.*Use aggregation: sequence"),
    ({"name": "ppo", "critic": None}, r"advantage: gae needs the values of a critic.*Set algo\.critic"),
    ({"name": "ppo", "advantage": "turn_gae", "critic": None}, r"advantage: .*gae needs the values.*Set algo\.critic"),
    ({"critic": {}}, r"algo\.critic would train a value model that advantage: episode never asks"),
    ({"name": "ppo", "baseline": "group_mean", "group_size": 4}, r"critic is the baseline.*Use baseline: none"),
    ({"name": "remax", "advantage": "turn"}, r"baseline: greedy compares whole episodes.*Use advantage: episode"),
    ({"name": "remax", "credit": "dense"}, r"baseline: greedy .*another scale.*Use credit: outcome"),
    ({"name": "remax", "overlong": {}}, r"baseline: greedy .*another scale.*overlong: null"),
    ({"filters": [{"name": "void_turn"}, {"name": "void_turn"}]}, r"algo\.filters names a filter twice"),
    ({"name": "ppo", "normalise": "group_std", "group_size": 4}, r"differs from token to token: normalise: batch_std"),
    ({"name": "reinforce_pp", "normalise": "max_return"}, r"differs from token to token: normalise: batch_std"),
    ({"name": "reinforce_pp", "baseline": "group_mean", "group_size": 4}, r"advantage: token .*Use baseline: none"),
    ({"baseline": "none", "normalise": "max_return"}, r"normalise: max_return .*Use advantage: turn, baseline: none"),
    ({"name": "epo", "baseline": "group_mean", "group_size": 4}, r"normalise: max_return .*Use advantage: turn, base"),
    ({"gamma": 0.9}, r"advantage: episode has one number.*gamma has no effect"),
    ({"credit": "turn"}, r"advantage: episode adds the turns up.*credit: turn has no effect"),
    ({"name": "rloo", "mini_batches": 2}, r"mini_batches x epochs = 2 .*on-policy.*set algo\.importance"),
    ({"name": "epo", "epochs": 3}, r"mini_batches x epochs = 3 .*on-policy.*set algo\.importance"),
    ({"importance": {}}, r"clipped ratio is taken against the behaviour.*count it twice.*Use proximal: recompute"),
    ({"name": "gspo", "importance": {"level": "sequence"}}, r"clipped ratio .*count it twice.*Use proximal: recompute"),
    ({"name": "cispo", "importance": {}}, r"cispo's clipped weight corrects.*already.*Use proximal: recompute"),
    ({"name": "rloo", **AGAIN}, r"reinforce surrogate has no ratio.*Use proximal: behaviour"),
    ({"name": "cispo", "dual_clip": 3}, r"dual_clip bounds the clip surrogate, and surrogate is cispo"),
    ({"name": "gspo", "dual_clip": 3}, r"dual_clip bounds the clip surrogate, and surrogate is sequence_clip"),
    ({"clip_low": None}, r"surrogate: clip needs clip_low"),
    ({"name": "gspo", "clip_low": None}, r"surrogate: sequence_clip needs clip_low"),
    ({**AGAIN, "importance": {"kind": "masked", "low": 3.0}}, r"importance\.low is above importance\.high"),
    ({"oversample": 2}, r"oversample refills .*there are none.*Set algo\.filters"),
]


@pytest.mark.parametrize(("settings", "says"), CONTRADICTIONS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_what_does_not_go_together_is_refused_with_the_setting_and_the_reason(load, settings, says):
    with pytest.raises(ConfigError, match=rf"run\.yaml:6: stages\[0\]\.algo: .*{says}"):
        load(settings)


def test_every_contradiction_has_a_case_above_that_it_alone_refuses(monkeypatch):
    """So that a line cannot be lost: with the check off, each line is the only one that is true of some case."""
    lines = AlgoConfig._contradictions
    monkeypatch.setattr(AlgoConfig, "_contradictions", lambda self: [])
    alone = set()
    for settings, _ in CONTRADICTIONS:
        true = [i for i, (wrong, _) in enumerate(lines(AlgoConfig.model_validate(settings))) if wrong]
        alone |= set(true) if len(true) == 1 else set()
    assert alone == set(range(len(lines(AlgoConfig()))))


@pytest.mark.parametrize(
    "settings",
    [
        ALONE,
        {"name": "gspo", **AGAIN, "importance": {"level": "sequence"}},
        {**AGAIN, "importance": {"kind": "truncated", "high": 0.4}},
        {"name": "gspo", "advantage": "turn", "credit": "turn", "gamma": 0.9},
        {"name": "ppo", "advantage": "turn_gae", "credit": "turn", "group_size": 4, "normalise": "none"},
        {"name": "rloo", "mini_batches": 2, "importance": {}},
        {"name": "rloo", "advantage": "turn"},
        {"name": "reinforce_pp", "gamma": 0.9, "credit": "dense", "dual_clip": 3},
        {"name": "cispo", **AGAIN, "importance": {"kind": "masked", "low": 2.0, "high": 2.0}, "epochs": 2},
        {"filters": [{"name": "void_turn", "removes": "loss"}, {"name": "accuracy_band", "low": 0.2}], "oversample": 2},
        {"aggregation": "fixed_length"},
    ],
    ids=str,
)
def test_what_goes_together_is_taken(load, settings):
    algo = load(settings)
    assert all(getattr(algo, name) == value for name, value in settings.items() if not isinstance(value, dict | list))


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"name": "accuracy_band", "low": 0.8, "high": 0.2}, r"low 0\.8 is above high 0\.2: no group would be kept"),
        ({"name": "zero_variance", "removes": "loss"}, r"zero_variance takes whole groups.*removes: both"),
        ({"name": "accuracy_band", "removes": "statistics"}, r"accuracy_band takes whole groups.*removes: both"),
    ],
)
def test_a_filter_that_contradicts_itself_is_refused(load, filters, says):
    with pytest.raises(ConfigError, match=rf"run\.yaml:6: stages\[0\]\.algo\.filters\[0\]: {says}"):
        load({"filters": [filters]})


@pytest.mark.parametrize(
    ("algo", "says"),
    [
        ({"name": "grppo"}, r"\.name: .*'grpo'.* or 'epo'.*\(got 'grppo'\)"),
        ({"name": ["grpo"]}, r"\.name: .*'grpo'.* or 'epo'"),
        ({"name": None}, r"\.name: .*'grpo'.* or 'epo'"),
        ("grpo", r": .*dictionary.*'grpo'"),
        ({"kl": 0.1}, r"\.kl: .*dictionary.*0\.1"),
        ({"kl": {"coeficient": 0.1}}, r"\.kl\.coeficient .*mean stages\[0\]\.algo\.kl\.coefficient\?"),
        ({"name": "rloo", "kl": {"place": "here"}}, r"\.kl\.place: .*'loss' or 'reward'"),
        ({**AGAIN, "importance": {"hihg": 2}}, r"\.importance\.hihg .*mean stages\[0\]\.algo\.importance\.high\?"),
        ({"name": "ppo", "critic": {"lr": 0}}, r"\.critic\.lr: .*greater than 0"),
        ({"filters": [{"name": "void"}]}, r"\.filters\[0\]\.name: .*'void_turn'"),
        ({"filters": [{"name": "void_turn", "remove": "loss"}]}, r"\.filters\[0\]\.remove .*filters\[0\]\.removes\?"),
        ({"overlong": {"limits": 9}}, r"\.overlong\.limits .*mean stages\[0\]\.algo\.overlong\.limit\?"),
        ({"clip_low": 1.0}, r"\.clip_low: .*less than 1"),
        ({"gamma": 0}, r"\.gamma: .*greater than 0"),
        ({"dual_clip": 1}, r"\.dual_clip: .*greater than 1"),
    ],
    ids=str,
)
def test_a_mistake_inside_the_algorithm_is_found_where_it_stands(load, algo, says):
    with pytest.raises(ConfigError, match=rf"run\.yaml:6: stages\[0\]\.algo{says}"):
        load(algo)


def test_a_contradiction_made_on_the_command_line_is_named_there(load):
    with pytest.raises(ConfigError, match=r"command line: stages\[0\]\.algo: group_size is 1"):
        load({"name": "grpo"}, "stages.0.algo={group_size: 1}")
