"""Games of RLlib's through the one episode loop: whose turn it is, what each saw, and who must not wait for ever."""

import asyncio
import random
import threading
import time

import numpy as np
import pytest
from conftest import repertory
from gymnasium import spaces
from ray.rllib.env.multi_agent_env import MultiAgentEnv

from actors.multi_agent import Game, MultiAgent
from rl.chat import ChatCodec
from rl.config_env import MultiAgentConfig
from rl.demonstration import demonstrate
from rl.env import Demonstrator, InfraError, World
from rl.episode import Episode, Identity, Limits, StopReason, run_episode
from rl.feedback import played
from rl.metrics import read_lines
from rl.policy import Completion, Sampling
from rl.pretrained import _train_tokenizer
from rl.trajectory import read_parquet, to_trajectory

WORD = spaces.Text(12, charset="abcdefghijklmnopqrstuvwxyz ")


class Ring(MultiAgentEnv):
    """Speakers in turn until each has spoken `rounds` times. args: speakers, rounds, and what goes wrong, by `wrong`.

    A speaker sees what was said since it last spoke, gets 1 when it speaks and 10 whenever another one does.
    """

    opened, closed = 0, 0

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.agents = self.possible_agents = args.get("speakers", ["ann", "bob"])
        self.action_spaces = dict.fromkeys(self.agents, WORD)
        self.observation_spaces = dict.fromkeys(
            self.agents, spaces.Dict({"round": spaces.Discrete(9), "heard": spaces.Text(99)})
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        type(self).opened += 1
        if self.args.get("wrong") == "reset":
            raise KeyError("no such board")
        self.said, self.secret = [], int(self.np_random.integers(1000))
        return {self.agents[0]: {"round": 0, "heard": f"secret {self.secret}"}}, {}

    def step(self, action_dict):
        ((agent, text),) = action_dict.items()
        wrong = self.args.get("wrong") if len(self.said) == 2 else None
        if wrong == "step":
            raise KeyError("a bad move")
        if wrong == "infra":
            raise InfraError("the board's service is gone")
        self.said.append(f"{agent}: {text}")
        turn, n = len(self.said), len(self.agents)
        rewards = {a: 1.0 if a == agent else 10.0 for a in self.agents}
        over = turn == self.args.get("rounds", 2) * n or text == "quit"
        after = self.agents[turn % n]
        seen = {after: {"round": turn // n, "heard": "; ".join(self.said[-n + 1 :])}}
        if wrong == "nobody":
            seen = {}
        if wrong == "stranger":
            seen = {"eve": "hello"}
        return seen, rewards, {"__all__": over}, {"__all__": False}, {after: {"flags": ["heard"]}}

    def close(self):
        type(self).closed += 1


class Together(MultiAgentEnv):
    """Both speak at once, three times; who says the same as the other gets 1. `bob` is out after two."""

    def __init__(self, args):
        super().__init__()
        self.agents = self.possible_agents = ["ann", "bob"]
        self.action_spaces = dict.fromkeys(self.agents, WORD)
        self.observation_spaces = dict.fromkeys(self.agents, spaces.Text(40))

    def reset(self, *, seed=None, options=None):
        self.turn = 0
        return dict.fromkeys(self.agents, "go"), {}

    def step(self, said):
        assert set(said) == ({"ann", "bob"} if self.turn < 2 else {"ann"}), said
        self.turn += 1
        same = float(len(set(said.values())) == 1 and len(said) == 2)
        heard = {"ann": f"bob: {said.get('bob')}", "bob": f"ann: {said['ann']}"}
        out = {"bob": self.turn >= 2, "__all__": self.turn == 3}
        return heard, dict.fromkeys(said, same), out, {"__all__": False}, {}

    def demonstrate(self, agent, rng, guess):
        return "same"


@pytest.fixture(scope="module")
def codec():
    return ChatCodec(_train_tokenizer(400, World(negotiation(), 0), seed=0))


def negotiation(**args) -> MultiAgentConfig:
    return MultiAgentConfig(name="multi_agent", path="actors.negotiation.Negotiation", args=args)


def ring(**args) -> MultiAgentConfig:
    return MultiAgentConfig(name="multi_agent", path="test_multi_agent.Ring", args=args)


class Says:
    """Says what `text(number, context)` gives, number counting the turns of all; remembers who was asked what."""

    def __init__(self, codec, text=lambda number, context: f"word {'abcdefgh'[number]}"):
        self.codec, self.text, self.asked = codec, text, []

    async def act(self, token_ids, sampling, session):
        self.asked.append((session, sampling.seed, self.codec.text(token_ids)))
        text = self.text(len(self.asked) - 1, list(token_ids))
        ids = [*self.codec.reply({"content": text})]
        return Completion(ids, [-0.5] * len(ids), [7] * len(ids), "stop")


async def play(config, policy, codec, index=0, split="train", sample=0, seed=0, turns=20, length=3000) -> Episode:
    task = World(config, 0).source.task(split, index)
    return await asyncio.wait_for(
        run_episode(
            MultiAgent(config), task, policy, codec, sampling=Sampling(max_tokens=20),
            limits=Limits(turns, length), identity=Identity(0, 0, task.id, sample), seed=seed,
        ),
        20,
    )  # fmt: skip


async def test_each_speaker_has_what_it_saw_for_its_context(codec):
    first = await play(ring(), Says(codec), codec)
    secret = first.prompt[0]["content"].split()[-1]
    assert first.prompt[0]["content"] == f"round: 0\nheard: secret {secret}"
    assert [t.text for t in first.turns] == ["word a", "word c"]
    assert [m["content"] for m in first.turns[0].observation] == ["round: 1\nheard: bob: word b"]
    second = await play(ring(), Says(codec), codec, index=1)
    assert second.prompt[0]["content"] == "round: 0\nheard: ann: word a"
    assert [t.text for t in second.turns] == ["word b", "word d"]
    assert first.stop_reason == second.stop_reason == StopReason.DONE
    assert secret not in codec.text(second.context_ids), "what only the other was shown"


async def test_only_the_speakers_own_tokens_are_trained_on(codec):
    episode = await play(ring(), Says(codec), codec, index=1)
    t = to_trajectory(episode)
    own = [codec.text(t.tokens[t.loss_mask & (t.turn == k)].tolist()) for k in range(2)]
    assert own == ["word b", "word d"]
    masked = codec.text(t.tokens[~t.loss_mask].tolist())
    assert "ann: word a" in masked and "ann: word c" in masked and "word b" not in masked
    assert (t.versions[t.loss_mask] == 7).all() and (t.versions[~t.loss_mask] == -1).all()
    assert t.tokens.tolist()[: t.loss_mask.nonzero()[0][0]] == list(episode.prompt_ids)


async def test_a_turn_gets_the_rewards_until_the_next(codec):
    """RLlib's rule. By hand, two rounds of two: 1 for one's own turn, 10 for the one that answers it."""
    first = await play(ring(), Says(codec), codec)
    assert [t.reward for t in first.turns] == [11, 11]
    second = await play(ring(), Says(codec), codec, index=1)
    # 10 came before its first turn, and is that turn's; nobody speaks after its last.
    assert [t.reward for t in second.turns] == [11, 1]
    assert [t.flags for t in second.turns] == [("heard",), ()]
    third = await play(ring(speakers=["a", "b", "c"]), Says(codec), codec, index=1)
    assert [t.reward for t in third.turns] == [21, 11]


async def test_three_speakers(codec):
    episode = await play(ring(speakers=["a", "b", "c"]), Says(codec), codec, index=2)
    assert episode.prompt[0]["content"] == "round: 0\nheard: a: word a; b: word b"
    assert [t.text for t in episode.turns] == ["word c", "word f"]


async def test_speakers_at_once_and_one_who_is_out_before_the_end(codec):
    config = MultiAgentConfig(name="multi_agent", path="test_multi_agent.Together")
    same = Says(codec, lambda number, context: "hm")
    ann, bob = [await play(config, same, codec, index=i) for i in (0, 1)]
    assert [t.reward for t in ann.turns] == [1, 1, 0] and [t.reward for t in bob.turns] == [1, 1]
    assert ann.turns[1].observation[0]["content"] == "bob: hm"
    assert ann.stop_reason == bob.stop_reason == StopReason.DONE
    world = World(config, 0)
    with pytest.raises(ValueError, match="lets 2 speak at once"):
        next(world.source.demonstrate(world.source.task("train", 0), random.Random(0), False))


async def test_instructions_open_every_part(codec):
    config = ring().model_copy(update={"instructions": "Be brief."})
    for index in (0, 1):
        episode = await play(config, Says(codec), codec, index)
        assert episode.prompt[0]["content"].startswith("Be brief.\nround: 0")


async def test_a_text_that_the_space_does_not_hold_is_void_and_passes_no_turn(codec):
    policy = Says(codec, lambda number, context: ["Hello!", "hello", "x" * 13, "yes"][number % 4])
    episode = await play(ring(rounds=1), policy, codec)
    assert [t.flags for t in episode.turns] == [("void",), ("heard",)]
    assert episode.turns[0].observation[0]["content"] == "Say 1 to 12 characters out of:  abcdefghijklmnopqrstuvwxyz"
    assert [t.text for t in episode.turns] == ["Hello!", "hello"] and episode.turn_reward == 11


async def test_a_game_that_ends_before_ones_first_turn_has_none(codec):
    episode = await play(ring(), Says(codec, lambda number, context: "quit"), codec, index=1)
    assert (episode.stop_reason, episode.turns) == (StopReason.DONE, [])
    assert not to_trajectory(episode).loss_mask.any()


class Coach:
    """Tells everyone what it was asked for, and remembers it."""

    def __init__(self):
        self.sessions = []

    async def answer(self, prompt, session, seed):
        self.sessions.append(session)
        return f"Speak up, number {len(self.sessions)}."


@pytest.mark.parametrize("index", [0, 1])
async def test_feedback_is_given_to_every_part(codec, index):
    config = MultiAgentConfig(
        name="multi_agent", path="test_multi_agent.Ring",
        feedback={"setting": "no_GT", "source": "endpoint", "url": "http://none", "model": "m"},
    )  # fmt: skip
    world, coach, identity = World(config, 0), Coach(), Identity(0, 0, "t")
    task = world.source.task("train", index)
    episode = await asyncio.wait_for(
        run_episode(
            played(world, coach, identity=identity, max_turns=9, seed=0), task, Says(codec), codec,
            sampling=Sampling(max_tokens=20), limits=Limits(9, 3000), identity=identity,
        ),
        20,
    )  # fmt: skip
    assert len(set(coach.sessions)) == 2, "ann and bob, once each: nobody reads what comes after the last turn"
    said = [m["content"] for m in episode.turns[0].observation]
    assert len(said) == 1 and said[0].startswith("round: 1\nheard: ") and "Speak up, number" in said[0]


# -- tasks and seeds -----------------------------------------------------------------------------------------------


def test_every_game_comes_round_once_for_each_speaker():
    source = World(negotiation(), 0).source
    tasks = [source.task("train", i) for i in range(40)]
    assert [t.prompt["speaker"] for t in tasks[:4]] == ["first", "second", "first", "second"]
    assert all(a.seed == b.seed for a, b in zip(tasks[::2], tasks[1::2], strict=True))
    assert len({t.seed for t in tasks}) == 20 and len({t.id for t in tasks}) == 40
    held_out = [source.task("held_out", i) for i in range(40)]
    assert all(t.seed % 2 == 0 for t in tasks) and all(t.seed % 2 == 1 for t in held_out)
    assert tasks != [World(negotiation(), 1).source.task("train", i) for i in range(40)]


async def test_the_same_seed_is_the_same_game(codec):
    one, again, other = [await play(ring(), Says(codec), codec, index=i) for i in (0, 0, 2)]
    assert one.context_ids == again.context_ids and one.context_ids != other.context_ids


async def test_every_speakers_every_turn_has_a_seed_of_its_own(codec):
    """Also the same speaker's in the episode in which it is the other one: no game is played twice."""

    async def asked(**more):
        policy = Says(codec)
        await play(ring(), policy, codec, **more)
        return [(session, seed) for session, seed, _ in policy.asked]

    base = await asked()
    assert base == await asked(), "played again after a failure it draws the same numbers"
    assert len({s for s, _ in base}) == 2, "a session each, for the prefix cache"
    for more in ({"seed": 1}, {"sample": 1}, {"index": 1}):
        assert not {s for _, s in base} & {s for _, s in await asked(**more)}


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1], ids=["ann", "bob"])
@pytest.mark.parametrize(
    ("wrong", "raised", "said"),
    [
        ("reset", KeyError, "no such board"),
        ("step", KeyError, "a bad move"),
        ("infra", InfraError, "service is gone"),
        ("nobody", ValueError, "shows nobody anything, and has not ended"),
        ("stranger", ValueError, "speaks of {'eve'}"),
    ],
)
async def test_an_environment_that_fails_is_nobodys_reward(codec, index, wrong, raised, said):
    Ring.opened = Ring.closed = 0
    with pytest.raises(raised, match=said):
        await play(ring(wrong=wrong), Says(codec), codec, index)
    assert Ring.opened == 1 and Ring.closed == 2, "the one that was asked for its spaces, and the game"


@pytest.mark.parametrize("index", [0, 1], ids=["the episode's", "another"])
@pytest.mark.parametrize("turn", [0, 2])
async def test_a_speaker_that_fails_is_nobodys_reward(codec, index, turn):
    """Turns 0 and 2 are ann's: with index 1 she is the other one, for whom bob waits."""

    def text(number, context):
        if number == turn:
            raise ConnectionError("no generator lives")
        return "word"

    Ring.closed = 0
    with pytest.raises(ConnectionError, match="no generator lives"):
        await play(ring(), Says(codec, text), codec, index)
    assert Ring.closed == 2


@pytest.mark.parametrize("index", [0, 1])
async def test_an_episode_that_is_given_up_leaves_nobody_behind(codec, index):
    class Never(Says):
        async def act(self, token_ids, sampling, session):
            if len(self.asked) == 2:
                await asyncio.Event().wait()
            return await super().act(token_ids, sampling, session)

    Ring.closed = 0
    before = asyncio.all_tasks()
    playing = asyncio.ensure_future(play(ring(), Never(codec), codec, index))
    await asyncio.sleep(0.3)
    started = time.monotonic()
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert time.monotonic() - started < 2 and Ring.closed == 2
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("index", [0, 1])
async def test_one_who_may_not_speak_on_ends_the_game_for_all(codec, index):
    episode = await play(ring(rounds=5), Says(codec), codec, index, turns=2)
    # ann has had her two turns, and leaves when bob has answered the second; he finds nobody there.
    assert len(episode.turns) == 2
    assert (episode.stop_reason, "truncated" in episode.turns[-1].flags) == [
        (StopReason.MAX_TURNS, False), (StopReason.DONE, True)][index]  # fmt: skip


async def test_who_is_given_up_while_the_game_is_closed_does_not_take_that_with_it():
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Together):
        closed = False

        def close(self):
            begun.set()
            Slow.closed = go_on.wait(20)

    config = MultiAgentConfig(name="multi_agent", path="test_multi_agent.Together")
    task, game = World(config, 0).source.task("train", 0), Game(config)
    await game.begin(task)
    game._env = Slow({})
    assert [(await game.told(s)).seen for s in ("ann", "bob")] == ["go", "go"]
    leaves = asyncio.ensure_future(game.leave("ann"))
    await asyncio.to_thread(begun.wait, 20)
    leaves.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await game.say("bob", "hm")
    told = await game.told("bob")
    assert told.out and told.flags == ["truncated"], "the others find nobody there"
    await game.leave("bob")
    assert Slow.closed and leaves.cancelled()


