"""k8s/ and `repertory k8s render`: KubeRay's schemas, kustomize, and pods that hold the roles."""

import copy
import re
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from crd import KINDS, faults
from ray.serve.schema import ServeDeploySchema
from rich.console import Console
from typer.testing import CliRunner

from actors.doctor import shared_memory_bytes
from actors.kubernetes import Wanted, render
from actors.kubernetes_command import k8s
from actors.kubernetes_pods import train_pods
from actors.launch import run_training
from actors.placement import demands
from actors.preflight import check_run_folder, has_saved
from rl.config import Config
from rl.config_file import ConfigError, load_config

K8S = ROOT / "k8s"
QUICK, QWEN = ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "cluster" / "qwen_8gpu.yaml"
CASES = {
    "quickstart": (QUICK, [], Wanted(replicas=1)),
    "qwen": (QWEN, [], Wanted(replicas=2, max_replicas=6)),
    "python": (QWEN, ["env={name: python, datasets: [{dataset: gcd}]}"], Wanted()),
}
OVERLAYS = ("cpu-small", "gpu-8", "gpu-64")


@pytest.fixture(autouse=True)
def no_model_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that sizes are those that the names say."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@cache
def built(folder: Path) -> dict[str, dict[str, Any]]:
    """What kustomize makes of a folder, by kind and name."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if "cannot unmarshal object into Go struct field Kustomization.patches" in done.stderr:
        pytest.skip("this kubectl is older than 1.21: its kustomize knows neither `resources` of folders nor `patches`")
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return {f"{one['kind']} {one['metadata']['name']}": one for one in yaml.safe_load_all(done.stdout)}


def rendered(tmp_path: Path, case: str) -> dict[str, dict[str, Any]]:
    path, overrides, wanted = CASES[case]
    files = render(path, overrides, tmp_path / "out", wanted)
    documents = [d for file in files for d in yaml.safe_load_all(file.read_text())]
    return {f"{d['kind']} {d['metadata'].get('name', '')}": d for d in documents if "metadata" in d}


def kind(resources: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return next(one for key, one in resources.items() if key.startswith(f"{name} "))


def cluster(resource: dict[str, Any]) -> dict[str, Any]:
    spec = resource["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod's specification of one of KubeRay's resources."""
    groups = [cluster(resource)["headGroupSpec"], *cluster(resource)["workerGroupSpecs"]]
    found = [group["template"]["spec"] for group in groups]
    submitter = resource["spec"].get("submitterPodTemplate")
    return [*found, submitter["spec"]] if submitter else found


def gib(amount: str) -> int:
    assert amount.endswith("Gi")
    return int(amount.removesuffix("Gi"))


