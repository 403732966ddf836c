"""Reference actors: log-probs under frozen weights, batched by tokens. A call says which folder's: nothing is told."""

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

    def load(self, path: str) -> None:
        """Freeze at a model folder: a checkpoint, or the initial model."""
        if path != self._path:
            with self.calling("load"):
                self._scorer, self._path = TokenScorer(self._read(path)), path

    def columns(self, path: str, refs: Sequence[Any], temperature: float) -> tuple[list[list[Columns]], int]:
        """refs: of groups of trajectories. Each trajectory's column `reference`, under the model in the folder `path`:
        log-probs, 0 off the mask. And how many groups. Two return values."""
        self.load(path)
        groups = ray.get(list(refs))
        with self.calling("columns"):
            scored = self._scored(groups, temperature)
        return [[{"reference": r} for r in group] for group in scored], len(scored)

    def example_logprobs(
        self, path: str, refs: Sequence[Any], part: int, parts: int
    ) -> tuple[list[list[np.ndarray]], int]:
        """refs: of lists of examples. Log-probs at temperature 1, for every parts-th example from `part` on. And how
        many. Two return values."""
        self.load(path)
        examples: list[Example] = [e for found in ray.get(list(refs)) for e in found]
        with self.calling("example_logprobs"):
            scored = self._scored([e.trajectories for e in examples[part::parts]], 1.0)
        return scored, len(scored)

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
