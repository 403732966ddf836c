"""How tests ask a server what OpenAI's clients ask, and turns that are written instead of sampled."""

import asyncio
import contextlib

import httpx
import openai

from rl.policy import Completion
from rl.vllm_io import Chunk

ASKED = [{"role": "user", "content": "17+4-9"}]
CALL = '<tool_call>{"name": "calculator", "arguments": {"a": 17, "op": "+", "b": 4}}</tool_call>'


def client_of(server) -> openai.OpenAI:
    """OpenAI's client, to be used as a context."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    )


def chat(client, **more):
    return client.chat.completions.create(**{"model": "agent", "messages": ASKED, **more})


def streamed(client, **more):
    """The chunks of a stream, and its choices put together: (text, finish reason) each."""
    chunks, texts, reasons = list(chat(client, stream=True, **more)), {}, {}
    for choice in (c for chunk in chunks for c in chunk.choices):
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return chunks, [(texts[i], reasons[i]) for i in sorted(texts)]


class Played:
    """A service's versions, but the turns are written here. They come a token at a time; `slow` ones never end."""

    def __init__(self, versions, codec, *said, slow=False, error=None, after=0):
        self._turns = [codec.reply({"role": "assistant", "content": s}) if isinstance(s, str) else s for s in said]
        self.codec, self._versions = codec, versions
        self._slow, self._error, self._after = slow, error, after
        self.contexts, self.asked, self.under_way = [], [], 0

    def __getattr__(self, name):
        return getattr(self._versions, name)

    def _next(self, context, sampling, version):
        self.contexts.append(list(context))
        self.asked.append((sampling, version))
        return self._turns[(len(self.asked) - 1) % len(self._turns)] if self._turns else []

    async def generate(self, context, sampling, version):
        ids = self._next(context, sampling, version)
        async for _ in self._tokens(ids, version):
            pass
        return Completion(ids, [-0.5] * len(ids), [version] * len(ids), "stop")

    async def _tokens(self, ids, version):
        self.under_way += 1
        try:
            for i in ids[: self._after or None] if self._slow or self._error else ids:
                yield Chunk([i], [-0.5], version, [{}])
            if self._error:
                raise self._error
            if self._slow:
                await asyncio.Event().wait()
        finally:
            self.under_way -= 1

    @contextlib.asynccontextmanager
    async def stream(self, context, sampling, version):
        ids = self._next(context, sampling, version)
        tokens = self._tokens(ids, version)

        class Stream:
            def __aiter__(self):
                return tokens

            async def completion(self):
                return Completion(ids, [-0.5] * len(ids), [version] * len(ids), "stop")

        try:
            yield Stream()
        finally:
            await tokens.aclose()


def have_said(server, monkeypatch, *said, **more) -> Played:
    """Have these turns said, in place of what the engine samples."""
    service = server.service
    versions = Played(getattr(service.versions, "_versions", service.versions), service.codec, *said, **more)
    monkeypatch.setattr(service, "versions", versions)
    return versions
