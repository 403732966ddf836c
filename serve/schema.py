"""What clients send to the session routes. Every bound is in the OpenAPI schema, and holds."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_MOST = (1 << 31) - 1
Text = Annotated[str, Field(max_length=1 << 20)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TaskRequest(_Body):
    """A task of the environment, by its place in a split."""

    split: Literal["held_out", "train"] = "held_out"
    index: int = Field(default=0, ge=0, le=_MOST)


class SessionRequest(_Body):
    """A task that the agent plays, or a conversation.

    env and task: the agent plays that task of that environment; without `env` a person speaks, and the agent may call
    `tools`. collect: whether ratings and corrections may be kept, and trained on.
    """

    env: str | None = Field(default=None, max_length=200)
    task: TaskRequest | None = None
    tools: str | None = Field(default=None, max_length=200)
    system: Text | None = None
    model: str | None = Field(default=None, max_length=200)
    seed: int | None = Field(default=None, ge=0, le=_MOST)
    sample: int = Field(default=0, ge=0, le=_MOST)
    max_turns: int | None = Field(default=None, ge=1, le=_MOST)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=_MOST)
    max_tokens: int | None = Field(default=None, ge=1, le=_MOST)
    collect: bool = False


class TurnRequest(_Body):
    """What the person says; nothing where the agent is to go on by itself. retry: sample the last turns, or those from
    `turn` on, once more."""

    content: Text | None = Field(default=None, min_length=1)
    retry: bool = False
    turn: int | None = Field(default=None, ge=0, le=_MOST)
    stream: bool = True


class FeedbackRequest(_Body):
    """What the person thinks of a turn, and what the agent should have said. Neither: what was said is taken back."""

    turn: int = Field(ge=0, le=_MOST)
    rating: Literal["up", "down"] | None = None
    correction: Text | None = Field(default=None, min_length=1)
