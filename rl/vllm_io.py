"""What goes into vLLM and what comes out of it: sampling parameters, and the tokens of a step or of a whole request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from rl.policy import Sampling


@dataclass(frozen=True)
class Chunk:
    """What one step sampled for a request: token ids, their log-probs, and the version that sampled them.

    top: for each token the most likely ones and their log-probs, as many as `Sampling.top_logprobs` asks for.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    version: int
    top: Sequence[Mapping[int, float]] = ()


Sink = Callable[[Chunk], None]
"""Takes a request's chunks as they are sampled, in the engine's thread: it must return at once."""


def sampling_params(sampling: Sampling, streamed: bool) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop),
        logprobs=sampling.top_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
    )


def probe_params() -> SamplingParams:
    """Of a request that only asks for the log-probs of its prompt."""
    return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def chunk_of(sampled: Any, version: int) -> Chunk:
    """Of flat log-probs: at each position the sampled token's first, then the most likely ones."""
    flat, ids = sampled.logprobs, list(sampled.token_ids)
    logprobs, top = [], []
    for at in range(len(ids)):
        start, end = flat.start_indices[at], flat.end_indices[at]
        logprobs.append(flat.logprobs[start])
        top.append(dict(zip(flat.token_ids[start + 1 : end], flat.logprobs[start + 1 : end], strict=True)))
    return Chunk(ids, logprobs, version, top)


def stamp(count: int, marks: Sequence[tuple[int, int]]) -> list[int]:
    """The version of each of `count` tokens, from (first token, version) marks in order."""
    versions = [marks[0][1]] * count
    for start, version in marks[1:]:
        versions[start:] = [version] * (count - start)
    return versions


def prompt_logprobs(output: Any) -> np.ndarray:
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return np.asarray([at[token].logprob for token, at in pairs], np.float32)
