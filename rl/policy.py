"""Whatever can take the model's place in an episode: the Policy protocol and a scripted one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from rl.chat import ChatCodec
from rl.env import Message


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one turn is sampled. `seed` makes it reproducible; `stop` are token ids that end the turn (kept in it).

    temperature 0 is greedy. top_logprobs: how many of the most likely tokens a streamed chunk tells with each (at most
    20; only a request with a sink may ask for any).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    seed: int | None = None
    stop: tuple[int, ...] = ()
    top_logprobs: int = 0

    def with_(self, **changes: object) -> "Sampling":
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Completion:
    """What a generator returns for one turn, of N sampled tokens.

    logprobs: natural logs under the distribution that was sampled from (after temperature, top-p and top-k);
    versions: the weight version that sampled each token; finish_reason: "stop" when a stop token ended the turn,
    "length" when the token limit cut it.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    finish_reason: Literal["stop", "length"]


class ContextFull(Exception):
    """A policy whose context has a limit of its own: the next turn has no room in it."""


class Policy(Protocol):
    async def act(self, token_ids: Sequence[int], sampling: Sampling, session: str) -> Completion:
        """Samples the next turn after `token_ids`. `session` names the episode, for prefix-cache affinity.

        Raises ContextFull when it could not, for want of room.
        """
        ...


class ScriptedPolicy:
    """Says the given assistant messages in order: demonstrations, and tests. Its log-probs are 0: nothing was sampled.

    `version` -1 marks tokens that no weight version sampled.
    """

    def __init__(self, codec: ChatCodec, messages: Iterator[Message]):
        self._codec, self._messages = codec, messages

    async def act(self, token_ids: Sequence[int], sampling: Sampling, session: str) -> Completion:
        ids = self._codec.reply(next(self._messages))
        return Completion(ids, [0.0] * len(ids), [-1] * len(ids), "stop")
