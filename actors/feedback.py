"""Who gives language feedback: actors that serve a fixed model, or an endpoint elsewhere (rl/feedback.py).

    rollout worker ──► Checkpoint ──► GeneratorPool ──► FeedbackGenerator (vLLM, its own model's weights)
                  └──► EndpointTeacher (actors/endpoint.py) ──► URL/chat/completions
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.endpoint import EndpointTeacher
from actors.generator import Generator
from actors.generator_pool import GeneratorPool
from rl.chat import ChatCodec, shortened
from rl.config import Config
from rl.config_env import FeedbackConfig
from rl.feedback import Teacher
from rl.policy import Sampling
from rl.pretrained import find_model, load_codec


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
        return EndpointTeacher(feedback, config.faults.patience_s)
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
            most = most * room * 19 // (20 * len(ids)) - 1  # a little less than in proportion
            if most < 1:
                raise ValueError(f"env.feedback.max_length {self._config.max_length} holds no prompt of this model")
            ids = self._codec.prompt([{"role": "user", "content": shortened(prompt, most)}])
        return ids
