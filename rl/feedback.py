"""Language feedback on turns, as in MINT (https://arxiv.org/abs/2309.10691), around any environment.

    turn ──► env.step ──► observation ──► + feedback ──► next turn
                                             └── rules: env.hint · a model: teacher.answer(episode so far, truth?)

Feedback is text of the observation: the policy reads it and is not trained on it. There is none once an episode is
done, nor after its last turn, where nobody reads it. A turn's flags tell of it: `feedback` (given), `feedback_unclear`
(the model said nothing usable: none is given) and `feedback_leak` (it named the ground truth, which is hidden in it).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from rl.config_env import FeedbackConfig
from rl.env import Action, CutsTurns, Env, Hints, ManySpeakers, Message, Observation, Step, World
from rl.episode import Identity
from rl.task import Task, derive_seed

VERDICTS = {True: "This is GOOD.", False: "This is BAD."}
HIDDEN = "[hidden]"

_PROMPT = """\
You are an expert who evaluates an assistant's work on a task and gives it feedback.
---
{episode}
---
Correct solution (please DO NOT disclose the correct solution to the assistant): {truth}

{ask}
Expert feedback:"""
_ASK = {
    "textual": (
        "Now give the assistant feedback on its last turn, short and helpful: what is right or wrong with it, and what "
        "to do next."
    ),
    "binary": f"Now judge the assistant's last turn. Say exactly one of: {VERDICTS[True]} {VERDICTS[False]}",
}


class Teacher(Protocol):
    """A model that gives feedback."""

    async def answer(self, prompt: str, session: str, seed: int) -> str:
        """What it says to one message. Raises InfraError when it cannot be reached for long."""
        ...


def played(world: World, teacher: Teacher | None, *, identity: Identity, max_turns: int, seed: int) -> Env:
    """A fresh environment for one episode, with the feedback that its configuration asks for.

    Without a teacher, as demonstrations are played, only rules give any.
    """
    env, config = world.env(), world.feedback
    if not config.on or (teacher is None and config.source != "rules"):
        return env
    return WithFeedback(env, config, teacher, identity=identity, max_turns=max_turns, seed=seed)


class WithFeedback:
    """An environment whose observations end in feedback on the turn. Raises what `env` and the teacher raise."""

    def __init__(
        self, env: Env, config: FeedbackConfig, teacher: Teacher | None, *,
        identity: Identity, max_turns: int, seed: int,
    ):  # fmt: skip
        self._env, self._config, self._teacher = env, config, teacher
        self._identity, self._max_turns, self._seed = identity, max_turns, seed
        self._turns = 0
        self._said: list[Message] = []
        """The episode as the policy sees it."""

    async def reset(self, task: Task) -> Observation:
        self._task = task
        observation = await self._env.reset(task)
        self._said = list(observation.messages)
        return observation

    def cut(self, text: str) -> int | None:
        return self._env.cut(text) if isinstance(self._env, CutsTurns) else None

    async def step(self, action: Action) -> Step:
        step = await self._env.step(action)
        self._turns += 1
        if step.done or self._turns >= self._max_turns:
            return step
        seen = list(step.observation.messages)
        self._said.append({"role": "assistant", "content": action.text})
        text, flags = await self._feedback([*self._said, *seen])
        seen = added(seen, text)
        self._said += seen
        info = {**step.info, "flags": [*step.info.get("flags", ()), *flags]}
        return replace(step, observation=replace(step.observation, messages=seen), info=info)

    def others(self, task: Task) -> Sequence[tuple[Task, Env]]:
        """The other speakers' parts, with feedback of their own: who speaks is one policy, and is treated as one."""
        if not isinstance(self._env, ManySpeakers):
            return ()
        more = {"max_turns": self._max_turns, "seed": self._seed}
        return [
            (t, WithFeedback(e, self._config, self._teacher, identity=replace(self._identity, task=t.id), **more))
            for t, e in self._env.others(task)
        ]

    async def close(self) -> None:
        await self._env.close()

    async def _feedback(self, episode: Sequence[Message]) -> tuple[str, list[str]]:
        """The text, empty for none, and the turn's flags."""
        truth, binary = self._config.setting == "GT", self._config.type == "binary"
        if self._config.source == "rules":
            assert isinstance(self._env, Hints), "World has checked that"
            hint = self._env.hint(truth)
            return VERDICTS[hint.good] if binary else hint.text, ["feedback"]
        assert self._teacher is not None, "what the configuration asks for has to be there"
        prompt = asked(episode, self._config, self._task.answer)
        who = self._identity
        seed = derive_seed("feedback", self._seed, who.task, who.sample, self._turns)
        said = spoken(await self._teacher.answer(prompt, who.session, seed))
        text = verdict(said) if binary else hidden(said, self._task.answer) if truth else said
        if not text:
            return "", ["feedback_unclear"]
        return text, ["feedback"] if binary or text == said else ["feedback", "feedback_leak"]


def asked(episode: Sequence[Message], config: FeedbackConfig, truth: str) -> str:
    """What a model is told: the episode up to the turn's observation, and with setting GT the ground truth."""
    told = "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in episode)
    known = truth if config.setting == "GT" and truth else "NOT GIVEN"
    return _PROMPT.format(episode=told, truth=known, ask=_ASK[config.type])


def spoken(text: str) -> str:
    """Without what a reasoning model thought; empty when it did not get beyond that."""
    _, closed, after = text.rpartition("</think>")
    return after.strip() if closed or "<think>" not in text else ""


def verdict(said: str) -> str:
    """One of the two sentences, when the text begins with it or is its last word alone; else nothing."""
    found = re.match(r"\W*this is (good|bad)\b(?![^\S\n]+\w)|\W*(good|bad)\W*$", said, re.IGNORECASE)
    return VERDICTS[(found[1] or found[2]).lower() == "good"] if found else ""


def hidden(said: str, truth: str) -> str:
    """The text with every mention of the truth hidden: verbatim but for case and blanks, as whole words.

    That also hides it where the episode has named it already, and does not hide another way of putting it.
    """
    if not truth.strip():
        return said
    words = r"\s+".join(map(re.escape, truth.split()))
    # A number is no mention inside of a longer one: 21 is not in 215, 3.21 or 21.5.
    return re.sub(rf"(?<!\w)(?<!\d[.,]){words}(?!\w)(?![.,]\d)", HIDDEN, said, flags=re.IGNORECASE)


def added(messages: Sequence[Message], feedback: str) -> list[Message]:
    """The observation with the feedback at the end of its last message."""
    if not feedback:
        return list(messages)
    text = f"Expert feedback: {feedback}"
    if not messages:
        return [{"role": "user", "content": text}]
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']}\n{text}"}]
