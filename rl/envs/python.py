"""Questions answered with the help of Python: the model writes code, sees what it printed, and goes on.

    turn ──► style: code? answer? neither? ──► sandbox ──► observation ──► next turn
                     └── answer ──► done; tags: right? else told so, while chances are left

Three styles (`PythonConfig.style`): fenced blocks, MINT's tags, tool calls. A turn ends with its first piece of code or
answer: what the model says past it, before it has seen what the code does, is dropped (`Python.cut`).
"""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from rl.chat import shortened
from rl.config_env import PythonConfig, ReasoningGymConfig, RowsConfig, SandboxConfig
from rl.env import Action, Hint, Message, Observation, Step
from rl.envs import reasoning
from rl.envs.python_hints import LIMITS, Played, hint
from rl.envs.python_solutions import SOLUTIONS
from rl.envs.python_styles import STYLES, TOOL, Fenced, Tags, boxed
from rl.envs.rows import RowsTasks
from rl.episode import Episode, StopReason
from rl.reward import same_answer
from rl.sandbox import NoSandbox, Result, Sandbox, Session
from rl.task import Task, derive_seed

_JUDGED_CHARS = 2000
"""A longer proposal is wrong and a longer output no answer: scorers read them on the event loop."""
_STYLE = "python_style"
"""Where a task's prompt says which style it is played in: what the environment took for an answer is what is graded."""


# -- tasks ------------------------------------------------------------------------------------------------------------


class MixTasks:
    """reasoning-gym generators in proportion to their weights. Which one an index belongs to follows from the seed."""

    def __init__(self, config: PythonConfig, seed: int):
        configs = [
            ReasoningGymConfig(name="reasoning_gym", dataset=d.dataset, settings=d.settings, tool="none", max_turns=1)
            for d in config.datasets
        ]
        self._seed, self._configs, self._style = seed, configs, config.style
        self._sources = [
            reasoning.ReasoningGymTasks(config, seed, f"env.datasets[{i}]") for i, config in enumerate(configs)
        ]
        self._weights = [d.weight for d in config.datasets]

    def size(self, split: str) -> None:
        return None

    def task(self, split: str, index: int) -> Task:
        rng = random.Random(derive_seed("python_mix", self._seed, split, index))
        which = rng.choices(range(len(self._sources)), self._weights)[0]
        config, entry = self._configs[which], self._sources[which].entry(split, index)
        question = {"role": "user", "content": entry["question"]}
        prompt = {"prompt": [question], "dataset": config.dataset, "settings": config.settings, "entry": entry}
        prompt[_STYLE] = self._style
        answer = "" if entry["answer"] is None else str(entry["answer"])
        return Task(id=reasoning.entry_id(config.dataset, entry), prompt=prompt, answer=answer)


class DemonstratedMix(MixTasks):
    """A mix whose generators are all in rl/envs/python_solutions.py."""

    def __init__(self, config: PythonConfig, seed: int):
        super().__init__(config, seed)
        self._says = STYLES[config.style]()
        self._guesses = config.max_solutions if config.style == "tags" else 1

    def demonstrate(self, task: Task, rng: random.Random, guess: bool) -> Iterator[Message]:
        """The code, then the answer that it prints; or an answer stated without it."""
        if guess:
            for _ in range(self._guesses):
                yield self._says.answers(str(rng.randrange(1000)))
            return
        yield self._says.runs(SOLUTIONS[task.prompt["dataset"]](task.prompt["entry"]["metadata"]))
        yield self._says.answers(task.answer)


class StyledRows(RowsTasks):
    """Rows that say which style they are played in."""

    def __init__(self, config: PythonConfig, seed: int):
        given = {"prompts": config.prompts, "held_out": config.held_out, "bad_rows": config.bad_rows}
        super().__init__(RowsConfig(name="rows", **given), seed)
        self._style = config.style

    def task(self, split: str, index: int) -> Task:
        task = super().task(split, index)
        return replace(task, prompt={**task.prompt, _STYLE: self._style})


def tasks(config: PythonConfig, seed: int) -> "MixTasks | StyledRows":
    """Raises ValueError on what cannot be played, NoSandbox's text among it: at the start, not in the first episode."""
    try:
        Sandbox(config.sandbox)
    except NoSandbox as error:
        raise ValueError(f"env.sandbox: {error}") from None
    if config.prompts is not None:
        return StyledRows(config, seed)
    if all(d.dataset in SOLUTIONS for d in config.datasets):
        return DemonstratedMix(config, seed)
    return MixTasks(config, seed)


def right(task: Task, answer: str) -> float:
    """What an answer is worth, in [0, 1]: by the generator's own scorer, or by math-verify for rows."""
    return reasoning.score(task, answer) if "entry" in task.prompt else same_answer(task.answer, answer)


def final_answer(episode: Episode) -> str | None:
    """The answer that ended the episode: in its last turn, or in what that turn's code printed.

    It is read in the style of the task. A task that names none, as those of older files, is tried in each.
    """
    if episode.stop_reason != StopReason.DONE or not episode.turns:
        return None
    last, style = episode.turns[-1], episode.task.prompt.get(_STYLE)
    if last.observation:  # nothing is shown after the last turn, but what its code printed
        printed = [boxed(str(m["content"])) for m in last.observation]
        return next((answer[0] for answer in printed if answer is not None), None)
    read = {"fenced": [Fenced()], "tags": [Tags()], "tool": [], None: [Tags(), Fenced()]}[style]
    for move in (kind.move(Action(last.text)) for kind in read):
        if move.answer is not None or move.code is not None:
            return move.answer
    plain = style not in ("fenced", "tags") and "void" not in last.flags
    return last.text.strip() if plain else None


