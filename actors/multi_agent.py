"""RLlib's MultiAgentEnv as an environment: several speakers, all played by the model that is being trained.

    env: {name: multi_agent, path: actors.negotiation.Negotiation, args: {turns: 6}, max_turns: 6}

An episode is one speaker's part of a game: what it saw is its context, what it said is trained on, and what the others
said is observation. Their parts are played beside it by the same policy (`rl.episode.run_episode`), each from a context
of its own, and are not kept. Which speaker the episode is belongs to the task, so a group compares like with like, and
every game comes round once for each of them.

             task: game 17, as `first`                      task: game 17, as `second`
    first    ●───say───┐         ●───say──► trained on      first    ○───say───┐         ○ ...
    second             ○───say───┘                          second             ●───say───┘   trained on

Whom the environment shows something speaks next, one of them or several at once. Where it has a method
`demonstrate(agent, rng, guess) -> str`, what a scripted speaker says in this place, SFT needs no data of its own.
"""

import asyncio
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gymnasium import spaces
from ray.rllib.env.multi_agent_env import MultiAgentEnv

from rl.config_env import MultiAgentConfig
from rl.env import Action, Message, Observation, Step, load_env
from rl.task import Task, derive_seed

Speaker = Hashable
"""RLlib's agent id."""


def make(config: MultiAgentConfig) -> Any:
    """The game. Raises ValueError naming what it cannot be made by."""
    cls = load_env(config.path)
    if not (isinstance(cls, type) and issubclass(cls, MultiAgentEnv)):
        raise ValueError(f"env.path: {config.path} is not a MultiAgentEnv of RLlib")
    made: Any = cls  # the base takes no config, and RLlib gives everyone who derives from it one
    try:
        return made(dict(config.args))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"env.args: {config.path} cannot be made with {config.args}: {error!r}") from error


def _speakers(env: Any, path: str) -> tuple[Speaker, ...]:
    """Raises ValueError when nobody speaks, or somebody in what is no text."""
    if not env.possible_agents:
        raise ValueError(f"env.path: {path} has no possible_agents: who speaks must be known before the game begins")
    for speaker in env.possible_agents:
        acts, sees = env.get_action_space(speaker), env.get_observation_space(speaker)
        if not isinstance(acts, spaces.Text):
            raise ValueError(f"env.path: the actions of {speaker!r} in {path} are {acts}: expected a Text space")
        if not all(isinstance(s, spaces.Text | spaces.Discrete) for s in _leaves(sees)):
            raise ValueError(
                f"env.path: the observations of {speaker!r} in {path} are {sees}: expected Text, or a Dict of Text "
                "and Discrete spaces"
            )
    return tuple(env.possible_agents)


def _leaves(space: Any) -> list[Any]:
    return [x for s in space.values() for x in _leaves(s)] if isinstance(space, spaces.Dict) else [space]


class MultiAgentTasks:
    """A task is a seed and a speaker. Held-out seeds are odd and the others even.

    `reset` is told the split as well, in its options: what a seed leads to is the environment's affair.
    """

    def __init__(self, config: MultiAgentConfig, seed: int):
        env = make(config)
        try:
            self._speakers = _speakers(env, config.path)
        finally:
            env.close()
        self._config, self._seed = config, seed

    def size(self, split: str) -> None:
        return None

    def task(self, split: str, index: int) -> Task:
        game, place = divmod(index, len(self._speakers))
        seed = derive_seed("multi_agent", self._seed, split, game) // 2 * 2 + (split == "held_out")
        speaker = self._speakers[place]
        name = self._config.path.rpartition(".")[2]
        return Task(
            f"{name}:{seed}:{speaker}", {"speaker": speaker, "speakers": self._speakers, "split": split}, "", seed
        )


class DemonstratedTasks(MultiAgentTasks):
    """Those of an environment that knows what a scripted speaker says."""

    def demonstrate(self, task: Task, rng: random.Random, guess: bool) -> Iterator[Message]:
        """What all speakers say, in turn: one scripted policy plays them all."""
        env = make(self._config)
        try:
            seen, over = env.reset(seed=task.seed, options={"split": task.prompt["split"]})[0], False
            while not over:
                if len(seen) != 1:
                    raise ValueError(
                        f"{self._config.path} lets {len(seen)} speak at once: its scripted speakers have no order to "
                        "be played in. Set demonstrations.path on the sft stage"
                    )
                (speaker,) = seen
                text = env.demonstrate(speaker, rng, guess)
                yield {"role": "assistant", "content": text}
                seen, _, terminated, truncated, _ = env.step({speaker: text})
                over = terminated["__all__"] or truncated["__all__"]
        finally:
            env.close()


def tasks(config: MultiAgentConfig, seed: int) -> MultiAgentTasks:
    shows = callable(getattr(load_env(config.path), "demonstrate", None))
    return (DemonstratedTasks if shows else MultiAgentTasks)(config, seed)


