"""One small trained run a session, and one server over it: the real application and engine under uvicorn, no Ray."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from asking import Played, client_of, have_said
from running import SMALL, repertory


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: the quickstart in small, with a checkpoint after SFT (version 1) and one after a step of RL."""
    if "TRAINED_RUN" in os.environ:  # one that was trained before, for who works on these tests
        return Path(os.environ["TRAINED_RUN"])
    root = tmp_path_factory.mktemp("trained")
    done = repertory("train", "configs/quickstart.yaml", f"run.root={root}", "run.name=agent", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "agent"


@dataclass
class Server:
    """A server in a thread. `run` has its event loop run something."""

    url: str
    service: Any
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, Any], timeout: float = 60) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **more)


def serving(config: Any) -> Iterator[Server]:
    """Start a server of a configuration; after the yield end it."""
    from serve.app import build
    from serve.service import Service

    ready: Any = threading.Event()
    made: dict[str, Any] = {}

    async def main() -> None:
        made["service"] = service = await Service.start(config)
        made["loop"] = asyncio.get_running_loop()
        server = uvicorn.Server(uvicorn.Config(build(service), host="127.0.0.1", port=0, log_config=None))
        made["server"] = server
        serve = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        made["port"] = server.servers[0].sockets[0].getsockname()[1]
        ready.set()
        await serve
        await service.close()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            made["error"] = error
            ready.set()
            raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(120)
    if "error" in made:
        raise made["error"]
    yield Server(f"http://127.0.0.1:{made['port']}", made["service"], made["loop"])
    made["server"].should_exit = True
    thread.join(30)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


@pytest.fixture
def api(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with client_of(server) as made:
        yield made


@pytest.fixture
def play(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Played]:
    """Have turns said that are written, in place of what the engine samples: `play("12", slow=True)`."""
    return partial(have_said, server, monkeypatch)


@pytest.fixture(scope="session")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the trained run's SFT checkpoint, version 1, and knows its final one, version 2."""
    from serve.resolve import resolve

    folder = tmp_path_factory.mktemp("server")
    first = next(p for p in sorted((trained / "checkpoints").glob("step=*")) if p.name == "step=20")
    settings = [f"dir={folder}", "name=agent", "tools=[calculator, python]", "sessions.disconnect_grace_s=0.5"]
    config, _ = resolve(str(first), settings)
    for made in serving(config):
        made.service.book.add(trained / "checkpoints" / "latest")
        yield made
