"""Who gives language feedback: actors that serve a fixed model, or an endpoint elsewhere (rl/feedback.py).

    rollout worker ──► Checkpoint ──► GeneratorPool ──► FeedbackGenerator (vLLM, its own model's weights)
                  └──► Endpoint ──► URL/chat/completions
"""

import asyncio
import itertools
import os
from collections.abc import Sequence
from typing import Any

import httpx

from actors.faults import backoff
from actors.generator import Generator
from actors.generator_pool import GeneratorPool
from rl.chat import ChatCodec, shortened
from rl.config import Config
from rl.config_env import FeedbackConfig
from rl.env import InfraError
from rl.feedback import Teacher
from rl.policy import Sampling
from rl.pretrained import find_model, load_codec

_CHARACTERS = 3
"""Of a token, at least, in what an endpoint is sent: its tokenizer is not here."""
_LONGEST_WAIT_S = 60.0
_OF_THE_REQUEST = (400, 413, 422)
"""Statuses that this one prompt would be answered with whenever it is sent."""
_ONCE_MORE = (408, 409, 429)
"""Statuses that another try may not be answered with; so are 500 and above."""


class FeedbackGenerator(Generator):
    """A generator of a fixed model, which no published version concerns."""

    role = "feedback"

    def __init__(self, config: Config, device: str):
        super().__init__(config.of_feedback, device, store="", namespace="")

    async def open(self, model_path: str, late: bool = False) -> None:
        """Start the engine on a model, given as model.path is; it takes turns at once."""
        await super().open(str(await asyncio.to_thread(find_model, model_path)))


def make_teacher(config: Config, actors: Sequence[Any]) -> Teacher | None:
    """None where no model gives feedback. Raises ValueError when its key or its model is not there."""
    feedback = config.env.feedback
    if not feedback.on or feedback.source == "rules":
        return None
    if feedback.source == "endpoint":
        return Endpoint(feedback)
    pool = GeneratorPool(actors, config.faults.patience_s)
    return Checkpoint(feedback, load_codec(config.of_feedback.model), pool)


class Checkpoint:
    """The feedback actors as a teacher."""

    def __init__(self, config: FeedbackConfig, codec: ChatCodec, pool: GeneratorPool):
        self._config, self._codec, self._pool = config, codec, pool

    async def answer(self, prompt: str, session: str, seed: int) -> str:
        """Raises Stuck when no feedback actor comes back within faults.patience_s."""
        c = self._config
        sampling = Sampling(
            temperature=c.temperature, max_tokens=c.max_tokens, seed=seed, stop=(self._codec.end_of_turn,)
        )
        completion = await self._pool.act(self._encoded(prompt), sampling, session)
        return self._codec.text(completion.token_ids)

    def _encoded(self, prompt: str) -> list[int]:
        """Its middle is left out when it is too long: the beginning has the task, the end the turn."""
        room, most = self._config.max_length - self._config.max_tokens, len(prompt)
        ids = self._codec.prompt([{"role": "user", "content": prompt}])
        while len(ids) > room:
            most = most * room // len(ids) - 1 - most // 20
            if most < 1:
                raise ValueError(f"env.feedback.max_length {self._config.max_length} holds no prompt of this model")
            ids = self._codec.prompt([{"role": "user", "content": shortened(prompt, most)}])
        return ids


class Endpoint:
    """An OpenAI-compatible endpoint as a teacher. For one event loop.

    Raises ValueError when made where the key's variable is not set. The key is sent in a header, and nowhere else.
    """

    def __init__(self, config: FeedbackConfig):
        self._config = config
        key = os.environ.get(config.key_variable) if config.key_variable else None
        if config.key_variable and not key:
            raise ValueError(missing_key(config.key_variable))
        self._headers = httpx.Headers({"Authorization": f"Bearer {key}"} if key else {})  # its repr hides the key
        self._slots = asyncio.Semaphore(config.parallel)
        self._client: httpx.AsyncClient | None = None

    async def answer(self, prompt: str, session: str, seed: int) -> str:
        """Raises InfraError when it stays away, ValueError when it refuses this prompt."""
        c = self._config
        body = {
            "model": c.model,
            "messages": [{"role": "user", "content": shortened(prompt, _CHARACTERS * (c.max_length - c.max_tokens))}],
            "temperature": c.temperature,
            "max_tokens": c.max_tokens,
            **({"seed": seed} if c.temperature else {}),
        }
        async with self._slots:
            for attempt in itertools.count(1):
                try:
                    return await self._asked(body)
                except _Again as error:
                    if attempt == c.attempts:
                        told = f"env.feedback: {c.url} gave no feedback in {attempt} attempts: {error}"
                        raise InfraError(told) from None
                    await asyncio.sleep(max(error.wait_s, backoff(attempt - 1)))
        raise AssertionError("the loop does not end")

    async def _asked(self, body: dict[str, Any]) -> str:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=self._config.timeout_s, limits=httpx.Limits(max_connections=None))
        url = f"{self._config.url}/chat/completions"
        try:
            response = await self._client.post(url, json=body, headers=self._headers)
        except httpx.TransportError as error:
            raise _Again(f"{type(error).__name__}: {error}") from None
        status = response.status_code
        if status == 200:
            return _text(response)
        told = f"status {status}: {self._safe(response.text)}"
        if status in _ONCE_MORE or status >= 500:
            raise _Again(told, _retry_after(response))
        if status in _OF_THE_REQUEST:
            raise ValueError(f"env.feedback: {url} refused a prompt: {told}")
        raise InfraError(f"env.feedback: {url} refused: {told}")

    def _safe(self, text: str) -> str:
        """The beginning of an answer, without the key if it repeats it."""
        key = self._headers.get("Authorization", "").removeprefix("Bearer ")
        return " ".join((text.replace(key, "***") if key else text).split())[:200]


class _Again(Exception):
    """A request that may go well another time, after wait_s."""

    def __init__(self, text: str, wait_s: float = 0.0):
        super().__init__(text)
        self.wait_s = wait_s


def _text(response: httpx.Response) -> str:
    try:
        said = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _Again("it answered something else than a chat completion") from None
    return said if isinstance(said, str) else ""  # null: all of it was thought


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the endpoint asks for, within reason."""
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_WAIT_S) if asked.isdigit() else 0.0


def missing_key(name: str) -> str:
    return (
        f"env.feedback.key_variable: the environment variable {name} is not set. Set it where the run starts; for "
        "a cluster at RAY_ADDRESS, on its nodes, before Ray starts there"
    )
