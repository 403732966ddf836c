"""Reward actors: score finished episodes with a rule, a function of one's own, or a reward model. Stateless.

A call says which reward model it wants: a replica that was started again needs nothing told.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.role import Role
from rl.config import Config
from rl.episode import Episode
from rl.reward import Score, reward_function


class Reward(Role):
    role = "reward"

    def __init__(self, config: Config):
        super().__init__()
        self._config, self._function = config, reward_function(config)
        self._model: tuple[str, Any] | None = None

    def ready(self) -> None:
        """Returns when it can score."""

    def load(self, path: str) -> None:
        """Have the reward model in a folder at hand."""
        from rl.model import ValueScorer

        stamp = f"{path} {Path(path, 'config.json').stat().st_mtime_ns}"  # a later stage writes to the same folder
        if self._model is None or self._model[0] != stamp:
            with self.calling("load"):
                model = ValueScorer.load(path, self._config.learner_dtype).eval().requires_grad_(False)
                self._model = stamp, model

    def score(self, episodes: Sequence[Episode], model: str | None = None) -> list[Score]:
        """One score an episode, in order. model: a reward model, a folder, whose value is the reward; success stays the
        rule's."""
        with self.calling("score"):
            scores = [Score.of(self._function, episode, self._config.reward.success_at) for episode in episodes]
        if model is None:
            return scores
        self.load(model)
        assert self._model is not None
        from rl.model import last_values
        from rl.trajectory import to_trajectory

        budget = self._config.learner.micro_batch_tokens
        with self.calling("value"):
            values = last_values(self._model[1], [to_trajectory(e) for e in episodes], budget)
        return [
            replace(s, total=v + e.turn_reward, parts={"model": v})
            for s, e, v in zip(scores, episodes, values, strict=True)
        ]
