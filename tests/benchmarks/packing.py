"""Forward and backward of the quickstart's SFT batches: rl/'s packing, and rows padded to the longest of a micro-batch.

    python packing.py

Drawn as the quickstart draws them: the first tasks of its training stream, each demonstrated once by the environment
itself (half of the demonstrations guess, and are short), in the SFT stage's seeded order and batch size. Only their
number is smaller. The padded side is SFT as one writes it on plain transformers and torch; it pads on the right, so
that it needs no attention mask. The sides alternate, batch by batch.
"""

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from packed import GradientOnly, packed_step

from rl.chat import ChatCodec
from rl.config_file import load_config
from rl.demonstration import demonstrate, draw_batch
from rl.env import World
from rl.episode import Limits
from rl.model import load_causal_lm
from rl.pretrained import load_tokenizer, prepare_model
from rl.task import TaskStream
from rl.trajectory import Trajectory

WARM_UP, BATCHES = 2, 30


async def demonstrations(config: Any, stage: Any, world: World, codec: ChatCodec) -> list[Trajectory]:
    limits, demo = Limits(config.env.max_turns, config.model.max_length), stage.demonstrations
    options = {"guess_fraction": demo.guess_fraction, "limits": limits, "seed": config.run.seed}
    tasks = TaskStream(world.source, "train").next((WARM_UP + BATCHES) * stage.batch_size)
    return [await demonstrate(world, task, codec, **options) for task in tasks]


def padded_step(lm: Any, trajectories: Sequence[Trajectory], budget: int) -> tuple[float, int]:
    """Seconds, and the tokens that went through the model."""
    started = time.perf_counter()
    waiting = sorted(trajectories, key=lambda t: -len(t))
    trained, computed = sum(int(t.loss_mask[1:].sum()) for t in waiting), 0
    while waiting:
        width = len(waiting[0])
        part, waiting = waiting[: max(1, budget // width)], waiting[max(1, budget // width) :]
        tokens, mask = torch.zeros(len(part), width, dtype=torch.long), torch.zeros(len(part), width, dtype=torch.bool)
        for row, t in enumerate(part):
            tokens[row, : len(t)], mask[row, : len(t)] = torch.from_numpy(t.tokens), torch.from_numpy(t.loss_mask)
        logits = lm(input_ids=tokens, use_cache=False).logits[:, :-1][mask[:, 1:]].float()
        (F.cross_entropy(logits, tokens[:, 1:][mask[:, 1:]], reduction="sum") / trained).backward()
        computed += tokens.numel()
    lm.zero_grad()
    return time.perf_counter() - started, computed


def main() -> None:
    config = load_config("configs/quickstart.yaml")
    stage, budget = next(s for s in config.stages if s.kind == "sft"), config.learner.micro_batch_tokens
    world = World(config.env, config.run.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = prepare_model(config.model, world, config.run.seed, Path(folder))
        codec = ChatCodec(load_tokenizer(model))
        padded = load_causal_lm(model, config.learner_dtype)
        trainer = GradientOnly(load_causal_lm(model, config.learner_dtype))
    played = asyncio.run(demonstrations(config, stage, world, codec))
    totals = {"real": 0, "padded": 0, "packed": 0}
    seconds: dict[str, list[float]] = {"padded_s": [], "packed_s": []}
    for k in range(WARM_UP + BATCHES):
        batch = [played[i] for i in draw_batch(k, stage.batch_size, len(played), config.run.seed)]
        padded_s, padded_tokens = padded_step(padded, batch, budget)
        before = trainer.computed
        packed_s = packed_step(trainer, batch, budget=budget)
        if k >= WARM_UP:
            seconds["padded_s"].append(padded_s)
            seconds["packed_s"].append(packed_s)
            totals["real"] += sum(map(len, batch))
            totals["padded"] += padded_tokens
            totals["packed"] += trainer.computed - before
    print(json.dumps({**totals, **seconds}))


main()
