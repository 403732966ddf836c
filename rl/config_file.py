"""YAML and dotted overrides, read into the configuration's schema.

Every error names the setting, where it stands in the file, and the nearest valid name. Imports no torch, so that
`repertory --help` and a mistyped key answer at once.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rl.config import Config

Schema = TypeVar("Schema", bound=BaseModel)
_SETTING = re.compile(r"([a-z_]+)(?:\.\w+|\[\d+\])+(?=[ :])")
"""A setting that a message begins with."""


class ConfigError(ValueError):
    """A user's mistake in a configuration: one message, no traceback."""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, validate.

    Raises ConfigError, whose text names each faulty setting with its position and a remedy.
    """
    data, node = read_yaml(path)
    apply_overrides(data, overrides)
    return validate(data, str(path), node, [o.partition("=")[0] for o in overrides])


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Any]:
    """A file's settings, and their YAML tree, which knows the lines. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        data = _unshared(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected settings like `model:`, `env:` and `stages:` at the top level")
    return data, node


def validate(data: dict[str, Any], source: str, node: Any = None, overridden: list[str] | None = None) -> Config:
    """Check raw settings against the schema. `node`: their YAML tree, for line numbers."""
    return checked(Config, data, source, node, overridden)


def checked(
    schema: type[Schema], data: dict[str, Any], source: str, node: Any = None, overridden: list[str] | None = None
) -> Schema:
    """Raw settings as a schema's; every mistake is named with its place and the nearest valid name."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [_explain(e, source, node, overridden or [], schema) for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


@contextmanager
def placing_errors(path: Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """A ConfigError from inside whose text begins with a setting, such as one that only the environment can judge, says
    where in the file that stands."""
    try:
        yield
    except ConfigError as error:
        named = _SETTING.match(str(error))
        known = named is not None and named[1] in Config.model_fields
        if named is None or not known or str(error).startswith(str(path)) or not path.is_file():
            raise
        steps = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", named[0])]
        node = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        where = _where(steps, str(path), node, [o.partition("=")[0] for o in overrides])
        raise ConfigError(f"{where}: {error}") from None


def _unshared(value: Any) -> Any:
    """A copy in which what a YAML alias repeats is not one object: an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def dump_config(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_overrides(data: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> None:
    """Set each `key.sub=value` in raw settings; values are read as YAML."""
    for override in overrides:
        _apply_override(data, override)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override: write key.sub=value, for example stages.1.steps=3")
    target: Any = data
    parts: list[Any] = key.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                here = ".".join(parts[:i])
                raise ConfigError(f"{key}: {here} is a list of {len(target)} items; use an index from 0 on, not {part}")
            part = int(part)
        elif not isinstance(target, dict):
            raise ConfigError(f"{key}: {'.'.join(parts[:i])} is a value, it has no settings below it")
        if last:
            try:
                target[part] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"{key}: {text!r} is not valid YAML: {error}") from None
        elif isinstance(target, list):
            target = target[int(part)]
        else:
            target = target.setdefault(part, {})
            if target is None:
                raise ConfigError(f"{key}: {'.'.join(parts[: i + 1])} is empty")


def _explain(error: Any, source: str, node: Any, overridden: list[str], schema: type[BaseModel]) -> str:
    """One line for one pydantic error."""
    steps, parent = _setting(error["loc"], schema)
    name = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).lstrip(".")
    dotted = ".".join(map(str, steps))
    # An override may name the faulty setting, one above it, or (when the fault is an unknown section) one below it.
    below = error["type"] == "extra_forbidden" and any(k.startswith(f"{dotted}.") for k in overridden)
    where = "command line" if below else _where(steps, source, node, overridden)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(steps[-1]), list(parent.model_fields), n=1, cutoff=0.5) if parent else []
        prefix = name[: -len(str(steps[-1]))]
        known = ", ".join(parent.model_fields) if parent else ""
        hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known here: {known}."
        return f"{where}: {name} is not a setting. {hint}"
    if error["type"] == "missing":
        return f"{where}: {name} is required and is not set"
    message = re.sub(r"^Value error, ", "", error["msg"])
    if error["type"].startswith(("union_tag", "literal")):
        return f"{where}: {name}: {message} (got {error['input']!r})" if name else f"{where}: {message}"
    shown = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    return f"{where}: {name + ': ' if name else ''}{message}{shown}"


def _where(steps: list[Any], source: str, node: Any, overridden: Sequence[str]) -> str:
    dotted = ".".join(map(str, steps))
    if any(f"{dotted}.".startswith(f"{key}.") for key in overridden):
        return "command line"
    line = _line(node, steps)
    return f"{source}:{line}" if line else source


def _setting(loc: tuple[Any, ...], schema: type[BaseModel]) -> tuple[list[Any], type[BaseModel] | None]:
    """A pydantic location as the user's path (without union tags), and the model that holds its last step."""
    steps: list[Any] = []
    current: Any = schema
    holder: type[BaseModel] | None = None
    for step in loc:
        members = _members(current)
        tagged = next((m for m in members if len(members) > 1 and step in _tags(m)), None)
        if tagged is not None:
            current = tagged
            continue
        if isinstance(step, int):
            current = (get_args(current) or (Any,))[0]
        else:
            models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
            holder = models[0] if models else None
            current = holder.model_fields[step].annotation if holder and step in holder.model_fields else Any
        steps.append(step)
    return steps, holder


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [m for arg in get_args(annotation) if arg is not type(None) for m in _members(arg)]
    return [annotation]


def _tags(model: Any) -> tuple[Any, ...]:
    for name in ("kind", "name"):
        field = getattr(model, "model_fields", {}).get(name)
        if field is not None and get_origin(field.annotation) is Literal:
            return get_args(field.annotation)
    return ()


def _line(node: Any, steps: list[Any]) -> int | None:
    """The line of a setting, or of the nearest one above it."""
    line = None
    for step in steps:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line
