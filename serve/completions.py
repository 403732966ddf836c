"""The work behind OpenAI's routes: a request to contexts and sampling, and turns sampled, whole or piece by piece.

    messages ──► context: as the episode loop would have it ──► versions ──► Turn ──► remembered as it was sampled
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl.env import Message
from rl.policy import Sampling
from rl.task import derive_seed
from serve.attended import too_late
from serve.errors import ApiError, not_taken
from serve.openai_schema import CHOICES, ChatRequest, CompletionRequest, messages_of, tools_of
from serve.text_stream import Said, TurnText
from serve.token_memory import TokenMemory

if TYPE_CHECKING:
    from serve.service import Service

_LONG = 20_000
"""Bytes of a request whose texts are encoded beside the event loop."""
_DEFAULT_TOKENS = 16
"""Of POST /v1/completions, as OpenAI has it."""


@dataclass(frozen=True)
class Asked:
    """One turn to sample, the request's `index`-th. stops: strings that end it; tools: whether it may call any."""

    index: int
    context: Sequence[int]
    sampling: Sampling
    stops: Sequence[str] = ()
    tools: bool = False
    one_call: bool = False
    chat: bool = True

    @property
    def watched(self) -> bool:
        """Whether its tokens have to be seen as they are sampled."""
        return bool(self.stops or self.sampling.top_logprobs or (self.tools and self.one_call))


@dataclass(frozen=True)
class Piece:
    """What has been sampled since the last one, and the text that can be shown by now."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[Mapping[int, float]] = ()


@dataclass(frozen=True)
class Turn:
    """A choice of the answer. The tokens are those up to where a stop string was complete."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[Mapping[int, float]]
    said: Said
    finish_reason: str


