"""Forward and backward of the same episodes: rl/'s learner, and TRL's GRPOTrainer as its own training step takes them.

    python learner.py CONFIG

Prompts are the configuration's tasks, a group of episodes on each. A completion is `rollout.max_turn_tokens` ids drawn
uniformly: their behaviour log-probs are known without a model. TRL gets each batch where it would have generated it,
and is timed from there to the end of its backward pass; the optimizer is outside the clock on both sides. Both compute
in plain bfloat16: with autocast on top (`bf16=True`) TRL is slower. The sides alternate, batch by batch.
"""

import asyncio
import json
import math
import os
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import torch
from datasets import Dataset
from packed import GradientOnly, one_turn, packed_step
from trl import GRPOConfig, GRPOTrainer

from rl.chat import ChatCodec
from rl.config_file import load_config
from rl.env import World
from rl.model import load_causal_lm
from rl.pretrained import find_model, load_tokenizer
from rl.task import TaskStream

WARM_UP, STEPS = 1, 6

Episodes = list[tuple[list[int], list[int], float]]
"""(prompt ids, completion ids, advantage) of each."""


def draw(prompts: list[list[int]], group: int, length: int, vocabulary: int, seed: int) -> Episodes:
    rng = np.random.default_rng(seed)
    return [(p, rng.integers(0, vocabulary, length).tolist(), 1.0 - 2 * (i % 2)) for p in prompts for i in range(group)]


def as_trl(episodes: Episodes, logprob: float) -> dict[str, torch.Tensor]:
    """What GRPOTrainer's `_generate_and_score_completions` returns: prompts padded on the left."""
    width = max(len(prompt) for prompt, _, _ in episodes)
    completions = torch.tensor([completion for _, completion, _ in episodes])
    return {
        "prompt_ids": torch.tensor([[*[0] * (width - len(p)), *p] for p, _, _ in episodes]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _, _ in episodes]),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.tensor([advantage for _, _, advantage in episodes]),
        "num_items_in_batch": torch.tensor(completions.numel()),
        "old_per_token_logps": torch.full(completions.shape, logprob),
    }


def main() -> None:
    config = load_config(sys.argv[1])
    stage: Any = next(s for s in config.stages if s.kind == "rl")
    path, world = find_model(config.model.path or ""), World(config.env, config.run.seed)
    codec, lm = ChatCodec(load_tokenizer(path)), load_causal_lm(path, "bfloat16")
    opened = [asyncio.run(world.env().reset(t)) for t in TaskStream(world.source, "train").next(stage.tasks_per_step)]
    prompts = [codec.prompt(o.messages, o.tools) for o in opened]
    group, vocabulary, length = stage.algo.group_size, lm.config.vocab_size, config.rollout.max_turn_tokens
    logprob, temperature = -math.log(vocabulary), config.rollout.temperature
    batches = [draw(prompts, group, length, vocabulary, seed) for seed in range(WARM_UP + STEPS)]
    trainer, here_s, trl_s = GradientOnly(lm), [], []
    options = {"budget": config.learner.micro_batch_tokens, "algo": stage.algo, "temperature": temperature}

    class Alternating(GRPOTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor]:
            return as_trl(batches[len(trl_s)], logprob)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
            trajectories = [one_turn(prompt, completion, logprob) for prompt, completion, _ in batches[len(trl_s)]]
            advantages = [advantage for _, _, advantage in batches[len(trl_s)]]
            here_s.append(packed_step(trainer, trajectories, advantages=advantages, **options))
            started = time.perf_counter()
            loss = super().training_step(model, inputs, num_items_in_batch)
            trl_s.append(time.perf_counter() - started)
            return loss

    with tempfile.TemporaryDirectory() as folder:
        many = len(batches[0])
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, beta=0.0, epsilon=stage.algo.clip_low,
            epsilon_high=stage.algo.clip_high, learning_rate=1e-6, max_steps=len(batches),
            per_device_train_batch_size=many, num_generations=group, gradient_accumulation_steps=1,
            max_completion_length=length, temperature=temperature, gradient_checkpointing=False, save_strategy="no",
            report_to=[], model_init_kwargs={"dtype": "bfloat16"}, disable_tqdm=True,
        )  # fmt: skip
        tasks = Dataset.from_list([{"prompt": "-"}] * many * len(batches))
        Alternating(model=str(path), reward_funcs=lambda **_: [], args=arguments, train_dataset=tasks).train()
    real, computed = sum(len(p) + len(c) for p, c, _ in batches[0]), trainer.computed // len(batches)
    print(json.dumps({"real": real, "packed": computed, "here_s": here_s[WARM_UP:], "trl_s": trl_s[WARM_UP:]}))


main()
