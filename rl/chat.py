"""Messages <-> tokens. The only module that touches chat templates.

Tokens in, tokens out: a conversation grows as
    prompt ids  +  sampled ids, exactly as sampled  +  glue and encoded observation  +  sampled ids  + ...
and is never rendered again as a whole. That is right only for a template whose rendering of a conversation is a
prefix of its rendering of the longer one; `ChatCodec` proves it when it is made, and refuses other templates.

What somebody writes never becomes a control token. "<|im_end|>" in a user's, a tool's or a system's text is encoded as
those ten characters, and so is every token that the tokenizer or the template reserves; in what the assistant says only
the special ones are, so that the calls and the thinking of a demonstration have the tokens that a model samples. Where
tool results are shown by text alone, "<tool_response>" in a user's turn, the marker is written "< tool_response>" when
it stands in a user's or a tool's own text: nobody can make up a result, or end one.
"""

import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol

from rl.env import Action, Message, ToolCall

_REPLY = "Zq7replyZq7"
OPEN, CLOSE = "<tool_call>", "</tool_call>"
BLOCK = re.compile(rf"{OPEN}(.*?){CLOSE}", re.DOTALL)
_SAID = {OPEN, CLOSE, "<think>", "</think>"}
"""What a model says on purpose, special token or not."""
_RESULT, _RESULT_END = "<tool_response>", "</tool_response>"
_FAKED = re.compile(r"<(?=/?tool_response>)")


class TemplateError(ValueError):
    """A chat template that cannot be continued token by token."""


@dataclass(frozen=True)
class _Probe:
    """What a template does to an assistant turn that is no longer the last one."""

    name: str
    content: str
    says: str


_PROBES = (
    _Probe("rewrites", "one 1", "rewrites earlier assistant turns"),
    _Probe("whitespace", " \n one 1 \n ", "strips whitespace from earlier assistant turns"),
    _Probe("whitespace", "\n one 1 \n", "strips whitespace from earlier assistant turns"),
    _Probe("reasoning", "<think>two</think>one 1", "strips reasoning from earlier assistant turns"),
)


class Codec(Protocol):
    """What an episode needs to turn messages into ids and back: `ChatCodec`, or rl/text_codec.py for text alone."""

    @property
    def end_of_turn(self) -> int: ...

    @property
    def end_text(self) -> str: ...

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]: ...

    def observation(self, messages: Sequence[Message]) -> list[int]: ...

    def action(self, token_ids: Sequence[int], truncated: bool = False) -> Action: ...

    def text(self, token_ids: Sequence[int], *, special: bool = False) -> str: ...

    def first(self, token_ids: Sequence[int], characters: int) -> int: ...


