"""What people think of an agent's turns, as data that a preference stage trains on (configs/from_feedback.yaml).

    journal + rating, correction ──► <dir>/feedback/ratings/<session>.parquet   `messages` and `label`: loss kto
                                            └──► <dir>/feedback/<session>.parquet   `chosen` and `rejected`: the others

Every answer that was rated up, or written as a correction, is set against every one rated down to the same
conversation: a turn that was retried; and a correction against what it corrects. A session's files are its own:
replicas write beside each other, and deleting them leaves nothing of it.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from rl.env import Message
from serve.errors import ApiError
from serve.journal import Event, Played, fold

RATINGS = pa.schema(
    [
        ("messages", pa.string()),
        ("label", pa.int8()),
        ("tools", pa.string()),
        ("session", pa.string()),
        ("turn", pa.int32()),
        ("seq", pa.int64()),
        ("said", pa.string()),
    ]
)
"""A row a rating, and one a correction: then `messages` ends with that, and `said` is the message in its place. `seq`
is the turn's event in the journal, and tells the attempts at a turn apart."""

PAIRS = pa.schema([(name, pa.string()) for name in ("chosen", "rejected", "tools", "session")])


class Feedback:
    """The ratings and corrections of all sessions of a server. Any number of processes may use one folder."""

    def __init__(self, dir: Path):
        self._pairs = dir / "feedback"
        self._ratings = self._pairs / "ratings"

    def record(
        self,
        session_id: str,
        events: Sequence[Event],
        turn: int,
        rating: Literal["up", "down"] | None,
        correction: str | None,
    ) -> dict[str, Any]:
        """Keep what is thought of a turn, in place of what was; two times None takes it back.

        Returns what is known of the turn now. Raises ApiError where the session has no such turn.
        """
        conversation, tools, seq = conversation_to(events, turn)
        said = conversation[-1]
        shared = {"tools": _json(tools), "session": session_id, "turn": turn, "seq": seq}
        new = []
        if rating is not None:
            new.append({**shared, "messages": _json(conversation), "label": 1 if rating == "up" else -1, "said": None})
        if correction is not None:
            corrected = [*conversation[:-1], {"role": "assistant", "content": correction}]
            new.append({**shared, "messages": _json(corrected), "label": 1, "said": _json(said)})
        with self._alone():
            kept = [row for row in self._known(session_id) if row["seq"] != seq]
            _write(self._ratings / f"{session_id}.parquet", [*kept, *new], RATINGS)
            _write(self._pairs / f"{session_id}.parquet", pairs_of([*kept, *new]), PAIRS)
        return {"turn": turn, "rating": rating, "correction": correction}

    def delete(self, session_id: str) -> None:
        """Nothing of a session is left."""
        with self._alone():
            for folder in (self._ratings, self._pairs):
                (folder / f"{session_id}.parquet").unlink(missing_ok=True)

    def sessions(self) -> set[str]:
        """Whose data is here."""
        return {path.stem for path in (*self._pairs.glob("*.parquet"), *self._ratings.glob("*.parquet"))}

    def rows(self) -> list[dict[str, Any]]:
        """All pairs there are."""
        return [row for file in sorted(self._pairs.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]

    def _known(self, session_id: str) -> list[dict[str, Any]]:
        file = self._ratings / f"{session_id}.parquet"
        return pq.read_table(file).to_pylist() if file.is_file() else []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """What is read is what is replaced, whoever else writes."""
        self._ratings.mkdir(parents=True, exist_ok=True)
        with FileLock(self._pairs / ".lock"):
            yield


def conversation_to(events: Sequence[Event], turn: int) -> tuple[list[Message], list[dict[str, Any]], int]:
    """The conversation up to a turn, which comes last, the tools shown, and the seq of the turn's event.

    The agent's messages hold the token ids that were sampled: a text may be encoded otherwise. Raises ApiError where
    the turn is not there.
    """
    prompt = next((event for event in events if event["type"] == "prompt"), None)
    messages: list[Message] = list(prompt["messages"]) if prompt else []
    for item in fold(events).items:
        if not isinstance(item, Played):
            messages.append({"role": "user", "content": item["content"]})
            continue
        said = item.turn
        messages.append({"role": "assistant", "content": said["text"], "token_ids": said["token_ids"]})
        if said["turn"] == turn:
            assert prompt is not None
            return messages, prompt["tools"], said["seq"]
        messages += item.observation["messages"] if item.observation else []
    raise ApiError(400, "no_such_turn", "the agent has not had this turn", param="turn")


def pairs_of(ratings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chosen and rejected conversations, each pair once, of one session's rows."""
    bad: dict[str, list[Message]] = {}
    for row in ratings:
        if row["label"] < 0:
            *before, last = json.loads(row["messages"])
            bad.setdefault(_json(before), []).append(last)
    pairs = {}
    for row in ratings:
        if row["label"] < 0:
            continue
        *before, good = json.loads(row["messages"])
        for rival in bad.get(_json(before), []) + ([json.loads(row["said"])] if row["said"] else []):
            if rival["content"] != good["content"]:
                both = row["messages"], _json([*before, rival])
                pairs[both] = {"chosen": both[0], "rejected": both[1], "tools": row["tools"], "session": row["session"]}
    return list(pairs.values())


def _json(value: Any) -> str:
    """The order of keys stays, as a template may show it; and half a character, which no file takes, as its escape."""
    return json.dumps(value)


def _write(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Whole or not at all; a file without rows is none."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), partial)
    partial.rename(path)
