"""The bare engine and a bare training loop on the episodes of a finished run: what the system is held against.

    python bare.py RUN FIRST_STEP

Generation: the same prompts, lengths, seeds and concurrency, each turn after the one before it, straight into vLLM's
LLMEngine: no actor, no event loop, no environment. Learning: GRPO as one writes it on plain transformers and torch,
rows padded to the longest of their micro-batch, and AdamW; and once more with rl/'s packed forward pass, still
without DeepSpeed and without an actor. All alternate, step by step, as they do in the system: caches are as cold.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, as the generator has it

import numpy as np
import torch
from vllm import LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from rl.algo.loss import token_weights
from rl.batch import Sample, mini_batches, spread_weights, turn_lengths
from rl.config import Config
from rl.config_file import load_config
from rl.config_stage import RlStage
from rl.engine_options import EngineOptions, engine_args
from rl.gradient import TorchTrainer, optimizer_step
from rl.model import TokenScorer, load_causal_lm
from rl.objective import PolicyGradient
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


def learn_packed(trainer: TorchTrainer, rows: list[dict[str, Any]], config: Config, stage: RlStage) -> float:
    """Seconds of one batch's optimizer steps with rl/'s own forward pass, in one process."""
    arrays = ("tokens", "loss_mask", "turn", "logprobs", "versions")
    trajectories = [Trajectory(*(np.asarray(row[a]) for a in arrays)) for row in rows]
    # Any log-probs will do as the reference's: what counts is that the KL term is computed.
    known = [{"reference": t.logprobs} if stage.algo.kl.used else {} for t in trajectories]
    columns = [
        {**k, "advantages": np.full(len(t), row["advantage"], np.float32)}
        for k, t, row in zip(known, trajectories, rows, strict=True)
    ]
    started = time.perf_counter()
    for chunk in mini_batches(len(rows), stage.algo.mini_batches, stage.algo.epochs):
        weights = token_weights([turn_lengths(trajectories[i]) for i in chunk], aggregation=stage.algo.aggregation)
        samples = [
            Sample(trajectories[i], spread_weights(trajectories[i], w), columns[i])
            for i, w in zip(chunk, weights, strict=True)
        ]
        objective = PolicyGradient.of(stage.algo, config.rollout.temperature)
        optimizer_step(trainer, samples, objective, lr=1e-6, token_budget=config.learner.micro_batch_tokens)
    return time.perf_counter() - started


def learn(lm: Any, optimizer: Any, rows: list[dict[str, Any]], config: Config, stage: RlStage) -> float:
    """Seconds of one batch's optimizer steps, as plain transformers and torch take them."""
    algo, budget = stage.algo, config.learner.micro_batch_tokens
    assert algo.clip_low is not None, "the plain loop has the clipped surrogate"
    started = time.perf_counter()
    for chunk in mini_batches(len(rows), algo.mini_batches, algo.epochs):
        waiting = sorted((rows[i] for i in chunk), key=lambda row: -len(row["tokens"]))
        trained = sum(sum(row["loss_mask"]) for row in waiting)
        while waiting:
            width = len(waiting[0]["tokens"])
            part, waiting = waiting[: max(1, budget // width)], waiting[max(1, budget // width) :]

            def padded(name: str, part: list[dict[str, Any]] = part, width: int = width) -> torch.Tensor:
                return torch.tensor([[*row[name], *[0] * (width - len(row[name]))] for row in part])

            tokens, mask = padded("tokens"), padded("loss_mask")[:, 1:].bool()
            old = padded("logprobs")[:, 1:][mask]
            advantages = torch.tensor([row["advantage"] for row in part])[:, None].expand(mask.shape)[mask]
            logits = lm(input_ids=tokens, use_cache=False).logits[:, :-1][mask].float()
            logp = torch.log_softmax(logits / config.rollout.temperature, -1)
            logp = logp.gather(-1, tokens[:, 1:][mask][:, None])[:, 0]
            ratio = torch.exp(logp - old)
            clipped = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high)
            loss = -torch.minimum(ratio * advantages, clipped * advantages)
            if algo.kl.coefficient > 0:
                loss = loss + algo.kl.coefficient * (torch.exp(old - logp) - (old - logp) - 1)
            (loss.sum() / trained).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), config.learner.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
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
    llm = LLMEngine.from_engine_args(engine_args(str(model), options))
    c = config.learner
    adam = {"lr": 1e-6, "betas": c.betas, "weight_decay": c.weight_decay}
    plain = load_causal_lm(model, config.learner_dtype)
    optimizer = torch.optim.AdamW(plain.parameters(), **adam, fused=True)
    scorer = TokenScorer(load_causal_lm(model, config.learner_dtype))
    trainer = TorchTrainer(scorer, betas=c.betas, weight_decay=c.weight_decay, grad_clip=c.grad_clip, device="cpu")
    timed = [
        {
            **dict(zip(("generate_s", "sampled_tokens"), generate(llm, rows, config.rollout.temperature), strict=True)),
            "update_s": learn(plain, optimizer, rows, config, stage),
            "packed_s": learn_packed(trainer, rows, config, stage),
        }
        for rows in steps
    ]
    print(json.dumps({name: [t[name] for t in timed[first:]] for name in timed[0]}))


main()