class NoSpeakers(Ring):
    def __init__(self, args):
        super().__init__({"speakers": []})


class Numbers(Ring):
    def __init__(self, args):
        super().__init__({})
        self.action_spaces = dict.fromkeys(self.agents, spaces.Discrete(3))


class Pictures(Ring):
    def __init__(self, args):
        super().__init__({})
        self.observation_spaces = dict.fromkeys(self.agents, spaces.Box(0, 1, (8, 8), np.float32))


@pytest.mark.parametrize(
    ("path", "args", "said"),
    [
        ("test_multi_agent.Says", {}, "test_multi_agent.Says is not a MultiAgentEnv"),
        ("test_multi_agent.Rink", {}, "has no 'Rink'"),
        ("nowhere.Ring", {}, "cannot import 'nowhere'"),
        ("rink", {}, "neither a dotted path"),
        ("test_multi_agent.NoSpeakers", {}, "has no possible_agents"),
        ("test_multi_agent.Numbers", {}, r"the actions of 'ann' in .*Numbers are Discrete\(3\): expected a Text"),
        ("test_multi_agent.Pictures", {}, r"the observations of 'ann' in .* are Box.*expected Text, or a Dict"),
        ("actors.negotiation.Negotiation", {"turns": "many"}, r"env\.args: .*Negotiation cannot be made with .*many"),
    ],
)
def test_what_cannot_be_played_is_named(path, args, said):
    with pytest.raises(ValueError, match=said):
        World(MultiAgentConfig(name="multi_agent", path=path, args=args), 0)


