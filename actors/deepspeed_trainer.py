"""rl.gradient's Trainer over a DeepSpeed engine: the policy's, and beside it a critic's or a reward model's."""

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rl.batch import MicroBatch
from rl.config import Config
from rl.gradient import ask
from rl.objective import Objective


class DeepSpeedTrainer:
    """Gradients are summed over ranks: the samples' weights carry the denominator."""

    def __init__(self, module: nn.Module, config: Config, device: str):
        import deepspeed

        c = config.learner
        self.device, self._world = device, c.count
        parameters = [p for p in module.parameters() if p.requires_grad]
        common: dict[str, Any] = {"lr": 0.0, "betas": c.betas, "weight_decay": c.weight_decay}
        if c.offload_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            adam: Any = DeepSpeedCPUAdam
            optimizer: Any = adam(parameters, **common)
        else:
            # fused: one pass over the weights instead of ten.
            optimizer = torch.optim.AdamW(parameters, **common, fused=True)
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config))
        self._norm: float | None = None
        self._frozen: list[Any] = []
        if clips_itself(config):
            # Without a ZeRO or bf16 optimizer DeepSpeed clips, but tells nobody the norm: clip between its gradient
            # reduction and the optimizer's step.
            def clip(*_: Any) -> None:
                self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip))

            self.engine.optimizer.register_step_pre_hook(clip)
        # From stage 2 on every backward pass runs collectives: one rank cannot start again on its own.
        self.can_retry = c.count == 1 or c.zero_stage < 2

    def begin(self, eps: float, *, fresh: bool) -> None:
        """A new stage or round; `fresh` drops the moments: those of another objective would steer its first steps."""
        optimizer = self.engine.optimizer
        for group in optimizer.param_groups:
            group["eps"] = eps
        if fresh:
            getattr(optimizer, "optimizer", optimizer).state.clear()

    def take_weights(self) -> None:
        """After the module's weights were written to: ZeRO and bf16 optimizers keep masters of their own."""
        if hasattr(self.engine.optimizer, "refresh_fp32_params"):
            self.engine.optimizer.refresh_fp32_params()

    def train_only(self, names: Collection[str]) -> None:
        """Parameters of other names get a gradient of zero from now on; with fresh moments they stay where they are."""
        for handle in self._frozen:
            handle.remove()
        self._frozen = [
            parameter.register_hook(torch.zeros_like)
            for name, parameter in self.engine.module.named_parameters()
            if parameter.requires_grad and name.removeprefix("lm.") not in names
        ]

    def forward(self, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor]:
        return ask(self.engine, micro, objective)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self._world)  # DeepSpeed averages over ranks

    def step(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self._norm if self._norm is not None else self.engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed reports the gradient's norm after a step"
        return float(norm)

    def zero_grad(self) -> None:
        self.engine.zero_grad()
        if hasattr(self.engine.optimizer, "zero_grad"):
            self.engine.optimizer.zero_grad()

    def any_rank(self, flag: bool) -> bool:
        return self.largest(int(flag)) > 0

    def largest(self, number: int) -> int:
        return int(self._reduced([number], torch.distributed.ReduceOp.MAX)[0])

    def totals(self, numbers: list[float]) -> list[float]:
        """Each number added up over the ranks."""
        return self._reduced(numbers, torch.distributed.ReduceOp.SUM)

    def _reduced(self, numbers: list[Any], operation: Any) -> list[Any]:
        if self._world == 1:
            return numbers
        values = torch.tensor(numbers, device=self.device, dtype=torch.float64)
        torch.distributed.all_reduce(values, op=operation)
        return values.tolist()

    def move(self, to: Literal["host", "device"]) -> None:
        """Time-sharing: optimizer and parameters leave the GPU while others use it."""
        if to == "host":
            self.engine.offload_states()
        else:
            self.engine.reload_states()


def clips_itself(config: Config) -> bool:
    """Whether the gradient is clipped by us: plain fp32 without ZeRO, where DeepSpeed hides the norm."""
    return config.learner.zero_stage == 0 and config.learner_dtype == "float32"


def deepspeed_config(config: Config) -> dict[str, Any]:
    c = config.learner
    zero: dict[str, Any] = {"stage": c.zero_stage}
    if c.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # We own the accumulation boundary: any number of backward passes, then one step.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if clips_itself(config) else c.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.learner_dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
