"""`repertory k8s`: what it is asked for, and what it says to do next."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

k8s = typer.Typer(help="Manifests for a Kubernetes cluster with the KubeRay operator.", no_args_is_help=True)


@k8s.callback()
def _group() -> None:
    """Keeps `render` a word of its own while it is the only one."""


@k8s.command()
def render(
    config: Annotated[Path, typer.Argument(help="A YAML configuration, for example configs/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Settings to change, as of `train`")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write into. Default: runs/k8s/<run name>.", show_default=False)
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Also a RayService that serves what the run trains.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="--serve: replicas of the agent, a pod each.")] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="--serve: as many as load may make of them. Default: --replicas.", show_default=False),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            help="The image that k8s/Dockerfile makes. Default: repertory:cpu, or repertory:gpu.", show_default=False
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that a node of the cluster has.")] = 8,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="CPUs of a node for roles that have no GPU.")] = 16,
) -> None:
    """Write the manifests that train CONFIG on Kubernetes: a RayJob, its volume, configuration and access.

    Example:  repertory k8s render configs/cluster/qwen_8gpu.yaml --serve --image registry.example/repertory:gpu

    Workers follow the roles: those with gpus go on pods with GPUs, each actor whole on one node, the others on pods
    without; the head holds what must be near the driver. Memory, /dev/shm, the volume and the time that a pod has to
    end are estimated from the model's size, as by `repertory doctor`. k8s/README.md has the way from there to a served
    agent.
    """
    from actors.kubernetes import Wanted
    from actors.kubernetes import render as write

    wanted = Wanted(image, replicas if serve else 0, max_replicas if serve else None, gpus_per_node, cpus_per_node)
    files = write(config, overrides or [], out, wanted)
    folder = files[0].parent
    console, label = Console(soft_wrap=True, highlight=False, markup=False), "app.kubernetes.io/component"
    console.print(f"{folder}: {', '.join(file.name for file in files)}")
    console.print(f"train it:    kubectl apply -k {folder} -l '{label} in (shared, train)'")
    if serve:
        console.print(f"promote it:  kubectl create -f {folder / 'promote.yaml'}")
        console.print(f"serve it:    kubectl apply -k {folder} -l {label}=serve")
