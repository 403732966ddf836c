"""The environments' settings. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rl.config_base import Strict


class CalculatorConfig(Strict):
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


class ReasoningGymConfig(Strict):
    """Tasks of a reasoning-gym generator, with the calculator tool (rl/envs/reasoning.py)."""

    name: Literal["reasoning_gym"]
    dataset: str = "chain_sum"
    settings: dict[str, Any] = Field(default_factory=dict)
    tool: Literal["calculator", "none"] = "calculator"
    max_turns: PositiveInt = 6


BadRows = Literal["refuse", "skip"]
"""What becomes of a run with rows that are no tasks, or whose question does not fit model.max_length."""


class RowsConfig(Strict):
    """Prompts of one's own, from JSONL or Parquet rows with `prompt` (text or messages) and `answer`."""

    name: Literal["rows"]
    prompts: str
    held_out: str | None = None
    bad_rows: BadRows = "refuse"
    tool: Literal["calculator", "none"] = "none"
    max_turns: PositiveInt = 1


class GymnasiumConfig(Strict):
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


class CustomEnvConfig(Strict):
    """An environment class of one's own; `args` is handed to it as it stands.

    path: a dotted path, or the name under which an installed package has it as an entry point of `repertory.envs`.
    """

    name: Literal["custom"]
    path: str
    args: dict[str, Any] = Field(default_factory=dict)
    max_turns: PositiveInt = 8


class SandboxConfig(Strict):
    """wall_s and output_kib are of a call, cpu_s of each process in all its life, the rest of the sandbox.

    memory_mib bounds the address space of each process: at most `processes` times as much in all. file_mib bounds each
    file, and each of the two places that can be written to, /tmp and /dev/shm, which are memory.
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


class PythonConfig(Strict):
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
        return self


EnvConfig = Annotated[
    CalculatorConfig | ReasoningGymConfig | RowsConfig | PythonConfig | GymnasiumConfig | CustomEnvConfig,
    Field(discriminator="name"),
]
