"""What a client wants of a session's next turns, and whether it can have that."""

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve.errors import ApiError, not_taken
from serve.journal import Event, History, Played

if TYPE_CHECKING:
    from serve.service import Service

_LONG = 2000
"""Characters of a content that is encoded on the event loop."""


@dataclass(frozen=True)
class Ask:
    """What the person says; or that the agent is to go on; or which turn is to be sampled once more."""

    content: str | None = None
    retry: bool = False
    turn: int | None = None
    stream: bool = True
    tokens: int | None = None
    """Of the content, where it is so long that it was counted beside the event loop."""


async def counted(service: "Service", created: Event, history: History, ask: Ask) -> Ask:
    """With the tokens of a long content, which take their time."""
    if ask.content is None or len(ask.content) < _LONG:
        return ask
    return replace(ask, tokens=await asyncio.to_thread(_tokens, service, created, history, ask.content))


def check(service: "Service", created: Event, ask: Ask, history: History) -> None:
    """Raises ApiError when the session as it stands cannot be asked for that. It stays as it is."""
    person = created["env"] is None
    if history.over is not None and not ask.retry:
        how = history.over.get("stop_reason") or history.over.get("message")
        raise ApiError(409, "session_over", f"this session is over ({how}): retry a turn, or make another session")
    if ask.retry and history.over is not None and history.over.get("code") == "session_expired":
        raise ApiError(409, "session_over", "this session has expired: make another one")
    if ask.content is not None and not person:
        raise ApiError(400, "content_unexpected", "this session plays a task: send no content", param="content")
    if ask.content is not None and ask.retry:
        raise ApiError(400, "content_unexpected", "a turn is retried with the same words", param="content")
    if ask.content is None and not ask.retry and person and history.asks_person:
        raise ApiError(400, "content_missing", "it is the person's turn: say something", param="content")
    if ask.content is not None:
        _check_room(service, created, ask, history)


def _check_room(service: "Service", created: Event, ask: Ask, history: History) -> None:
    """Raises ApiError when the words leave no room for an answer."""
    most, have = service.max_length, history.turns[-1].turn["context"] if history.turns else 0
    assert ask.content is not None
    more = ask.tokens or _tokens(service, created, history, ask.content)
    if history.unanswered:
        have += _tokens(service, created, history, *history.unanswered, ask.content) - more
    if have + more >= most:
        raise ApiError(
            400,
            "context_length_exceeded",
            f"this message takes {more} tokens after the {have} of the session so far: {have + more + 1 - most} more "
            f"than the model's context of {most} leaves for it and an answer",
            param="content",
        )


def _tokens(service: "Service", created: Event, history: History, *contents: str) -> int:
    """What a person's words take, with all that goes before them where they are the first. Raises ApiError."""
    said = [{"role": "user", "content": content} for content in contents]
    try:
        if history.turns:
            return len(service.codec.observation(said))
        system = [{"role": "system", "content": created["system"]}] if created["system"] else []
        return len(service.codec.prompt([*system, *said], service.tools_shown(created["tools"])))
    except Exception as error:
        raise not_taken(error, "content") from error


def retried_from(ask: Ask, history: History) -> int:
    """From which turn on is sampled again: the one asked for, or the first after the person's last words."""
    turns = history.turns
    if not history.items:
        raise ApiError(409, "nothing_to_retry", "the agent has not had a turn yet", param="retry")
    if ask.turn is not None:
        if ask.turn >= len(turns):
            raise ApiError(400, "no_such_turn", f"there are turns 0 to {len(turns) - 1}", param="turn")
        return ask.turn
    if not isinstance(history.items[-1], Played):  # their answer was stopped: nothing is taken back
        return len(turns)
    words = [i for i, item in enumerate(history.items) if not isinstance(item, Played)]
    later = [item for item in history.items[words[-1] if words else 0 :] if isinstance(item, Played)]
    return later[0].turn["turn"]
