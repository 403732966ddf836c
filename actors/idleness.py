"""How idle each role is, step by step: from the seconds that every actor says it was busy."""

from collections import defaultdict
from typing import Any

from actors.company import Company

_ROLES = ("generator", "feedback", "rollout", "reward", "reference", "learner")


class Idleness:
    def __init__(self) -> None:
        self._before: dict[int, dict[str, Any]] = {}

    async def since_last(self, company: Company) -> dict[str, float]:
        """Since this was last asked: idle/ROLE, the share of the time that the role's actors had nothing to do, and the
        share of the prompts' tokens that the generators found in their prefix caches. Not of who was started again.
        """
        statuses = await company.statuses()
        idle: dict[str, list[float]] = defaultdict(list)
        hits = queries = 0
        for status in statuses:
            then = self._before.get(status["pid"])
            if then is None or status["role"] not in _ROLES:
                continue
            busy, passed = (status[key] - then[key] for key in ("busy_s", "clock_s"))
            idle[status["role"]].append(1 - busy / passed)
            if status["role"] != "generator":
                continue
            hits += status.get("prefix_hits", 0) - then.get("prefix_hits", 0)
            queries += status.get("prefix_queries", 0) - then.get("prefix_queries", 0)
        self._before = {status["pid"]: status for status in statuses}
        shares = {f"idle/{role}": sum(own) / len(own) for role, own in idle.items()}
        return shares | ({"generator/prefix_hit_rate": hits / queries} if queries else {})