# -- the schemas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_what_kustomize_builds_is_what_kuberay_takes(overlay):
    resources = built(K8S / overlay)
    ours = [one for one in resources.values() if one["kind"] in KINDS]
    assert sorted(one["kind"] for one in ours) == sorted(KINDS)
    assert [faults(one) for one in ours] == [[], [], []]
    assert {one["kind"] for one in resources.values()} - set(KINDS) == {
        "ServiceAccount", "PersistentVolumeClaim", "NetworkPolicy",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_rendered_is_what_kuberay_takes(case, tmp_path):
    resources = rendered(tmp_path, case)
    assert faults(kind(resources, "RayJob")) == []
    serves = CASES[case][2].replicas > 0
    assert serves == ("RayService" in {one["kind"] for one in resources.values()})
    if serves:
        assert faults(kind(resources, "RayService")) == []
    assert set(built(tmp_path / "out")) == {key for key in resources if not key.startswith("Job ")}


def test_a_misspelt_field_is_a_fault(tmp_path):
    """At any depth, and where the API server would drop it and say nothing."""
    job = kind(rendered(tmp_path, "quickstart"), "RayJob")
    wrong = copy.deepcopy(job)
    wrong["spec"]["backOffLimit"] = wrong["spec"].pop("backoffLimit")
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["securityContex"] = {}
    wrong["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokens"
    wrong["spec"]["ttlSecondsAfterFinished"] = "600"
    said = "\n".join(faults(wrong))
    assert all(word in said for word in ("backOffLimit", "securityContex", "'tokens' is not one of", "'600' is not of"))
    assert len(said.splitlines()) == 4


# -- the pods ---------------------------------------------------------------------------------------------------------


def trained_by(job: dict[str, Any]) -> Config:
    """The configuration that a RayJob's entrypoint names."""
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["repertory", "train"] and words[-1] == "--job"
    return load_config(ROOT / words[2], words[3:-1])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_holds_its_configurations_roles(overlay):
    """As many pods as `render` makes for the same configuration, and none smaller."""
    resources = built(K8S / "overlays" / overlay)
    job = kind(resources, "RayJob")
    config = trained_by(job)
    head, groups = train_pods(config, _size(config), 8, 16)
    for resource in (job, kind(resources, "RayCluster")):
        found = cluster(resource)
        assert [g["groupName"] for g in found["workerGroupSpecs"]] == [g.group for g in groups]
        for wanted, group in zip([head, *groups], [found["headGroupSpec"], *found["workerGroupSpecs"]], strict=True):
            spec = group["template"]["spec"]
            limits = spec["containers"][0]["resources"]["limits"]
            assert group.get("replicas", 1) == group.get("minReplicas", 1) == wanted.count
            assert int(limits["cpu"]) >= wanted.cpus and gib(limits["memory"]) >= wanted.memory
            assert int(limits.get("nvidia.com/gpu", 0)) == wanted.gpus
    served = yaml.safe_load(kind(resources, "RayService")["spec"]["serveConfigV2"])["applications"][0]["args"]
    for name in (served["what"], *_stopped(job)):
        assert name == f"runs/{config.run.name}"


def _stopped(job: dict[str, Any]) -> list[str]:
    commands = [p["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] for p in pods(job)[:-1]]
    assert len(commands) == len(cluster(job)["workerGroupSpecs"]) + 1
    return [run for command in commands for run in re.findall(r"repertory stop (\S+?);?(?: |$)", " ".join(command))]


def _size(config: Config):
    from actors.footprint import model_size

    return model_size(config)


@pytest.mark.parametrize(
    ("settings", "per_node", "groups"),
    [
        ([], (8, 16), {"cpu": (1, 5, 0), "gpu": (1, 16, 8)}),
        ([], (4, 16), {"cpu": (1, 5, 0), "gpu": (2, 8, 4)}),
        # Two engines over two GPUs each do not fit beside one another on nodes with three.
        (["generator.count=2", "generator.tensor_parallel=2", "learner.count=1", "placement.strategy=spread"], (3, 2),
         {"cpu": (3, 2, 0), "gpu": (2, 4, 3)}),
        (["generator.gpus=0.5", "rollout.count=32", "reference.gpus=0.5", "learner.zero_stage=3"], (8, 16),
         {"cpu": (3, 11, 0), "gpu": (1, 16, 6)}),
    ],
)  # fmt: skip
def test_every_actor_has_its_place_on_one_node(settings, per_node, groups):
    config = load_config(QWEN, settings)
    _, found = train_pods(config, _size(config), *per_node)
    assert {g.group: (g.count, g.cpus, g.gpus) for g in found} == groups
    wanted = demands(config)
    for name in ("cpus", "gpus"):
        assert sum(g.count * getattr(g, name) for g in found) >= sum(d.count * getattr(d, name) for d in wanted)


@pytest.mark.parametrize("where", ["base", "overlays/cpu-small", "overlays/gpu-8", "overlays/gpu-64", *CASES])
def test_every_pod_is_shut_in_has_what_it_asks_for_and_memory_for_ray(where, tmp_path):
    resources = rendered(tmp_path, where) if where in CASES else built(K8S / where)
    found = [one for one in resources.values() if one["kind"] in KINDS]
    for resource in found:
        options = cluster(resource)["autoscalerOptions"]
        assert cluster(resource)["enableInTreeAutoscaling"] and options["version"] == "v2"
        assert cluster(resource)["authOptions"] == {"mode": "token"}
        assert options["resources"]["requests"] == options["resources"]["limits"]
        assert cluster(resource)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for pod in pods(resource):
            container = pod["containers"][0]
            assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert pod["serviceAccountName"] == ("repertory-head" if container["name"] == "ray-head" else "repertory")
            if container["name"] == "ray-job-submitter":
                continue
            assert container["livenessProbe"] and container["readinessProbe"]
            shared = next(v["emptyDir"] for v in pod["volumes"] if v["name"] == "shared-memory")
            memory = gib(container["resources"]["limits"]["memory"])
            assert shared["medium"] == "Memory"
            assert 2**30 * gib(shared["sizeLimit"]) >= shared_memory_bytes(2**30 * memory)
            assert gib(shared["sizeLimit"]) < memory
            assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
            unmasked = where == "python"
            assert pod.get("hostUsers", True) is not unmasked
            assert ("procMount" in container["securityContext"]) is unmasked
    text = yaml.safe_dump_all(found)
    assert "kind: Secret" not in text and "optional: true" in text
    for service in (one for one in found if one["kind"] == "RayService"):
        for pod in pods(service):
            env = {one["name"]: one for one in pod["containers"][0]["env"]}
            assert env["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]["value"] == "serve.proxy_guard:middlewares"
            assert "optional" not in env["REPERTORY_API_KEYS"]["valueFrom"]["secretKeyRef"]


@pytest.mark.parametrize("where", ["overlays/cpu-small", "overlays/gpu-8", "overlays/gpu-64", "qwen"])
def test_serves_configuration_is_one_and_a_replica_fills_a_pod(where, tmp_path):
    service = kind(rendered(tmp_path, where) if where in CASES else built(K8S / where), "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert config.http_options.host == "0.0.0.0" and config.http_options.port == 8000
    settings = config.applications[0].args["set"]
    group = cluster(service)["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert settings["engine.cpus"] == int(limits["cpu"])
    assert settings.get("engine.gpus", 0) * settings.get("engine.tensor_parallel", 1) == int(
        limits.get("nvidia.com/gpu", 0)
    )
    least = settings.get("autoscale.min", settings.get("replicas", 1))
    assert (least, settings.get("autoscale.max", least)) == (group["minReplicas"], group["maxReplicas"])


def test_prometheus_reaches_the_metrics_and_nothing_else():
    policy, service = (yaml.safe_load((K8S / "base" / f"{name}.yaml").read_text()) for name in ("network", "serve"))
    rules = policy["spec"]["ingress"]
    (rule,) = [r for r in rules if "prometheus" in str(r["from"])]
    assert rule["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    for pod in pods(service):
        ports = {p["name"]: p["containerPort"] for p in pod["containers"][0]["ports"]}
        assert [p["port"] for p in rule["ports"]] == [ports["metrics"]]


def test_an_entrypoint_is_plain_words():
    """The submitter's shell reads it before Ray's does."""
    for overlay in OVERLAYS:
        entrypoint = kind(built(K8S / "overlays" / overlay), "RayJob")["spec"]["entrypoint"]
        assert shlex.join(shlex.split(entrypoint)) == entrypoint


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_rendered_configuration_is_the_resolved_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["render", str(QUICK), "run.name=My_Run.1", "stages.3.steps=3", "--serve"]
    done = CliRunner().invoke(k8s, asked)
    assert done.exit_code == 0, done.output
    out = Path("runs/k8s/my-run-1")
    assert f"kubectl apply -k {out}" in done.output and "promote.yaml" in done.output
    (tmp_path / "train.yaml").write_text(yaml.safe_load((out / "config.yaml").read_text())["data"]["train.yaml"])
    config = load_config(tmp_path / "train.yaml")
    assert config == load_config(QUICK, asked[2:4])
    job = yaml.safe_load((out / "train.yaml").read_text())
    head = pods(job)[0]
    assert {"name": "config", "mountPath": "/repertory/config"} in head["containers"][0]["volumeMounts"]
    assert job["spec"]["entrypoint"] == "repertory train config/train.yaml --job"
    assert set(_stopped(job)) == {"runs/My_Run.1"}
    promote = yaml.safe_load((out / "promote.yaml").read_text())["spec"]["template"]["spec"]
    assert promote["containers"][0]["command"] == ["repertory", "release", "promote", "runs/My_Run.1", "latest"]
    assert promote["volumes"][0]["persistentVolumeClaim"]["claimName"] == "my-run-1-runs"
    help_text = CliRunner().invoke(k8s, ["render", "--help"]).output
    assert "Example:" in help_text and "--gpus-per-node" in help_text


MISTAKES = {
    "an engine over more GPUs than a node has": (["generator.tensor_parallel=16"], Wanted(), "give --gpus-per-node"),
    "an actor larger than a node": (["rollout.cpus=20"], Wanted(), "give --cpus-per-node"),
    "no name": (["run.name=8gpu"], Wanted(), "begin with a letter"),
    "too long a name": ([f"run.name={'a' * 41}"], Wanted(), "at most 40"),
    "a model of unknown size": (["model.path=some/name"], Wanted(), "download it to this machine first"),
    "a folder of this machine": ([f"model.path={ROOT}"], Wanted(), "copy it to the volume"),
    "fewer at most than at least": ([], Wanted(replicas=3, max_replicas=2), "--max-replicas 2 is below"),
    "an unknown setting": (["generator.cout=1"], Wanted(), "Did you mean generator.count?"),
    "no GPU on cuda": (["learner.gpus=0"], Wanted(), "learner.gpus is 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_written(mistake, tmp_path):
    overrides, wanted, says = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=re.escape(says)):
        render(QWEN, overrides, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*out: File exists"):
        render(QUICK, [], tmp_path / "out")


def test_a_job_goes_on_where_something_was_saved(tmp_path):
    config = load_config(QUICK, [f"run.root={tmp_path}"])
    assert not has_saved(config), "nothing is there"
    (config.run.dir / "logs").mkdir(parents=True)
    assert not has_saved(config), "it ended before its first checkpoint"
    (config.run.dir / "checkpoints" / "step=3").mkdir(parents=True)
    assert has_saved(config), "and if it is damaged, that is said: it is not deleted"


def fake_preflight(config: Config, console: Console, *, resume: bool) -> str:
    check_run_folder(config, resume)
    return "cpu"


def test_a_job_that_was_stopped_is_to_be_tried_again(tmp_path, monkeypatch):
    """And one that ended before it had saved anything starts over."""
    config = load_config(QUICK, [f"run.root={tmp_path}"])
    left = config.run.dir / "metrics.jsonl"
    monkeypatch.setattr("actors.preflight.preflight", fake_preflight)
    monkeypatch.setattr("actors.summary.show_summary", lambda *_: None)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    for whole in (False, True):
        left.parent.mkdir(exist_ok=True)
        left.write_text("")
        monkeypatch.setattr("actors.launch._train", lambda *_, whole=whole: whole)
        with pytest.raises(SystemExit) if not whole else nullcontext() as ended:
            run_training(config, Console(quiet=True), job=True)
        assert whole or ended.value.code == 75
        assert not left.exists() and load_config(config.run.dir / "config.yaml") == config


# -- the image --------------------------------------------------------------------------------------------------------


def test_the_image_has_what_the_sources_are():
    lines = (K8S / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert {"rl/", "actors/", "serve/", "configs/", "k8s/", ".ci/lock-cpu.txt"} <= set(copied)
    assert lines[-1] == "USER 1000:1000" and sum(line.startswith("USER") for line in lines) == 1
    text, makefile = "\n".join(lines), (ROOT / "Makefile").read_text()
    for pinned in ("torch==", "uv=="):
        assert re.findall(rf"{pinned}\S+", text)[0] == re.findall(rf"{pinned}\S+", makefile)[0]
    assert "bubblewrap" in text and "DEVICE" in text
    version = re.search(r"^ray==(\S+)", (ROOT / ".ci" / "lock-cpu.txt").read_text(), re.MULTILINE)
    for name in ("train", "serve", "cluster"):
        assert f"rayVersion: {version[1]}\n" in (K8S / "base" / f"{name}.yaml").read_text()


def test_no_secret_is_in_the_repository():
    for path in (*K8S.rglob("*.yaml"), K8S / "README.md", K8S / "Dockerfile"):
        assert not re.search(r"kind: Secret|stringData|sk-[A-Za-z0-9]{8}", path.read_text()), path
    assert "kubectl create secret generic repertory" in (K8S / "README.md").read_text()
