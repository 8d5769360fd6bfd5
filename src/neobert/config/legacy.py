"""Older names of keys: one table, old path -> new path. Each acts, with a warning.

Where the old and the new name are set to different values, that is an error if the old one is no longer a key. Some older names
still are keys, with a default of their own: at that default they do not act, and beside the new name they give way, with a
warning. An explicit `null` is a value like any other.

Applied to every layer (a file, the overrides) by itself, before layers are merged: so a newer layer may set the new name of
what an older one set by the old name.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neobert.config.schema import known_keys
from neobert.errors import ConfigError, Problem

Values = dict[str, Any]
ABSENT: Any = object()
ON_COMMAND_LINE = 0  # instead of a line; nobody writes a default there without meaning it
FLOAT32 = ("no", "fp32")  # two names of one precision


@dataclass(frozen=True)
class Legacy:
    """`old` acts as `new`, its value passed through `convert`. `old` ending in `.*` is a whole block."""

    old: str
    new: str
    convert: Callable[[Any], Any] = lambda value: value


def _switch(on: str, off: str) -> Callable[[Any], Any]:
    """A boolean that became a choice; other values pass, and are refused where the choice is checked."""
    return lambda value: (on if value else off) if isinstance(value, bool) else value


FLASH = _switch("flash_attn_varlen", "sdpa")
PRECISION = _switch("bf16", "no")

LEGACY = (
    Legacy("mixed_precision", "trainer.mixed_precision", PRECISION),
    Legacy("trainer.bf16", "trainer.mixed_precision", PRECISION),
    Legacy("trainer.seed", "seed"),
    Legacy("trainer.run_name", "wandb.name"),
    Legacy("trainer.learning_rate", "optimizer.lr"),
    Legacy("trainer.warmup_steps", "scheduler.warmup_steps"),
    Legacy("trainer.max_grad_norm", "trainer.gradient_clipping"),
    Legacy("trainer.dir", "trainer.output_dir"),
    Legacy("dataset.tokenizer_name", "tokenizer.name"),
    Legacy("dataset.column", "dataset.text_column"),
    Legacy("dataset.path_to_disk", "dataset.path"),
    Legacy("dataset.lanes", "dataset.num_shards"),
    Legacy("tokenizer.tokenizer_name_or_path", "tokenizer.name"),
    Legacy("optimizer.hparams.*", "optimizer.*"),
    Legacy("model.flash_attention", "model.attn_backend", FLASH),
    Legacy("model.xformers_attention", "model.attn_backend", FLASH),
    Legacy("model.use_flash_attention", "model.attn_backend", FLASH),
    Legacy("model.sdpa_attention", "model.attn_backend", _switch("sdpa", "flash_attn_varlen")),
    # These are still keys.
    Legacy("trainer.max_ckpt", "trainer.save_total_limit"),
    Legacy("trainer.train_batch_size", "trainer.per_device_train_batch_size"),
    Legacy("trainer.eval_batch_size", "trainer.per_device_eval_batch_size"),
    Legacy("trainer.dataloader_num_workers", "dataset.num_workers"),
    Legacy("optimizer.muon_config.algorithm", "optimizer.muon_config.orthogonalization"),
    Legacy(
        "optimizer.muon_config.polar_express",
        "optimizer.muon_config.orthogonalization",
        _switch("polar_express", "newton_schulz"),
    ),
)


def apply_legacy(values: Values, lines: dict[str, int], problems: list[Problem]) -> list[str]:
    """Rename in place, in `values` and in the line numbers of a file; returns one warning per old name that acts or gives way.

    Where old and new names contradict each other, `problems` gets an entry.
    """
    warnings: list[str] = []
    for rule in LEGACY:
        written = take(values, rule.old.removesuffix(".*"))
        if not rule.old.endswith(".*"):
            if written is not ABSENT:
                warnings += _rename(values, lines, problems, rule, written)
        elif isinstance(written, dict):
            for name, value in written.items():
                one = Legacy(rule.old.replace("*", name), rule.new.replace("*", name))
                warnings += _rename(values, lines, problems, one, value)
        elif written not in (ABSENT, None):
            problems.append(Problem(rule.old.removesuffix(".*"), f"must be a section, got {written!r}"))
    return warnings


def _rename(values: Values, lines: dict[str, int], problems: list[Problem], rule: Legacy, written: Any) -> list[str]:
    """Set the new name to what is `written` under the old one; the warning about it, if there is one."""
    value, present, key = rule.convert(written), look(values, rule.new), known_keys().get(rule.old)
    is_default = key is not None and type(written) is type(key.default) and written == key.default
    if is_default and lines.get(rule.old) != ON_COMMAND_LINE:
        return []
    if present is ABSENT:
        put(values, rule.new, value)
        if rule.old in lines:
            lines.setdefault(rule.new, lines[rule.old])
    elif (now := rule.convert(present)) != value and not (now in FLOAT32 and value in FLOAT32):
        if key is not None:
            return [f"{rule.old}: {written!r} has no effect, {rule.new}: {present!r} wins"]
        problems.append(Problem(rule.old, f"{written!r} contradicts {rule.new}: {present!r}; keep only {rule.new}"))
        return []
    return [f"{rule.old} is an older name: {written!r} acts as {rule.new}: {value!r}"]


def look(values: Values, dotted: str) -> Any:
    """The value at a dotted path, or ABSENT."""
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return ABSENT
        values = values[part]
    return values


def take(values: Values, dotted: str) -> Any:
    """Remove and return the value at a dotted path; ABSENT when there is none."""
    section, _, name = dotted.rpartition(".")
    inner = look(values, section) if section else values
    return inner.pop(name, ABSENT) if isinstance(inner, dict) else ABSENT


def put(values: Values, dotted: str, value: Any) -> None:
    """Set the value at a dotted path. Raises ConfigError when a part of the path holds a plain value."""
    *sections, last = dotted.split(".")
    for depth, section in enumerate(sections):
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(Problem(".".join(sections[: depth + 1]), f"is a value, so {dotted} cannot be set in it"))
        values = inner
    values[last] = value


def nearest_key(dotted: str) -> str:
    """`; did you mean trainer.max_steps?` for an unknown key or section: first among its siblings, then anywhere, by its
    present or an older name.
    """
    newer = {rule.old: rule.new for rule in LEGACY if not rule.old.endswith(".*")}
    keys = {**newer, **{key: key for key in known_keys()}}
    keys |= {section: section for key in known_keys() if (section := key.rpartition(".")[0])}
    section, _, name = dotted.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    near = difflib.get_close_matches(name, siblings, 1, cutoff=0.7)
    found = siblings[near[0]] if near else next((key for key in keys if key.rpartition(".")[2] == name), None)
    found = found or next(iter(difflib.get_close_matches(dotted, keys, 1, cutoff=0.75)), None)
    return f"; did you mean {keys[found]}?" if found else "; `neobert config keys` lists all keys"
