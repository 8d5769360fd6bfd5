"""`key()`: the one place where a configuration key is described, and `KeyInfo`, that description as data.

Everything about a key stands at its field: default, bounds, choices (as a `Literal`), help, `effect`, which names where a
change can be seen, and the tasks in which it acts. `neobert config keys`, messages and the reference page are read from here.
"""

import types
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

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


class KeyInfo(NamedTuple):
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


def describe_keys(section: type[Section], prefix: str = "") -> Iterator[KeyInfo]:
    """Every key of a section and of those inside it, in the order of the schema. A list of sections is one key."""
    for name, field in section.model_fields.items():
        kinds = _alternatives(field.annotation)
        inner = next((one for one in kinds if isinstance(one, type) and issubclass(one, Section)), None)
        if inner is None or type(None) in kinds:
            extra: Any = field.json_schema_extra or {}
            yield KeyInfo(
                key=prefix + name,
                type=_type_name(field.annotation),
                default=field.get_default(),
                section=prefix.rstrip(".") or "top",
                help=field.description or "",
                choices=next((list(typing.get_args(one)) for one in kinds if typing.get_origin(one) is Literal), None),
                bounds=", ".join(f"{SIGNS[s]} {getattr(m, s)}" for m in field.metadata for s in SIGNS if hasattr(m, s)),
                effect=extra.get("effect", ""),
                tasks=tuple(extra.get("tasks", section.tasks)),
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
        origin = typing.get_origin(one)
        if origin is None:
            names.append(one.__name__.removesuffix("Type"))  # None's is NoneType
        elif origin is Literal:
            names.append("str")
        else:
            names.append(f"{origin.__name__}[{', '.join(map(_type_name, typing.get_args(one)))}]")
    return " | ".join(names)