def own_answer(task: Task, episode: Episode) -> float:
    """What the answer that ended the episode is worth; 0 without one. Raises where the scorer itself fails."""
    answer = final_answer(episode)
    return right(task, answer) if answer is not None else 0.0


# -- the environment --------------------------------------------------------------------------------------------------


class Python:
    """One episode. Flags of a turn: `void` (neither code nor answer), `tool_error` (the code failed, or none could be
    read). Raises InfraError where the sandbox cannot be started.
    """

    reward = "rl.envs.python.own_answer"
    tasks = staticmethod(tasks)

    def __init__(self, config: PythonConfig):
        self._config = config
        self._style = STYLES[config.style]()
        self._session: Session | None = None
        self._calls = self._solutions = self._turns = 0
        self._last = Played()
        self._results: dict[str, Result] = {}
        """What the code of the turns before gave."""

    async def reset(self, task: Task) -> Observation:
        self._task = task
        system = self._config.system or self._style.system
        first, *rest = task.prompt["prompt"]
        if first["role"] == "system":
            system, first = f"{first['content']}\n\n{system}", None
        messages = [{"role": "system", "content": system}, *([first] if first else []), *rest]
        if self._config.style == "tags":
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n{self._left()}"}
        return Observation(messages, [TOOL] if self._config.style == "tool" else [])

    def cut(self, text: str) -> int | None:
        return self._style.move(Action(text)).end if self._config.style != "tool" else None

    async def step(self, action: Action) -> Step:
        self._turns += 1
        move = self._style.move(action)
        self._last = Played(move.code, move.answer)
        if move.answer is not None:
            return await self._answered(move.answer)
        if move.code is not None:
            return await self._run(move.code)
        if move.error is not None:
            return self._shown(move.error, ["tool_error"] if self._config.style == "tool" else ["void"])
        if self._config.void_turn == "stop":
            return Step(Observation([]), done=True, info={"flags": ["void"]})
        return self._shown("none. Write code in a ```python block, or the answer in \\boxed{}.", ["void"])

    def hint(self, truth: bool) -> Hint:
        return hint(self._last, self._is_right() if truth else None)

    def _is_right(self) -> bool:
        """Whether the last turn's answer, or what its code printed or printed last, is the task's."""
        result = self._last.result
        shown = (self._last.answer or (result.output if result is not None and result.ok else "")).strip()
        read = {text for text in (shown, *shown.splitlines()[-1:]) if 0 < len(text) <= _JUDGED_CHARS}
        return any(right(self._task, text) >= 1 for text in read)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _run(self, code: str) -> Step:
        limit = self._config.max_calls
        if limit is not None and self._calls >= limit:
            return self._shown(f"not run: the {limit} calls are used up. Answer now.", ["tool_error"])
        self._calls += 1
        if self._session is None:
            self._session = _sandbox(self._config.sandbox.model_dump_json(), asyncio.get_running_loop()).session()
        result = await self._session.run(code, echo=self._config.style == "tags")
        if not self._config.stateful:
            await self._session.close()
        self._last = Played(code, result=result, repeated=self._results.get(code) == result)
        self._results[code] = result
        flags = [] if result.ok else ["tool_error"]
        if self._config.answer_in_output and boxed(result.output) is not None:
            seen = self._style.shown(result.output)
            return Step(Observation([seen]), done=True, info={"flags": flags})
        return self._shown(said(result, self._config), flags)

    async def _answered(self, answer: str) -> Step:
        self._solutions += 1
        void = ["void"] if not answer else []
        if self._config.style != "tags" or self._solutions >= self._config.max_solutions:
            return Step(Observation([]), done=True, info={"flags": void})
        if len(answer) <= _JUDGED_CHARS and right(self._task, answer) >= 1:
            return Step(Observation([]), done=True)
        return self._shown("Your answer is wrong.", void)

    def _shown(self, text: str, flags: list[str]) -> Step:
        if self._config.style == "tags":
            text += f"\n{self._left()}"
        return Step(Observation([self._style.shown(text)]), info={"flags": flags})

    def _left(self) -> str:
        steps, chances = self._config.max_turns - self._turns, self._config.max_solutions - self._solutions
        return f"You have {steps} steps left and {chances} chances to propose a solution left."


@lru_cache(maxsize=4)
def _sandbox(config: str, loop: asyncio.AbstractEventLoop) -> Sandbox:
    """One for all episodes of a process: they share its slots."""
    return Sandbox(SandboxConfig.model_validate_json(config))


def said(result: Result, config: PythonConfig) -> str:
    """A result as the model sees it: the output, cut in its middle, then what went wrong."""
    output, error = result.output.strip("\n"), result.error.strip("\n")
    if config.errors == "last_line" and error:
        error = error.splitlines()[-1]
    parts = [shortened(part, config.output_chars) for part in (output, error) if part]
    if result.limit is not None and result.exit is None:
        parts.append(f"The code was stopped: {LIMITS[result.limit]}.")
    elif result.exit is None:
        parts.append("The code was killed.")
    elif result.exit and not parts:
        parts.append(f"The code ended with status {result.exit}.")
    return "\n".join(parts) or "[Executed Successfully with No Output]"
