"""vLLM in this process, stepped by our own thread: token ids in, version-stamped token ids out.

The thread alternates between taking commands and stepping the engine, so a weight swap falls between two steps:
no request is aborted, and the tokens before and after it carry their own versions.

    generate           ──► queue ──► [ commands | swap when due | vLLM step ] ──► Completion
    load, load_adapter ──► queue ──►
"""

import asyncio
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

# Read when vLLM is imported: engine core and worker stay in this process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLMEngine
from vllm.lora.request import LoRARequest

import rl.transfer  # noqa: F401  registers how tensors of this process come in
from rl.engine_options import EngineOptions, engine_args
from rl.env import InfraError
from rl.policy import Completion, Sampling
from rl.vllm_io import Sink, chunk_of, probe_params, prompt_logprobs, sampling_params, stamp

SwapPolicy = Literal["drain", "continue"]


class EngineError(InfraError):
    """The engine thread has died; the text is its cause."""


ADAPTER = LoRARequest("adapter", 1, "adapter")
"""What every request of an engine with LoRA carries. The worker always holds an adapter under this id, so its path is
never read: the one loaded last, or zeros, which are the base alone. A request under `continue` thus changes over from
base to adapter and back without being told."""


def hold_zeros(worker: Any) -> None:
    """In the worker, which holds no adapter: the one that vLLM warms up with."""
    worker.model_runner.lora_manager.add_dummy_lora(ADAPTER, rank=1)


@dataclass
class _Running:
    future: Future[Any]
    internal_id: str
    marks: list[tuple[int, int]]
    """(tokens sampled so far, version from there on), one entry a swap."""
    sink: Sink | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """What a request with a sink has been given so far."""


@dataclass
class _Swap:
    version: int
    updates: Sequence[dict[str, Any]]
    policy: SwapPolicy
    adapter: Path | None = None
    future: Future[None] = field(default_factory=Future)