@dataclass
class _Place:
    """What waits for a speaker. `woken` when it is to speak and when it is out: its game, or its part, has ended."""

    seen: Any = None
    reward: float = 0.0
    flags: list[str] = field(default_factory=list)
    out: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Game:
    """One game, which its speakers' episodes meet in: who is to speak, and what each has been told since it last did.

    When somebody leaves in the middle, having no tokens or turns left, the game is over for all, and flagged
    `truncated`. What the environment raises is raised to whoever has spoken: no episode is made of such a game.
    """

    def __init__(self, config: MultiAgentConfig):
        self._config = config
        self._env: Any = None
        self._spaces: dict[Speaker, spaces.Text] = {}
        self._places: dict[Speaker, _Place] = {}
        self._said: dict[Speaker, str] = {}
        self._closing: asyncio.Future[None] | None = None
        self.to_speak: list[Speaker] = []

    async def begin(self, task: Task) -> None:
        """Opened by whoever comes first."""
        if not self._places:
            self._places = {speaker: _Place() for speaker in task.prompt["speakers"]}
            await self._advance(lambda: self._opened(task))

    def _opened(self, task: Task) -> tuple[dict, dict, dict, dict, dict]:
        self._env = make(self._config)
        self._spaces = {speaker: self._env.get_action_space(speaker) for speaker in self._places}
        seen, infos = self._env.reset(seed=task.seed, options={"split": task.prompt["split"]})
        return seen, {}, {}, {}, infos

    def refuses(self, speaker: Speaker, text: str) -> str | None:
        """What to say in the place of a text that the action space does not hold."""
        space = self._spaces[speaker]
        if self._places[speaker].out or space.contains(text):
            return None
        return f"Say {space.min_length} to {space.max_length} characters out of: {''.join(sorted(space.characters))}"

    async def say(self, speaker: Speaker, text: str) -> None:
        """The game goes on when all who are to speak have."""
        self._said[speaker] = text
        if self._said.keys() == set(self.to_speak):
            said, self._said = self._said, {}
            await self._advance(lambda: self._env.step(said))

    async def told(self, speaker: Speaker) -> _Place:
        """What the speaker has been told, when it is to speak or is out."""
        place = self._places[speaker]
        await place.woken.wait()
        told = replace(place)
        place.seen, place.reward, place.flags = None, 0.0, []
        if not place.out:
            place.woken.clear()
        return told

    async def leave(self, speaker: Speaker) -> None:
        """Called once by each. Whoever's part has not ended ends the game."""
        if self._env is None or (self._places[speaker].out and self.to_speak):
            return  # it was never opened, or the others play on
        if self._closing is None:
            for place in self._places.values():
                if not place.out:
                    place.out = True
                    place.flags.append("truncated")
                    place.woken.set()
            self.to_speak = []
            self._closing = asyncio.ensure_future(asyncio.to_thread(self._env.close))
        await asyncio.shield(self._closing)  # who is given up while it waits does not take the close with it

    async def _advance(self, move: Callable[[], tuple[dict, dict, dict, dict, dict]]) -> None:
        # In a thread: an environment may compute for long, and other episodes are played on this event loop.
        self._tell(*await asyncio.to_thread(move))

    def _tell(self, seen: dict, rewards: dict, terminated: dict, truncated: dict, infos: dict) -> None:
        unknown = (seen.keys() | rewards.keys()) - self._places.keys()
        if unknown:
            raise ValueError(f"{self._config.path} speaks of {unknown}, who are not among its possible_agents")
        over = terminated.get("__all__", False) or truncated.get("__all__", False)
        for speaker, place in self._places.items():
            place.out |= bool(over or terminated.get(speaker, False) or truncated.get(speaker, False))
            place.reward += float(rewards.get(speaker, 0.0))
            place.flags += infos.get(speaker, {}).get("flags", ())
            place.seen = seen.get(speaker, place.seen)
        self.to_speak = [s for s in seen if not self._places[s].out]
        if not over and not self.to_speak:
            raise ValueError(f"{self._config.path} shows nobody anything, and has not ended: who is to speak?")
        for speaker, place in self._places.items():
            if place.out or speaker in self.to_speak:
                place.woken.set()


class MultiAgent:
    """One speaker's part of a game.

    A text that the action space does not hold is flagged `void`, answered with what it holds, and takes a turn.
    """

    reward = "rl.envs.gymnasium.nothing_more"
    tasks = staticmethod(tasks)

    def __init__(self, config: MultiAgentConfig, game: Game | None = None):
        self._config = config
        self._together = game is not None
        self._game = game or Game(config)
        self._speaker: Speaker = None

    def others(self, task: Task) -> Sequence[tuple[Task, "MultiAgent"]]:
        """The parts that the same policy plays beside this one's. Their sampling seeds are not those of the episodes in
        which they are trained on: no game is played twice."""
        self._together = True
        parts = [
            replace(task, id=f"{task.id}/{speaker}", prompt={**task.prompt, "speaker": speaker})
            for speaker in task.prompt["speakers"]
            if speaker != task.prompt["speaker"]
        ]
        return [(part, MultiAgent(self._config, self._game)) for part in parts]

    async def reset(self, task: Task) -> Observation:
        """Waits for the speaker's turn; where nobody plays the others, it is shown what the first to speak sees."""
        self._speaker = task.prompt["speaker"]
        await self._game.begin(task)
        if not self._together:
            self._speaker = self._game.to_speak[0]
        told = await self._game.told(self._speaker)
        text = "\n".join(filter(None, [self._config.instructions, _shown(told.seen)]))
        return Observation([{"role": "user", "content": text}], over=told.out)

    async def step(self, action: Action) -> Step:
        text = action.text.strip()
        refusal = self._game.refuses(self._speaker, text)
        if refusal is not None:
            return Step(Observation([{"role": "user", "content": refusal}]), info={"flags": ["void"]})
        await self._game.say(self._speaker, text)
        told = await self._game.told(self._speaker)
        messages = [] if told.seen is None else [{"role": "user", "content": _shown(told.seen)}]
        return Step(Observation(messages), told.reward, done=told.out, info={"flags": told.flags})

    async def close(self) -> None:
        await self._game.leave(self._speaker)


def _shown(seen: Any) -> str:
    """An observation as text: a Dict's entries on a line each."""
    if isinstance(seen, Mapping):
        return "\n".join(f"{key}: {_shown(value)}" for key, value in seen.items())
    return "" if seen is None else str(seen)
