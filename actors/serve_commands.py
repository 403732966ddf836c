"""The `repertory` commands around serving: serve, release, keys, bench-serve and k8s."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from actors.kubernetes_command import k8s

console = Console()
release = typer.Typer(help="Which weight versions a server answers with.", no_args_is_help=True)
keys = typer.Typer(help="API keys: only their hashes are kept.", no_args_is_help=True)

Served = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a server's own folder")]


def add_to(app: typer.Typer) -> None:
    app.command()(serve)
    app.command("bench-serve")(bench_serve)
    app.add_typer(release, name="release")
    app.add_typer(keys, name="keys")
    app.add_typer(k8s, name="k8s")


def serve(
    what: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RUN|CONFIG",
            help="A checkpoint, a run's folder (its promoted or newest version), a YAML of configs/serve/ or of the "
            "run, or a model as of model.path",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key.sub=value]...", help="Settings to change, such as replicas=2 limits.in_flight=64"),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Take each new version of the run while serving: follow.source=run.")
    ] = False,
    host: Annotated[
        str | None, typer.Option(help="The address to listen on; a public one needs a key: http.host.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on: http.port.")] = None,
) -> None:
    """Serve a trained agent: a page to talk to it, OpenAI's API, and sessions that play its environment.

    Example:  repertory serve runs/quickstart

              repertory serve runs/quickstart --follow replicas=2

              repertory serve configs/serve/quickstart.yaml http.port=9000

    Starts a Ray of its own, or attaches to the cluster at RAY_ADDRESS. Ctrl-C and SIGTERM let what is under way finish.
    """
    from serve.serve_command import serve as run_server

    more = [*(["follow.source=run"] if follow else []), *([f"http.host={host}"] if host else [])]
    more += [f"http.port={port}"] if port is not None else []
    run_server(what, [*(overrides or []), *more], console)


@release.command("list")
def list_releases(run: Served) -> None:
    """The versions that a server knows, with the step and held-out success of each.

    Example:  repertory release list runs/quickstart
    """
    from serve.release_command import list_releases as show

    show(run, console)


@release.command()
def promote(
    run: Served,
    version: Annotated[str, typer.Argument(help="A version's number, step=N, best or latest")],
    canary: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Only for this share of new sessions and requests; 0 ends a canary."),
    ] = None,
) -> None:
    """Answer with a version from now on; a server that runs takes it within a second, and drops nothing.

    Example:  repertory release promote runs/quickstart latest

              repertory release promote runs/quickstart 37 --canary 0.1
    """
    from serve.release_command import promote as change

    change(run, version, canary, console)


@release.command()
def rollback(run: Served) -> None:
    """Answer with the version before the promoted one again. Following then promotes nothing until the next promote.

    Example:  repertory release rollback runs/quickstart
    """
    from serve.release_command import rollback as change

    change(run, console)


@keys.command()
def create(run: Served, name: Annotated[str, typer.Argument(help="Whose key it is")] = "") -> None:
    """Make a key, and show it once. A server that runs takes it within a second.

    Example:  repertory keys create runs/quickstart alice
    """
    from serve.keys_command import create_key

    key = create_key(run, name)
    console.print(key, highlight=False, soft_wrap=True)
    console.print("It is shown once. Send it as `Authorization: Bearer KEY`.", highlight=False)


@keys.command("list")
def list_keys(run: Served) -> None:
    """The keys' ids and names, when they were made, and which are revoked.

    Example:  repertory keys list runs/quickstart
    """
    from serve.keys_command import list_keys as read

    table = Table("id", "name", "made", "revoked")
    for key in read(run):
        table.add_row(key.id, key.name, _day(key.created), _day(key.revoked) if key.revoked else "")
    console.print(table)


@keys.command()
def revoke(run: Served, name: Annotated[str, typer.Argument(help="A key's id, or its name")]) -> None:
    """Let a key in no more. A server that runs takes it within a second.

    Example:  repertory keys revoke runs/quickstart alice
    """
    from serve.keys_command import revoke_key

    key = revoke_key(run, name)
    console.print(f"{key.name} ({key.id}) is revoked", highlight=False)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def bench_serve(
    url: Annotated[str, typer.Argument(help="Where the server is, for example http://localhost:8000")],
    model: Annotated[str | None, typer.Option(help="Default: the first that the server has.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Conversations at the same time.")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="Of each conversation.")] = 4,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds for which new conversations are begun.")] = 30.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 64,
    stream: Annotated[bool, typer.Option("--stream", help="Ask for tokens as they are sampled.")] = False,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Sessions in the place of chat completions, each checked for its own.")
    ] = False,
    env: Annotated[str | None, typer.Option(help="With --sessions: the environment whose tasks are played.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VAR", help="The environment variable with the key, which is written nowhere.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures there.")] = None,
) -> None:
    """Put a server under load, and say what came of it: throughput, latency percentiles, errors, versions seen.

    Example:  repertory bench-serve http://localhost:8000 --stream

              repertory bench-serve http://localhost:8000 --sessions --env calculator --duration 60
    """
    from serve.bench import run_bench

    run_bench(
        url, console, model=model, concurrency=concurrency, turns=turns, duration_s=duration, max_tokens=max_tokens,
        stream=stream, sessions=sessions, env=env, key_variable=api_key_env, json_path=json_path,
    )  # fmt: skip
