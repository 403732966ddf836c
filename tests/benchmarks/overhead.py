"""What everything but model and tools costs: three-turn episodes a second through rollout, reward, buffer and batch.

    python tests/benchmarks/overhead.py [EPISODES]

Rollout worker, reward and buffer are the real actors, in processes of their own; generator, environment and reward rule
cost nothing. The last line is JSON: episodes a second, and resident memory after a quarter of them and at the end.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from free_env import TURNS, ScriptedGenerator

from actors.buffer import Buffer
from actors.launch import connect
from actors.learner_batch import RlBatch
from actors.reward import Reward
from actors.role import bound_threads, remote_class
from actors.rollout import RolloutWorker
from rl.batch import collate
from rl.config_file import load_config
from rl.config_stage import RlStage
from rl.credit import GroupFacts
from rl.env import World
from rl.episode import GroupRequest
from rl.policy import Sampling
from rl.pretrained import prepare_model

HERE = Path(__file__).parent
TASKS, GROUP, AHEAD = 16, 8, 2
"""A step's tasks, the samples of each, and how many steps are played at once."""


def resident(actor: Any = None) -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def run(episodes: int, folder: Path) -> dict[str, Any]:
    quickstart = load_config(HERE.parent.parent / "configs" / "quickstart.yaml", [])
    model = str(prepare_model(quickstart.model, World(quickstart.env, 0), 0, folder / "model"))
    config = load_config(
        HERE.parent.parent / "configs" / "quickstart.yaml",
        [f"env={{name: custom, path: free_env.Free, max_turns: {TURNS}}}", "reward.function=free_env.reward",
         "stages=[{kind: rl, steps: 1, algo: {name: grpo, group_size: 8}}]"],
    )  # fmt: skip
    stage = config.stages[0]
    assert isinstance(stage, RlStage)
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    options: Any = {"num_cpus": 0, "runtime_env": {"env_vars": {**bound_threads(1), "PYTHONPATH": path}}}
    many = {**options, "max_concurrency": 4096}
    generator = remote_class(ScriptedGenerator).options(**many).remote()
    worker = remote_class(RolloutWorker).options(**many).remote(config, [generator])
    reward = remote_class(Reward).options(**options).remote(config)
    buffer = remote_class(Buffer).options(**many).remote(config, [worker], [reward])
    await worker.open.remote(model)
    actors = {"rollout": worker, "reward": reward, "buffer": buffer}
    source = World(config.env, 0).source

    async def step(number: int) -> int:
        """Played, scored, credited, and packed as a learner's rank does. Returns how many episodes."""
        tasks = [source.task("train", number * TASKS + i) for i in range(TASKS)]
        requests = [GroupRequest(0, number, task, GROUP) for task in tasks]
        groups = (await buffer.play.remote(requests, Sampling(max_tokens=16))).groups
        facts = [
            GroupFacts(
                [s.turn_rewards for s in g.summaries], [s.outcome for s in g.scores], [s.success for s in g.scores],
                [True] * GROUP,
            )
            for g in groups
        ]  # fmt: skip
        columns, means = buffer.credit.options(num_returns=2).remote(groups, facts, stage.algo, 512, 0.0, [])
        await means
        batch = RlBatch(
            [g.trajectories for g in groups],
            [[s.tokens for s in g.summaries] for g in groups],
            [[s.turn_tokens for s in g.summaries] for g in groups],
            columns,
            [(g, s) for g in range(len(groups)) for s in range(GROUP)],
            stage.algo, 512, 1.0, 0.0,
        )  # fmt: skip
        samples = await asyncio.to_thread(batch.share, 0, 1)
        collate(samples)
        return len(samples)

    async def memory() -> dict[str, int]:
        found = {name: await actor.__ray_call__.remote(resident) for name, actor in actors.items()}
        return {**found, "controller": resident()}

    steps = -(-episodes // (TASKS * GROUP))
    await asyncio.gather(*(step(i) for i in range(4)))  # what is compiled and imported once
    numbers, done, early = iter(range(4, 4 + steps)), 0, {}
    started = time.perf_counter()

    async def player() -> None:
        nonlocal done, early
        for number in numbers:
            played = await step(number)
            done += played
            if not early and done >= episodes / 4:
                early = await memory()

    await asyncio.gather(*(player() for _ in range(AHEAD)))
    seconds = time.perf_counter() - started
    return {"episodes": done, "seconds": seconds, "early": early, "late": await memory()}


if __name__ == "__main__":
    connect()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(run(int((sys.argv[1:] or ["20000"])[0]), Path(folder)))))
    ray.shutdown()