# -- demonstrations, and a whole run -------------------------------------------------------------------------------


async def test_one_script_plays_all_speakers(codec):
    world = World(negotiation(), 0)
    assert isinstance(world.source, Demonstrator) and not isinstance(World(ring(), 0).source, Demonstrator)
    tasks = [world.source.task("train", i) for i in range(8)]
    for task in tasks:
        t = await demonstrate(world, task, codec, guess_fraction=0.0, limits=Limits(4, 400), seed=0)
        said = [codec.text(t.tokens[t.loss_mask & (t.turn == k)].tolist()) for k in range(t.turn.max() + 1)]
        assert all(s == "accept" or s.startswith("want ") for s in said)
        seen = codec.text(t.tokens[~t.loss_mask].tolist())
        assert ("You begin." in seen) == (task.prompt["speaker"] == "first")
        assert seen.count("Worth to you") == 1
    careless = [await demonstrate(world, t, codec, guess_fraction=1.0, limits=Limits(4, 400), seed=0) for t in tasks]
    patient = [await demonstrate(world, t, codec, guess_fraction=0.0, limits=Limits(4, 400), seed=0) for t in tasks]
    assert [t.tokens.tolist() for t in careless] != [t.tokens.tolist() for t in patient]


def test_a_whole_run(tmp_path):
    """The shipped configuration in small: SFT, self-play, evaluation, with the real engines."""
    done = repertory(
        "train", "configs/negotiation.yaml", f"run.root={tmp_path}", "run.name=n",
        "model.scratch.layers=2", "model.scratch.hidden=64", "model.scratch.heads=2",
        "stages.0.steps=40", "stages.0.demonstrations.count=256", "stages.1.n=8",
        "stages.2.steps=2", "stages.2.tasks_per_step=4", "stages.2.algo.group_size=4", "stages.3.n=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_parquet(tmp_path / "n" / "trajectories" / "rl-02-00000.parquet")
    assert len(rows) == 16
    for group in (rows[i : i + 4] for i in range(0, 16, 4)):
        assert len({row["task"] for row in group}) == 1
    assert [row["task"].rsplit(":", 1)[1] for row in rows[::4]] == ["first", "second"] * 2
    for row in rows:
        tokens, mask, logprobs = (np.asarray(row[k]) for k in ("tokens", "loss_mask", "logprobs"))
        assert mask.sum() == (np.asarray(row["versions"]) >= 0).sum() and (logprobs[~mask] == 0).all()
        assert len(tokens) == len(mask)
    steps = [line for line in read_lines(tmp_path / "n" / "metrics.jsonl") if "reward/mean" in line]
    assert len(steps) == 2 and all(line["mismatch/kl"] < 1e-3 for line in steps)
    assert not any(line.get("faults/data") or line.get("faults/infra") for line in steps)


def test_a_wrong_setting_is_one_message(tmp_path):
    done = repertory("train", "configs/negotiation.yaml", f"run.root={tmp_path}", "env.path=actors.negotiation.Nego")
    assert done.returncode == 2 and "has no 'Nego'" in done.stdout + done.stderr and not list(tmp_path.iterdir())
    assert "Traceback" not in done.stdout + done.stderr
