"""Reward actors: score finished episodes with a rule, a verifier, or a function of one's own. Stateless."""

from collections.abc import Sequence

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
        self._function = reward_function(config)

    def score(self, episodes: Sequence[Episode]) -> list[Score]:
        """One score an episode, in order."""
        self._calls["score"] += 1
        return [Score.of(self._function, episode) for episode in episodes]
