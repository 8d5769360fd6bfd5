"""The schema as data: one `KeyInfo` per key, for `neobert config keys`, error messages and the reference page."""

import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from neobert.config.field import Section
from neobert.config.schema import Config


@dataclass(frozen=True)
class KeyInfo:
    """One key: dotted name, type as written in Python, JSON-able default, and what its field says of it."""

    key: str
    type: str
    default: Any
    section: str
    help: str
    choices: list[str] | None
    effect: str
    bounds: str
    kinds: frozenset[Any]

    def as_json(self) -> dict[str, Any]:
        """What `neobert config keys --json` prints of a key."""
        names = ("key", "type", "default", "section", "help", "choices", "bounds", "effect")
        return {name: getattr(self, name) for name in names}


@cache
def known_keys() -> dict[str, KeyInfo]:
    """Every key of the configuration in the order of the schema, by dotted name."""
    return {info.key: info for info in _walk(Config, "")}


def value_of(config: Config, dotted: str) -> object:
    """The value of a key; None below a section that is not there."""
    value: object = config
    for part in dotted.split("."):
        value = getattr(value, part, None)
    return value


def is_set(path: str, config: Config) -> bool:
    """Whether a key was given a value, be it the default one, in a file, on the command line, or by what a run filled in."""
    section, _, name = path.rpartition(".")
    inner = value_of(config, section) if section else config
    return isinstance(inner, BaseModel) and name in inner.model_fields_set


def is_chosen(path: str, config: Config) -> bool:
    """Whether a key has another value than its default."""
    value = value_of(config, path)
    default = type(value)() if isinstance(value, Section) else known_keys()[path].default
    return is_set(path, config) and value != default


def _walk(section: type[BaseModel], prefix: str) -> typing.Iterator[KeyInfo]:
    for name, field in section.model_fields.items():
        inner = _inner_section(field.annotation)
        optional = type(None) in typing.get_args(field.annotation)
        if inner is None or optional:
            yield _info(prefix + name, field, (section.__doc__ or "").strip().splitlines()[0])
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    if typing.get_origin(annotation) in (list, dict):
        return None  # a list of sections is one key
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _info(dotted: str, field: Any, section: str) -> KeyInfo:
    default = field.get_default(call_default_factory=True)
    assert default is not PydanticUndefined, dotted
    return KeyInfo(
        key=dotted,
        type=_type_name(field.annotation),
        default=default,
        section=dotted.rpartition(".")[0] or "top",
        help=field.description,
        choices=_choices(field.annotation),
        effect=(field.json_schema_extra or {}).get("effect", ""),
        bounds=_bounds(field.metadata),
        kinds=frozenset(_kinds(field.annotation)),
    )


def _plain(annotation: Any) -> Any:
    """Strip `Annotated`."""
    return typing.get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _alternatives(annotation: Any) -> list[Any]:
    annotation = _plain(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [_plain(one) for one in typing.get_args(annotation)]
    return [annotation]


def _type_name(annotation: Any) -> str:
    names = []
    for one in _alternatives(annotation):
        origin, arguments = typing.get_origin(one), typing.get_args(one)
        if origin is typing.Literal:
            names.append("str")
        elif origin is not None:
            names.append(f"{origin.__name__}[{', '.join(_type_name(argument) for argument in arguments)}]")
        else:
            names.append("None" if one is type(None) else getattr(one, "__name__", str(one)))
    return " | ".join(names)


def _kinds(annotation: Any) -> typing.Iterator[type]:
    for one in _alternatives(annotation):
        origin = typing.get_origin(one)
        kind = str if origin is typing.Literal else origin or one
        yield kind
        if kind is float:
            yield int


def _choices(annotation: Any) -> list[str] | None:
    for one in _alternatives(annotation):
        if typing.get_origin(one) is typing.Literal:
            return list(typing.get_args(one))
    return None


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [f"{signs[name]} {getattr(m, name)}" for m in metadata for name in signs if hasattr(m, name)]
    return ", ".join(found)
