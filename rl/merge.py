"""Several checkpoints of one architecture -> one, a tensor at a time.

    folders ──► Weights (on disk) ──► rule: name -> merged tensor ──► a folder in the first checkpoint's layout

`uniform` and `lines` are rules; `greedy` chooses which checkpoints a uniform soup is made of.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl import checkpoint
from rl.config import Dtype
from rl.config_file import ConfigError
from rl.model import DTYPES
from rl.pretrained import ModelNotFound, find_model
from rl.weights import block_of

Rule = Callable[[str], Tensor]
"""A tensor's name -> its merged value, float32."""

_INDEX = "model.safetensors.index.json"
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "repertory.yaml")
_NOT_OF_THE_MERGED = {"state.json", "files.json", "adapter_config.json", _INDEX}


@dataclass(frozen=True)
class Weights:
    """A folder's full weights, left on disk until a tensor is read; tied ones are what the files hold, once or twice.

    files, shapes: by tensor name.
    """

    folder: Path
    architecture: str
    files: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)


def find_checkpoint(path: str) -> Path:
    """The folder of a run's newest checkpoint, of a checkpoint, or of a model as `model.path` names it.

    Raises ConfigError.
    """
    if Path(path).is_dir():
        damaged: list[str] = []
        newest = checkpoint.newest(Path(path), damaged.append)
        if newest is None and damaged:
            raise ConfigError(f"{path} has no checkpoint that is whole: {'; '.join(damaged)}")
        return newest or Path(path)
    try:
        return find_model(path)
    except ModelNotFound as error:
        raise ConfigError(str(error)) from None


def open_weights(folder: Path) -> Weights:
    """Raises ConfigError when the folder holds no full weights, or only quantised ones."""
    config = folder / "config.json"
    if (folder / _INDEX).is_file():
        found = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        found = ["model.safetensors"]
    elif (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} holds a LoRA adapter and not the full weights: merge it into its model first "
            "(peft: merge_and_unload, then save_pretrained)"
        )
    else:
        found = []
    if not found or not config.is_file():
        raise ConfigError(
            f"{folder}: neither a checkpoint, nor a run with a checkpoint, nor a model in Hugging Face format "
            "(config.json and model.safetensors)"
        )
    settings = json.loads(config.read_text())
    if "quantization_config" in settings:
        raise ConfigError(f"{folder} is quantised: merge the full weights and quantise the result")
    files: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in found:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.offset_keys():
                    files[name], shapes[name] = file, tuple(opened.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder / file} cannot be read: {error}") from None
    return Weights(folder, (settings.get("architectures") or [settings["model_type"]])[0], files, shapes)


def check_alike(first: Weights, other: Weights) -> None:
    """Raises ConfigError, which names the tensor, when the two are not of one architecture and size."""
    if other.architecture != first.architecture:
        raise ConfigError(
            f"{first.folder} is a {first.architecture} and {other.folder} a {other.architecture}: only checkpoints of "
            "one architecture can be merged"
        )
    for name in [*first.shapes, *other.shapes]:
        a, b = first.shapes.get(name), other.shapes.get(name)
        if a is None or b is None:
            there, missing = (other, first) if a is None else (first, other)
            raise ConfigError(f"{name} is in {there.folder} and missing in {missing.folder}: they cannot be merged")
        if a != b:
            raise ConfigError(
                f"{name} is {list(a)} in {first.folder} and {list(b)} in {other.folder}: they cannot be merged"
            )


def uniform(members: Sequence[Weights]) -> Rule:
    """θ = mean of the θ_i: the uniform soup (Model soups, https://arxiv.org/abs/2203.05482, section 2)."""

    def merged(name: str) -> Tensor:
        return reduce(torch.add, (m.read(name).float() for m in members)) / len(members)

    return merged


