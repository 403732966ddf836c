"""What `repertory serve` refuses before anything starts, how its parts end, and what is asked of Ray Serve for that."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve as ray_serve
from run_folders import make_checkpoint

from rl import checkpoint
from rl.config_file import ConfigError, dump_config
from serve import serve_command
from serve.agent import Agent
from serve.config import ServeConfig
from serve.deploy import APPLICATION, application, grace_s
from serve.releases import Book
from serve.resolve import resolve, source_of


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What Serve and Ray are told when a server ends; its application takes two looks to go."""
    told: list[str] = []
    left = [{APPLICATION: 1, "another": 1}, {APPLICATION: 1, "another": 1}, {"another": 1}]
    monkeypatch.setattr(ray_serve, "delete", lambda name, **_: told.append(f"delete {name}"))
    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(applications=left.pop(0)))
    monkeypatch.setattr(ray_serve, "shutdown", lambda: told.append(f"end Serve, {len(left)} looks left"))
    monkeypatch.setattr(ray, "shutdown", lambda: told.append("leave Ray"))
    return told


def configured(**settings: Any) -> ServeConfig:
    return ServeConfig.model_validate({"model": "m", **settings})


def test_on_a_cluster_of_others_only_our_application_ends(asked, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    serve_command._end(configured())
    assert asked == [f"delete {APPLICATION}", "leave Ray"]


def test_on_a_ray_of_its_own_serve_ends_after_what_was_under_way(asked, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    serve_command._end(configured())
    assert asked == [f"delete {APPLICATION}", "end Serve, 0 looks left", "leave Ray"]


def test_a_second_ctrl_c_waits_for_nothing(asked, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_serve, "status", interrupted)
    began = time.monotonic()
    serve_command._end(configured())
    assert time.monotonic() - began < 1 and asked[-1] == "leave Ray"


@pytest.mark.parametrize(("deadline_s", "expected"), [(600, 120), (45, 45)])
def test_a_turn_under_way_may_finish(deadline_s, expected):
    config = configured(http={"deadline_s": deadline_s})
    deployed: Any = application(config)
    assert grace_s(config) == expected
    assert deployed._bound_deployment._deployment_config.graceful_shutdown_timeout_s == expected


@pytest.mark.parametrize(
    ("weights", "settings", "threads"),
    [(1 << 20, [], "1"), (65 << 20, [], "6"), (65 << 20, ["replicas=2"], "3"), (65 << 20, ["replicas=9"], "1"),
     (65 << 20, ["autoscale={min: 2, max: 6}"], "3"), (1 << 20, ["engine.threads=4"], "4")],
)  # fmt: skip
def test_a_larger_model_computes_on_a_replicas_part_of_the_cores(tmp_path, monkeypatch, weights, settings, threads):
    monkeypatch.setattr("serve.resolve.cpu_count", lambda: 6.5)
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    config, _ = resolve(str(tmp_path), settings)
    deployed: Any = application(config)
    options = deployed._bound_deployment._replica_config.ray_actor_options
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == threads


async def test_what_serve_calls_at_the_end_closes_the_service():
    closed = []

    class Service:
        async def close(self) -> None:
            closed.append(1)

    agent: Any = Agent
    await agent.__del__(SimpleNamespace())  # one whose engine did not start
    await agent.__del__(SimpleNamespace(service=Service()))
    assert closed == [1]


@pytest.mark.parametrize("what", ["./quikstart", "/no/such", "runs/quikstart", "{tmp}/checkpoints"])
def test_a_folder_that_is_not_there_is_no_model_of_the_hub(what, tmp_path):
    with pytest.raises(ConfigError, match="no such folder: name a checkpoint, a run's folder"):
        resolve(what.format(tmp=tmp_path))


def test_to_follow_what_is_of_no_run_is_refused_at_once(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    resolve(str(tmp_path))
    with pytest.raises(ConfigError, match="of no run that could be followed"):
        resolve(str(tmp_path), ["follow.source=run"])


def test_a_checkpoint_that_is_a_release_is_not_read_whole_again(tmp_path, monkeypatch, quickstart_config):
    """Each replica looks for the newest one when it starts, and one of a large model takes minutes to read."""
    run, read = tmp_path / "agent", []
    for version in (1, 2):
        folder = make_checkpoint(run, 10 * version, version)
        (folder / "repertory.yaml").write_text(dump_config(quickstart_config()))
    whole = checkpoint.damage
    monkeypatch.setattr(checkpoint, "damage", lambda folder: read.append(folder.name) or None)
    config, source = resolve(str(run))
    assert (source.model.name, read) == ("step=20", ["step=20"])
    monkeypatch.setattr("serve.releases.damage", lambda folder: None)
    Book(source.dir).begin(source.model)
    read.clear()
    assert (source_of(config).model, read) == (source.model, [])
    monkeypatch.setattr(checkpoint, "damage", whole)
    newest = make_checkpoint(run, 30, 3)
    (newest / "model.safetensors").write_bytes(b"x")
    assert source_of(config).model == source.model
