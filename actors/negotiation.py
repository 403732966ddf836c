"""A small negotiation, as an RLlib environment of texts: two speakers divide items that they value differently.

After Deal or No Deal (https://arxiv.org/abs/1706.05125), with one item of each kind. What all of them are worth to a
speaker adds up to 10, and only that speaker knows how. They take turns: `want book pen` asks for these and leaves the
rest to the other, `accept` takes what the other's last words leave. An agreement rewards each with a tenth of what its
share is worth to it, the end of the turns with nothing. What is half for one may be little for the other: both gain by
finding out who wants what.
"""

import itertools
import random
import string
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from ray.rllib.env.multi_agent_env import MultiAgentEnv

from rl.task import held_out

ITEMS = ("book", "hat", "pen", "cup")
TOTAL = 10
SPEAKERS: tuple[str, str] = ("first", "second")
_ASPIRATIONS = (7, 6, 5)
"""What a patient speaker asks for with its first words, its second, and from then on."""


def wanted(text: str) -> frozenset[str] | None:
    """The items that `want ...` asks for; None for any other text."""
    verb, *items = text.split() or [""]
    if verb != "want" or items == ["nothing"]:
        return frozenset() if verb == "want" else None
    known = items and len(set(items)) == len(items) and set(items) <= set(ITEMS)
    return frozenset(items) if known else None


def listed(items: Collection[str]) -> str:
    return " ".join(item for item in ITEMS if item in items) or "nothing"


class Negotiation(MultiAgentEnv):
    """args: `turns`, how many both have together.

    reset takes options: {"split": "train" | "held_out"}, which no two games of the same valuations are in both of.
    """

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__()
        self._turns = int((config or {}).get("turns", 6))
        self.possible_agents = list(SPEAKERS)
        self.agents = list(SPEAKERS)
        letters = string.ascii_lowercase + " "
        self.action_spaces = {a: spaces.Text(40, charset=letters) for a in SPEAKERS}
        self.observation_spaces = {a: spaces.Text(120, charset=string.printable) for a in SPEAKERS}
        self.worths: dict[str, dict[str, int]] = {}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        split = (options or {}).get("split")
        while True:
            self.worths = {a: self._drawn() for a in SPEAKERS}
            if split is None or held_out(str(self.worths)) == (split == "held_out"):
                break
        self._taken, self._asked, self._spoken = 0, None, dict.fromkeys(SPEAKERS, 0)
        return {"first": f"{self._opening('first')} You begin."}, {}

    def _drawn(self) -> dict[str, int]:
        """Every way of adding up to TOTAL is as likely as any other: bars between stars."""
        places = TOTAL + len(ITEMS) - 1
        bars = np.sort(self.np_random.choice(places, len(ITEMS) - 1, replace=False))
        worths = np.diff([-1, *bars, places]) - 1
        return dict(zip(ITEMS, map(int, worths), strict=True))

    def _opening(self, agent: str) -> str:
        return "Worth to you: " + " ".join(f"{item} {worth}" for item, worth in self.worths[agent].items()) + "."

    def step(self, action_dict: dict) -> tuple[dict, dict, dict, dict, dict]:
        ((agent, text),) = action_dict.items()
        assert agent == SPEAKERS[self._taken % 2], f"it is not {agent}'s turn"
        other = SPEAKERS[1 - self._taken % 2]
        self._taken += 1
        self._spoken[agent] += 1
        if text.split() == ["accept"] and self._asked is not None:
            return self._agreed({other: self._asked, agent: frozenset(ITEMS) - self._asked})
        self._asked = wanted(text)
        said = "say nothing clear" if self._asked is None else f"want {listed(self._asked)}"
        if self._taken == self._turns:
            return self._ended(dict.fromkeys(SPEAKERS, "No agreement."), dict.fromkeys(SPEAKERS, 0.0), truncated=True)
        opening = f"{self._opening(other)} " if self._taken == 1 else ""
        going = {"__all__": False}
        return {other: f"{opening}They {said}."}, {agent: 0.0, other: 0.0}, going, going, {}

    def _agreed(self, shares: Mapping[str, Collection[str]]) -> tuple[dict, dict, dict, dict, dict]:
        rewards = {a: self.worth(a, shares[a]) / TOTAL for a in SPEAKERS}
        return self._ended({a: f"Agreed: you get {listed(shares[a])}." for a in SPEAKERS}, rewards, truncated=False)

    def _ended(self, seen: dict, rewards: dict, truncated: bool) -> tuple[dict, dict, dict, dict, dict]:
        return seen, rewards, {"__all__": not truncated}, {"__all__": truncated}, {}

    def worth(self, agent: str, items: Collection[str]) -> int:
        return sum(self.worths[agent][item] for item in items)

    def demonstrate(self, agent: str, rng: random.Random, guess: bool) -> str:
        """What a scripted speaker says in this place (actors/multi_agent.py asks for it).

        The patient one asks for little enough that is worth much, less each time, and accepts half. The careless one
        (`guess`), of which logs are full, asks for whatever comes to its mind and accepts one time in three.
        """
        if guess:
            if self._asked is not None and rng.random() < 1 / 3:
                return "accept"
            return f"want {listed([i for i in ITEMS if rng.random() < 0.5] or [rng.choice(ITEMS)])}"
        if self._asked is not None and self.worth(agent, frozenset(ITEMS) - self._asked) * 2 >= TOTAL:
            return "accept"
        aspired = _ASPIRATIONS[min(self._spoken[agent], len(_ASPIRATIONS) - 1)]
        by_worth = sorted(ITEMS, key=lambda item: -self.worths[agent][item])
        enough = itertools.accumulate(self.worths[agent][item] for item in by_worth)
        count = next(i for i, worth in enumerate(enough, 1) if worth >= aspired)
        return f"want {listed(by_worth[:count])}"
