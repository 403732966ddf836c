"""From what a user names - a checkpoint, a run, a YAML file, a model - to a server's configuration and its parts.

CHECKPOINT|RUN|CONFIG ──► ServeConfig ──► Source: the weights to start with, the run's own configuration, the folder
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.doctor import cpu_count
from rl import checkpoint
from rl.config import Config, ModelConfig
from rl.config_env import CalculatorConfig
from rl.config_file import ConfigError, apply_overrides, checked, load_config, read_yaml
from rl.config_stage import EvalStage
from rl.pretrained import ModelNotFound, find_model
from serve.config import ServeConfig
from serve.release_files import origin_of
from serve.releases import Book

_SMALL_BYTES = 64 << 20


@dataclass(frozen=True)
class Source:
    """What a server is made of.

    model: a folder in Hugging Face format; run: the run's folder that it comes from, where there is one; trained: the
    configuration that it was trained under, or one with defaults; own_env: whether that says which environment is its
    own; dir: the server's folder.
    """

    model: Path
    run: Path | None
    trained: Config
    own_env: bool
    dir: Path
    name: str


def resolve(what: str, overrides: Sequence[str] = ()) -> tuple[ServeConfig, Source]:
    """The server's configuration, and what it is made of. Raises ConfigError."""
    path = Path(what)
    node: Any = None
    if path.suffix in (".yaml", ".yml"):
        data, node = read_yaml(path)
        if "stages" in data:  # a run's configuration: what it has trained
            data, node = {"model": str(load_config(path).run.dir)}, None
    else:
        data = {"model": what}
    apply_overrides(data, list(overrides))
    config = checked(ServeConfig, data, what, node, [o.partition("=")[0] for o in overrides])
    source = source_of(config)
    if config.follow.source == "run":
        followed(config, source)
    if config.engine.threads is None:
        replicas = config.autoscale.min if config.autoscale else config.replicas
        engine = config.engine.model_copy(update={"threads": threads_for(source.model, replicas)})
        config = config.model_copy(update={"engine": engine})
    return config, source


def threads_for(model: Path, replicas: int) -> int:
    """How many an engine's CPU computation takes. Beside a small model's, answering needs the other cores more."""
    if sum(weights.stat().st_size for weights in model.glob("*.safetensors")) < _SMALL_BYTES:
        return 1
    return max(1, int(cpu_count()) // replicas)


def followed(config: ServeConfig, source: Source) -> Path:
    """The run that new versions come from. Raises ConfigError when what is served comes from no run."""
    if source.run is None:
        raise ConfigError(f"follow.source: {config.model} is of no run that could be followed. Name a run's folder")
    return source.run


def source_of(config: ServeConfig) -> Source:
    """Raises ConfigError when there is no model to serve."""
    path = Path(config.model)
    folder = _newest(path, config) if (path / "checkpoints").is_dir() else path
    if folder is None:
        raise ConfigError(f"{path} is a run without a checkpoint that could be served: train it first, or --resume it")
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"model: {path} is a configuration: name a checkpoint, a run's folder, or a model")
    if (folder / "repertory.yaml").is_file():
        trained, own_env = load_config(folder / "repertory.yaml"), True
        folder = folder.resolve()
        run = folder.parent.parent if folder.parent.name == "checkpoints" else None
        name = config.name or trained.run.name
    else:
        if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
            raise ConfigError(f"{path} is a run without a checkpoint that could be served: train it first")
        if _means_a_folder(config.model) and not path.exists():
            what = "name a checkpoint, a run's folder, a YAML file, or a model as of model.path"
            raise ConfigError(f"model: {config.model}: no such folder: {what}")
        try:
            folder = find_model(config.model)
        except ModelNotFound as error:
            raise ConfigError(f"model: {error}") from None
        trained, own_env, run, name = _untrained(config), False, None, config.name or folder.name
    where = Path(config.dir) if config.dir else run / "serve" if run else Path("runs") / f"serve-{name}"
    return Source(folder, run, trained, own_env, where, name)


def _newest(run: Path, config: ServeConfig) -> Path | None:
    """The newest checkpoint that can be served. One that is a release has been read whole before, and is not again."""
    where = Path(config.dir) if config.dir else run / "serve"
    ready = {release.version for release in Book(where).read().ready}
    for folder in checkpoint.folders(run):
        if _version(folder) in ready or checkpoint.damage(folder) is None:
            return folder
    return None


def _version(folder: Path) -> int | None:
    """None of a checkpoint that cannot say."""
    try:
        return origin_of(folder).version
    except ConfigError:
        return None


def _means_a_folder(model: str) -> bool:
    """And no organisation/name of the hub, which would be asked for it."""
    near = "/" in model and Path(model).parent.is_dir()
    return near or model.startswith(("./", "../", "/", "~", "runs/"))


def _untrained(config: ServeConfig) -> Config:
    """Of a model that no run of ours has trained: defaults."""
    length = config.engine.max_length or 4096
    model = ModelConfig(path=config.model, max_length=length, dtype=config.engine.dtype or "bfloat16")
    return Config(model=model, env=CalculatorConfig(name="calculator"), stages=[EvalStage(kind="eval")])
