"""Where the roles run: what they ask of the cluster, whether it has that, and the placement group that holds them."""

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.role import CALL_LOG, bound_threads, keep_memory
from rl.config import Config, EngineConfig, Role

_MINIMUM_CPU = 0.01  # a bundle must ask for something
_ROOM_S = 60.0


class ClusterTooSmall(ValueError):
    """The roles want more than the cluster has; the text says which role wants what."""


@dataclass(frozen=True)
class Demand:
    """What one role asks for: `count` actors of (cpus, gpus) each."""

    role: str
    count: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU" + (f" + {self.gpus:g} GPU" if self.gpus else "")
        return f"{self.role}: {self.count} x {each}"


def demands(config: Config) -> list[Demand]:
    """Every role's demand, from the configuration alone."""

    def of(name: str, role: Role, gpus: float | None = None) -> Demand:
        return Demand(name, role.count, max(role.cpus, _MINIMUM_CPU), role.gpus if gpus is None else gpus)

    g = config.generator
    wanted = [of("generator", g, g.gpus * g.tensor_parallel), of("learner", config.learner)]
    if config.needs_reference:
        wanted.append(of("reference", config.reference))
    if config.needs_feedback_model:
        f = config.feedback_actor
        wanted.append(of("feedback", f, f.gpus * f.tensor_parallel))
    return [*wanted, of("rollout", config.rollout), of("reward", config.reward_actor)]


def check(config: Config, cpus: float, gpus: float) -> list[Demand]:
    """Raises ClusterTooSmall when the demands do not fit into so many CPUs and GPUs in all."""
    wanted = demands(config)
    want_cpus = sum(d.count * d.cpus for d in wanted)
    want_gpus = sum(d.count * d.gpus for d in wanted)
    if want_cpus > cpus + 1e-9 or want_gpus > gpus + 1e-9:
        each = "\n".join(f"  {d}" for d in wanted)
        raise ClusterTooSmall(
            f"the roles want {want_cpus:g} CPUs and {want_gpus:g} GPUs, and the cluster has {cpus:g} CPUs and {gpus:g} "
            f"GPUs:\n{each}\n"
            "Lower <role>.count, <role>.cpus or <role>.gpus, or attach to a larger cluster (RAY_ADDRESS)"
        )
    return wanted


@dataclass
class Placement:
    """A placement group with one bundle an actor, and the actor options that put each into its own."""

    group: PlacementGroup
    bundles: dict[tuple[str, int], int]
    config: Config
    owner: str
    extra: dict[tuple[str, int], PlacementGroup] = field(default_factory=dict)
    """Of actors that joined a run under way: each has a group of its own."""

    @staticmethod
    async def make(config: Config, owner: str) -> "Placement":
        """owner: names the run. Room that an earlier controller of it has left behind is given back first.

        Raises ClusterTooSmall, also when the total suffices and no node can hold a bundle.
        """
        _give_back(owner)
        total = ray.cluster_resources()
        wanted = check(config, total.get("CPU", 0), total.get("GPU", 0))
        bundles: list[dict[str, float]] = []
        index: dict[tuple[str, int], int] = {}
        for demand in wanted:
            for i in range(demand.count):
                index[demand.role, i] = len(bundles)
                bundles.append(_bundle(demand))
        strategy = "PACK" if config.placement.strategy == "packed" else "SPREAD"
        group = placement_group(bundles, strategy=strategy, name=owner)
        ready, _ = await asyncio.to_thread(ray.wait, [group.ready()], timeout=_ROOM_S)
        if not ready:
            remove_placement_group(group)
            each = "\n".join(f"  {d}" for d in wanted)
            free = ray.available_resources()
            raise ClusterTooSmall(
                f"the cluster did not free what the roles want within {_ROOM_S:g} s (now free: {free.get('CPU', 0):g} "
                f"CPUs, {free.get('GPU', 0):g} GPUs):\n{each}"
            )
        return Placement(group, index, config, owner)

    async def add(self, role: str, index: int) -> None:
        """Room for one more actor. A bundle that an earlier one has left is used again.

        Raises ClusterTooSmall.
        """
        if (role, index) in self.bundles:
            return
        demand = next(d for d in demands(self.config) if d.role == role)
        group = placement_group([_bundle(demand)], name=f"{self.owner} {role} {index}")
        ready, _ = await asyncio.to_thread(ray.wait, [group.ready()], timeout=_ROOM_S)
        if not ready:
            remove_placement_group(group)
            raise ClusterTooSmall(f"the cluster has no room for one more: {demand}")
        self.extra[role, index] = group

    def leave(self, role: str, index: int) -> None:
        """The actor has ended. Room that it had by itself is given back."""
        if (role, index) in self.extra:
            remove_placement_group(self.extra.pop((role, index)))

    def options(self, role: str, index: int, **more: Any) -> dict[str, Any]:
        """Ray options of one actor: its bundle and its threads."""
        section = f"{role}_actor" if role in ("reward", "feedback") else role
        spec: Role = getattr(self.config, section)
        gpus = spec.gpus * (spec.tensor_parallel if isinstance(spec, EngineConfig) else 1)
        memory = {} if gpus else keep_memory()
        return {
            "num_cpus": max(spec.cpus, _MINIMUM_CPU),
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.extra.get((role, index), self.group),
                self.bundles.get((role, index), 0),
                placement_group_capture_child_tasks=True,
            ),
            "runtime_env": {"env_vars": {**bound_threads(spec.threads), **memory, **inherited()}},
            **more,
        }


def _give_back(owner: str) -> None:
    """Ray keeps a dead actor's groups for as long as its job lives."""
    for found in placement_group_table().values():
        if f"{found['name']} ".startswith(f"{owner} ") and found["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(found["placement_group_id"]))))


def _bundle(demand: Demand) -> dict[str, float]:
    return {"CPU": demand.cpus, **({"GPU": demand.gpus} if demand.gpus else {})}


def inherited() -> dict[str, str]:
    """What the driver's environment says about caches and offline use holds for the actors too."""
    names = (CALL_LOG, "REPERTORY_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "PYTHONPATH")
    return {name: os.environ[name] for name in names if name in os.environ}
