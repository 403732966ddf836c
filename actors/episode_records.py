"""What an evaluation against an endpoint has played and graded: a line as soon as it is there, so a kill loses none.

Two lines an episode, {key, episode, usage} and {key, score}: one that was paid for and could not be graded is graded
again, and not played, when the evaluation goes on.
"""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rl.episode import Episode, Identity, StopReason, Turn
from rl.metrics import read_lines
from rl.reward import Score
from rl.task import Task
from rl.text_codec import UNKNOWN, Usage, counted

Key = tuple[str, int, int]
"""sampled or greedy, the task's place in the evaluation, the number of its episode."""


class EpisodeRecords:
    """Use it as a context to write. elapsed_s: of the evaluation when the last line was written."""

    def __init__(self, path: Path, tasks: Sequence[Task], wanted: Collection[Key]):
        """Reads what is there. Raises ValueError when it is of other tasks."""
        self._path, self._tasks = path, tasks
        self.episodes: dict[Key, Episode] = {}
        self.scores: dict[Key, Score] = {}
        self.elapsed_s = 0.0
        self.usage_known = True
        """Whether the endpoint has said of every call how many tokens it took."""
        self._file: IO[str] | None = None
        self._lines = read_lines(path)
        for line in self._lines:
            mode, index, sample = line["key"]
            key: Key = mode, index, sample
            if key not in wanted or line["task"] != tasks[index].id:
                raise ValueError(f"{path} is of another evaluation: {line['task']} is not task {index} of this one")
            if "episode" in line:
                usage = [Usage(*tokens) for tokens in line["usage"]]
                self._keep(key, _episode(line["episode"], tasks[index], sample, usage), usage)
            else:
                self.scores[key] = Score(**line["score"])
                self.elapsed_s = max(self.elapsed_s, line["elapsed_s"])

    def __enter__(self) -> "EpisodeRecords":
        # A kill may have left a part of a line.
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        partial.rename(self._path)
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._file is not None
        self._file.close()

    def played(self, key: Key, episode: Episode, usage: Sequence[Usage]) -> None:
        """An episode as run_episode has returned it, and the usage of each of its calls."""
        tokens = [[u.prompt, u.completion] for u in usage]
        self._write(key, {"episode": _plain(episode), "usage": tokens})
        self._keep(key, counted(episode, usage), usage)

    def graded(self, key: Key, score: Score, elapsed_s: float) -> None:
        self._write(key, {"score": asdict(score), "elapsed_s": elapsed_s})
        self.scores[key] = score

    def _keep(self, key: Key, episode: Episode, usage: Sequence[Usage]) -> None:
        self.episodes[key] = episode
        self.usage_known &= all(u.completion is not None for u in usage)

    def _write(self, key: Key, value: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"key": key, "task": self._tasks[key[1]].id, **value}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _plain(episode: Episode) -> dict[str, Any]:
    """An episode as JSON, without its ids."""
    turns = [
        {"text": t.text, "reward": t.reward, "flags": [*t.flags], "observation": [*t.observation], "seed": t.seed}
        for t in episode.turns
    ]
    return {
        "prompt": list(episode.prompt),
        "tools": list(episode.tools),
        "turns": turns,
        "stop_reason": str(episode.stop_reason),
        "duration_s": episode.duration_s,
        "attempt": episode.identity.attempt,
    }


def _episode(plain: dict[str, Any], task: Task, sample: int, usage: Sequence[Usage]) -> Episode:
    turns = [
        Turn((), (), (), False, t["text"], t["reward"], tuple(t["flags"]), t["observation"], (), t["seed"])
        for t in plain["turns"]
    ]
    identity = Identity(0, 0, task.id, sample, plain["attempt"])
    reason = StopReason(plain["stop_reason"])
    episode = Episode(identity, task, plain["prompt"], (), UNKNOWN, turns, reason, plain["duration_s"], plain["tools"])
    return counted(episode, usage)