class Completions:
    """Of one replica, which remembers what it has said."""

    def __init__(self, service: "Service"):
        self._service, self.memory = service, TokenMemory()

    # -- what is asked for -------------------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, size: int) -> list[Asked]:
        """The turns that a request of `size` bytes asks for. Raises ApiError."""
        if body.top_logprobs and not body.logprobs:
            raise _invalid("top_logprobs", "needs logprobs to be true")
        messages, tools = messages_of(body), tools_of(body)
        context = await _beside(size, self._conversation, messages, tools)
        # OpenAI's own order: the newer name goes before.
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = self._sampling(body, context, body.max_tokens is not None, body.top_logprobs or 0, name, "messages")
        one_call = body.parallel_tool_calls is False
        return [
            Asked(k, context, _nth(sampling, k), body.stops, bool(tools), one_call) for k in range(body.n or 1)
        ]

    async def texts(self, body: CompletionRequest, size: int) -> list[Asked]:
        """The same of a request without messages: every prompt, `n` times. Raises ApiError."""
        n, prompts = body.n or 1, _prompts(body.prompt)
        if body.best_of is not None and body.best_of > n:
            raise _invalid("best_of", "more than n is not supported here")
        if len(prompts) * n > CHOICES:
            raise _invalid("n", f"asks for {len(prompts) * n} choices, and {CHOICES} are the most")
        if body.echo and body.logprobs is not None:
            raise _invalid("echo", "is not supported here together with logprobs")
        explicit, body.max_tokens = body.max_tokens is not None, body.max_tokens or _DEFAULT_TOKENS
        asked = []
        for prompt in prompts:
            context = await _beside(size, self._ids, prompt)
            sampling = self._sampling(body, context, explicit, body.logprobs or 0, "max_tokens", "prompt")
            for _ in range(n):
                asked.append(Asked(len(asked), context, _nth(sampling, len(asked)), body.stops, chat=False))
        return asked

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        most = self._service.max_length

        def recall(context: Sequence[int], message: Message) -> Sequence[int] | None:
            return self.memory.recall(context, message) if len(context) < most else None  # it is refused anyhow

        try:
            return self._service.codec.conversation(messages, tools, recall)
        except Exception as error:
            raise not_taken(error, "messages") from error

    def _ids(self, prompt: str | list[int]) -> list[int]:
        codec = self._service.codec
        ids = codec.plain(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise _invalid("prompt", "is empty")
        if max(ids) >= codec.vocabulary:
            raise _invalid("prompt", f"has the token {max(ids)}, and the model has {codec.vocabulary}")
        return ids

    def _sampling(
        self, body: Any, context: Sequence[int], explicit: bool, top: int, name: str, prompt: str
    ) -> Sampling:
        """Raises ApiError, saying by how much, when there is no room."""
        most, have = self._service.max_length, len(context)
        room, over = most - have, "context_length_exceeded"
        if room < 1:
            told = f"the prompt takes {have} tokens: {1 - room} too many for an answer in a context of {most}"
            raise ApiError(400, over, told, param=prompt)
        wanted = self._service.sampling_of(body)
        if explicit and wanted["max_tokens"] > room:
            told = (
                f"{name} = {wanted['max_tokens']} is {wanted['max_tokens'] - room} more than the {room} tokens that a "
                f"prompt of {have} leaves in the model's context of {most}"
            )
            raise ApiError(400, over, told, param=name)
        wanted["max_tokens"] = min(wanted["max_tokens"], room)
        seed = None if body.seed is None else body.seed % (1 << 63)
        return Sampling(**wanted, seed=seed, stop=(self._service.codec.end_of_turn,), top_logprobs=top)

    # -- what is sampled ---------------------------------------------------------------------------------------------

    async def turns(self, asked: Sequence[Asked], version: int) -> list[Turn]:
        """Whole, all at the same time. Cancelling ends them all."""
        if len(asked) == 1:
            return [await self._turn(asked[0], version)]
        tasks = [asyncio.ensure_future(self._turn(a, version)) for a in asked]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def pieces(
        self, asked: Sequence[Asked], version: int, deadline: float
    ) -> AsyncGenerator[tuple[int, Piece | Turn]]:
        """As they come, each choice's last one being the whole. Closing ends them all. Raises ApiError 504."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()

        async def speak(a: Asked) -> None:
            try:
                queue.put_nowait((a.index, await self._turn(a, version, lambda p: queue.put_nowait((a.index, p)))))
            except Exception as error:  # whoever listens has to hear of it
                queue.put_nowait((a.index, error))

        tasks = [asyncio.ensure_future(speak(a)) for a in asked]
        under_way = len(tasks)
        try:
            while under_way:
                try:
                    index, item = await asyncio.wait_for(queue.get(), deadline - loop.time())
                except TimeoutError:
                    raise too_late() from None
                if isinstance(item, Exception):
                    raise item
                under_way -= isinstance(item, Turn)
                yield index, item
        finally:
            for task in tasks:
                task.cancel()

    async def _turn(self, asked: Asked, version: int, show: Callable[[Piece], None] | None = None) -> Turn:
        versions, codec = self._service.versions, self._service.codec
        text = TurnText(codec, asked.stops, tools=asked.tools, one_call=asked.one_call)
        ids: list[int] = []
        logprobs: list[float] = []
        top: list[Mapping[int, float]] = []
        if show is None and not asked.watched:
            completion = await versions.generate(asked.context, asked.sampling, version)
            ids, logprobs = list(completion.token_ids), list(completion.logprobs)
            text.add(ids)
            _, said = text.finish()
            reason = completion.finish_reason
        else:
            async with versions.stream(asked.context, asked.sampling, version) as stream:
                async for chunk in stream:
                    before, shown = len(ids), text.add(chunk.token_ids)
                    ids += chunk.token_ids
                    if text.end is not None:
                        del ids[codec.first(ids, text.end) :]
                    count = max(0, len(ids) - before)
                    new = chunk.token_ids[:count], chunk.logprobs[:count], chunk.top[:count]
                    logprobs += new[1]
                    top += new[2]
                    if show is not None:
                        show(Piece(shown, *new))
                    if text.end is not None:
                        break
                reason = "stop" if text.end is not None else (await stream.completion()).finish_reason
            rest, said = text.finish()
            if show is not None and rest:
                show(Piece(rest, (), ()))
        turn = Turn(ids, logprobs, top, said, "tool_calls" if said.calls else reason)
        if asked.chat:
            self._remember(asked.context, turn)
        return turn

    def _remember(self, context: Sequence[int], turn: Turn) -> None:
        codec, ids, said = self._service.codec, list(turn.token_ids), turn.said
        if said.end is not None:
            ids = ids[: codec.first(ids, said.kept)]
            if len(codec.text(ids, special=True)) != said.kept:
                return  # the cut is within a token
        if not ids or ids[-1] != codec.end_of_turn:
            ids.append(codec.end_of_turn)
        calls = [{"function": {"name": c.name, "arguments": dict(c.arguments)}} for c in said.calls]
        self.memory.remember(context, {"content": said.content, "tool_calls": calls}, ids)


async def _beside(size: int, encode: Callable[..., list[int]], *texts: Any) -> list[int]:
    return await asyncio.to_thread(encode, *texts) if size > _LONG else encode(*texts)


def _nth(sampling: Sampling, index: int) -> Sampling:
    """Of the choices of a seeded request each has a seed of its own, the first the request's."""
    if sampling.seed is None or index == 0:
        return sampling
    return sampling.with_(seed=derive_seed(sampling.seed, "choice", index))


def _prompts(prompt: Any) -> list[str | list[int]]:
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def _invalid(param: str, says: str) -> ApiError:
    return ApiError(400, "invalid_request", f"{param} {says}", param=param)