class Engine:
    """Samples completions; swaps its weights between two steps. Methods may be called from any thread or event loop.

    After an error inside vLLM the engine is dead: every call raises EngineError with the cause.
    """

    def __init__(self, model_path: str, options: EngineOptions, version: int = 0):
        self.version = version
        self.prefix_hits = self.prefix_queries = 0  # prompt tokens found in the prefix cache, and in all
        self._busy: tuple[float, float | None] = 0.0, None
        """Seconds in steps and swaps that are done, and when the one now began: one value, read by other threads."""
        self._options = options
        self._lora = ADAPTER if options.lora_rank else None
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._held: list[tuple[str, Any]] = []
        self._swaps: deque[_Swap] = deque()
        self._next_id = 0
        self._torn: float | None = None
        """Since when the weights are no version's: a load has failed. Nothing is sampled until another succeeds."""
        self._error: BaseException | None = None
        self.died: Future[None] = Future()
        """Ends with EngineError when the engine does."""
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(model_path, started), name="engine", daemon=True)
        self._thread.start()
        started.result()

    # -- called from outside -------------------------------------------------------------------------------------

    async def generate(self, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Sample one turn after `token_ids`."""
        return await asyncio.wrap_future(self.submit(token_ids, sampling))

    def submit(self, token_ids: Sequence[int], sampling: Sampling, sink: Sink | None = None) -> "Future[Completion]":
        """Sample one turn. Cancelling what is returned ends the request, and frees its place in the batch.

        sink: is given every chunk of it, before the whole.
        """
        assert sink is not None or not sampling.top_logprobs, "a Completion has no room for more than one a token"
        future: Future[Completion] = Future()
        self._send("add", (list(token_ids), sampling_params(sampling, streamed=sink is not None), sink, future))
        return future

    def score(self, token_ids: Sequence[int]) -> "Future[np.ndarray]":
        """log p(token t | tokens < t) under the current weights, t = 1..T-1, at temperature 1: the weight probe."""
        future: Future[np.ndarray] = Future()
        self._send("add", (list(token_ids), probe_params(), None, future))
        return future

    def load(self, version: int, updates: Sequence[dict[str, Any]], policy: SwapPolicy) -> "Future[None]":
        """Swap the weights for `version`.

        updates: one update_info a bucket, for the transfer engine named in the options. `drain` finishes the running
        requests on the old weights and holds new ones back; `continue` swaps at once, and running requests go on
        with their cache computed again. Raises what loading them does: nothing is sampled then, and no request is
        lost, until another load succeeds.
        """
        swap = _Swap(version, updates, policy)
        self._send("swap", swap)
        return swap.future

    def load_adapter(self, version: int, folder: str | Path, policy: SwapPolicy) -> "Future[None]":
        """Put the LoRA adapter in `folder` on the weights of the last `load`, in place of the adapter before.

        The next `load` takes it off again. vLLM passes over weights of layers that are no `lora_targets`: score.
        """
        if self._lora is None:
            raise ValueError("this engine has no room for an adapter: make it with EngineOptions.lora_rank")
        swap = _Swap(version, (), policy, Path(folder))
        self._send("swap", swap)
        return swap.future

    def sleep(self) -> "Future[None]":
        """Give the GPU memory back (weights to host, KV cache dropped), for time-sharing with the learner."""
        return self._call(lambda: self._llm.sleep(level=1))

    def wake_up(self) -> "Future[None]":
        return self._call(lambda: self._llm.wake_up())

    def _call(self, function: Any) -> "Future[None]":
        future: Future[None] = Future()
        self._send("call", (function, future))
        return future

    @property
    def stuck_s(self) -> float:
        """Seconds since the step, or the swap, that is being made began; or since the load that failed."""
        began = self._torn or self._busy[1]
        return 0.0 if began is None else time.perf_counter() - began

    @property
    def torn(self) -> bool:
        return self._torn is not None

    @property
    def busy_s(self) -> float:
        """Seconds in steps and swaps, so far."""
        done, began = self._busy
        return done if began is None else done + time.perf_counter() - began

    @property
    def load_in_flight(self) -> int:
        return len(self._running) + len(self._held)

    @property
    def waiting(self) -> int:
        """Of those, what is not sampled yet: held back for a swap, or beyond max_sequences."""
        return len(self._held) + max(0, len(self._running) - self._options.max_sequences)

    def close(self) -> None:
        self._commands.put(("close", None))
        self._thread.join(timeout=30)

    def _send(self, kind: str, body: Any) -> None:
        if self._error is not None:
            raise EngineError(f"the engine has died: {self._error!r}") from self._error
        self._commands.put((kind, body))

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self, model_path: str, started: Future[None]) -> None:
        try:
            # Made in the thread that steps it. Each thread that computes gets OpenMP workers of its own; with more of
            # them than cores, libgomp puts them to sleep between any two operations: a third of a step on CPU.
            self._llm = LLMEngine.from_engine_args(engine_args(model_path, self._options))
            assert not self._llm.vllm_config.scheduler_config.async_scheduling
            self._take_adapter_off()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while self._take_commands():
                began = time.perf_counter()
                self._busy = self._busy[0], began
                while self._swaps and self._due(self._swaps[0]):
                    self._apply_swap(self._swaps[0])
                if self._steps:
                    for output in self._llm.step():
                        self._finish(output)
                self._busy = self._busy[0] + time.perf_counter() - began, None
        except BaseException as error:  # the thread's end must reach everyone who waits on it
            self._fail(error)

    def _due(self, swap: _Swap) -> bool:
        return swap.policy == "continue" or not self._running or self.torn

    @property
    def _steps(self) -> bool:
        return not self.torn and self._llm.has_unfinished_requests()

    def _take_commands(self) -> bool:
        """Take what is queued; with nothing to do, wait for it. False ends the thread."""
        idle = not self._steps and not self._swaps
        timeout: float | None = None
        while True:
            try:
                kind, body = self._commands.get(block=idle, timeout=timeout)
            except queue.Empty:
                return True
            # No more than a full batch can share the step: requests that never pause do not put it off for ever.
            waits = kind == "add" and self._options.linger_s > 0 and len(self._running) < self._options.max_sequences
            idle, timeout = idle and waits, self._options.linger_s
            if kind == "close":
                return False
            if kind == "swap":
                self._swaps.append(body)
            elif kind == "call":
                function, future = body
                function()
                future.set_result(None)
            elif kind == "abort":
                self._abort(body)
            elif any(swap.policy == "drain" for swap in self._swaps):
                self._held.append((kind, body))
            else:
                self._add(*body)

    def _add(self, token_ids: list[int], params: Any, sink: Sink | None, future: Future[Any]) -> None:
        if future.cancelled():
            return
        if len(token_ids) + (params.max_tokens or 0) > self._options.max_length:
            # vLLM's scheduler would never start it; the caller's mistake is not the engine's end.
            what = f"{len(token_ids)} tokens and {params.max_tokens} to sample"
            future.set_exception(ValueError(f"{what} are more than max_length = {self._options.max_length}"))
            return
        request_id = str(self._next_id)
        self._next_id += 1
        internal = self._llm.add_request(request_id, {"prompt_token_ids": token_ids}, params, lora_request=self._lora)
        self._running[request_id] = _Running(future, internal, [(0, self.version)], sink)
        future.add_done_callback(lambda ended: self._commands.put(("abort", request_id)) if ended.cancelled() else None)

    def _abort(self, request_id: str) -> None:
        """Nobody waits for it any longer."""
        if self._running.pop(request_id, None) is not None:
            self._llm.abort_request([request_id])

    def _apply_swap(self, swap: _Swap) -> None:
        if not swap.future.set_running_or_notify_cancel():
            self._end_swap()
            return
        try:
            self._take_weights(swap)
        except Exception as error:  # most likely who had them is gone: the next load may be of another's
            self._torn = time.perf_counter()
            self._swaps.popleft()
            swap.future.set_exception(error)
            return
        self._torn = None
        states = self._llm.output_processor.request_states
        # Cached keys and values were computed by the old weights; running requests compute theirs again.
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not drop its prefix cache with the weights")
        self.version = swap.version
        for running in self._running.values():
            detokenizer = states[running.internal_id].detokenizer
            assert detokenizer is not None
            running.marks.append((detokenizer.num_output_tokens(), swap.version))
        self._end_swap()
        swap.future.set_result(None)

    def _end_swap(self) -> None:
        """What waited for it may begin."""
        self._swaps.popleft()
        if not any(later.policy == "drain" for later in self._swaps):
            held, self._held = self._held, []
            for _, body in held:
                self._add(*body)

    def _take_weights(self, swap: _Swap) -> None:
        if swap.adapter is not None:
            # Only here: of a request that asked for load_inplace vLLM would read the folder again at every step.
            path = str(swap.adapter.resolve())
            self._llm.add_lora(LoRARequest(ADAPTER.lora_name, ADAPTER.lora_int_id, path, load_inplace=True))
        else:
            self._load_weights(swap.updates)

    def _load_weights(self, updates: Sequence[dict[str, Any]]) -> None:
        self._llm.collective_rpc("start_weight_update")
        for update in updates:
            self._llm.collective_rpc("update_weights", args=(update,))  # an error ends the update that was started
        self._llm.collective_rpc("finish_weight_update")
        self._take_adapter_off()

    def _take_adapter_off(self) -> None:
        """vLLM has dropped its adapters: with new weights, and after its warm-up."""
        if self._lora is not None:
            self._llm.collective_rpc(hold_zeros)

    def _finish(self, output: Any) -> None:
        running = self._running.get(output.request_id)
        if running is None:
            return
        if output.finished:
            del self._running[output.request_id]
        if running.future.cancelled():  # its abort is on the way
            return
        if running.sink is not None:
            self._pass_on(running, output.outputs[0])
        if not output.finished or not running.future.set_running_or_notify_cancel():
            return
        if output.prompt_logprobs is not None:
            running.future.set_result(prompt_logprobs(output))
            return
        sampled = output.outputs[0]
        ids = running.token_ids or list(sampled.token_ids)
        self.prefix_hits += output.num_cached_tokens or 0
        self.prefix_queries += len(output.prompt_token_ids)
        running.future.set_result(
            Completion(
                ids,
                running.logprobs or list(sampled.logprobs.logprobs),
                stamp(len(ids), running.marks),
                "stop" if sampled.finish_reason == "stop" else "length",
            )
        )

    def _pass_on(self, running: _Running, sampled: Any) -> None:
        if not sampled.token_ids:
            return
        chunk = chunk_of(sampled, self.version)
        running.token_ids += chunk.token_ids
        running.logprobs += chunk.logprobs
        assert running.sink is not None
        running.sink(chunk)

    def _fail(self, error: BaseException) -> None:
        self._error = error
        dead = EngineError(f"the engine has died: {error!r}")
        dead.__cause__ = error
        waiting = [self.died] + [r.future for r in self._running.values()] + [body[-1] for _, body in self._held]
        waiting += [swap.future for swap in self._swaps]
        while not self._commands.empty():
            kind, body = self._commands.get()
            waiting.append(body.future if kind == "swap" else body[-1] if body else Future())
        for future in waiting:
            if not future.done():
                future.set_exception(dead)
