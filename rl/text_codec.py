"""Episodes of a model that takes and gives text: behind somebody else's endpoint, no token ids are to be had.

Its conversation is kept as Unicode code points. The ids of a text are its characters, `END` closes each piece, and the
pieces that the model did not say are JSON:

    opening                        turn              observation     turn ...
    {"messages":..,"tools":..}END  what it said END  [message,..]END ...

So `run_episode` cuts and continues such an episode like any other. How many tokens it took only the endpoint knows:
`counted` puts that in the place of the characters when the episode has ended.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rl.chat import parse_calls
from rl.env import Action, Message
from rl.episode import Episode

UNKNOWN = -1
"""Stands for a token whose id is not known."""
END = "\U0010ffff"
"""A noncharacter of Unicode: no text that is exchanged may hold it."""


class TextCodec:
    """Of characters, for `run_episode`."""

    end_of_turn = ord(END)
    end_text = END

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return _ids(json.dumps({"messages": list(messages), "tools": list(tools)}) + END)

    def observation(self, messages: Sequence[Message]) -> list[int]:
        return _ids(json.dumps(list(messages)) + END)

    def reply(self, text: str, *, ended: bool) -> list[int]:
        """What a model said, as ids. ended: it was not cut short."""
        # A reply is JSON, which can spell halves of characters; no file takes those.
        text = text.encode(errors="replace").decode().replace(END, "\ufffd")
        return _ids(text + END * ended)

    def action(self, token_ids: Sequence[int], truncated: bool = False) -> Action:
        text = self.text(token_ids)
        calls, error = parse_calls(text)
        return Action(text, (), calls, error, truncated)

    def text(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        text = "".join(map(chr, token_ids))
        return text if special else text.replace(END, "")

    def first(self, token_ids: Sequence[int], characters: int) -> int:
        return min(characters, len(token_ids))

    def conversation(self, token_ids: Sequence[int]) -> tuple[list[Message], list[dict[str, Any]]]:
        """The messages so far, the model's own as text, and the tools that it may call."""
        first, *others = self.text(token_ids, special=True).split(END)[:-1]
        opening = json.loads(first)
        messages: list[Message] = opening["messages"]
        for said, seen in zip(others[::2], others[1::2], strict=True):
            messages += [{"role": "assistant", "content": said}, *json.loads(seen)]
        return messages, opening["tools"]


@dataclass(frozen=True)
class Usage:
    """Tokens of one call as the endpoint counts them; None where it does not say."""

    prompt: int | None
    completion: int | None


def counted(episode: Episode, usage: Sequence[Usage]) -> Episode:
    """A finished episode of characters as one of tokens whose ids are not known. usage: of each turn's call.

    A turn has as many as were sampled for it, also those that the environment has cut away.
    """
    turns = []
    for k, turn in enumerate(episode.turns):
        sampled = [UNKNOWN] * (usage[k].completion or 0)
        # The next call's prompt tells what the observation and the template took.
        following = usage[k + 1].prompt if k + 1 < len(usage) else None
        seen = (following or 0) - (usage[k].prompt or 0) - len(sampled)
        turns.append(
            replace(
                turn,
                token_ids=sampled,
                logprobs=[0.0] * len(sampled),
                versions=[-1] * len(sampled),
                supplied_end=False,
                observation_ids=[UNKNOWN] * max(0, seen),
            )
        )
    opening = [UNKNOWN] * ((usage[0].prompt or 0) if usage else 0)
    return replace(episode, prompt_ids=opening, end_of_turn=UNKNOWN, turns=turns)


def _ids(text: str) -> list[int]:
    return list(map(ord, text))
