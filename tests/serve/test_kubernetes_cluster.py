"""The manifests' commands as they are written, on a Ray cluster that starts as KubeRay starts one: a head without CPUs,
a worker beside it, token authentication, the Ray Jobs API, and Serve's REST API."""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from actors.run_folder import is_owned
from rl import checkpoint
from rl.metrics import read_lines

K8S = Path(__file__).parents[2] / "k8s"
TRAIN, SERVE = (yaml.safe_load((K8S / "base" / f"{name}.yaml").read_text())["spec"] for name in ("train", "serve"))
RUN, STEPS = Path("runs/quickstart"), 60
SMALL = {
    "run": {"name": "quickstart"},
    "model": {"scratch": {"layers": 1, "hidden": 32, "heads": 1, "intermediate": 64}, "max_length": 200},
    "env": {"name": "calculator"},
    "generator": {"threads": 1},
    "rollout": {"max_turn_tokens": 16},
    "stages": [
        {
            "kind": "sft",
            "steps": STEPS,
            "batch_size": 8,
            "lr": 1e-3,
            "demonstrations": {"count": 64},
            "aux_loss": {"function": "slowly.step"},
        },
        {"kind": "eval", "n": 4},
    ],
}
"""In the place of configs/quickstart.yaml, which the entrypoint names."""
SLOWLY = """
import time

def step(logprobs, entropy, micro):
    time.sleep(0.1)
    return 0 * logprobs
"""
"""So that the run lasts until it is stopped."""


@dataclass
class Cluster:
    """home: what the image's working directory is. agents: the ports of both nodes' health checks."""

    home: Path
    dashboard: str
    environment: dict[str, str]
    agents: list[int]
    jobs: JobSubmissionClient


def pod(cluster: dict[str, Any], worker: bool = False) -> dict[str, Any]:
    group = cluster["workerGroupSpecs"][0] if worker else cluster["headGroupSpec"]
    return group["template"]["spec"]["containers"][0]


def free_ports(count: int) -> list[int]:
    """Outside of those that Ray gives its workers."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("repertory")
    (home / "configs").mkdir()
    (home / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(SMALL))
    (home / "slowly.py").write_text(SLOWLY)
    container = [*pod(TRAIN["rayClusterSpec"])["env"], *pod(SERVE["rayClusterConfig"])["env"]]
    plain = {one["name"]: one["value"].replace("/repertory/", f"{home}/") for one in container if "value" in one}
    token = secrets.token_hex(32)  # the operator makes one, and puts it into every container
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        **plain,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "REPERTORY_API_KEYS": "a-key-of-this-test",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at the test's end nobody has a request under way
        "RAY_worker_niceness": "0",  # a pod has its CPUs to itself
    }
    gcs, dashboard, client, *agents = free_ports(5)
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets' paths must be short
    params = {**TRAIN["rayClusterSpec"]["headGroupSpec"]["rayStartParams"], "dashboard-host": "127.0.0.1"}
    common = ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", "--block"]
    head = ["--head", *(f"--{name}={value}" for name, value in params.items()), f"--port={gcs}"]
    head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={temporary}"]
    cpus = pod(TRAIN["rayClusterSpec"], worker=True)["resources"]["limits"]["cpu"]
    worker = [f"--address=127.0.0.1:{gcs}", f"--num-cpus={cpus}"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for words, agent in zip((head, worker), agents, strict=True):
            with (home / f"node-{len(nodes)}.log").open("wb") as log:
                command = ["ray", "start", *words, *common, f"--dashboard-agent-listen-port={agent}"]
                node = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT)
                nodes.append(node)
            wait_until(lambda agent=agent: healthy(agent), Path(log.name).read_text)
        url = f"http://127.0.0.1:{dashboard}"
        jobs = JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"})
        yield Cluster(home, url, environment, agents, jobs)
    finally:
        ours = [p for node in nodes for p in (psutil.Process(node.pid), *psutil.Process(node.pid).children(True))]
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        psutil.wait_procs(ours, timeout=15)
        for process in ours:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def healthy(port: int) -> bool:
    """By the container's own probe, which has no token."""
    path = pod(TRAIN["rayClusterSpec"])["livenessProbe"]["httpGet"]["path"]
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(reached: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)


