"""What a stage sampled for itself -> the examples that it trains on: select, relabel, or pair.

A data stage is a function of one task's material. Built-in: successes, s3ft, feedback (SFT) and the pair rules of
rl/algo/pairs.py (preference, reward models). One's own is a dotted path of f(material, rng) -> list[Example].
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rl.algo.pairs import by_margin, right_against_wrong
from rl.chat import ChatCodec
from rl.config_stage import ExampleStage, PairsConfig, PairStage, PreferenceStage
from rl.env import load_object
from rl.episode import Episode, conditioned
from rl.reward import Score
from rl.task import Task, derive_seed
from rl.trajectory import Trajectory, to_trajectory

RIGHT, WRONG = "Feedback: right.", "Feedback: wrong."
"""What conditions an answer on how good it is. Evaluate with `condition: "Feedback: right."`."""


@dataclass(frozen=True)
class Example:
    """One demonstration (label 1), or a pair: chosen (1), rejected (-1) and, for KTO, a mismatched answer (0).

    source: where it came from, counted in the metrics.
    """

    trajectories: tuple[Trajectory, ...]
    labels: tuple[float, ...] = (1.0,)
    source: str = "demonstration"


@dataclass(frozen=True)
class Material:
    """What is known of one task: the episodes sampled for it and their scores, a demonstration if the environment has
    one, and (s3ft) episodes that put that demonstration into the policy's own words."""

    task: Task
    episodes: Sequence[Episode]
    scores: Sequence[Score]
    demonstration: Trajectory | None
    paraphrases: Sequence[Episode] = ()
    paraphrase_scores: Sequence[Score] = ()


DataStage = Callable[[Material, random.Random], list[Example]]


def successes(material: Material, rng: random.Random) -> list[Example]:
    """Rejection sampling: every episode that succeeded."""
    return [
        Example((to_trajectory(e),), source="self")
        for e, s in zip(material.episodes, material.scores, strict=True)
        if s.success
    ]


def s3ft(material: Material, rng: random.Random) -> list[Example]:
    """Selective self-to-supervised fine-tuning (S3FT, https://arxiv.org/abs/2502.08130): the policy's own answer where
    it is right; else its own paraphrase of the demonstration where that is right; else the demonstration."""
    own = successes(material, rng)
    if own:
        return [rng.choice(own)]
    for episode, score in zip(material.paraphrases, material.paraphrase_scores, strict=True):
        if score.success:
            # Learned as an answer to the question alone, which it was not sampled for.
            plain = material.episodes[0].prompt_ids
            return [Example((with_prompt(to_trajectory(episode), plain),), source="paraphrase")]
    return [Example((material.demonstration,), source="gold")] if material.demonstration else []


def feedback(codec: ChatCodec) -> DataStage:
    """Conditional training on feedback (DRESS, https://arxiv.org/abs/2311.10081): every episode, behind a prompt that
    says what feedback it earned. At inference the prompt asks for the best."""

    def condition_on_it(material: Material, rng: random.Random) -> list[Example]:
        examples = []
        for episode, score in zip(material.episodes, material.scores, strict=True):
            earned = conditioned(episode.prompt, RIGHT if score.success else WRONG)
            trajectory = with_prompt(to_trajectory(episode), codec.prompt(earned, episode.tools))
            examples.append(Example((trajectory,), source="right" if score.success else "wrong"))
        return examples

    return condition_on_it


BUILT_IN: dict[str, Callable[[ChatCodec], DataStage]] = {
    "successes": lambda codec: successes,
    "s3ft": lambda codec: s3ft,
    "feedback": feedback,
}


def pairs(config: PairsConfig) -> DataStage:
    """Chosen and rejected episodes of one task, by the stage's rule."""

    def pair(material: Material, rng: random.Random) -> list[Example]:
        if config.rule == "demonstration":
            if material.demonstration is None:
                return []
            indices = rng.sample(range(len(material.episodes)), min(config.per_task, len(material.episodes)))
            found = [(material.demonstration, to_trajectory(material.episodes[i])) for i in indices]
        else:
            if config.rule == "right_wrong":
                ranked = right_against_wrong([s.success for s in material.scores], rng, per_task=config.per_task)
            else:
                rewards = [s.total for s in material.scores]
                ranked = by_margin(rewards, rng, margin=config.margin, per_task=config.per_task)
            found = [(to_trajectory(material.episodes[c]), to_trajectory(material.episodes[r])) for c, r in ranked]
        differ = [both for both in found if not np.array_equal(both[0].tokens, both[1].tokens)]
        return [Example(both, (1.0, -1.0), "pair") for both in differ]

    return pair


def data_stage(stage: ExampleStage, codec: ChatCodec) -> DataStage:
    """The stage's own, by name or dotted path. Raises ValueError for a name that is neither."""
    if isinstance(stage, PairStage) and stage.data_stage is None:
        return pairs(stage.pairs)
    name = stage.data_stage or ""
    return BUILT_IN[name](codec) if name in BUILT_IN else load_object(name)


def build(
    stage: ExampleStage,
    materials: Sequence[Material],
    codec: ChatCodec,
    seed: int,
    round_number: int,
    max_length: int,
) -> list[Example]:
    """The examples of one round, task after task.

    Left out are those without a token to train on, and those that a longer prompt made longer than `max_length`.
    """
    make = data_stage(stage, codec)
    examples: list[Example] = []
    for material in materials:
        rng = random.Random(derive_seed("data_stage", seed, round_number, material.task.id))
        examples += make(material, rng)
    fit = [e for e in examples if all(t.loss_mask[1:].any() and len(t) <= max_length for t in e.trajectories)]
    return completed(fit, stage, max_length)


def completed(examples: Sequence[Example], stage: ExampleStage, max_length: int) -> list[Example]:
    """The examples with what the stage's loss wants beside them: KTO mismatched answers."""
    wanted = isinstance(stage, PreferenceStage) and stage.loss == "kto"
    return with_mismatched(examples, max_length) if wanted else list(examples)


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Each pair with its prompt answered by the next other prompt's episode, chosen and rejected ones in turn: what KTO
    estimates its KL on. A pair without another prompt, or whose strange answer would be too long, is left as it is."""
    prompts = [[t.tokens[t.turn < 0] for t in e.trajectories] for e in examples]  # KTO's two may differ in theirs
    out = list(examples)
    for i, example in enumerate(examples):
        own, later = prompts[i][0], [(i + k) % len(examples) for k in range(1, len(examples))]
        other = next((j for j in later if not np.array_equal(own, prompts[j][i % 2])), None)
        if other is not None:
            strange = with_prompt(examples[other].trajectories[i % 2], own)
            if len(strange) > max_length:
                continue
            out[i] = replace(example, trajectories=(*example.trajectories, strange), labels=(*example.labels, 0.0))
    return out


def with_prompt(trajectory: Trajectory, prompt_ids: Sequence[int] | np.ndarray) -> Trajectory:
    """The same turns, token by token, behind another prompt. What was sampled keeps its recorded log-probs."""
    after = trajectory.turn >= 0
    prompt = np.asarray(prompt_ids, np.int32)

    def put(values: np.ndarray, before: object) -> np.ndarray:
        return np.concatenate([np.full(len(prompt), before, values.dtype), values[after]])

    return Trajectory(
        np.concatenate([prompt, trajectory.tokens[after]]),
        put(trajectory.loss_mask, False),
        put(trajectory.turn, -1),
        put(trajectory.logprobs, 0.0),
        put(trajectory.versions, -1),
    )
