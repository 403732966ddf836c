"""The health of the stateless pools, reference and reward: RLlib's FaultTolerantActorManager, in a thread of its own.

A replica that Ray has started again needs nothing told: every call of it says which model it wants. So all there is to
do is to notice: that one is gone, that it is back, and that it hangs and must be killed. Who calls the replicas tries
again elsewhere meanwhile (actors/faults.py).
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from actors.faults import Stuck
from actors.supervisor import Reborn, end
from rl.config import FaultsConfig

_EVERY_S = 1.0


class ReplicaHealth(threading.Thread):
    """on_restart(role, error): called from this thread, once for every restart."""

    def __init__(self, faults: FaultsConfig, on_restart: Callable[[str, BaseException], None]):
        super().__init__(name="replica-health", daemon=True)
        logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)  # our log says it in our words
        self._faults, self._on_restart = faults, on_restart
        self._managers: dict[str, FaultTolerantActorManager] = {}
        self._seen: dict[tuple[str, int], tuple[str, float]] = {}
        """Of each replica: its life, and when it last answered."""
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def use(self, role: str, replicas: list[Any]) -> None:
        """From now on these are the role's."""
        with self._lock:
            manager = self._managers.setdefault(
                role, FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=1)
            )
            known = {manager._actors[i]: i for i in manager.actor_ids()}
            for actor, i in known.items():
                if actor not in replicas:
                    manager.remove_actor(i)
            manager.add_actors([r for r in replicas if r not in known])

    def healthy(self, role: str) -> int:
        """How many replicas answered when they were last asked."""
        with self._lock:
            return self._managers[role].num_healthy_actors() if role in self._managers else 0

    def close(self) -> None:
        self._ended.set()

    def run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            with self._lock:
                for role, manager in self._managers.items():
                    self._look(role, manager)

    def _look(self, role: str, manager: FaultTolerantActorManager) -> None:
        now = time.monotonic()
        manager.foreach_actor_async(lambda actor: actor.ping(), healthy_only=False)
        for answer in manager.fetch_ready_async_reqs(timeout_seconds=_EVERY_S / 2, mark_healthy=True):
            if not answer.ok:
                continue  # the manager has taken it out of service
            found: Any = answer
            life, replica = str(found.get()), (role, found.actor_id)
            before, _ = self._seen.get(replica, (life, now))
            self._seen[replica] = life, now
            if life != before:
                self._on_restart(role, Reborn("a replica's process died"))
        for i in manager.healthy_actor_ids():
            life, last = self._seen.setdefault((role, i), ("", now))
            if now - last > self._faults.deadline_s:  # an answer comes after the call that runs
                self._seen[role, i] = life, now
                self._on_restart(role, Stuck(f"no answer within faults.deadline_s = {self._faults.deadline_s:g} s"))
                end(manager._actors[i])
