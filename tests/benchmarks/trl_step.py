"""TRL's GRPOTrainer on the tasks, group and completion length of a configuration: completion tokens a second.

    python trl_step.py CONFIG
"""

import json
import os
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("WANDB_MODE", "disabled")

import asyncio

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl.config_file import load_config
from rl.config_stage import RlStage
from rl.env import World
from rl.pretrained import find_model
from rl.task import TaskStream

WARM_UP, STEPS = 1, 4


class Clock(TrainerCallback):
    def __init__(self):
        self.marks: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.marks.append(time.perf_counter())

    def on_train_end(self, *args, **kwargs):
        self.marks.append(time.perf_counter())


def main() -> None:
    config = load_config(sys.argv[1])
    stage = next(s for s in config.stages if isinstance(s, RlStage))
    world = World(config.env, config.run.seed)
    tasks = TaskStream(world.source, "train").next(stage.tasks_per_step * STEPS)
    prompts = [list(asyncio.run(world.env().reset(t)).messages) for t in tasks]
    lengths: list[int] = []

    def reward(completions, completion_ids, **_):
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(len(ids) % 2) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        episodes = stage.tasks_per_step * stage.algo.group_size
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=True, beta=0.0, learning_rate=stage.lr, max_steps=STEPS,
            per_device_train_batch_size=episodes, num_generations=stage.algo.group_size, gradient_accumulation_steps=1,
            max_completion_length=config.rollout.max_turn_tokens, temperature=config.rollout.temperature,
            gradient_checkpointing=False, save_strategy="no", report_to=[], logging_steps=1,
            model_init_kwargs={"dtype": "bfloat16"}, disable_tqdm=True,
        )  # fmt: skip
        clock = Clock()
        trainer = GRPOTrainer(
            model=str(find_model(config.model.path or "")), reward_funcs=reward, args=arguments,
            train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    per_step = len(lengths) // STEPS
    seconds = clock.marks[-1] - clock.marks[WARM_UP]
    tokens = sum(lengths[WARM_UP * per_step :])
    print(json.dumps({"tokens_per_second": tokens / seconds, "length": tokens / (len(lengths) - WARM_UP * per_step)}))


main()
