"""A stage on examples: sft, preference or reward_model. Each round makes its examples and takes its steps on them.

demonstrations, rows, or   play ──► select, relabel or pair  ──► examples ──► steps ──► publish ──┐
                             ▲                                                                    │
                             └──────────────────────── next round ◄───────────────────────────────┘
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actors.buffer import Group
from actors.learner_batch import Drawn
from rl.config_stage import PairStage, PreferenceStage, RewardModelStage, SftStage
from rl.demonstration import draw_batch
from rl.episode import GroupRequest
from rl.objective import to_metrics
from rl.task import TaskStream

if TYPE_CHECKING:
    from actors.controller import Controller

PARAPHRASE = "An answer known to be right:\n{shown}\nSay it in your own words."
"""S3FT's second attempt, added to the prompt."""

STAGE_START = "stage_start"
"""Who keeps the version that a stage goes on sampling from."""


class ExampleLoop:
    """One stage on examples under a controller."""

    def __init__(self, run: "Controller", index: int, stage: SftStage | PreferenceStage | RewardModelStage):
        self.run, self.index, self.stage = run, index, stage
        self.tasks = TaskStream(run.world.source, "train", run.state.cursor)
        self.started_with = run.state.version
        self.counts = [0, 0]
        """Examples of this round and of the round before."""
        self.sources: dict[str, float] = {}

    async def train(self) -> None:
        run, stage = self.run, self.stage
        await run.begin(self.index, stage)
        frozen = stage.sample is not None and stage.sample.policy == "stage_start" and stage.rounds > 1
        if frozen:
            self.started_with = run.state.version
            await run.company.store.pin.remote(self.started_with, STAGE_START)
        # Saved between rounds; inside one where it was stopped, or where a finished stage was given more steps.
        first, inside = divmod(run.state.stage_step, stage.steps)
        for number in range(first, stage.rounds):
            if number and not inside:
                await run.company.learner.tell("begin_round", number)
            await self.round(number, inside)
            inside = 0
            if number + 1 < stage.rounds:
                await run.publish()
                # Neither the weights that it samples from nor the round before could be had again.
                if not frozen and not stage.mix_previous:
                    await run.checkpoint()
                run.go_on()
        if frozen:
            await run.company.store.unpin.remote(STAGE_START)
        if isinstance(stage, RewardModelStage):
            await self.install_reward_model()
        await run.publish()
        await run.checkpoint()

    async def round(self, number: int, start: int) -> None:
        run, stage = self.run, self.stage
        run.timing.clear()
        refs = await self.examples(number)
        held = min(await run.company.learner.tell("hold", refs, bool(stage.mix_previous)))
        self.counts = [held, self.counts[0]]
        mixed = round(stage.batch_size * stage.mix_previous) if self.counts[1] else 0
        what = "pairs" if isinstance(stage, PairStage) else "demonstrations"
        if held < stage.batch_size - mixed:
            raise ValueError(
                f"{held} {what} are fewer than stages[{self.index}].batch_size = {stage.batch_size}. Lower batch_size"
                + (", or sample more (sample.tasks, sample.samples)" if stage.sample else "")
            )
        await self.add_references(refs)
        await run.company.time_share("learn")
        for step in range(start, stage.steps):
            if step > start:
                run.timing.clear()  # the first one's also tells what making the examples took
            with run.timed("step"), run.timed("update"), run.working("learner"):
                seed = run.config.run.seed + number
                drawn = Drawn(
                    draw_batch(step, stage.batch_size - mixed, held, seed),
                    draw_batch(step, mixed, self.counts[1], seed) if mixed else (),
                )
                whole = number * stage.steps + step
                lr = run.lr(stage, step)
                sums, run.slowest = await run.company.step("example_step", (self.index, whole, 0), drawn, step, lr)
            metrics = {
                **to_metrics(sums),
                "perf/tokens_per_second": sums.get("tokens", 0.0) / run.timing["step"],
                "actor/lr": lr,
                **(self.sources if step == start else {}),
            }
            if stage.rounds > 1:
                metrics["round"] = float(number)
            run.advance(stage.kind, metrics)
            if run.stopping and step + 1 < stage.steps:
                if self.made_again_alike:
                    await run.checkpoint()
                run.go_on()

    @property
    def made_again_alike(self) -> bool:
        """Whether a resumed run makes the round's examples, and what they are held against, as they were."""
        of_now = isinstance(self.stage, PreferenceStage) and self.stage.reference == "last_iterate"
        return self.stage.sample is None and not of_now

    # -- where examples come from --------------------------------------------------------------------------------

    async def examples(self, number: int) -> list[Any]:
        """Refs of lists of examples."""
        run, stage = self.run, self.stage
        if stage.sample is not None:
            return await self.sampled(number)
        if isinstance(stage, PairStage):
            assert stage.pairs.path is not None
            return await run.company.buffer.encoded_rows.remote(stage.pairs.path, stage)
        assert isinstance(stage, SftStage)
        demo = stage.demonstrations
        if demo.path:
            return await run.company.buffer.encoded_rows.remote(demo.path, stage)
        size = run.world.source.size("train")
        tasks = TaskStream(run.world.source, "train").next(demo.count if size is None else min(demo.count, size))
        with run.working("rollout"):
            return await run.company.buffer.demonstrations.remote(tasks, demo.guess_fraction)

    async def sampled(self, number: int) -> list[Any]:
        """Play the round's tasks, again with their demonstration in the prompt where S3FT wants that, and build."""
        run, stage = self.run, self.stage
        s = stage.sample
        assert s is not None
        old = s.policy == "stage_start" and number > 0
        if old:
            await run.company.load(self.started_with)
        tasks = self.tasks.next(s.tasks)
        run.state = replace(run.state, cursor=self.tasks.cursor)
        requests = [GroupRequest(self.index, number, task, s.samples) for task in tasks]
        groups = (await run.play(requests, s.temperature)).groups
        again = await self.paraphrased(groups, s.temperature) if stage.data_stage == "s3ft" else {}
        if old:
            await run.company.load(run.state.version)
        path = run.folder / "trajectories" / f"{stage.kind}-{self.index:02d}-{number:05d}.parquet"
        await run.company.buffer.write.remote(str(path), groups, [[0.0] * len(g.scores) for g in groups])
        refs, sources = await run.company.buffer.build.remote(stage, number, groups, again)
        made = max(1, sum(sources.values()))
        scores = [x for g in groups for x in g.scores]
        self.sources = {
            **{f"data/{name}": count / made for name, count in sources.items()},
            "data/examples": float(made),
            "data/success": sum(x.success for x in scores) / len(scores),
        }
        return refs

    async def paraphrased(self, groups: list[Group], temperature: float) -> dict[int, Group]:
        """For each group without a success, one of as many samples that saw the demonstration; by index."""
        failed = [i for i, g in enumerate(groups) if not any(s.success for s in g.scores)]
        if not failed:
            return {}
        shown = await self.run.company.buffer.shown.remote([groups[i].request.task for i in failed])
        requests = [
            replace(groups[i].request, attempt=1, condition=PARAPHRASE.format(shown=text))
            for i, text in zip(failed, shown, strict=True)
        ]
        played = {g.request.task.id: g for g in (await self.run.play(requests, temperature)).groups}
        return {i: played[t] for i in failed if (t := groups[i].request.task.id) in played}

    # -- what they are held against ------------------------------------------------------------------------------

    async def add_references(self, refs: list[Any]) -> None:
        """The reference's log-probs of every example: by the reference actors, or by the learner before it moves."""
        run, stage = self.run, self.stage
        if not (isinstance(stage, PreferenceStage) and stage.needs_reference):
            return
        with run.timed("reference"):
            if run.config.stage_needs_reference(stage):
                with run.working("reference"):
                    parts = await run.company.reference_examples(run.reference_path(), refs)
            else:
                with run.working("learner"):
                    parts = await run.company.learner.refs("score_held", stage.reference == "stage_start")
            await run.company.learner.tell("hold_references", parts)

    async def install_reward_model(self) -> None:
        """Save the reward model, and have the reward actors use it if the configuration says so."""
        run = self.run
        folder = run.folder / "reward_model"
        await run.company.learner.ask("save_values", str(folder))
        if run.config.reward.model == "trained":
            await run.company.use_reward_model(str(folder))
