"""The environments' settings. Imports no torch."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rl.config_base import Strict


class FeedbackConfig(Strict):
    """Feedback on every turn but an episode's last, as part of what the turn is answered with (rl/feedback.py).

    The settings and types of MINT (https://arxiv.org/abs/2309.10691). source: who gives it: `rules`, the environment's
    own, `checkpoint`, a model that feedback actors serve, or `endpoint`, a URL that answers like OpenAI's chat
    completions.
    """

    setting: Literal["none", "no_GT", "GT"] = "none"
    """GT: who gives feedback knows the ground truth, and is asked not to disclose it."""
    type: Literal["textual", "binary"] = "textual"
    """binary: "This is GOOD." or "This is BAD.", and nothing else."""
    source: Literal["rules", "checkpoint", "endpoint"] = "rules"
    model: str | None = None
    """checkpoint: as model.path. endpoint: the model's name there."""
    url: str | None = None
    """endpoint: up to and without /chat/completions."""
    key_variable: str | None = None
    """endpoint: the environment variable, of the rollout workers' processes, that holds the API key. Default: none."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: PositiveInt = 512
    max_length: PositiveInt = 4096
    """Tokens of a prompt and its answer. A longer episode is cut in its middle (endpoint: three characters a token)."""
    timeout_s: PositiveFloat = 60.0
    """endpoint: of one request."""
    parallel: PositiveInt = 32
    """endpoint: requests of one rollout worker at the same time; others wait."""

    @field_validator("key_variable")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            raise ValueError("the name of an environment variable, such as OPENAI_API_KEY, and never the key itself")
        return name

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "http://none")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a URL such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("a URL without user, password or query, which would be stored: use key_variable")
        return url.rstrip("/") if url else None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "FeedbackConfig":
        if self.source == "checkpoint" and self.model is None:
            raise ValueError("source checkpoint needs `model`: a folder or a hub id, as model.path")
        if self.source == "endpoint" and (self.model is None or self.url is None):
            raise ValueError("source endpoint needs `url`, such as https://api.openai.com/v1, and a `model`'s name")
        given = [name for name in ("url", "key_variable") if getattr(self, name) is not None]
        if self.source != "endpoint" and given:
            raise ValueError(f"{' and '.join(given)}: only for source endpoint, and source is {self.source}")
        if self.max_length < self.max_tokens + 128:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for a prompt beside max_tokens {self.max_tokens}: "
                f"at least {self.max_tokens + 128}"
            )
        return self

    @property
    def on(self) -> bool:
        return self.setting != "none"


class EnvSettings(Strict):
    """What every environment has."""

    feedback: FeedbackConfig = FeedbackConfig()


class CalculatorConfig(EnvSettings):
    """Arithmetic with a calculator tool that takes one binary operation a call (rl/envs/calculator.py)."""

    name: Literal["calculator"]
    min_operations: PositiveInt = 2
    max_operations: PositiveInt = 4
    max_digits: PositiveInt = 4
    operators: str = Field(default="+-", pattern=r"^[+\-*]+$")
    max_turns: PositiveInt = 8
    progress_reward: float = Field(default=0.0, ge=0)
    """What a turn is given for the next right step and for the right answer. Small, so that only a right answer makes
    reward.success_at."""

    @model_validator(mode="after")
    def _ordered(self) -> "CalculatorConfig":
        if self.min_operations > self.max_operations:
            raise ValueError(f"min_operations {self.min_operations} is above max_operations {self.max_operations}")
        return self


class ReasoningGymConfig(EnvSettings):
    """Tasks of a reasoning-gym generator, with the calculator tool (rl/envs/reasoning.py)."""

    name: Literal["reasoning_gym"]
    dataset: str = "chain_sum"
    settings: dict[str, Any] = Field(default_factory=dict)
    tool: Literal["calculator", "none"] = "calculator"
    max_turns: PositiveInt = 6


BadRows = Literal["refuse", "skip"]
"""What becomes of a run with rows that are no tasks, or whose question does not fit model.max_length."""


class RowsConfig(EnvSettings):
    """Prompts of one's own, from JSONL or Parquet rows with `prompt` (text or messages) and `answer`."""

    name: Literal["rows"]
    prompts: str
    held_out: str | None = None
    bad_rows: BadRows = "refuse"
    tool: Literal["calculator", "none"] = "none"
    max_turns: PositiveInt = 1


class GymnasiumConfig(EnvSettings):
    """A Gymnasium environment of choices or texts (rl/envs/gymnasium.py)."""

    name: Literal["gymnasium"]
    id: str
    args: dict[str, Any] = Field(default_factory=dict)
    """Handed to gymnasium.make."""
    actions: tuple[str, ...] = ()
    """What the choices are called, in order. Default: by number."""
    instructions: str = ""
    """The first message begins with this."""
    max_turns: PositiveInt = 20


class MultiAgentConfig(EnvSettings):
    """A game of RLlib's whose speakers say texts; the model in training plays them all (actors/multi_agent.py).

    path: a MultiAgentEnv's dotted path, or the name under which an installed package has it as an entry point of
    `repertory.envs`; `args` is the config that it is made with.
    """

    name: Literal["multi_agent"]
    path: str
    args: dict[str, Any] = Field(default_factory=dict)
    instructions: str = ""
    """Each speaker's first message begins with this."""
    max_turns: PositiveInt = 20
    """Of each speaker."""


class CustomEnvConfig(EnvSettings):
    """An environment class of one's own; `args` is handed to it as it stands.

    path: a dotted path, or the name under which an installed package has it as an entry point of `repertory.envs`.
    """

    name: Literal["custom"]
    path: str
    args: dict[str, Any] = Field(default_factory=dict)
    max_turns: PositiveInt = 8


class SandboxConfig(Strict):
    """wall_s and output_kib are of a call, cpu_s of each process in all its life, the rest of the sandbox.

    memory_mib bounds the address space of each process, and what all processes together hold in memory, with anonymous
    memory made to be shared, and 1 KiB for each file in the two places that can be written to, /tmp and /dev/shm.
    file_mib bounds each file, and each of those two places, which are memory. processes bounds how many there are at a
    time, and ends a session whose code leaves some behind that come back however often they are ended.
    """

    backend: Literal["bubblewrap", "unsafe_local"] = "bubblewrap"
    python: str = "/usr/bin/python3"
    read_only: tuple[str, ...] = ()
    """Further folders that the code may read, such as a virtual environment's."""
    wall_s: PositiveFloat = 10.0
    cpu_s: PositiveInt = 10
    memory_mib: PositiveInt = 512
    processes: PositiveInt = 16
    file_mib: PositiveInt = 16
    open_files: PositiveInt = 64
    output_kib: PositiveInt = 64
    parallel: PositiveInt = 32
    """Calls that run at the same time in one process of ours; others wait."""


class DatasetConfig(Strict):
    """One reasoning-gym generator of a mix; weight: how many of its tasks come for one of weight 1."""

    dataset: str
    settings: dict[str, Any] = Field(default_factory=dict)
    weight: PositiveFloat = 1.0


class PythonConfig(EnvSettings):
    """Questions that are answered with the help of Python, run in a sandbox (rl/envs/python.py).

    The questions: `datasets`, a mix of reasoning-gym generators, or `prompts`, rows as of the `rows` environment.
    """

    name: Literal["python"]
    datasets: tuple[DatasetConfig, ...] = ()
    prompts: str | None = None
    held_out: str | None = None
    bad_rows: BadRows = "refuse"
    style: Literal["fenced", "tags", "tool"] = "fenced"
    """fenced: the first ```python block of a turn is run (R1-Code-Interpreter, SimpleTIR, M-DPO). tags: <execute> or
    <solution>, with budgets stated each turn (MINT). tool: calls of a tool `python`."""
    system: str | None = None
    """In place of the style's own system message."""
    answer_in_output: bool = False
    """fenced: an answer that the code prints counts too (SimpleTIR)."""
    void_turn: Literal["stop", "ask"] = "stop"
    """fenced: a turn with neither code nor answer ends the episode, or is answered by a request for one of them."""
    stateful: bool = True
    """Whether a turn's code sees what the ones before have left."""
    max_turns: PositiveInt = 6
    max_calls: PositiveInt | None = None
    max_solutions: PositiveInt = 2
    """tags: how many answers may be proposed; a wrong one is said to be wrong."""
    output_chars: PositiveInt = 512
    errors: Literal["traceback", "last_line"] = "last_line"
    sandbox: SandboxConfig = SandboxConfig()

    @model_validator(mode="after")
    def _one_source(self) -> "PythonConfig":
        if bool(self.datasets) == (self.prompts is not None):
            raise ValueError("give either `datasets` (reasoning-gym generators) or `prompts` (rows of one's own)")
        if self.held_out is not None and self.prompts is None:
            raise ValueError("held_out names a second file of rows: give the first as `prompts`")
        if self.prompts is not None and self.style == "tags" and self.max_solutions > 1:
            raise ValueError(
                "style tags says which solutions are wrong while the episode is played, on an event loop, where "
                "math-verify cannot bound its time: set max_solutions to 1, or play `datasets`"
            )
        if self.prompts is not None and self.feedback.setting == "GT" and self.feedback.source == "rules":
            raise ValueError(
                "feedback by rules with the ground truth says which outputs are right while the episode is played, on "
                "an event loop, where math-verify cannot bound its time: use source checkpoint or endpoint, setting "
                "no_GT, or play `datasets`"
            )
        return self


EnvConfig = Annotated[
    CalculatorConfig
    | ReasoningGymConfig
    | RowsConfig
    | PythonConfig
    | GymnasiumConfig
    | MultiAgentConfig
    | CustomEnvConfig,
    Field(discriminator="name"),
]
