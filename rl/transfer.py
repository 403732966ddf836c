"""How weights come into vLLM: named tensors in checkpoint format, layer by layer, from wherever a subclass has them."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rl.engine_options import FROM_FOLDER, IN_PROCESS


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to rendezvous: who reads the weights is told where they are with every update."""


class LayerwiseTransfer(WeightTransferEngine):
    """The swap itself, for any source of named tensors in checkpoint format: subclasses say where they come from."""

    init_info_cls = InitInfo

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    @abstractmethod
    def tensors(self, update_info: Any) -> Iterator[tuple[str, torch.Tensor]]: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Any) -> None:
        model: Any = self.model
        try:
            model.load_weights(self.tensors(update_info))
        except BaseException:
            self.finish_weight_update()  # else the next update's first layers begin with what this one has brought
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_head(self.model)

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract up to vLLM 0.26; nobody calls it: the learner publishes to the weight store."""
        raise NotImplementedError


def refresh_tied_head(model: Any) -> None:
    """Pack the output head again when it shares the embedding's weight.

    On CPU the head computes with a packed copy made at start. Reloading a tied embedding leaves that copy behind:
    parameters and checksums agree, and the logits come from the old head.
    """
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if method is not None and getattr(model.config, "tie_word_embeddings", False):
        method.process_weights_after_loading(head)


@dataclass
class TensorUpdate(WeightTransferUpdateInfo):
    tensors: list[tuple[str, torch.Tensor]]


class InProcessTransfer(LayerwiseTransfer):
    """Tensors handed over within the process: rl/loop.py."""

    update_info_cls = TensorUpdate

    def tensors(self, update_info: TensorUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        yield from update_info.tensors


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """One safetensors file of a model's folder."""

    folder: str
    file: str


class FolderTransfer(LayerwiseTransfer):
    """Every worker reads the files of a folder itself, one tensor at a time: serve/."""

    update_info_cls = FileUpdate

    def tensors(self, update_info: FileUpdate) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(Path(update_info.folder) / update_info.file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a file is no mapping
                yield name, file.get_tensor(name)


WeightTransferEngineFactory.register_engine(IN_PROCESS, InProcessTransfer)
WeightTransferEngineFactory.register_engine(FROM_FOLDER, FolderTransfer)