def greedy(count: int, score: Callable[[Sequence[int]], float]) -> list[int]:
    """Which of `count` models make the greedy soup (Model soups, https://arxiv.org/abs/2203.05482, Recipe 1).

    score: the held-out score of the uniform soup of some of them. From the best model alone downwards, each joins when
    the soup with it scores strictly higher (as in the authors' code: a tie is no gain, and the smaller soup stays).
    """
    alone = [score([i]) for i in range(count)]
    best, *others = sorted(range(count), key=lambda i: -alone[i])
    soup, reached = [best], alone[best]
    for i in others:
        tried = score([*soup, i])
        if tried > reached:
            soup, reached = [*soup, i], tried
    return soup


def lines(members: Sequence[Weights], base: Weights, alpha: float, beta: float) -> Rule:
    """θ = θ0 + λ_l Σ_i (θ_i - θ0), λ_l = α + β l / (L-1) in block l of L, and α outside the blocks.

    LiNeS (https://arxiv.org/abs/2410.17146): shallow layers stay near the base. Several members are merged by the sum
    of their changes (task arithmetic). Raises ConfigError when the model has fewer than two blocks.
    """
    blocks = 1 + max((block for name in base.shapes if (block := block_of(name)) is not None), default=-1)
    if blocks < 2:
        raise ConfigError(
            f"{base.folder}: LiNeS scales by depth, and {blocks} block(s) are found by name (layers.N, h.N or blocks.N)"
        )

    def merged(name: str) -> Tensor:
        start = base.read(name).float()
        update = reduce(torch.add, (m.read(name).float() - start for m in members))
        return start + lines_scale(block_of(name), blocks, alpha, beta) * update

    return merged


def lines_scale(block: int | None, blocks: int, alpha: float, beta: float) -> float:
    """λ of a block of `blocks`, counted from 0; None is outside the blocks."""
    return alpha if block is None else alpha + beta * block / (blocks - 1)


def lines_coefficients(count: int, alpha: float | None, beta: float | None) -> tuple[float, float]:
    """(α, β) for `count` members where one is not given. Raises ConfigError when α must be.

    LiNeS: α of several is ‖Σ τ_i‖ / ‖τ_merged‖ / count (the authors' code: L1 norms), which is 1 / count where, as
    here, τ_merged is Σ τ_i: the first block takes the mean. β is 1 - α, the paper's choice for one model: the last
    block takes τ_merged whole. For several the paper tunes β on held-out tasks.
    """
    if alpha is None and count == 1:
        raise ConfigError(
            "lines of one checkpoint needs --alpha, the share of its change that the first block keeps: 0 gives that "
            "block back to the base, 1 changes nothing"
        )
    alpha = 1 / count if alpha is None else alpha
    return alpha, 1 - alpha if beta is None else beta


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A temporary neighbour that becomes `out`, whole, when the block ends without an error.

    Raises ConfigError when `out` holds something already, or cannot be made.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: choose another one for the merged model")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error}") from None
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(
    rule: Rule, first: Weights, folder: Path, *, dtype: Dtype | None = None, written: Callable[[], None] = lambda: None
) -> None:
    """The merged weights in the files of `first`, one file in memory at a time, and what else belongs to a model.

    dtype: of the floating-point tensors; default: each as `first` has it. written: called after every tensor. Raises
    ConfigError when the disk refuses.
    """
    size = 0
    for file in sorted(set(first.files.values())):
        tensors: dict[str, Tensor] = {}
        for name in (name for name, where in first.files.items() if where == file):
            stored = first.read(name).dtype
            wanted = DTYPES[dtype] if dtype and stored.is_floating_point else stored
            tensors[name] = rule(name).to(wanted).contiguous()
            size += tensors[name].nbytes
            written()
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot write {folder / file}: {error}") from None
    if (first.folder / _INDEX).is_file():
        index = json.loads((first.folder / _INDEX).read_text())
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))
    for path in (path for pattern in _BESIDE for path in first.folder.glob(pattern)):
        if path.name not in _NOT_OF_THE_MERGED:
            shutil.copyfile(path, folder / path.name)
    if dtype:
        settings = json.loads((folder / "config.json").read_text())
        settings.pop("torch_dtype", None)  # the name before transformers 5
        (folder / "config.json").write_text(json.dumps({**settings, "dtype": dtype}, indent=2))
