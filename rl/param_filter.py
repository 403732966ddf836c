"""Which parameters a round of a stage trains."""

import re
from collections import defaultdict
from collections.abc import Mapping
from random import Random

from rl.config_stage import ParameterFilter
from rl.env import load_object
from rl.task import derive_seed
from rl.weights import block_of

Shapes = Mapping[str, tuple[int, ...]]

_TENSOR = re.compile(r"(\.lora_.+)?\.(weight|bias)$")
"""What follows the name of a module in the names of its parameters, those of its LoRA adapter included."""


def trainable(shapes: Shapes, config: ParameterFilter | None, *, seed: int, round: int) -> set[str]:
    """The names of the parameters that are trained, of those that would be without a filter: `shapes`, in full.

    seed: the stage's; the same names, seed and round give the same half. Raises ValueError when nothing is chosen.
    """
    if config is None:
        return set(shapes)
    if config.kind == "half":
        return _half(shapes, Random(derive_seed("half", seed, round)))
    if config.kind == "pattern":
        chosen = {name for name in shapes if re.search(config.value, name)}
    else:
        trains = load_object(config.value)
        chosen = {name for name in shapes if trains(name, round)}
    if not chosen:
        raise ValueError(
            f"param_filter {config.kind} {config.value} chooses none of the parameters in round {round}: they have "
            f"names like {next(iter(shapes))}"
        )
    return chosen


def _half(shapes: Shapes, rng: Random) -> set[str]:
    """Half fine-tuning (HFT, https://arxiv.org/abs/2404.18466), with the paper's selection by category.

    Of every transformer block a random half of the attention matrices, of the other matrices (feed-forward), and of
    the vectors (norms). Where a block has an odd number, as of gate, up and down, every second block, in random order,
    trains one more than the others: over the model each category is halved, rounded down. Matrices are counted, not
    their elements; a bias goes with its matrix, and so do the two matrices of a LoRA adapter. Embeddings, output head
    and last norm, outside the blocks, are always trained: the paper does so, and freezing them cost it performance.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name in sorted(shapes):
        modules[_TENSOR.sub("", name)].append(name)
    chosen: set[str] = set()
    categories: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, names in modules.items():
        block = block_of(names[0])
        if block is None:
            chosen.update(names)
        else:
            categories[_category(module, max(len(shapes[name]) for name in names))][block].append(module)
    if not categories:
        raise ValueError("param_filter half finds no blocks by name (layers.N, h.N, blocks.N): use pattern or function")
    for of_block in categories.values():
        blocks = rng.sample(list(of_block.values()), len(of_block))
        # End to end in random order, every second module is half of each block, and evens out the odd ones.
        in_line = [module for block in blocks for module in rng.sample(block, len(block))]
        chosen.update(name for module in in_line[1::2] for name in modules[module])
    return chosen


def _category(module: str, dimensions: int) -> str:
    if dimensions < 2:
        return "norm"
    return "attention" if re.search("attn|attention", module) else "feed_forward"
