"""A batch, by reference, as it reaches the learner's ranks, and each rank's share of it as samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rl.algo.loss import token_weights
from rl.algo.sft import masked_thought, masked_thought_rate
from rl.batch import Sample, balance, spread_weights, trained_positions, turn_lengths
from rl.config_algo import AlgoConfig
from rl.config_stage import SftStage
from rl.credit import first_tokens
from rl.data_stage import Example
from rl.objective import Sums
from rl.task import derive_seed


@dataclass(frozen=True)
class RlBatch:
    """One optimizer step's trajectories, by reference: `groups[g]` is a ref of a list, `chosen` picks (g, sample).

    tokens[g][s], turn_tokens[g][s]: lengths, so that ranks can share the work out before they fetch anything.
    columns: a ref of rl.credit's columns, [g][s].
    """

    groups: Sequence[Any]
    tokens: Sequence[Sequence[int]]
    turn_tokens: Sequence[Sequence[Sequence[int]]]
    columns: Any
    chosen: Sequence[tuple[int, int]]
    algo: AlgoConfig
    fixed_length: int
    temperature: float
    kl_coefficient: float

    def share(self, rank: int, ranks: int) -> list[Sample]:
        """This rank's samples of the batch, weighted for the policy's loss; one without weight where it has none."""
        algo = self.algo
        weights = token_weights(
            [self.turn_tokens[g][s] for g, s in self.chosen],
            aggregation=algo.aggregation,
            fixed_length=algo.fixed_length or self.fixed_length,
        )
        mine, idle = _share([self.tokens[g][s] for g, s in self.chosen], rank, ranks)
        needed = sorted({self.chosen[k][0] for k in mine})
        fetched = dict(zip(needed, ray.get([self.groups[g] for g in needed]), strict=True))
        columns = ray.get(self.columns)
        samples = []
        for k in mine:
            g, s = self.chosen[k]
            trajectory = fetched[g][s]
            samples.append(Sample(trajectory, spread_weights(trajectory, [] if idle else weights[k]), columns[g][s]))
        return samples

    def for_critic(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples, weighted for the value loss: a mean over the batch's values, of tokens or of turns."""
        by_turn = self.algo.advantage == "turn_gae"
        spoken = [n for g, s in self.chosen for n in self.turn_tokens[g][s] if n]
        weight = 1 / max(1, len(spoken) if by_turn else sum(spoken))
        out = []
        for sample in samples:
            at = trained_positions(sample.trajectory)
            valued = first_tokens(sample.trajectory.turn[at]) if by_turn else np.ones(len(at), bool)
            weights = np.zeros(len(sample.trajectory), np.float32)
            weights[at[valued]] = weight if sample.weights.any() else 0
            out.append(Sample(sample.trajectory, weights, sample.columns))
        return out


@dataclass(frozen=True)
class StepResult:
    """What one rank says of an optimizer step."""

    sums: Sums
    token_budget: int
    seconds: float


@dataclass(frozen=True)
class Drawn:
    """One step's examples: indices into those held now, and into those of the round before."""

    now: Sequence[int]
    before: Sequence[int] = ()


@dataclass(frozen=True)
class Held:
    """An example, and per-token float32 [T] reference log-probs of each of its trajectories."""

    example: Example
    references: Sequence[np.ndarray] | None = None


def example_samples(held: Sequence[Held], rank: int, ranks: int) -> list[Sample]:
    """This rank's samples of a batch of examples; a pair is a unit. Mismatched trajectories (label 0) are left out. A
    rank without any has samples without weight.

    A demonstration's tokens weigh 1 / all the batch's trained tokens, a pair's episodes 1 / pairs.
    """
    paired = len(held[0].example.trajectories) > 1
    lengths = [sum(len(t) for t in h.example.trajectories) for h in held]
    weights = token_weights([turn_lengths(h.example.trajectories[0]) for h in held], aggregation="token")
    mine, idle = _share(lengths, rank, ranks)
    samples = []
    for k in mine:
        example, references = held[k].example, held[k].references
        for i, (trajectory, label) in enumerate(zip(example.trajectories, example.labels, strict=True)):
            if not label:
                continue
            columns = {"reference": references[i]} if references else {}
            if paired:
                each = np.full(len(trajectory), 0 if idle else 1 / len(held), np.float32)
                samples.append(Sample(trajectory, each, columns, unit=k, label=0.0 if idle else label))
            else:
                samples.append(Sample(trajectory, spread_weights(trajectory, [] if idle else weights[k]), columns))
    return samples


def _share(lengths: Sequence[int], rank: int, ranks: int) -> tuple[list[int], bool]:
    """This rank's indices; without any the first one, and True: collectives want every rank to take part."""
    mine = balance(lengths, ranks)[rank]
    return mine or [0], not mine


def with_masked_thoughts(
    samples: Sequence[Sample], stage: SftStage, step: int, seed: int, words: np.ndarray, mask_token: int
) -> list[Sample]:
    """MFT: what the model reads is corrupted at a share of the assistant's words; special tokens never are."""
    config = stage.masked_thought
    assert config is not None
    rate = masked_thought_rate(step, stage.steps, rate=config.rate, warmup=config.warmup)
    out = []
    for sample in samples:
        tokens, t = sample.trajectory.tokens, sample.trajectory
        # By the tokens, not by a place in this rank's share: the same words on any number of ranks.
        rng = np.random.default_rng(derive_seed("masked_thought", seed, step, tokens.tobytes().hex()))
        inputs = masked_thought(
            tokens, t.loss_mask & np.isin(tokens, words), rate=rate, vocabulary=words, rng=rng,
            mask_token=mask_token if config.replacement == "mask" else None,
        )  # fmt: skip
        out.append(Sample(t, sample.weights, sample.columns, inputs, sample.unit, sample.label))
    return out
