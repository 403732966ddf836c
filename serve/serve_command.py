"""`repertory serve`: start Ray Serve where it is not there yet, deploy, say where, and end when asked to."""

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from rl.config_file import ConfigError
from serve.config import ServeConfig
from serve.keys import KeyRing, handed_on, refuse_public
from serve.release import Releases
from serve.release_files import origin_of
from serve.releases import Book
from serve.resolve import Source, resolve

PROXY_GUARD = "serve.proxy_guard:middlewares"
_CLOSE_S = 10.0
"""For Serve to see that a replica has nothing more to do, and for the replica to close."""


def serve(what: str, overrides: Sequence[str], console: Console) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError."""
    config, source = resolve(what, overrides)
    keys = KeyRing.of(config.keys, source.dir)
    refuse_public(config.http.host, keys)
    releases = _begin(config, source)
    config = handed_on(_with_port(config), keys)
    ended = threading.Event()
    with console.status("starting the server: Ray, then the engine"):
        _deploy(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which has set its own
        signal.signal(number, lambda *_: ended.set())
    _tell(config, source, keys, releases, console)
    ended.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with console.status("ending what is under way; Ctrl-C ends it at once"):
        _end(config)


def _begin(config: ServeConfig, source: Source) -> Releases:
    """What is named is a release. A checkpoint that is named is the stable one; a run has its own promoted one."""
    book = Book(source.dir, config.versions.keep)
    book.renew(source.model)
    releases, version = book.begin(source.model), origin_of(source.model).version
    is_run = (Path(config.model) / "checkpoints").is_dir()
    return releases if is_run or releases.stable == version else book.promote(version)


def _with_port(config: ServeConfig) -> ServeConfig:
    """With a free port where 0 is set. Raises ConfigError when another process listens there."""
    h = config.http
    if h.port and _attached():  # whose Serve may listen there already, as it should
        return config
    family = socket.AF_INET6 if ":" in h.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((h.host, h.port))
        except OSError as error:
            what = f"cannot listen on {h.host}:{h.port}: {error.strerror}"
            raise ConfigError(f"{what}. Choose another http.port, or 0 for a free one") from None
        port = probe.getsockname()[1]
    return config.model_copy(update={"http": h.model_copy(update={"port": port})})


def _deploy(config: ServeConfig) -> None:
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    from actors.launch import connect
    from serve.deploy import APPLICATION, application

    for_proxies = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": PROXY_GUARD,
        "REPERTORY_MAX_BODY_BYTES": str(config.http.max_body_bytes),
        "REPERTORY_BODY_TIMEOUT_S": str(config.http.body_timeout_s),
        # One that died is started again after three of them, by default of 10 s.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": os.environ.get("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2"),
    }
    os.environ.update(for_proxies)
    connect(for_proxies)
    _refuse_another_address(config)
    ray_serve.start(http_options=HTTPOptions(host=config.http.host, port=config.http.port))
    try:
        ray_serve.run(application(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        deployments = ray_serve.status().applications[APPLICATION].deployments.values()
        told = "\n".join(d.message for d in deployments if d.message) or str(error)
        _end(config)
        raise ConfigError(f"the server did not start:\n{told}") from None


def _attached() -> bool:
    """To a cluster that others have, and may have other applications on."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _refuse_another_address(config: ServeConfig) -> None:
    """Serve listens where it was first told to. Raises ConfigError when that is not where this server is to be."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    there, asked = client.http_config, config.http
    if (there.host, there.port) != (asked.host, asked.port):
        raise ConfigError(
            f"Serve runs on this cluster already, and listens on {there.host}:{there.port}: set http.host and "
            "http.port to that"
        )


def _end(config: ServeConfig) -> None:
    """End our application, when what is under way in it has finished; then Serve and Ray, where they are ours.

    Serve's own shutdown waits for half a minute at most.
    """
    import ray
    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from serve.deploy import APPLICATION, grace_s

    with suppress(KeyboardInterrupt, RayError, RayServeException):  # in a hurry; or Serve has died
        ray_serve.delete(APPLICATION, _blocking=False)
        deadline = time.monotonic() + grace_s(config) + _CLOSE_S
        while APPLICATION in ray_serve.status().applications and time.monotonic() < deadline:
            time.sleep(0.1)
    if not _attached():
        ray_serve.shutdown()
    ray.shutdown()


def _tell(config: ServeConfig, source: Source, keys: KeyRing, releases: Releases, console: Console) -> None:
    host = f"[{config.http.host}]" if ":" in config.http.host else config.http.host
    url = f"http://{host}:{config.http.port}"
    console.print(f"{source.name} is served at {url}", highlight=False, soft_wrap=True)
    lines = {
        "version": f"{releases.stable}" + _newer(config, source, releases),
        "page": url,
        "OpenAI": f"{url}/v1   (model {source.name})",
        "sessions": f"POST {url}/v1/sessions",
        "folder": f"{source.dir}   (releases, sessions, feedback, keys)",
        "keys": "needed with every request" if keys.needed else "none needed",
        "releases": f"repertory release list {source.run or source.dir}",
    }
    if config.follow.source != "none":
        lines["follows"] = str(Path(config.model))
    for name, value in lines.items():
        console.print(f"  {name:<9} {value}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C ends it.")


def _newer(config: ServeConfig, source: Source, releases: Releases) -> str:
    newest = origin_of(source.model).version
    if releases.stable == newest or config.follow.source != "none":
        return ""
    return f"   (the run has version {newest}: repertory release promote {source.run} {newest})"
