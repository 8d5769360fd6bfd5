"""`key()`: the one place where a configuration key is described, and `KeyInfo`, that description as data.

Everything about a key stands at its field: default, bounds, choices (as a `Literal`), help, `effect`, which names where a
change can be seen, and the tasks in which it acts. `neobert config keys`, messages and the reference page are read from here.
"""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

# The tasks in which a key acts.
PRETRAINING, GLUE, CONTRASTIVE, MTEB = ("pretraining",), ("glue",), ("contrastive",), ("mteb",)
TEXT = (*PRETRAINING, *CONTRASTIVE)  # those that read a corpus
TRAINING = (*PRETRAINING, *GLUE, *CONTRASTIVE)
TASKS = (*TRAINING, *MTEB)
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Section(BaseModel):
    """A mapping of the YAML: unknown keys and wrong types are refused, and nothing can be assigned afterwards. Validators are
    built on first use: for a whole configuration that is one, with all sections in it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )
    tasks: ClassVar[tuple[str, ...]] = TRAINING  # in which the keys act that name none of their own


def key(
    default: Any, help: str, effect: str, *, tasks: tuple[str, ...] = (), beyond: bool = False, **bounds: Any
) -> Any:
    """A field with its default, its help in whole sentences, and where its effect shows. `tasks`: where it acts, if not in all
    tasks of its section; `beyond`: whether the reference has no such key; `bounds`: ge, gt, le, lt, ...
    """
    extra: dict[str, Any] = {"effect": effect, "tasks": list(tasks)} if tasks else {"effect": effect}
    note = " Beyond the reference." if beyond else ""
    return Field(default, description=help + note, json_schema_extra=extra, **bounds)


def section(help: str) -> Any:
    """A field that holds a section, by default one with all of its keys at their defaults."""
    return Field({}, description=help, json_schema_extra={"effect": ""}, validate_default=True)


@dataclass(frozen=True)
class KeyInfo:
    """One key: dotted name, type as written in Python, JSON-able default, and what its field says of it."""

    key: str
    type: str
    default: Any
    section: str
    help: str
    choices: list[str] | None
    bounds: str
    effect: str
    tasks: tuple[str, ...]
    kinds: frozenset[Any]

    def as_json(self) -> dict[str, Any]:
        """What `neobert config keys --json` prints of a key."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "kinds"}


def describe_keys(section: type[Section], prefix: str = "") -> Iterator[KeyInfo]:
    """Every key of a section and of those inside it, in the order of the schema. A list of sections is one key."""
    for name, field in section.model_fields.items():
        alternatives = _alternatives(field.annotation)
        inner = next((one for one in alternatives if isinstance(one, type) and issubclass(one, Section)), None)
        if inner is None or type(None) in alternatives:
            extra: Any = field.json_schema_extra or {}
            literal = next((one for one in alternatives if typing.get_origin(one) is typing.Literal), None)
            kinds = {str if one is literal else typing.get_origin(one) or one for one in alternatives}
            yield KeyInfo(
                key=prefix + name,
                type=_type_name(field.annotation),
                default=field.get_default(),
                section=prefix.rstrip(".") or "top",
                help=field.description or "",
                choices=list(typing.get_args(literal)) if literal else None,
                bounds=", ".join(f"{SIGNS[s]} {getattr(m, s)}" for m in field.metadata for s in SIGNS if hasattr(m, s)),
                effect=extra.get("effect", ""),
                tasks=tuple(extra.get("tasks", section.tasks)),
                kinds=frozenset(kinds | ({int} if float in kinds else set())),
            )
        if inner is not None:
            yield from describe_keys(inner, f"{prefix}{name}.")


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the one type, without `Annotated`."""
    if hasattr(annotation, "__metadata__"):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [inner for one in typing.get_args(annotation) for inner in _alternatives(one)]
    return [annotation]


def _type_name(annotation: Any) -> str:
    names = []
    for one in _alternatives(annotation):
        origin, arguments = typing.get_origin(one), typing.get_args(one)
        if origin is None:
            names.append("None" if one is type(None) else getattr(one, "__name__", str(one)))
        else:
            names.append(
                "str" if origin is typing.Literal else f"{origin.__name__}[{', '.join(map(_type_name, arguments))}]"
            )
    return " | ".join(names)