def submit(cluster: Cluster) -> str:
    """As the operator's submitter does: its shell reads the entrypoint first."""
    return cluster.jobs.submit_job(entrypoint=" ".join(shlex.split(TRAIN["entrypoint"])))


def ended(cluster: Cluster, job: str) -> str:
    wait_until(lambda: cluster.jobs.get_job_status(job).is_terminal(), lambda: cluster.jobs.get_job_logs(job))
    return cluster.jobs.get_job_status(job)


def steps(cluster: Cluster) -> int:
    return len(read_lines(cluster.home / RUN / "metrics.jsonl"))


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> Cluster:
    """Two tries of the RayJob: the first one's pods are ended in the middle, the second comes to the end."""
    first = submit(cluster)
    wait_until(
        lambda: steps(cluster) > 0 or cluster.jobs.get_job_status(first).is_terminal(),
        lambda: cluster.jobs.get_job_logs(first),
    )
    pods = [pod(TRAIN["rayClusterSpec"], worker) for worker in (True, False)]
    hooks = [one["lifecycle"]["preStop"]["exec"]["command"] for one in pods]
    stops = [subprocess.Popen(hook, cwd=cluster.home, env=cluster.environment) for hook in hooks]
    for stop in stops:
        stop.wait(120)
    assert not is_owned(cluster.home / RUN), "the pods have waited for the run to save"
    newest, done = checkpoint.newest(cluster.home / RUN), steps(cluster)
    assert newest is not None, cluster.jobs.get_job_logs(first)
    assert newest.name == f"step={done}" and done < STEPS
    assert ended(cluster, first) == JobStatus.FAILED, "so that the RayJob is tried again"

    second = submit(cluster)
    assert ended(cluster, second) == JobStatus.SUCCEEDED, cluster.jobs.get_job_logs(second)
    assert f"resumed from {newest.name}" in cluster.jobs.get_job_logs(second)
    return cluster


def test_a_job_is_tried_again_and_goes_on(trained: Cluster) -> None:
    lines = read_lines(trained.home / RUN / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    assert all(healthy(agent) for agent in trained.agents)


def test_the_dashboard_asks_for_the_token(cluster: Cluster) -> None:
    assert httpx.get(f"{cluster.dashboard}/api/jobs/").status_code == 401


def test_what_was_trained_is_promoted_and_served(trained: Cluster) -> None:
    job = yaml.safe_load((K8S / "promote.yaml").read_text())
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    done = subprocess.run(command, cwd=trained.home, env=trained.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    config = yaml.safe_load(SERVE["serveConfigV2"])
    (config["http_options"]["port"],) = free_ports(1)
    token = {"Authorization": f"Bearer {trained.environment['RAY_AUTH_TOKEN']}"}
    applications = f"{trained.dashboard}/api/serve/applications/"
    answer = httpx.put(applications, json=config, headers=token, timeout=60)  # what the operator does
    assert answer.status_code == 200, answer.text

    def status() -> dict[str, Any]:
        return httpx.get(applications, headers=token, timeout=60).json()["applications"]["repertory"]

    wait_until(lambda: status()["status"] in ("RUNNING", "DEPLOY_FAILED"), lambda: str(status()))
    assert status()["status"] == "RUNNING", status()
    server = f"http://127.0.0.1:{config['http_options']['port']}"
    ready = pod(SERVE["rayClusterConfig"], worker=True)["readinessProbe"]["httpGet"]["path"]
    assert httpx.get(server + ready).status_code == 200, "the pod's probe has no key"
    key = {"Authorization": f"Bearer {trained.environment['REPERTORY_API_KEYS']}"}
    assert httpx.get(f"{server}/v1/models").status_code == 401
    models = httpx.get(f"{server}/v1/models", headers=key).json()
    assert models["data"][0]["id"] == "quickstart"
    asked = {"model": "quickstart", "messages": [{"role": "user", "content": "1+2"}], "max_tokens": 4}
    said = httpx.post(f"{server}/v1/chat/completions", headers=key, json=asked, timeout=60)
    assert said.status_code == 200 and said.json()["usage"]["completion_tokens"] <= 4, said.text
