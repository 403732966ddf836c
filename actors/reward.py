"""Reward actors: score finished episodes with a rule, a function of one's own, or a reward model. Stateless."""

from collections.abc import Sequence
from dataclasses import replace

from actors.role import Role
from rl.config import Config
from rl.env import World, load_object
from rl.episode import Episode
from rl.reward import RewardFunction, Score


def reward_function(config: Config) -> RewardFunction:
    """The configured function, or the environment's own rule, or nothing beyond what the environment gave."""
    path = config.reward.function or World(config.env, config.run.seed).default_reward
    return load_object(path) if path else lambda task, episode: 0.0


class Reward(Role):
    role = "reward"

    def __init__(self, config: Config):
        super().__init__()
        self._config, self._function, self._model = config, reward_function(config), None

    def load(self, path: str) -> None:
        """From now on a reward model, a folder, gives the reward. Success stays the rule's."""
        from rl.model import ValueScorer

        self._calls["load"] += 1
        self._model = ValueScorer.load(path, self._config.learner_dtype).eval().requires_grad_(False)

    def score(self, episodes: Sequence[Episode]) -> list[Score]:
        """One score an episode, in order."""
        self._calls["score"] += 1
        scores = [Score.of(self._function, episode, self._config.reward.success_at) for episode in episodes]
        if self._model is None:
            return scores
        from rl.model import last_values
        from rl.trajectory import to_trajectory

        budget = self._config.learner.micro_batch_tokens
        values = last_values(self._model, [to_trajectory(e) for e in episodes], budget)
        return [
            replace(s, total=v + e.turn_reward, parts={"model": v})
            for s, e, v in zip(scores, episodes, values, strict=True)
        ]
