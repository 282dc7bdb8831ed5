"""A config as text and back: the lines `group.field = value` of `--print` and of a run's config.txt.

What is read is checked field by field against the dataclasses, so that a damaged or foreign file is named by line or
field. Fields that earlier versions named otherwise are read as what they are now. Nothing here needs JAX.
"""

import ast
import dataclasses
import reprlib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from gemma2_jax.config import Config


def to_text(config: Config) -> str:
    """Every field as a line `group.field = value`: what `--print` shows and a run keeps as config.txt."""
    return "".join(f"{key} = {value!r}\n" for key, value in _flatten_fields(config))


def from_file(path: Path) -> Config:
    """The config in a run's config.txt. Raises ValueError naming the file where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, as it is not UTF-8 ({error}); copy it again") from error
    return from_text(text, str(path))


def from_text(text: str, source: str = "config.txt") -> Config:
    """The config that `to_text` wrote. Raises ValueError naming the line that is not one of its own."""
    groups: dict[str, dict] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, separator, value = line.partition(" = ")
        group, _, name = key.rpartition(".")
        try:
            groups.setdefault(group, {})[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:  # as `ast` has it
            raise ValueError(f"{source}:{number}: {line!r} is not a line `group.field = value`") from error
        if not separator:
            raise ValueError(f"{source}:{number}: {line!r} is not a line `group.field = value`")
    types: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
    _rename_old_fields(groups.get("data", {}))
    try:
        nested = {name: kind(**groups.pop(name, {})) for name, kind in types.items()}
        config = Config(**nested, **groups.pop("", {}))
    except TypeError as error:
        raise ValueError(f"{source} is of another version of this program: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if groups:
        raise ValueError(f"{source} is of another version of this program: unknown groups {sorted(groups)}")
    for node in (config, *(getattr(config, name) for name in types)):
        for f in dataclasses.fields(node):
            if f.name not in types and not matches_type(getattr(node, f.name), f.type):
                value = reprlib.repr(getattr(node, f.name))
                raise ValueError(f"{source}: {f.name} is {value}; it must be {describe_type(f.type)}")
    return config


def _rename_old_fields(data: dict) -> None:
    """Puts the columns that runs up to 0.1 kept in fields of their own where they are now."""
    columns = {name: data.pop(f"{name}_key", name) for name in ("text", "prompt", "completion")}
    renamed = [f"{name}={column}" for name, column in columns.items() if column != name]
    if renamed:
        data["columns"] = ",".join(renamed)


def matches_type(value: Any, kind: Any) -> bool:
    """Whether a field of that type can have this value."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if get_origin(kind) is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(matches_type, value, kinds))
    if isinstance(kind, UnionType):
        return any(matches_type(value, one) for one in inner)
    return type(value) in ((int, float) if kind is float else (kind,))


def describe_type(kind: Any) -> str:
    """What a field of that type may be, in words."""
    names = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if get_origin(kind) is tuple:
        kinds = {str: "strings", int: "whole numbers", int | str: "whole numbers and strings"}
        return f"a tuple of {kinds.get(inner[0], 'pairs of a pattern and a number')}"
    if isinstance(kind, UnionType):
        return " or ".join(map(describe_type, inner))
    return names[kind]


def _flatten_fields(node, prefix: str = ""):
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flatten_fields(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value
