"""Filters: which episodes of a group are trained on, and which count in the group's statistics."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rl.config_algo import FilterConfig

_FLAG = {"void_turn": "void", "truncated": "truncated", "tool_error": "tool_error"}


@dataclass(frozen=True)
class Verdict:
    """What the filters leave of a group, [G] each. trained: in the loss; counted: in the group's mean and std.

    taken: how many episodes each filter took by itself, so that what two filters take is in both numbers. A group
    filter takes all G or none.
    """

    trained: tuple[bool, ...]
    counted: tuple[bool, ...]
    taken: Mapping[str, int]

    @property
    def empty(self) -> bool:
        """Whether nothing of the group is trained."""
        return not any(self.trained)


def judge(
    filters: Sequence[FilterConfig],
    *,
    rewards: Sequence[float],
    successes: Sequence[bool],
    flags: Sequence[Collection[str]],
) -> Verdict:
    """The verdict on one group of G episodes; flags: those of all turns of each episode.

    First the episode filters, which take the episodes with a flag; then the group filters, which look at the episodes
    that still count and take the whole group. The order of `filters` is without effect.

    void_turn: a turn without an action. With removes: loss it is SimpleTIR's filter (https://arxiv.org/abs/2509.02479):
    void episodes are not trained on, and their rewards stay in the group's mean and std. truncated: a turn cut short
    (there with removes: both). tool_error: a tool call that failed. zero_variance: fewer than two different rewards;
    DAPO's dynamic sampling (https://arxiv.org/abs/2503.14476, section 3.2). accuracy_band: a share of successes outside
    [low, high], or nobody left to take it of; SimpleTIR's acc_filter.
    """
    trained = counted = (True,) * len(rewards)
    taken: dict[str, int] = {}
    for f in (f for f in filters if f.name in _FLAG):
        spared = [_FLAG[f.name] not in episode for episode in flags]
        taken[f.name] = spared.count(False)
        if f.removes != "statistics":
            trained = tuple(a and b for a, b in zip(trained, spared, strict=True))
        if f.removes != "loss":
            counted = tuple(a and b for a, b in zip(counted, spared, strict=True))
    kept = [(r, s) for r, s, c in zip(rewards, successes, counted, strict=True) if c]
    for f in (f for f in filters if f.name not in _FLAG):
        taken[f.name] = len(rewards) if _takes_group(f, kept) else 0
        if taken[f.name]:
            trained = counted = (False,) * len(rewards)
    return Verdict(trained, counted, taken)


def _takes_group(f: FilterConfig, kept: Sequence[tuple[float, bool]]) -> bool:
    """kept: reward and success of the episodes that count."""
    if f.name == "zero_variance":
        return len({reward for reward, _ in kept}) < 2
    return not kept or not f.low <= sum(success for _, success in kept) / len(kept) <= f.high
