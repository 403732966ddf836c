"""`repertory k8s render`: a configuration's manifests for KubeRay, made from those in k8s/base.

    CONFIG ──► the roles' demands ──► groups of pods ──► k8s/base with names, numbers and the configuration put in

What the base says of security, probes, shared memory and the end of a pod holds for every rendered cluster too.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from actors.footprint import model_size
from actors.kubernetes_pods import Pods, grace_s, replica_pods, train_pods, volume_gib
from actors.preflight import choose_device
from rl.config import Config
from rl.config_file import ConfigError, dump_config, load_config

BASE = Path(__file__).resolve().parent.parent / "k8s" / "base"
_RUNS, _CONFIG = "runs", "config/train.yaml"
"""Where the image has the volume and the configuration, below its working directory."""
_LONGEST_NAME = 40
"""The operator appends to a RayJob's and a RayService's name, and a Service's may have 63 letters."""
_UNCONFINED = {"type": "Unconfined"}
_SANDBOX = {"procMount": "Unmasked", "seccompProfile": _UNCONFINED, "appArmorProfile": _UNCONFINED}


@dataclass(frozen=True)
class Wanted:
    """What is rendered beside the configuration. replicas: of the agent, 0 for no server; max_replicas: as far as load
    may take them. image: by default the Dockerfile's for the configuration's device."""

    image: str | None = None
    replicas: int = 0
    max_replicas: int | None = None
    gpus_per_node: int = 8
    cpus_per_node: int = 16


def render(path: Path, overrides: list[str], out: Path | None = None, wanted: Wanted | None = None) -> list[Path]:
    """Write the manifests into `out` (default: runs/k8s/<run name>), and return their paths.

    Raises ConfigError, before anything is written.
    """
    wanted = wanted or Wanted()
    config = load_config(path, [*overrides, f"run.root={_RUNS}"])
    _check(config, wanted)
    name, image = _name(config), wanted.image or f"repertory:{'gpu' if choose_device(config) == 'cuda' else 'cpu'}"
    files = {
        "runs.yaml": [_volume(config, name)],
        "config.yaml": [_config_map(config, name)],
        "train.yaml": [_train(config, name, image, wanted)],
        **({"serve.yaml": [_serve(config, name, image, wanted)]} if wanted.replicas else {}),
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["access.yaml", "network.yaml", *files],
    }
    files |= {"promote.yaml": [_promote(config, name, image)], "kustomization.yaml": [kustomization]}
    out = out or Path(_RUNS) / "k8s" / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kept in ("access.yaml", "network.yaml"):
            shutil.copy(BASE / kept, out / kept)
        head = f"# Written by `repertory k8s render {path}`. Change the configuration, or patch this with kustomize.\n"
        for file, documents in files.items():
            (out / file).write_text(head + yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=1000))
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}: {error.filename}") from None
    return [out / file for file in ("access.yaml", "network.yaml", *files)]


def _check(config: Config, wanted: Wanted) -> None:
    if not BASE.is_dir():
        raise ConfigError(f"there is no {BASE}: render from a checkout, or in the image that k8s/Dockerfile makes")
    if wanted.max_replicas is not None and wanted.max_replicas < wanted.replicas:
        raise ConfigError(f"--max-replicas {wanted.max_replicas} is below --replicas {wanted.replicas}")
    model = Path(config.model.path or "")
    if config.model.path and model.is_dir() and _RUNS not in model.parts[:1]:
        raise ConfigError(
            f"model.path: {model} is a folder of this machine, which no pod sees: copy it to the volume and name it as "
            f"{_RUNS}/..., or use a hub id"
        )


def _name(config: Config) -> str:
    """The run's name as Kubernetes takes names."""
    name = re.sub(r"[^a-z0-9]+", "-", config.run.name.lower()).strip("-")
    if not name or not name[0].isalpha() or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"run.name {config.run.name!r} makes no name for Kubernetes: it must begin with a letter and have at most "
            f"{_LONGEST_NAME} letters and digits"
        )
    return name


def _train(config: Config, name: str, image: str, wanted: Wanted) -> dict[str, Any]:
    size = _size(config)
    head, groups = train_pods(config, size, wanted.gpus_per_node, wanted.cpus_per_node)
    job = _base("train.yaml")
    job["metadata"]["name"] = f"{name}-train"
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    spec["entrypoint"] = f"repertory train {_CONFIG} --job"
    spec["submitterPodTemplate"]["spec"]["containers"][0]["image"] = image
    named = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    cluster["workerGroupSpecs"] = [_group(named[g.group], g, 2 * g.count) for g in groups]
    _fill(cluster["headGroupSpec"]["template"]["spec"], head)
    grace = grace_s(config, size)
    for pod in _pods(cluster):
        _of_run(pod, config, name, image)
        pod["terminationGracePeriodSeconds"] = grace
        pod["volumes"].append({"name": "config", "configMap": {"name": f"{name}-config"}})
        container = pod["containers"][0]
        container["volumeMounts"].append({"name": "config", "mountPath": f"/repertory/{Path(_CONFIG).parent}"})
        for variable in container["env"]:
            if variable["name"] == "RAY_JOB_STOP_WAIT_TIME_S":
                variable["value"] = str(grace)
    return job