class ChatCodec:
    """Encodes prompts and observations for one tokenizer, and parses what the model said.

    Raises TemplateError, naming what the template does, when concatenated turns would not be its own rendering.
    `keep_sampled_turns` accepts the templates that strip whitespace or reasoning from earlier turns: the turns then
    stay in the context as they were sampled, in training and in serving alike.
    """

    def __init__(self, tokenizer: Any, *, keep_sampled_turns: bool = False):
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError("the tokenizer has no chat template. Set model.path to a chat model")
        self._tokenizer = tokenizer
        self._breaks = _Breaks(tokenizer)
        self._native_tools = self._shows_tools()
        self._native_tool_role = self._shows_tool_role()
        self._native_calls = self._shows_calls()
        self._results_are_text = self._shows_results_as_text()
        suffix = self._after_reply([{"role": "user", "content": "go on"}])
        self.end_of_turn: int = self._encode(suffix)[0]
        self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_of_turn))
        if not suffix.startswith(self.end_text) or not self._is_special(self.end_of_turn):
            raise TemplateError(
                f"the template ends an assistant turn with {suffix[:20]!r}, which is not one special token of the "
                "tokenizer: where a sampled turn ends cannot be told from its tokens"
            )
        self.refused = self._verify()
        if self.refused and not (keep_sampled_turns and self.refused[0].name != "rewrites"):
            says = "; ".join(dict.fromkeys(p.says for p in self.refused))
            raise TemplateError(
                f"the chat template {says}: the tokens of later turns would not be the ones that were sampled. "
                "Use another template, or set model.keep_sampled_turns=true to keep every turn as it was sampled"
            )

    # -- encoding ------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of the opening messages, ending where the assistant starts to speak."""
        return self._encode(self._render(messages, tools, generation_prompt=True))

    def observation(self, messages: Sequence[Message]) -> list[int]:
        """Token ids between the end-of-turn token of one assistant turn and the start of the next one."""
        return self._encode(self._after_reply(messages)[len(self.end_text) :])

    def reply(self, message: Message) -> list[int]:
        """Token ids of an assistant message as a model would have sampled it, end-of-turn included."""
        return [*self._encode(self._breaks.said(self.reply_text(message))), self.end_of_turn]

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        recall: Callable[[Sequence[int], Message], Sequence[int] | None] = lambda context, message: None,
    ) -> list[int]:
        """Token ids of a conversation so far, ending where the assistant starts to speak: an episode's context.

        recall: the ids that were sampled when the assistant said `message` after `context`, end-of-turn included.
        Where it knows none (None), `reply` stands in for them.
        """
        turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        ends = [*turns, len(messages)]
        ids = self.prompt(messages[: ends[0]], tools)
        for at, end in pairwise(ends):
            ids += recall(ids, messages[at]) or self.reply(messages[at])
            ids += self.observation(messages[at + 1 : end])
        return ids

    def plain(self, text: str) -> list[int]:
        """Token ids of a text that stands alone, after what the tokenizer begins every text with."""
        begins = [i for i in self._tokenizer.encode("") if i == self._tokenizer.bos_token_id]
        return begins + self._encode(self._breaks.shown(text))

    def reply_text(self, message: Message) -> str:
        """An assistant message as plain text; structured tool calls become <tool_call> blocks."""
        calls = "".join(format_call(c["function"]) for c in message.get("tool_calls") or ())
        return str(message.get("content") or "") + calls

    def messages(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a whole conversation as the template itself renders it: what concatenation must equal."""
        return self._encode(self._render(messages, tools, generation_prompt=False))

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return len(self._tokenizer)

    # -- decoding ------------------------------------------------------------------------------------------------

    def text(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not special)

    def action(self, token_ids: Sequence[int], truncated: bool = False) -> Action:
        """The model's turn, parsed. `truncated`: it was cut short before its end-of-turn token."""
        ids = list(token_ids)
        if ids and ids[-1] == self.end_of_turn:
            ids = ids[:-1]
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        calls, error = parse_calls(text)
        return Action(text, tuple(token_ids), calls, error, truncated)

    def first(self, token_ids: Sequence[int], characters: int) -> int:
        """How many of a turn's tokens hold its first `characters`: the last of them may hold more."""
        return bisect_left(
            range(len(token_ids)),
            characters,
            key=lambda count: len(self._tokenizer.decode(list(token_ids[:count]), skip_special_tokens=False)),
        )

    # -- the template --------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        pieces = self._breaks.pieces(text)
        return [i for piece in pieces for i in self._tokenizer.encode(piece, add_special_tokens=False)]

    def _render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        messages, tools = [self._harmless(m) for m in messages], self._breaks.shown(list(tools))
        if tools and not self._native_tools:
            messages, tools = _describe_tools(messages, tools), ()
        return self._tokenizer.apply_chat_template(
            [self._adapt(m) for m in messages],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )

    def _harmless(self, message: Message) -> Message:
        """A message whose texts hold nothing that the template's own markers could be taken for."""
        role, content = message["role"], message.get("content")
        if role == "assistant":
            return {**self._breaks.said(message), "role": role}
        if role in ("user", "tool") and self._results_are_text and isinstance(content, str):
            message = {**message, "content": _FAKED.sub("< ", content)}
        return {**self._breaks.shown(message), "role": role}

    def _adapt(self, message: Message) -> Message:
        if message["role"] == "tool" and not self._native_tool_role:
            return {"role": "user", "content": f"{_RESULT}\n{message['content']}\n{_RESULT_END}"}
        if message.get("tool_calls") and not self._native_calls:
            return {"role": "assistant", "content": self.reply_text(message)}
        return message

    def _is_special(self, token: int) -> bool:
        """Named as special by the tokenizer, or marked so in its vocabulary only (Gemma 3, Phi 3)."""
        added = self._tokenizer.added_tokens_decoder.get(token)
        return token in self._tokenizer.all_special_ids or (added is not None and added.special)

    def _after_reply(self, messages: Sequence[Message]) -> str:
        opening = [{"role": "user", "content": "go"}, {"role": "assistant", "content": _REPLY}]
        try:
            text = self._render([*opening, *messages], (), generation_prompt=True)
        except Exception as error:
            raise TemplateError(f"the chat template fails on a question and an answer: {error}") from error
        _, found, after = text.partition(_REPLY)
        if not found:
            raise TemplateError("the chat template rewrites earlier assistant turns: use another template")
        return after

    def _shows(self, messages: list[Message], word: str, tools: Any = None) -> bool:
        try:
            return word in self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception:
            # Templates refuse what they do not know with whatever error jinja raises.
            return False

    def _shows_tools(self) -> bool:
        tool = {"type": "function", "function": {"name": _REPLY, "description": "d", "parameters": {"type": "object"}}}
        return self._shows([{"role": "user", "content": "go"}], _REPLY, [tool])

    def _shows_tool_role(self) -> bool:
        opening = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "x"}]
        return self._native_tools and self._shows([*opening, {"role": "tool", "content": _REPLY}], _REPLY)

    def _shows_results_as_text(self) -> bool:
        """Whether a tool's result is marked by what anybody could write, and not by tokens that nobody can."""
        opening = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "x"}]
        marked = not self._native_tool_role or self._shows([*opening, {"role": "tool", "content": "y"}], _RESULT)
        return marked and self._breaks.shown(_RESULT) == _RESULT

    def _shows_calls(self) -> bool:
        """Whether the template writes a structured call exactly as `reply_text` does."""
        call = {"type": "function", "function": {"name": _REPLY, "arguments": {"a": 1, "op": "+"}}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        return self._shows([{"role": "user", "content": "go"}, turn], format_call(call["function"]))

    def _verify(self) -> list[_Probe]:
        """The probes whose concatenated turns differ from the template's own rendering."""
        refused = []
        tool = {"role": "tool" if self._native_tool_role else "user", "content": "three"}
        for probe in _PROBES:
            opening: list[Message] = [{"role": "user", "content": "go"}]
            reply: Message = {"role": "assistant", "content": probe.content}
            concatenated, history = self.prompt(opening), opening
            for more in (tool, {"role": "user", "content": "and?"}):
                concatenated += self.reply(reply) + self.observation([more])
                history = [*history, reply, more]
            try:
                rendered = self._render(history, (), generation_prompt=True)
            except Exception as error:
                raise TemplateError(f"the chat template fails on a conversation of three turns: {error}") from error
            # Text, not ids: a tokenizer may merge a turn's first blank with the template's line break, where a
            # sampled turn cannot. What the template wrote is the question here.
            if self._tokenizer.decode(concatenated) != self._tokenizer.decode(self._encode(rendered)):
                refused.append(probe)
                if probe.name == "rewrites":
                    break
        return refused


class _Breaks:
    """Breaks the control tokens in texts: behind the first character a mark, at which the text is encoded in pieces.

    So each piece has the tokens that it would have anywhere, and none holds a whole control token that somebody wrote.
    What templates do to a text leaves the mark as it is: digits, too many to be guessed.
    """

    def __init__(self, tokenizer: Any):
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(t.content for t in added if t.special)}
        # Vocabulary is added too, such as line breaks and HTML by Gemma: only what marks something is reserved.
        known, template = {*_SAID, _RESULT, _RESULT_END}, str(tokenizer.chat_template)
        marks = (t.content for t in added if t.content.startswith(("<", "[")))
        self._mark = str(10**39 + secrets.randbelow(9 * 10**39))
        self._said = _beginnings(special - _SAID)
        self._shown = _beginnings(special | {m for m in marks if m in known or m in template or m[:2] == "<|"})

    def said(self, value: Any) -> Any:
        """What the assistant says: text, or JSON with texts in it."""
        return self._broken(value, self._said)

    def shown(self, value: Any) -> Any:
        """What the assistant is shown: text, or JSON with texts in it."""
        return self._broken(value, self._shown)

    def pieces(self, text: str) -> list[str]:
        return text.split(self._mark)

    def _broken(self, value: Any, beginnings: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return beginnings.sub(lambda first: first[0] + self._mark, value)
        if isinstance(value, Mapping):
            return {self._broken(k, beginnings): self._broken(v, beginnings) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._broken(v, beginnings) for v in value]
        return value


def _beginnings(tokens: set[str]) -> re.Pattern[str]:
    """The first character of each of them, wherever it stands, also where two overlap."""
    several = sorted(t for t in tokens if len(t) > 1 and t.strip())
    groups = groupby(several, key=lambda token: token[0])
    heads = [f"{re.escape(first)}(?={'|'.join(re.escape(t[1:]) for t in rest)})" for first, rest in groups]
    return re.compile("|".join(heads) or "(?!)")


def format_call(function: Mapping[str, Any]) -> str:
    """A tool call as text, in the form that Hermes, Qwen and others share."""
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
    shown = json.dumps(arguments, ensure_ascii=False)
    return f'{OPEN}{{"name": "{function["name"]}", "arguments": {shown}}}{CLOSE}'


def parse_calls(text: str) -> tuple[tuple[ToolCall, ...], str | None]:
    """The tool calls in a turn, and what is wrong with them (then no calls)."""
    if OPEN not in text and CLOSE not in text:
        return (), None
    # Only where every opening has a closing behind it is the pattern's search linear in the text.
    balanced = text.count(OPEN) == text.count(CLOSE) and text.rfind(OPEN) < text.rfind(CLOSE)
    blocks = BLOCK.findall(text) if balanced else []
    if not blocks or len(blocks) != text.count(OPEN):
        return (), "malformed call: unbalanced tags"
    calls = []
    for block in blocks:
        try:
            call = json.loads(block)
            json.dumps(call, ensure_ascii=False, allow_nan=False).encode()  # a lone surrogate is no text, NaN no JSON
        except (ValueError, RecursionError):
            return (), "malformed call: not JSON"
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return (), "malformed call: no name"
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return (), "malformed call: arguments are not an object"
        calls.append(ToolCall(call["name"], arguments))
    return tuple(calls), None


def _describe_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """For templates that know no tools: the schemas in the system message."""
    lines = "\n".join(json.dumps(t["function"]) for t in tools)
    text = (
        f"You may call tools:\n{lines}\n"
        f'To call one, write {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE} and nothing else.'
    )
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def shortened(text: str, most: int) -> str:
    """The beginning and the end of a text, `most` characters of it."""
    if len(text) <= most:
        return text
    head = most - most // 2
    return f"{text[:head]}\n[{len(text) - most} characters left out]\n{text[len(text) - most // 2 :]}"
