"""What OpenAI's clients send. Every bound is in the OpenAPI schema, and holds.

A field that OpenAI does not know is ignored, as OpenAI does. One that would change the answer, and that this server
cannot follow, is there with the one value that changes nothing: any other is refused by the field's name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.errors import ApiError

_MOST = (1 << 31) - 1
CHOICES = 128
"""The most that one request may ask for, over all its prompts."""
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_MOST)]], Field(min_length=1)]
Body = TypeVar("Body", bound="_Sampled")


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class TextPart(_Model):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class Function(_Model):
    name: str = Field(pattern=r"^[a-zA-Z0-9_\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Model):
    type: Literal["function"]
    function: Function


class CalledFunction(_Model):
    name: str
    arguments: str = Field(description="A JSON object.")


class Call(_Model):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(_Model):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(_Model):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(_Model):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[Call] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(_Model):
    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class TextFormat(_Model):
    type: Literal["text"]


class StreamOptions(_Model):
    include_usage: bool | None = None


class _Sampled(_Model):
    """What both kinds of request say about sampling."""

    model: str = Field(min_length=1, description="A model that GET /v1/models lists.")
    n: int | None = Field(default=None, ge=1, le=CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=_MOST)
    max_tokens: int | None = Field(default=None, ge=1, le=_MOST)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Sampled):
    """The assistant's next turn in a conversation."""

    messages: list[AnyMessage] = Field(min_length=1)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_MOST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    prompt_cache_key: str | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    web_search_options: None = None


class CompletionRequest(_Sampled):
    """How texts go on."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=CHOICES)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=1, le=CHOICES)
    suffix: None = None


def parse(kind: type[Body], body: bytes) -> Body:
    """A request's body. Raises ApiError 400, naming the first field that is wrong, without what it holds."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a union all that it could have been is listed: the deepest is what was meant.
    first = max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=lambda e: len(e["loc"]))
    where = ".".join(_named(first["loc"]))
    says = "is not supported here" if first["type"] == "none_required" else first["msg"]
    raise ApiError(400, "invalid_request", f"{where}: {says}" if where else says, param=where or None)


def _named(steps: Sequence[int | str]) -> Iterator[str]:
    """A place in a body, less pydantic's names for the members of a union, such as "user" and "list[str]"."""
    for at, step in enumerate(steps):
        if at == 0 or isinstance(step, int) or (step.isidentifier() and step not in _MEMBERS):
            yield str(step)


_MEMBERS = {"str", "constrained", "system", "developer", "user", "assistant", "tool"}


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """As an OpenAPI operation's `openapi_extra`: the schema stands in it whole."""
    whole = kind.model_json_schema()
    content = {"application/json": {"schema": _inlined(whole, whole.pop("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    # The mapping of a discriminator points into what is inlined; the constant roles say the same.
    return {k: _inlined(v, definitions) for k, v in node.items() if k != "discriminator"}


def text_of(content: "str | list[TextPart] | None") -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def messages_of(body: ChatRequest) -> list[dict[str, Any]]:
    """As rl/ knows them. Raises ApiError for a recorded call that is none."""
    return [_message(at, message) for at, message in enumerate(body.messages)]


def _message(at: int, message: Any) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    shown = {"role": role, "content": text_of(message.content)}
    named = {key: getattr(message, key, None) for key in ("name", "tool_call_id")}
    shown |= {key: value for key, value in named.items() if value is not None}
    if role == "assistant" and message.tool_calls:
        shown["tool_calls"] = [_call(f"messages.{at}.tool_calls.{i}", c) for i, c in enumerate(message.tool_calls)]
    return shown


def _call(where: str, call: Call) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
        json.dumps(arguments, ensure_ascii=False).encode()  # an escaped lone surrogate is JSON, but no text
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.function.arguments"
        raise ApiError(400, "invalid_request", f"{param}: should be the text of a JSON object", param=param)
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def tools_of(body: ChatRequest) -> list[dict[str, Any]]:
    """The tools that the model is shown. One without parameters takes none."""
    if not body.tools or body.tool_choice == "none":
        return []
    nothing = {"type": "object", "properties": {}}
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    return [{**tool, "function": {"parameters": nothing, **tool["function"]}} for tool in tools]