def _serve(config: Config, name: str, image: str, wanted: Wanted) -> dict[str, Any]:
    most = wanted.max_replicas or wanted.replicas
    head, replicas = replica_pods(config, _size(config), wanted.replicas)
    service = _base("serve.yaml")
    service["metadata"]["name"] = f"{name}-serve"
    cluster, g = service["spec"]["rayClusterConfig"], config.generator
    cluster["workerGroupSpecs"] = [_group(cluster["workerGroupSpecs"][0], replicas, most)]
    _fill(cluster["headGroupSpec"]["template"]["spec"], head)
    for pod in _pods(cluster):
        _of_run(pod, config, name, image)
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    settings = {"http.host": "0.0.0.0", "engine.cpus": replicas.cpus, "engine.threads": max(g.threads, 2)}
    if g.gpus:
        settings |= {"engine.gpus": g.gpus, "engine.tensor_parallel": g.tensor_parallel}
        settings |= {"engine.gpu_memory_utilization": g.gpu_memory_utilization}
    settings |= {"engine.kv_cache_gib": g.kv_cache_gib, "engine.max_sequences": g.max_sequences}
    autoscale = {"autoscale.min": wanted.replicas, "autoscale.max": most}
    settings |= autoscale if most > wanted.replicas else {"replicas": wanted.replicas}
    served["applications"][0]["args"] = {"what": f"{_RUNS}/{config.run.name}", "set": settings}
    service["spec"]["serveConfigV2"] = yaml.safe_dump(served, sort_keys=False)
    return service


def _promote(config: Config, name: str, image: str) -> dict[str, Any]:
    job = _base("../promote.yaml")
    job["metadata"]["generateName"] = f"{name}-promote-"
    _of_run(job["spec"]["template"]["spec"], config, name, image)
    return job


def _volume(config: Config, name: str) -> dict[str, Any]:
    claim = _base("runs.yaml")
    claim["metadata"]["name"] = f"{name}-runs"
    claim["spec"]["resources"]["requests"]["storage"] = f"{volume_gib(config, _size(config))}Gi"
    return claim


def _config_map(config: Config, name: str) -> dict[str, Any]:
    metadata = {"name": f"{name}-config", "labels": _base("runs.yaml")["metadata"]["labels"]}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {Path(_CONFIG).name: dump_config(config)},
    }


def _size(config: Config) -> Any:
    size = model_size(config)
    if size is None:
        raise ConfigError(
            f"model.path: how large {config.model.path} is can be seen neither in its files nor in its name, and the "
            "pods' memory follows from that: download it to this machine first"
        )
    return size


def _base(file: str) -> Any:
    """One of the base's manifests. What its aliases repeat is not one object: a change stays where it is made."""
    return json.loads(json.dumps(yaml.safe_load((BASE / file).read_text())))


def _pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specifications of a RayCluster's."""
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def _group(group: dict[str, Any], pods: Pods, most: int) -> dict[str, Any]:
    _fill(group["template"]["spec"], pods)
    return {**group, "replicas": pods.count, "minReplicas": pods.count, "maxReplicas": most}


def _fill(pod: dict[str, Any], pods: Pods) -> None:
    """Its resources: what it asks for is what it may use, so that nobody else's load takes them away."""
    amounts = {"cpu": str(pods.cpus), "memory": f"{pods.memory}Gi"}
    if pods.gpus:
        amounts["nvidia.com/gpu"] = str(pods.gpus)
    pod["containers"][0]["resources"] = {"requests": amounts, "limits": amounts}
    next(v for v in pod["volumes"] if v["name"] == "shared-memory")["emptyDir"]["sizeLimit"] = f"{pods.shm}Gi"


def _of_run(pod: dict[str, Any], config: Config, name: str, image: str) -> None:
    """The base's pod with this run's volume, image, and what its environment needs."""
    container = pod["containers"][0]
    container["image"] = image
    next(v for v in pod["volumes"] if v["name"] == "runs")["persistentVolumeClaim"]["claimName"] = f"{name}-runs"
    at_its_end = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
    for holder in (container, at_its_end):
        if "command" in holder:
            named = [word.replace("runs/quickstart", f"{_RUNS}/{config.run.name}") for word in holder["command"]]
            holder["command"] = named
    key = config.env.feedback.key_variable
    if key and "env" in container:
        secret = {"secretKeyRef": {"name": "repertory", "key": key}}
        container["env"].append({"name": key, "valueFrom": secret})
    if config.env.name == "python" and config.env.sandbox.backend == "bubblewrap":
        # The sandbox makes a user namespace and mounts /proc in it: a pod has to be in one of its own for that.
        pod["hostUsers"] = False
        container["securityContext"] = {**container["securityContext"], **_SANDBOX}


class _Plain(yaml.SafeDumper):
    """Repeats what is shared, and writes texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Plain.add_representer(str, _text)
