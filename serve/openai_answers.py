"""Answers in OpenAI's shape, as plain dictionaries: whole ones, and the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rl.chat import ChatCodec
from rl.env import ToolCall
from serve.completions import Asked, Piece, Turn

_LEAST = -9999.0
"""Minus infinity, which is no JSON, as OpenAI writes it."""
JSON = dict[str, Any]


class Answer:
    """One answer: a chat completion, or texts. Every part of it says which version it is of."""

    def __init__(self, codec: ChatCodec, name: str, version: int, asked: Sequence[Asked], *, tells: int | None):
        """tells: how many of the most likely tokens are told with each; None: no log-probs."""
        self._codec, self._asked, self._tells = codec, asked, tells
        self._chat = asked[0].chat
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": f"{name}@{version}",
            "system_fingerprint": f"v{version}",
            "weight_version": version,
        }
        self._offsets = [0] * len(asked)

    def whole(self, turns: Sequence[Turn], echo: bool) -> JSON:
        choices = [self._choice(a, turn, echo) for a, turn in zip(self._asked, turns, strict=True)]
        return {**self._head, "choices": choices, "usage": self._usage(turns)}

    def _choice(self, asked: Asked, turn: Turn, echo: bool) -> JSON:
        said, told = turn.said, Piece(turn.said.content, turn.token_ids, turn.logprobs, turn.top)
        choice: JSON = {"index": asked.index, "logprobs": self._logprobs(asked.index, told)}
        choice["finish_reason"] = turn.finish_reason
        if not self._chat:
            return {**choice, "text": self.prompt_of(asked) + said.content if echo else said.content}
        message: JSON = {"role": "assistant", "content": said.content, "refusal": None}
        if said.calls:
            message = {**message, "content": said.content or None, "tool_calls": list(map(_call, said.calls))}
        return {**choice, "message": message}

    def prompt_of(self, asked: Asked) -> str:
        return self._codec.text(asked.context, special=True)

    def _usage(self, turns: Sequence[Turn]) -> JSON:
        # The prompt of several choices is one.
        prompts = {id(a.context): len(a.context) for a in self._asked}
        prompt, sampled = sum(prompts.values()), sum(len(turn.token_ids) for turn in turns)
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}

    # -- a stream ----------------------------------------------------------------------------------------------------

    def opening(self, echo: bool) -> Iterator[JSON]:
        """What comes before anything is sampled."""
        for asked in self._asked:
            if self._chat:
                yield self._chunk(asked.index, {"role": "assistant", "content": ""})
            elif echo:
                yield self._chunk(asked.index, self.prompt_of(asked))

    def piece(self, index: int, piece: Piece) -> JSON | None:
        logprobs = self._logprobs(index, piece)
        if not piece.text and not logprobs:
            return None
        return self._chunk(index, {"content": piece.text} if self._chat else piece.text, logprobs)

    def closing(self, index: int, turn: Turn) -> Iterator[JSON]:
        """What comes of a choice when it is finished."""
        if turn.said.calls:
            calls = [{"index": i, **_call(call)} for i, call in enumerate(turn.said.calls)]
            yield self._chunk(index, {"tool_calls": calls})
        yield self._chunk(index, {} if self._chat else "", reason=turn.finish_reason)

    def usage(self, turns: Sequence[Turn]) -> JSON:
        return {**self._stream_head(), "choices": [], "usage": self._usage(turns)}

    def _chunk(self, index: int, delta: Any, logprobs: JSON | None = None, reason: str | None = None) -> JSON:
        shown = {"delta" if self._chat else "text": delta}
        choice = {"index": index, **shown, "logprobs": logprobs, "finish_reason": reason}
        return {**self._stream_head(), "choices": [choice]}

    def _stream_head(self) -> JSON:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    # -- log-probs ---------------------------------------------------------------------------------------------------

    def _logprobs(self, index: int, piece: Piece) -> JSON | None:
        if self._tells is None or not piece.token_ids:
            return None
        ids = [i for i in piece.token_ids if i != self._codec.end_of_turn]  # it is none of the text
        tokens = [self._codec.text([i], special=True) for i in ids]
        top = piece.top or [{}] * len(ids)
        both = [self._likely(i, p, likely) for i, p, likely in zip(ids, piece.logprobs, top, strict=False)]
        if self._chat:
            content = [
                {**_token(token, p), "top_logprobs": [_token(*each) for each in likely]}
                for token, p, likely in zip(tokens, piece.logprobs, both, strict=False)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(p, _LEAST) for p in piece.logprobs[: len(ids)]],
            "top_logprobs": [{t: max(p, _LEAST) for t, p in likely} for likely in both] if self._tells else None,
            "text_offset": offsets,
        }

    def _likely(self, token: int, logprob: float, top: Mapping[int, float]) -> list[tuple[str, float]]:
        """The most likely tokens in order; vLLM tells the sampled one apart from them."""
        ranked = sorted({**top, token: logprob}.items(), key=lambda pair: -pair[1])[: self._tells]
        return [(self._codec.text([i], special=True), p) for i, p in ranked]


def _token(token: str, logprob: float) -> JSON:
    whole = "\N{REPLACEMENT CHARACTER}" not in token  # else it is a part of a character
    return {"token": token, "logprob": max(logprob, _LEAST), "bytes": list(token.encode()) if whole else None}


def _call(call: ToolCall) -> JSON:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
