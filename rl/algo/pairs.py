"""Pairs to prefer by, mined from the rewards of one task's episodes. An episode is its index in the group."""

import math
from collections.abc import Sequence
from random import Random

Pair = tuple[int, int]
"""(chosen, rejected)"""


def right_against_wrong(successes_G: Sequence[bool], rng: Random, *, per_task: int = 1) -> list[Pair]:
    """Up to `per_task` different pairs of a random success and a random failure.

    One of each is M-DPO's data (https://arxiv.org/abs/2409.02392). With more, no episode is used again before its whole
    side has been.
    """
    right = [i for i, success in enumerate(successes_G) if success]
    wrong = [i for i, success in enumerate(successes_G) if not success]
    rng.shuffle(right)
    rng.shuffle(wrong)
    # Walking both sides in step comes back to the first pair after lcm steps; a shift by one then makes new pairs.
    cycle = math.lcm(len(right), len(wrong))
    count = min(per_task, len(right) * len(wrong))
    return [(right[i % len(right)], wrong[(i + i // cycle) % len(wrong)]) for i in range(count)]


def by_margin(rewards_G: Sequence[float], rng: Random, *, margin: float, per_task: int = 1) -> list[Pair]:
    """Up to `per_task` pairs whose rewards differ by more than `margin`: best against worst, and so on inwards.

    Online DPO (https://arxiv.org/abs/2404.14367) takes two samples and drops them where they differ by no more. No
    episode is in two pairs; equal rewards are ordered at random.
    """
    order = rng.sample(range(len(rewards_G)), len(rewards_G))
    order.sort(key=lambda i: rewards_G[i], reverse=True)
    outside_in = [(order[k], order[-1 - k]) for k in range(min(per_task, len(order) // 2))]
    return [(best, worst) for best, worst in outside_in if rewards_G[best] - rewards_G[worst] > margin]
