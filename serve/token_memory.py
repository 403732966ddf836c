"""What the model has sampled, for conversations that come back as text.

A client of OpenAI's API sends a conversation as text. Encoding the model's own words again can give other ids than
those that it sampled, and a small model that has never seen the others loses its thread. So a replica remembers the ids
of what it has said: by all the ids before, and the message as the client sends it back.
"""

import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from rl.env import Message


class TokenMemory:
    """The turns said last, `most_tokens` of them together. May be used from several threads."""

    def __init__(self, most_tokens: int = 1 << 21):
        self._most, self._count = most_tokens, 0
        self._turns: OrderedDict[bytes, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, context: Sequence[int], message: Message, token_ids: Sequence[int]) -> None:
        """token_ids: what was sampled after `context` when the assistant said `message`, end-of-turn included."""
        key, ids = _key(context, message), array("i", token_ids)
        with self._lock:
            self._count += len(ids) - len(self._turns.pop(key, ()))
            self._turns[key] = ids
            while self._count > self._most:
                self._count -= len(self._turns.popitem(last=False)[1])

    def recall(self, context: Sequence[int], message: Message) -> Sequence[int] | None:
        key = _key(context, message)
        with self._lock:
            if key in self._turns:
                self._turns.move_to_end(key)
            return self._turns.get(key)


def _key(context: Sequence[int], message: Message) -> bytes:
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls") or ()]
    said = json.dumps([message.get("content") or "", calls], sort_keys=True)
    return blake2b(array("i", context).tobytes() + said.encode(), digest_size=16).digest()
