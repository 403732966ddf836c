"""Reference actors: log-probs under frozen weights, batched by tokens. Rebuilt from a folder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from actors.role import Role
from rl.config import Config
from rl.credit import Columns
from rl.data_stage import Example
from rl.model import LogprobHead, TokenScorer, frozen_scores, load_causal_lm
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

    def columns(self, refs: Sequence[Any], temperature: float) -> list[list[Columns]]:
        """refs: of groups of trajectories. Each trajectory's column `reference`: log-probs, 0 off the mask."""
        self._calls["columns"] += 1
        return [[{"reference": r} for r in group] for group in self._scored(ray.get(list(refs)), temperature)]

    def example_logprobs(self, refs: Sequence[Any], part: int, parts: int) -> list[list[np.ndarray]]:
        """refs: of lists of examples. Log-probs at temperature 1, for every parts-th example from `part` on."""
        self._calls["example_logprobs"] += 1
        examples: list[Example] = [e for found in ray.get(list(refs)) for e in found]
        return self._scored([e.trajectories for e in examples[part::parts]], 1.0)

    def _scored(self, groups: Sequence[Sequence[Trajectory]], temperature: float) -> list[list[np.ndarray]]:
        flat = [t for group in groups for t in group]
        budget = self._config.learner.micro_batch_tokens
        rest = iter(frozen_scores(self._scorer, flat, LogprobHead(temperature), budget, self._device))
        return [[next(rest) for _ in group] for group in groups]

    def _read(self, path: str) -> Any:
        model = load_causal_lm(
            path, self._config.learner_dtype, trust_remote_code=self._config.model.trust_remote_code
        )
        return model.eval().requires_grad_(False).to(self._device)
