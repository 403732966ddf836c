"""What an engine is made with, and the vLLM arguments that follow from it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from rl.adapter import target_names_in

if TYPE_CHECKING:
    from vllm import EngineArgs

    from rl.config import VllmConfig

IN_PROCESS = "in_process"
FROM_FOLDER = "from_folder"


@dataclass(frozen=True)
class EngineOptions:
    dtype: str = "float32"
    max_length: int = 512
    max_sequences: int = 128
    max_batched_tokens: int = 4096
    """That a step computes, prompts and answers together; never below `max_length` or `max_sequences`. With fewer,
    answers under way wait for less long while others' prompts are computed."""
    device: str = "cpu"
    kv_cache_gib: int = 1
    gpu_memory_utilization: float = 0.9
    tensor_parallel: int = 1
    enforce_eager: bool | None = None
    trust_remote_code: bool = False
    sleep_mode: bool = False
    linger_s: float = 0.0
    """An idle engine waits for this long after the newest request before it steps: requests that come in a burst then
    share their first step. Costs a lone request that much."""
    transfer: str = IN_PROCESS
    lora_rank: int | None = None
    """The largest rank that `Engine.load_adapter` may load. Default: no adapters."""
    lora_targets: str | Sequence[str] = "all-linear"
    """The layers that an adapter may sit on, as in LoraConfig.targets. Weights for others are not applied."""

    @classmethod
    def of(cls, engine: "VllmConfig", *, dtype: str, **more: Any) -> "EngineOptions":
        """What a configuration says of an engine, and what its holder does."""
        same = ("tensor_parallel", "gpu_memory_utilization", "kv_cache_gib", "max_sequences", "enforce_eager")
        return cls(dtype=engine.dtype or dtype, **{name: getattr(engine, name) for name in same}, **more)


def engine_args(model_path: str, options: EngineOptions) -> "EngineArgs":
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig

    cpu = options.device == "cpu"
    if cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_cache_gib)
    return EngineArgs(
        model=model_path,
        dtype=options.dtype,  # type: ignore[arg-type]
        max_model_len=options.max_length,
        max_num_seqs=options.max_sequences,
        max_num_batched_tokens=max(options.max_length, options.max_sequences, options.max_batched_tokens),
        gpu_memory_utilization=options.gpu_memory_utilization,
        tensor_parallel_size=options.tensor_parallel,
        distributed_executor_backend="uni" if options.tensor_parallel == 1 else "ray",
        enforce_eager=cpu if options.enforce_eager is None else options.enforce_eager,
        enable_sleep_mode=options.sleep_mode,
        trust_remote_code=options.trust_remote_code,
        # A swap must fall between two steps: with async scheduling two batches are in flight.
        async_scheduling=False,
        # On CPU a seeded request whose prefill is cut in parts kills vLLM ("CPU Generator does not use offset").
        enable_chunked_prefill=not cpu,
        enable_prefix_caching=True,
        # The smallest block that CPU attention takes: only full blocks are reused, and turns are short.
        block_size=32 if cpu else None,
        # Ratios need the distribution that was sampled from, not the one before temperature and top-p.
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=options.transfer),
        disable_log_stats=True,
        seed=0,
        **_lora_args(model_path, options),
    )


def _lora_args(model_path: str, options: EngineOptions) -> dict[str, Any]:
    if options.lora_rank is None:
        return {}
    names = target_names_in(model_path, options.lora_targets, trust_remote_code=options.trust_remote_code)
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": allowed_rank(options.lora_rank),
        # Left to itself vLLM wraps the output head too: on CPU a copy of the head's factors for every token, and the
        # end of the engine when a prompt is scored beside other requests (its log-probs are none of the step's rows).
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in names}),
    }


def allowed_rank(rank: int) -> int:
    """The smallest rank that vLLM has room for `rank` in. Raises ValueError above its largest."""
    from vllm.config.lora import MaxLoRARanks

    ranks = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise ValueError(
            f"learner.lora.rank = {rank} is above {max(ranks)}, the largest that vLLM applies: "
            "set learner.lora.publish = merged"
        )
    return min(r for r in ranks if r >= rank)
