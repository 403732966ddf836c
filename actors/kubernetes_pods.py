"""Which pods a configuration's roles need: from what they ask of Ray to groups of pods that are alike. Estimates."""

import math
from dataclasses import dataclass, field
from typing import Literal

from actors.doctor import shared_memory_bytes, store_bytes
from actors.footprint import DTYPE_BYTES, Size, activation_bytes, checkpoint_bytes, learner_state_bytes, model_size
from actors.placement import Demand, demands
from rl.config import Config, Role
from rl.config_file import ConfigError

GIB = 2**30
_MARGIN = 1.25
_PROCESS = 0.6 * GIB
"""A process of ours that has imported what it needs."""
_ENGINE = 1.2 * GIB
_CUDA = 6 * GIB
"""Host memory of a process on a GPU: its context, pinned buffers, and buckets of weights under way."""
_LEAST_STORE = 0.5 * GIB
_RAY = 0.7 * GIB
"""Ray's own processes on a node."""
_HEAD = 3.5 * GIB
"""Beside those: its tables and dashboard, the driver, the controller, the weight store and the buffer."""
_SANDBOXES = 1 * GIB
_STEP_S, _DISK_BYTES_S = 120, 250e6
"""Until a run that is asked to stop has finished its step, and how fast a shared file system takes its checkpoint."""


@dataclass(frozen=True)
class Pods:
    """`count` pods alike, each with so much. cpus and gpus are whole; memory and shm are GiB."""

    group: str
    count: int
    cpus: int
    gpus: int
    memory: int
    shm: int


@dataclass
class _Node:
    """What has been put on one node."""

    cpus: float = 0.0
    gpus: float = 0.0
    roles: list[str] = field(default_factory=list)

    def take(self, demand: Demand) -> None:
        self.cpus += demand.cpus
        self.gpus += demand.gpus
        self.roles.append(demand.role)


def train_pods(config: Config, size: Size, gpus_per_node: int, cpus_per_node: int) -> tuple[Pods, list[Pods]]:
    """The head, where nothing is placed but what must be near the driver, and the groups of workers: `gpu` for roles
    with GPUs, each actor whole on one node, and `cpu` for the others.

    Raises ConfigError when an actor is larger than a node.
    """
    wanted = demands(config)
    groups = {
        "cpu": _evenly([d for d in wanted if not d.gpus], cpus_per_node, "cpus"),
        "gpu": _evenly([d for d in wanted if d.gpus], gpus_per_node, "gpus"),
    }
    head = _pods("head", [_Node(cpus=2)], _HEAD, store_bytes(config, size), config, size)
    workers = [_pods(name, n, 0, _store(config, size, n), config, size) for name, n in groups.items() if n]
    return head, workers


def replica_pods(config: Config, size: Size, count: int) -> tuple[Pods, Pods]:
    """The head, and pods that one replica of the agent fills each: an engine like a generator's, and Serve's proxy."""
    g = config.generator
    nodes = [_Node(max(2.0, g.cpus, g.threads), g.gpus * g.tensor_parallel, ["generator"])] * count
    head = _pods("head", [_Node(cpus=2)], _HEAD, 0, config, size)
    return head, _pods("replica", nodes, _PROCESS, 0, config, size)


def grace_s(config: Config, size: Size) -> int:
    """How long a run that is to stop may take for its step and its checkpoint."""
    return 60 * math.ceil((_STEP_S + checkpoint_bytes(config, size) / _DISK_BYTES_S) / 60)


def volume_gib(config: Config, size: Size) -> int:
    """The checkpoints that are kept, and two more; the model as it was downloaded; episodes and logs."""
    held = checkpoint_bytes(config, size) * (config.run.keep_checkpoints + 2)
    held += 2 * size.parameters * DTYPE_BYTES[config.model.dtype]
    return 10 * math.ceil((held / GIB + 5) / 10)


