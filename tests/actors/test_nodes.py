"""Two raylets on one machine: the node with the generator dies, and training goes on on the other."""

import json
import os
import time
from pathlib import Path

import pytest
import ray
from conftest import Run, repertory, started, wait_until
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.audit import audit
from rl import checkpoint
from rl.metrics import read_lines

STEPS = 16
TAKEN = (1, 0.2)
"""CPUs of the first node's two that others have while the run starts: what is left is too little for the generator."""


@ray.remote
class Tenant:
    """Somebody else's actor."""

    def here(self) -> None:
        pass


@pytest.fixture(scope="module")
def survived(small_run: Run, tmp_path_factory: pytest.TempPathFactory):
    """The run's folder, what it said, which step the node died after, and what scaling said."""
    root = tmp_path_factory.mktemp("nodes")
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    before = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        head = ray.get_runtime_context().get_node_id()
        stays = NodeAffinitySchedulingStrategy(head, soft=False)
        tenants = [Tenant.options(num_cpus=cpus, scheduling_strategy=stays).remote() for cpus in TAKEN]
        ray.get([tenant.here.remote() for tenant in tenants])
        os.environ["RAY_ADDRESS"] = cluster.address
        yield trained(root, small_run, cluster, tenants)
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        if before:
            os.environ["RAY_ADDRESS"] = before
        ray.shutdown()
        cluster.shutdown()


def trained(root: Path, small_run: Run, cluster: Cluster, tenants) -> tuple[Path, str, int, list[str]]:
    settings = {
        "run": {"name": "nodes", "root": str(root)},
        "model": {"path": str(small_run.folder / "checkpoints" / "latest"), "max_length": 200},
        "env": {"name": "custom", "path": "slow_env.Slow", "args": {"seconds": 0.2}, "max_turns": 3},
        "reward": {"function": "own_reward.digits", "success_at": 0.05},
        "rollout": {"max_turn_tokens": 12},
        "generator": {"cpus": 1, "dtype": "bfloat16"},
        "weights": {"full_every": 4},
        "stages": [
            {"kind": "rl", "steps": STEPS, "tasks_per_step": 6, "lr": 1e-5, "evaluate": {"every": 4, "n": 6},
             "algo": {"group_size": 4}}
        ],
    }  # fmt: skip
    config = root / "nodes.yaml"
    config.write_text(json.dumps(settings))
    process, folder = started("train", str(config)), root / "nodes"
    wait_until(folder, process, lambda s: s.phase == "starting")  # on the first node, the only one yet
    second = cluster.add_node(num_cpus=1)
    wait_until(folder, process, lambda s: s.stage_step >= 4)
    for tenant in tenants:
        ray.kill(tenant)
    cluster.remove_node(second, allow_graceful=False)
    died_after = len(read_lines(folder / "metrics.jsonl"))
    wait_until(folder, process, lambda s: s.stage_step >= died_after + 1)
    told = [repertory("scale", str(folder), wanted) for wanted in ("reward=2", "learner=2")]
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    output = process.communicate(timeout=5)[0]
    assert process.returncode == 0, output
    return folder, output, died_after, [t.stdout + t.stderr for t in told]


def test_training_goes_on_on_the_other_node_and_nothing_is_lost(survived):
    folder, output, died_after, _ = survived
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)] and 4 <= died_after < STEPS
    assert "generator: " in output and "it is started again" in output
    assert sum(line.get("faults/restarts_generator", 0) for line in lines) >= 1
    account = audit(folder)[0]
    assert account.right and account.ends == {"trained": 6 * STEPS}


def test_publishes_between_the_whole_ones_are_of_what_changed(survived):
    lines = read_lines(survived[0] / "metrics.jsonl")
    whole = [line["publish/bytes"] == line["publish/full_bytes"] for line in lines]
    assert any(whole) and sum(whole) < STEPS / 2
    parts = [line["publish/bytes"] / line["publish/full_bytes"] for line in lines if line["publish/bytes"]]
    assert min(parts) < 0.5
    assert all(line["mismatch/probe_mean_diff"] < 0.1 for line in lines)


def test_it_was_evaluated_beside_its_training_and_the_best_is_kept(survived):
    folder = survived[0]
    evaluations = read_lines(folder / "eval.jsonl")
    assert [(line["step"], line["beside"], line["n"]) for line in evaluations] == [(s, True, 6) for s in (4, 8, 12, 16)]
    best = max(evaluations, key=lambda line: line["success"])  # the first of equals
    assert checkpoint.best(folder) == {"step": best["step"], "success": best["success"]}
    assert (folder / "checkpoints" / "best").resolve() == (folder / "checkpoints" / f"step={best['step']}").resolve()
    assert checkpoint.damage(folder / "checkpoints" / "best") is None


def test_it_was_scaled_while_it_trained(survived):
    _, output, _, (more, learner) = survived
    assert "reward: 2" in more and "scaling reward from 1 to 2" in output
    assert "learner=2" in learner and "generator, rollout, reward or reference" in learner
