"""`key()`: the one place where a configuration key is described.

Everything about a key stands at its field: default, bounds, choices (as a `Literal`), help, and `effect`, which names
where a change can be seen. `neobert config keys`, the error messages and the reference page are read from here.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_UNSET: Any = object()


class Section(BaseModel):
    """A mapping of the YAML: unknown keys and wrong types are refused, and nothing can be assigned afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def key(default: Any, help: str, effect: str, *, factory: Any = _UNSET, **bounds: Any) -> Any:
    """A field with its default, its help in one sentence, and where its effect shows. `bounds`: ge, gt, le, lt, ..."""
    extra: Any = {"effect": effect}
    if factory is not _UNSET:
        return Field(default_factory=factory, description=help, json_schema_extra=extra, **bounds)
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)
