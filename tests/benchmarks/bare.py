"""The bare engine and a bare training loop on the episodes of a finished run: what the system is held against.

    python bare.py RUN FIRST_STEP

Generation: the same prompts, lengths, seeds and concurrency, each turn after the one before it, straight into vLLM's
LLMEngine: no actor, no event loop, no environment. Learning: forward, loss, backward and AdamW on the same
micro-batches. The two alternate, step by step, as they do in the system: caches are as cold for both.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from vllm import LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from rl.batch import Sample, collate, mini_batches, plan
from rl.config import Config, RlStage
from rl.config_file import load_config
from rl.engine import EngineOptions, _engine_args
from rl.gradient import TorchTrainer, grpo_objective, weigh
from rl.model import TokenScorer, load_causal_lm
from rl.pretrained import find_model
from rl.trajectory import Trajectory, read_parquet


def turns_of(row: dict[str, Any]) -> list[tuple[list[int], int, int]]:
    """(prompt ids, sampled tokens, seed) of each turn."""
    turns = []
    for k, seed in enumerate(row["turn_seeds"]):
        sampled = [i for i, (t, m) in enumerate(zip(row["turn"], row["loss_mask"], strict=True)) if t == k and m]
        turns.append((row["tokens"][: sampled[0]], len(sampled), seed))
    return turns


def generate(llm: LLMEngine, rows: list[dict[str, Any]], temperature: float) -> tuple[float, int]:
    """Seconds to sample every turn again, at the lengths recorded, and how many tokens that was."""
    waiting = {i: turns_of(row) for i, row in enumerate(rows)}
    llm.reset_prefix_cache()  # the system starts every step with new weights, and so with an empty cache
    total = sum(length for turns in waiting.values() for _, length, _ in turns)
    started = time.perf_counter()

    def submit(i: int) -> None:
        prompt, length, seed = waiting[i].pop(0)
        params = SamplingParams(
            temperature=temperature, max_tokens=length, ignore_eos=True, seed=seed, logprobs=0,
            flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        llm.add_request(f"{i}", {"prompt_token_ids": prompt}, params)

    for i in range(len(rows)):
        submit(i)
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.finished and waiting[int(output.request_id)]:
                submit(int(output.request_id))
    return time.perf_counter() - started, total


def learn(trainer: TorchTrainer, rows: list[dict[str, Any]], config: Config, stage: RlStage) -> float:
    """Seconds of one batch's optimizer steps."""
    arrays = ("tokens", "loss_mask", "turn", "logprobs", "versions")
    trajectories = [Trajectory(*(torch.tensor(row[a]).numpy() for a in arrays)) for row in rows]
    # Any log-probs will do as the reference's: what counts is that the KL term is computed.
    references = [t.logprobs if stage.algo.kl.coefficient > 0 else None for t in trajectories]
    objective = grpo_objective(stage.algo)
    started = time.perf_counter()
    for chunk in mini_batches(len(rows), stage.algo.mini_batches, stage.algo.epochs):
        weights = weigh([int(trajectories[i].loss_mask[1:].sum()) for i in chunk], stage.algo)
        samples = [
            Sample(trajectories[i], w, rows[i]["advantage"], references[i]) for i, w in zip(chunk, weights, strict=True)
        ]
        for indices in plan([len(s.trajectory) for s in samples], config.learner.micro_batch_tokens):
            micro = collate([samples[i] for i in indices])
            logprobs, entropy = trainer.forward(micro, config.rollout.temperature)
            trainer.backward(objective(logprobs, entropy, micro)[0])
        trainer.step(1e-6)
    return time.perf_counter() - started


def main() -> None:
    run, first = Path(sys.argv[1]), int(sys.argv[2])
    config = load_config(run / "config.yaml")
    stage = next(s for s in config.stages if isinstance(s, RlStage))
    files = sorted((run / "trajectories").glob("rl-*.parquet"))
    steps = [read_parquet(f) for f in files]
    # The initial model will do: lengths are given, so that what the weights would sample does not matter.
    model = run / "initial" if config.model.scratch else find_model(config.model.path or "")
    g = config.generator
    length, many = config.model.max_length, g.max_sequences
    options = EngineOptions(config.generator_dtype, length, many, kv_cache_gib=g.kv_cache_gib)
    llm = LLMEngine.from_engine_args(_engine_args(str(model), options))
    c = config.learner
    scorer = TokenScorer(load_causal_lm(model, config.learner_dtype))
    trainer = TorchTrainer(scorer, betas=c.betas, weight_decay=c.weight_decay, grad_clip=c.grad_clip, device="cpu")
    timed = [(*generate(llm, rows, config.rollout.temperature), learn(trainer, rows, config, stage)) for rows in steps]
    timed = timed[first:]
    print(
        json.dumps(
            {
                "generate_s": sum(g for g, _, _ in timed),
                "sampled_tokens": sum(n for _, n, _ in timed),
                "update_s": sum(u for _, _, u in timed),
            }
        )
    )


main()
