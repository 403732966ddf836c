"""Gymnasium environments through the episode loop, and an environment that an installed package brings."""

import gymnasium
import pytest
from gymnasium import spaces

from rl.config_env import CustomEnvConfig, GymnasiumConfig
from rl.env import Action, World
from rl.envs.gymnasium import Gymnasium
from rl.episode import Identity, Limits, StopReason, run_episode
from rl.policy import Sampling, ScriptedPolicy
from rl.reward import Score

LAKE = {"id": "FrozenLake-v1", "args": {"is_slippery": False}, "actions": ("left", "down", "right", "up")}


class Echo(gymnasium.Env):
    """Texts in, texts out: two that are the same end it."""

    action_space = spaces.Text(8, charset="abc")
    observation_space = spaces.Text(20)
    metadata = {"render_modes": []}  # noqa: RUF012

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.last = "abc"[int(self.np_random.integers(3))]
        return self.last, {}

    def step(self, action):
        done, self.last = action == self.last, action
        return action[::-1], float(done), done, False, {}


gymnasium.register("Echo-v0", Echo)


def config(**settings) -> GymnasiumConfig:
    return GymnasiumConfig(name="gymnasium", **settings)


@pytest.fixture
def play(codec):
    async def play(texts, settings, task=None):
        world = World(settings, 0)
        task = task or world.source.task("train", 0)
        policy = ScriptedPolicy(codec, ({"role": "assistant", "content": t} for t in texts))
        return await run_episode(
            world.env(), task, policy, codec, sampling=Sampling(), limits=Limits(settings.max_turns, 3000),
            identity=Identity(0, 0, task.id),
        )  # fmt: skip

    return play


async def test_a_way_over_the_lake(play):
    way = ["down", "Down.", "I go right", "left? no: right", "DOWN", "right"]
    episode = await play(way, config(**LAKE, instructions="Reach G."))
    first = episode.prompt[0]["content"].splitlines()
    assert first[:3] == ["Reach G.", "Answer with one of: left, down, right, up.", "[S]FFF"]
    assert episode.turns[0].observation[0]["content"].splitlines()[:3] == ["  (Down)", "SFFF", "[F]HFH"]
    assert (episode.stop_reason, [t.reward for t in episode.turns]) == (StopReason.DONE, [0, 0, 0, 0, 0, 1])
    from rl.envs.gymnasium import nothing_more

    assert Score.of(nothing_more, episode).success
    drowned = await play(["down", "right"], config(**LAKE))
    assert drowned.stop_reason == StopReason.DONE and not Score.of(nothing_more, drowned).success


async def test_a_turn_that_names_no_action_is_void_and_moves_nothing(play):
    episode = await play(["north", "2", "down"], config(**LAKE, max_turns=3))
    assert [t.flags for t in episode.turns] == [("void",), ("void",), ()]
    assert episode.turns[0].observation[0]["content"] == "Answer with one of: left, down, right, up."
    by_number = await play(["go 1"], config(id="FrozenLake-v1", max_turns=1))
    assert by_number.turns[0].flags == ()


async def test_observations_without_a_drawing(play):
    episode = await play(["1"], config(id="Blackjack-v1", max_turns=1))
    shown = episode.prompt[0]["content"].splitlines()
    assert shown[0] == "Answer with one of: 0, 1." and shown[1].startswith("Observation: (")


async def test_texts(play):
    settings = config(id="Echo-v0", max_turns=4)
    world = World(settings, 0)
    start = (await play(["x"], config(id="Echo-v0", max_turns=1))).prompt[0]["content"]
    assert start in ("Observation: a", "Observation: b", "Observation: c")
    episode = await play(["xyz", "abc", "abc"], settings)
    assert [t.flags for t in episode.turns] == [("void",), (), ()]
    assert episode.turns[1].observation[0]["content"] == "Observation: cba"
    assert episode.turn_reward == 1 and episode.stop_reason == StopReason.DONE
    tasks = [world.source.task("train", i) for i in range(8)]
    opened = [(await Gymnasium(settings).reset(t)).messages for t in tasks]
    assert opened == [(await Gymnasium(settings).reset(t)).messages for t in tasks], "a seed is an episode"
    assert len({str(m) for m in opened}) > 1


def test_no_seed_is_in_both_splits():
    source = World(config(**LAKE), 0).source
    train, held_out = ({source.task(s, i).seed for i in range(500)} for s in ("train", "held_out"))
    assert len(train) > 490 and not train & held_out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"id": "FrozenLake-v99"}, "gymnasium does not make 'FrozenLake-v99'"),
        ({"id": "FrozenLake-v1", "args": {"slippery": 1}}, "gymnasium does not make 'FrozenLake-v1'.*slippery"),
        ({"id": "FrozenLake-v1", "actions": ("a", "b")}, r"env\.actions names 2 actions, and FrozenLake-v1 has Disc"),
        ({"id": "Pendulum-v1"}, "the actions of Pendulum-v1 are Box.*expected Discrete or Text"),
    ],
)
def test_what_cannot_be_played_is_named(settings, said):
    with pytest.raises(ValueError, match=said):
        World(config(**settings), 0)


PACKAGE = """
from rl.env import Observation, Step
from rl.task import Task

class Tasks:
    def size(self, split): return None
    def task(self, split, index): return Task(f"{split}{index}", {}, str(index))

class Say:
    tasks = staticmethod(lambda args, seed: Tasks())
    def __init__(self, args): self.word = args["word"]
    async def reset(self, task): return Observation([{"role": "user", "content": f"Say {self.word}."}])
    async def step(self, action): return Step(Observation([]), float(action.text == self.word), done=True)
    async def close(self): pass
"""


async def test_an_installed_package_brings_an_environment_by_name(tmp_path, monkeypatch, play):
    """One file and one line: nothing of this repository is touched."""
    (tmp_path / "their_env.py").write_text(PACKAGE)
    info = tmp_path / "their_env-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-env\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[repertory.envs]\nsay = their_env:Say\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = CustomEnvConfig(name="custom", path="say", args={"word": "hello"})
    episode = await play(["hello"], settings)
    assert episode.prompt[0]["content"] == "Say hello." and episode.turn_reward == 1
    with pytest.raises(ValueError, match=r"'sing' is neither a dotted path.*installed: say"):
        World(CustomEnvConfig(name="custom", path="sing"), 0)


def test_an_action_is_taken_by_its_whole_name():
    env = Gymnasium(config(id="FrozenLake-v1", actions=("a", "ab", "b", "c")))
    env._env = gymnasium.make("FrozenLake-v1")
    assert [env._chosen(t) for t in ("ab", "a b", "abc", "A", "")] == [1, 2, None, 0, None]
    assert env._chosen(Action("c, then a").text) == 0


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such_module_of_theirs:Say", r"'no_such_module_of_theirs:Say' of the entry point 'say'.*No module named"),
        ("json:Say", r"'json:Say' of the entry point 'say'.*has no attribute 'Say'"),
    ],
)
def test_an_entry_point_that_cannot_be_loaded_is_named(target, said, tmp_path, monkeypatch):
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[repertory.envs]\nsay = {target}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=rf"env\.path: cannot load {said}"):
        World(CustomEnvConfig(name="custom", path="say"), 0)


def test_an_environment_without_tasks_is_named():
    with pytest.raises(ValueError, match=r"env\.path: collections\.Counter has no `tasks`"):
        World(CustomEnvConfig(name="custom", path="collections.Counter"), 0)
