"""LoRA (https://arxiv.org/abs/2106.09685) by peft, injected into a causal LM that stays what it is.

An adapted layer computes W x + scale * B A x: W [O, I] frozen, A [R, I] drawn, B [O, R] zero at first, and
scale = alpha / R. No wrapper around the model: its class, its `base_model` and its forward pass are transformers' own.

    attach ──► train A, B ──► parts          W + scale * B A under checkpoint names ──► published, saved
                    │     └─► adapter_parts  A and B alone ──► write_adapter ──► vLLM, peft
                    └───────► fold           W := W + scale * B A, and a new A and B
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rl.config import LoraConfig

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes parameters whole for a while, and what was written to them everybody's: ZeRO-3's GatheredParameters."""

_NAME = "default"
_PREFIX = "base_model.model."
"""What names in an adapter folder begin with."""


def target_names(lm: Any, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers whose names end in one of `targets`; `all-linear`: all but the output head.

    The head is never one: where it is tied to the embedding, adding to the one would add to the other.
    Raises ValueError for a target that names no layer.
    """
    head = lm.get_output_embeddings()
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if targets == "all-linear":
        return linear
    ends = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in targets}
    for target, names in ends.items():
        if not names:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(
                f"learner.lora.targets: {target!r} is no linear layer of {type(lm).__name__}. Its layers are {known}"
            )
    return [name for name in linear if any(name in names for names in ends.values())]


def target_names_in(folder: str, targets: str | Sequence[str], *, trust_remote_code: bool = False) -> list[str]:
    """target_names of the model in a folder, without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return target_names(lm, targets)


def attach(lm: Any, config: LoraConfig, seed: int) -> None:
    """Inject an adapter that changes nothing yet, and freeze all the rest.

    A and B are float32, also in a bfloat16 model: an optimizer that works on the weights themselves would lose its
    small steps in bfloat16. DeepSpeed's bf16 casts them with the rest of the module, and keeps float32 masters instead.
    """
    import peft
    import peft.functional

    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    described = peft.LoraConfig(target_modules=target_names(lm, config.targets), **settings)
    peft.functional.inject_adapter_in_model(described, lm, _NAME)
    peft.functional.cast_adapter_dtype(lm, _NAME)
    generator = torch.Generator().manual_seed(seed)
    for part in _adapted(lm).values():
        part.start(generator)


@dataclass(frozen=True)
class Part:
    """One published tensor: a parameter, or a weight W [O, I] with the A [R, I] and B [O, R] that are added to it.

    Under ZeRO-3 its shape is always known, its value only while its parameters are gathered.
    """

    base: nn.Parameter
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.base, "ds_shape", self.base.shape))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.base, self.a, self.b) if p is not None]

    @torch.no_grad()
    def value(self) -> Tensor:
        """The parameter itself; or W + scale * B A, float32, to be rounded once, by whoever stores it."""
        if self.a is None or self.b is None:
            return self.base.detach()
        return self.base.float() + self.scale * (self.b.float() @ self.a.float())

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """A as in the paper's code, B zero. Drawn on CPU in float32, so that every rank and device draws the same."""
        assert self.a is not None and self.b is not None
        drawn = torch.empty(self.a.shape)
        self.a.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
        self.b.zero_()


def parts(lm: Any) -> dict[str, Part]:
    """Every parameter under its checkpoint name, with what the adapter adds; without one, named_parameters as it is."""
    adapted = _adapted(lm)
    factors = {id(p) for part in adapted.values() for p in (part.a, part.b)}
    return {
        name.replace(".base_layer.", "."): adapted.get(name.removesuffix(".base_layer.weight")) or Part(parameter)
        for name, parameter in lm.named_parameters()
        if id(parameter) not in factors
    }


def adapter_parts(lm: Any) -> dict[str, Part]:
    """A and B of every adapted layer, under the names of an adapter folder."""
    return {
        f"{_PREFIX}{name}.lora_{which}.weight": Part(parameter)
        for name, part in _adapted(lm).items()
        for which, parameter in (("A", part.a), ("B", part.b))
        if parameter is not None
    }


def merged_tensors(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint of the model with its adapter merged in, in the model's own dtype. The model stays as it is."""
    for name, part in parts(lm).items():
        yield name, part.value().to(part.base.dtype)


def adapter_tensors(lm: Any) -> dict[str, Tensor]:
    return {name: part.value() for name, part in adapter_parts(lm).items()}


def write_adapter(folder: str | Path, tensors: Mapping[str, Tensor], config: LoraConfig, base_model_name: str) -> None:
    """An adapter folder from adapter_tensors, which peft's PeftModel and vLLM's LoRARequest load."""
    import peft

    names = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    described = peft.LoraConfig(
        target_modules=names,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_name,
        inference_mode=True,
        **settings,
    )
    described.save_pretrained(str(folder))
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


@contextmanager
def disabled(lm: Any) -> Iterator[None]:
    """The forward pass of the base alone: the model as it was when the adapter was attached, or last folded in."""
    layers = [module for module in lm.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def fold(lm: Any, seed: int, gathered: Gather = lambda _: nullcontext()) -> None:
    """Add the adapter to the base weights for good and start a new one, so that `disabled` is the model as it is now.

    DeepSpeed's optimizers step copies of A and B, but for float32 without ZeRO: unless the caller goes on with
    `optimizer.refresh_fp32_params()`, the next step brings the old A and B back, to a base that already holds them.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in _adapted(lm).values():
        with gathered(part.parameters):
            part.base.copy_(part.value())
            part.start(generator)


def _adapted(lm: Any) -> dict[str, Part]:
    """The adapted weights by the names of their layers."""
    return {
        name: Part(
            layer.base_layer.weight, layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, layer.scaling[_NAME]
        )
        for name, layer in lm.named_modules()
        if hasattr(layer, "lora_A")
    }
