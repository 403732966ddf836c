"""How large a model is and what its roles must hold, from its files or, when it is not here, from its name."""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from rl.config import Config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_VOCABULARY = 152_000  # of a model that is not here to be asked


@dataclass(frozen=True)
class Size:
    parameters: float
    vocabulary: int
    source: str

    @property
    def layers(self) -> float:
        """Parameters = 12 layers x width², and a width of 128 a layer."""
        return (self.parameters / 12 / 128**2) ** (1 / 3)


def locate_model(path: str) -> Path | None:
    """The model's folder; None when it is to be downloaded or converted. Uses no network. Raises ModelNotFound."""
    from rl.pretrained import cache_dir, find_model

    if path.startswith("package://"):
        module, _, file = path.removeprefix("package://").partition("/")
        cached, spec = cache_dir() / "models" / Path(file).stem, util.find_spec(module)
        if (cached / "config.json").is_file() or spec is None or spec.origin is None:
            return find_model(path)
        return Path(spec.origin).parent
    if Path(path).is_dir() or path.startswith((".", "/")) or path.count("/") != 1:
        return find_model(path)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"], local_files_only=True))
    except FileNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def model_size(config: Config) -> Size | None:
    """Counted in the model's safetensors, or guessed from a name like Qwen2.5-7B."""
    if config.model.scratch is not None:
        s = config.model.scratch
        count = s.vocabulary * s.hidden + s.layers * (4 * s.hidden**2 + 3 * s.hidden * s.intermediate)
        return Size(count, s.vocabulary, "from its layers")
    path = config.model.path or ""
    folder = None
    with suppress(ValueError):  # check_model has said so
        folder = locate_model(path)
    if folder and (count := sum(map(_count_parameters, folder.glob("*.safetensors")))):
        settings = json.loads((folder / "config.json").read_text())
        return Size(count, settings.get("vocab_size", _VOCABULARY), "counted in its safetensors")
    named = re.findall(r"(\d+(?:\.\d+)?)([BM])(?![a-z])", Path(path).name, re.IGNORECASE)
    if not named:
        return None
    count = float(named[0][0]) * {"B": 1e9, "M": 1e6}[named[0][1].upper()]
    return Size(count, _VOCABULARY, "estimated from its name")


def _count_parameters(file: Path) -> int:
    """Out of the header alone: 8 bytes of length, then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def learner_state_bytes(config: Config, size: Size) -> float:
    """One rank's weights, gradients, and fp32 master weights and Adam moments, as ZeRO shards them.

    2 + 2 + 12 bytes a parameter in bf16 (https://arxiv.org/abs/1910.02054, section 3.1); 4 + 4 + 8 in fp32.
    """
    c, weights = config.learner, DTYPE_BYTES[config.learner_dtype]
    optimizer = 0 if c.offload_optimizer else 16 - 2 * weights
    shards = [c.count if c.zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return size.parameters * (weights / shards[0] + weights / shards[1] + optimizer / shards[2])


def activation_bytes(config: Config, size: Size, *, backward: bool) -> float:
    """One micro-batch: four fp32 arrays as large as the logits, and what each layer keeps for a backward pass."""
    kept = 2 if config.learner.gradient_checkpointing else 34  # https://arxiv.org/abs/2205.05198, without the scores
    layers = backward * 128 * size.layers**2 * kept * DTYPE_BYTES[config.learner_dtype] / 2
    return config.learner.micro_batch_tokens * (layers + 16 * size.vocabulary)


def checkpoint_bytes(config: Config, size: Size) -> float:
    """Weights plus two fp32 moments and, in bf16, fp32 master weights."""
    return size.parameters * (14 if config.learner_dtype == "bfloat16" else 12)
