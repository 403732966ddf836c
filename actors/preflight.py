"""What can be checked before a run writes anything: each fault is one ConfigError that says what to change."""

import asyncio
import os
import shutil
from pathlib import Path

from rich.console import Console

from actors.footprint import Size, checkpoint_bytes, model_size
from actors.run_folder import refuse_owned
from rl import checkpoint
from rl.config import Config
from rl.config_file import ConfigError
from rl.config_stage import ExampleStage, PairStage, SftStage


def preflight(config: Config, console: Console, *, resume: bool) -> str:
    """Check the run's folder, model, template, environment, reward, disk and cluster. Returns the device."""
    check_run_folder(config, resume)
    with console.status("checking the model, the environment and the cluster"):
        device = choose_device(config)
        check_model(config)
        check_world(config)
        size = model_size(config)
        if size is not None:
            check_disk(config, size)
        check_cluster(config)
    return device


def has_saved(config: Config) -> bool:
    """Whether the run's folder holds something to go on with. A damaged checkpoint is something: it is not deleted."""
    if config.only_evaluates:
        return config.run.dir.is_dir()
    return any((config.run.dir / "checkpoints").glob("step=*"))


def check_run_folder(config: Config, resume: bool) -> None:
    folder = config.run.dir
    refuse_owned(folder)
    if resume and config.only_evaluates:
        if not folder.is_dir():
            raise ConfigError(f"--resume: there is no {folder} to go on with")
    elif resume:
        damaged: list[str] = []
        if checkpoint.newest(folder, damaged.append) is None:
            raise ConfigError("; ".join([f"--resume: {folder} holds no complete checkpoint to go on from", *damaged]))
    elif folder.exists() and not config.run.overwrite:
        raise ConfigError(
            f"the run folder {folder} exists. Choose another run.name=..., go on with --resume, or delete it with "
            "run.overwrite=true"
        )


def choose_device(config: Config) -> str:
    """What `device` says; auto is cuda when the roles ask for GPUs, and cpu else."""
    device = config.device
    if device == "auto":
        device = "cuda" if config.generator.gpus > 0 or config.learner.gpus > 0 else "cpu"
    if device == "cuda" and config.learner.gpus == 0:
        raise ConfigError("device is cuda and learner.gpus is 0: give generator, learner and reference their gpus")
    if device == "cuda" and config.needs_feedback_model and config.feedback_actor.gpus == 0:
        raise ConfigError("device is cuda and feedback_actor.gpus is 0: give the actors that give feedback their gpus")
    if device == "cpu" and config.placement.time_share:
        raise ConfigError("placement.time_share takes turns on GPUs, and the device is cpu: set it to false")
    return device


def check_model(config: Config) -> None:
    """Raises ConfigError when a model is missing or its chat template cannot be used."""
    from rl.chat import TemplateError
    from rl.pretrained import ModelNotFound, find_model, load_codec

    models = [*([] if config.model.scratch else [config.model])]
    if config.needs_feedback_model:
        models.append(config.of_feedback.model)
    try:
        for model in models:
            load_codec(model)
        if config.needs_reference and config.reference.source not in ("stage_start", "initial"):
            find_model(config.reference.source)
    except (ModelNotFound, TemplateError) as error:
        raise ConfigError(str(error)) from None


def check_world(config: Config) -> None:
    """The environment, its demonstrations and the reward function can be loaded; who gives feedback can be asked."""
    from actors.endpoint import missing_key
    from rl.data_stage import BUILT_IN
    from rl.demonstration import read_rows
    from rl.env import Demonstrator, load_object
    from rl.fitting import open_world
    from rl.reward import reward_function

    key = config.env.feedback.key_variable
    # The processes of a cluster that runs already have the environment of its own nodes.
    if config.env.feedback.on and key and not os.environ.get(key) and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(missing_key(key))
    try:
        world = asyncio.run(open_world(config))
        world.source.task("train", 0)
        reward_function(config)
        if config.model.scratch and not isinstance(world.source, Demonstrator):
            raise ConfigError(
                f"model.scratch trains its tokenizer on demonstrations, and env {config.env.name} has none of its own "
                "here: set model.path"
            )
        model = config.reward.model
        if model and model != "trained" and not (Path(model) / "config.json").is_file():
            raise ConfigError(f"reward.model: {model} is no folder of a model in Hugging Face format, nor `trained`")
        for index, stage in enumerate(config.stages):
            if stage.kind != "eval" and stage.aux_loss:
                load_object(stage.aux_loss.function)
            if not isinstance(stage, ExampleStage):
                continue
            if stage.data_stage and stage.data_stage not in BUILT_IN:
                load_object(stage.data_stage)
            if isinstance(stage, PairStage) and stage.pairs.path:
                check_pairs(index, stage, stage.pairs.path)
            shows = isinstance(world.source, Demonstrator)
            if isinstance(stage, PairStage) and stage.pairs.rule == "demonstration" and stage.sample and not shows:
                raise ConfigError(
                    f"stages[{index}].pairs.rule is demonstration and env {config.env.name} has no demonstrations of "
                    "its own: use right_wrong or margin, or pairs.path"
                )
            if not isinstance(stage, SftStage) or (stage.sample and stage.data_stage != "s3ft"):
                continue
            if stage.demonstrations.path:
                read_rows(stage.demonstrations.path)
            elif not shows:
                raise ConfigError(
                    f"stages[{index}] is sft and env {config.env.name} has no demonstrations of its own: set "
                    f"stages.{index}.demonstrations.path to rows of messages"
                )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_pairs(index: int, stage: PairStage, path: str) -> None:
    """Raises ConfigError when a file or folder has fewer pairs than a step takes."""
    from rl.demonstration import read_rows

    rows = [row for _, row in read_rows(path)]
    count, what = len(rows), "pairs"
    if stage.objective == "kto" and "label" in rows[0]:
        above = sum(isinstance(row.get("label"), int | float) and row["label"] > 0 for row in rows)
        count, what = max(above, count - above), "ratings of one kind"
    if count < stage.batch_size:
        raise ConfigError(
            f"stages[{index}].pairs.path: {path} has {count} {what}, and stages[{index}].batch_size is "
            f"{stage.batch_size}: lower that to at most {count}, or collect more"
        )


def check_disk(config: Config, size: Size) -> None:
    """Room for the checkpoints that are kept, and for two more."""
    wanted = checkpoint_bytes(config, size) * (config.run.keep_checkpoints + 2)
    root = Path(config.run.root).resolve()
    while not root.exists():
        root = root.parent
    free = shutil.disk_usage(root).free
    if free < wanted:
        raise ConfigError(
            f"{root} has {free / 2**30:.1f} GiB free, and {config.run.keep_checkpoints} checkpoints of this model take "
            f"about {wanted / 2**30:.1f} GiB. Free some space, lower run.keep_checkpoints, or set run.root elsewhere"
        )


def check_cluster(config: Config) -> None:
    import ray

    from actors.launch import connect
    from actors.placement import ClusterTooSmall, check

    try:
        connect()
    except Exception as error:
        raise ConfigError(f"cannot reach or start Ray: {error}") from None
    total = ray.cluster_resources()
    try:
        check(config, total.get("CPU", 0), total.get("GPU", 0))
    except ClusterTooSmall as error:
        ray.shutdown()
        raise ConfigError(str(error)) from None
