"""From the token ids of a turn, as they come, to what a client is shown: text, cut at stop strings, and tool calls.

    ids ──► Decoder ──► Cutter ──► Calls ──► content, tool calls

However the ids are cut into chunks, what is shown is the same in the end: that of the whole turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rl.chat import BLOCK, CLOSE, OPEN, ChatCodec, parse_calls
from rl.env import ToolCall

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Ids to text. A character whose bytes are not all there is held back."""

    def __init__(self, codec: ChatCodec):
        self._codec = codec
        self._ids: list[int] = []
        self._context = self._read = self._shown = 0
        """Tokens from `_context` to `_read` are shown, and say how the next ones are written; after `_read`, `_shown`
        characters are."""

    def add(self, token_ids: Sequence[int]) -> str:
        """What more of the text is certain with these."""
        self._ids += token_ids
        return self._next(certain=True)

    def flush(self) -> str:
        """The rest, which is not going to be a whole character."""
        return self._next(certain=False)

    def _next(self, certain: bool) -> str:
        before = len(self._text(self._read)) + self._shown
        text = self._text(len(self._ids))
        end = len(text)
        while certain and end > max(before, len(text) - 3) and text[end - 1] == _UNKNOWN:
            end -= 1
        if end == len(text):
            self._context, self._read, self._shown = self._read, len(self._ids), 0
        else:
            self._shown += max(0, end - before)
        return text[before:end]

    def _text(self, end: int) -> str:
        return self._codec.text(self._ids[self._context : end], special=True)


class Cutter:
    """A text up to the first of some strings that is complete in it. What may become one is held back.

    stops: the text ends before such a string; last: it ends behind this one.
    """

    def __init__(self, stops: Sequence[str], last: str | None = None):
        self._ends = [(stop, 0) for stop in stops] + ([(last, len(last))] if last else [])
        self._held = ""
        self._before = 0
        """Characters before what is held."""
        self.end: int | None = None
        """Characters of the text up to the end of the string that has ended it."""
        self.kept = 0
        """Characters that were let through."""

    def add(self, text: str) -> str:
        if self.end is not None:
            return ""
        self._held += text
        found = [(self._held.find(s) + len(s), -len(s), kept) for s, kept in self._ends if s in self._held]
        if not found:
            return self._pass(len(self._held) - max((_overlap(self._held, s) for s, _ in self._ends), default=0))
        end, length, kept = min(found)
        self.end = self._before + end
        return self._pass(end + length + kept)

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        return "" if self.end is not None else self._pass(len(self._held))

    def _pass(self, count: int) -> str:
        passed, self._held = self._held[:count], self._held[count:]
        self._before += count
        self.kept += count
        return passed


class Calls:
    """A text apart from the tool calls in it. From the first on it is held back to its end: one bad call spoils all."""

    def __init__(self) -> None:
        self._text, self._shown = "", 0

    def add(self, text: str) -> str:
        self._text += text
        at = self._text.find(OPEN, self._shown)
        return self._show(at if at >= 0 else len(self._text) - _overlap(self._text[self._shown :], OPEN))

    def flush(self) -> tuple[str, Sequence[ToolCall]]:
        """The rest of the text, and the calls."""
        calls, _ = parse_calls(self._text)
        rest = self._show(len(self._text))
        return (BLOCK.sub("", rest) if calls else rest), calls

    def _show(self, end: int) -> str:
        shown, self._shown = self._text[self._shown : end], end
        return shown


def _overlap(text: str, string: str) -> int:
    """How many of the last characters of a text may be the beginning of a string."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if string.startswith(text[-n:])), 0)


@dataclass(frozen=True)
class Said:
    """A turn as a client is shown it.

    kept, end: how many characters of the text count, and how many there were up to where a stop string was complete;
    end is None where none was.
    """

    content: str
    calls: Sequence[ToolCall]
    kept: int
    end: int | None


class TurnText:
    """A turn's ids, as they come, to what is shown of it. tools: whether tool calls are told apart from the text."""

    def __init__(self, codec: ChatCodec, stops: Sequence[str] = (), *, tools: bool = False, one_call: bool = False):
        self._end_of_turn = codec.end_of_turn
        self._decoder = Decoder(codec)
        self._cutter = Cutter(stops, CLOSE if tools and one_call else None)
        self._calls = Calls() if tools else None
        self._content: list[str] = []

    @property
    def end(self) -> int | None:
        """Where the turn ends, in characters, once a stop string has come: no more ids are wanted."""
        return self._cutter.end

    def add(self, token_ids: Sequence[int]) -> str:
        """More of the content."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] == self._end_of_turn else token_ids
        return self._show(self._cutter.add(self._decoder.add(ids)))

    def finish(self) -> tuple[str, Said]:
        """The last of the content, and the whole."""
        rest = self._show(self._cutter.add(self._decoder.flush()) + self._cutter.flush())
        calls: Sequence[ToolCall] = ()
        if self._calls is not None:
            more, calls = self._calls.flush()
            rest += more
            self._content.append(more)
        return rest, Said("".join(self._content), calls, self._cutter.kept, self._cutter.end)

    def _show(self, text: str) -> str:
        shown = self._calls.add(text) if self._calls is not None else text
        self._content.append(shown)
        return shown
