"""Reference actors: log-probs under frozen weights, batched by tokens. Rebuilt from a folder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from actors.role import Role
from rl.config import Config
from rl.model import TokenScorer, frozen_logprobs, load_causal_lm
from rl.trajectory import Trajectory


class Reference(Role):
    role = "reference"

    def __init__(self, config: Config, device: str):
        super().__init__()
        self._config, self._device, self._path = config, device, ""

    def open(self, path: str) -> None:
        self.load(path)

    def load(self, path: str) -> None:
        """Freeze at a model folder: a checkpoint, or the initial model."""
        self._calls["load"] += 1
        if path != self._path:
            self._scorer, self._path = TokenScorer(self._read(path)), path

    def logprobs(self, refs: Sequence[Any], temperature: float) -> list[list[np.ndarray]]:
        """refs: of groups of trajectories. For each trajectory float32 [T], its tokens' log-probs, 0 off the mask."""
        self._calls["logprobs"] += 1
        groups: list[list[Trajectory]] = ray.get(list(refs))
        flat = [t for group in groups for t in group]
        budget = self._config.learner.micro_batch_tokens
        out = frozen_logprobs(self._scorer, flat, temperature, budget, self._device)
        rest = iter(out)
        return [[next(rest) for _ in group] for group in groups]

    def _read(self, path: str) -> Any:
        model = load_causal_lm(
            path, self._config.learner_dtype, trust_remote_code=self._config.model.trust_remote_code
        )
        return model.eval().requires_grad_(False).to(self._device)
