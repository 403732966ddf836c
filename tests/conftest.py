"""What the suites share: bounded threads, and one Ray cluster and one trained-from-nothing model a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_SILENT", "true")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def quickstart_config():
    """The quickstart's configuration with overrides: `quickstart_config("stages.1.steps=3")`."""
    from rl.config_file import load_config

    def load(*overrides: str):
        return load_config(ROOT / "configs" / "quickstart.yaml", overrides)

    return load


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    from actors.launch import connect

    connect()
    yield
    ray.shutdown()