def _evenly(wanted: list[Demand], room: int, kind: Literal["cpus", "gpus"]) -> list[_Node]:
    """On as few nodes as hold them, and on these as evenly as whole actors allow: the pods are alike."""
    for demand in wanted:
        if getattr(demand, kind) > room:
            asked = "gpus x tensor_parallel" if kind == "gpus" else "cpus"
            raise ConfigError(
                f"one {demand.role} wants {getattr(demand, kind):g} {kind} ({asked}), and a node has {room}: an actor "
                f"does not spread over nodes. Lower that, or give --{kind}-per-node"
            )
    nodes = _first_fit(wanted, room, kind)
    total = sum(d.count * getattr(d, kind) for d in wanted)
    for smaller in range(math.ceil(total / max(len(nodes), 1)), room):
        if len(found := _first_fit(wanted, smaller, kind)) == len(nodes):
            return found
    return nodes


def _first_fit(wanted: list[Demand], room: int, kind: str) -> list[_Node]:
    """The largest actors first. One that is larger than a node gets one of its own."""
    nodes: list[_Node] = []
    for demand in sorted(wanted, key=lambda d: -getattr(d, kind)):
        each = getattr(demand, kind)
        for _ in range(demand.count):
            node = next((n for n in nodes if getattr(n, kind) + each <= room + 1e-9), None)
            if node is None:
                nodes.append(node := _Node())
            node.take(demand)
    return nodes


def _store(config: Config, size: Size, nodes: list[_Node]) -> float:
    """Only generators have weights brought to their node."""
    return store_bytes(config, size) if any("generator" in node.roles for node in nodes) else 0.0


def _pods(group: str, nodes: list[_Node], extra: float, store: float, config: Config, size: Size) -> Pods:
    """All as the largest of them in each respect. extra: bytes beside what the roles hold; store: what the object store
    must hold, of which Ray gives it a share of the pod's memory."""
    held = _RAY + extra + _MARGIN * max(sum(_role_bytes(config, size, role) for role in node.roles) for node in nodes)
    share = shared_memory_bytes(1000 * GIB) / (1000 * GIB)
    memory = 2 * math.ceil(max(held + max(store, _LEAST_STORE), store / share, 4 * GIB) / GIB / 2)
    threads = max((_section(config, role).threads for node in nodes for role in node.roles), default=1)
    cpus = max(math.ceil(max(node.cpus for node in nodes) - 1e-9), threads)
    gpus = math.ceil(max(node.gpus for node in nodes) - 1e-9)
    return Pods(group, len(nodes), cpus, gpus, memory, math.ceil(shared_memory_bytes(memory * GIB) / GIB))


def _section(config: Config, role: str) -> Role:
    return getattr(config, f"{role}_actor" if role in ("reward", "feedback") else role)


def _role_bytes(config: Config, size: Size, role: str) -> float:
    """Host memory of one actor."""
    on_gpu = _section(config, role).gpus > 0
    if role == "feedback":
        return _role_bytes(config.of_feedback, model_size(config.of_feedback) or size, "generator")
    if role == "generator":
        weights = 2 * size.parameters * DTYPE_BYTES[config.generator_dtype]  # as loaded, and packed for the processor
        return _CUDA if on_gpu else _ENGINE + weights + config.generator.kv_cache_gib * GIB
    if role == "learner":
        states = learner_state_bytes(config, size) + activation_bytes(config, size, backward=True)
        kept = DTYPE_BYTES[config.generator_dtype] * (config.weights.full_every > 1)  # of what was published last
        kept += 12 * config.learner.offload_optimizer
        return kept * size.parameters / config.learner.count + (_CUDA if on_gpu else _PROCESS + states)
    if role == "reference":
        held = size.parameters * DTYPE_BYTES[config.learner_dtype] + activation_bytes(config, size, backward=False)
        return _CUDA if on_gpu else _PROCESS + held
    runs_code = config.env.name == "python"
    return _PROCESS + (_SANDBOXES if runs_code and role == "rollout" else 0.0)
