"""Older names of keys: one table, old path -> new path. Each acts, with a warning; old and new that differ are an error.

Applied to every layer (a file, the overrides) by itself, before layers are merged: so a newer layer may set the new name of
what an older one set by the old name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neobert.errors import ConfigError, Problem

Values = dict[str, Any]


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
    Legacy("tokenizer.tokenizer_name_or_path", "tokenizer.name"),
    Legacy("optimizer.hparams.*", "optimizer.*"),
    Legacy("model.flash_attention", "model.attn_backend", FLASH),
    Legacy("model.xformers_attention", "model.attn_backend", FLASH),
    Legacy("model.use_flash_attention", "model.attn_backend", FLASH),
    Legacy("model.sdpa_attention", "model.attn_backend", _switch("sdpa", "flash_attn_varlen")),
    # Fields of the reference that are older names of others.
    Legacy("trainer.max_ckpt", "trainer.save_total_limit"),
    Legacy("trainer.train_batch_size", "trainer.per_device_train_batch_size"),
    Legacy("trainer.eval_batch_size", "trainer.per_device_eval_batch_size"),
    Legacy("trainer.dataloader_num_workers", "dataset.num_workers"),
    Legacy("wandb.log_interval", "trainer.logging_steps"),
    Legacy("optimizer.muon_config.algorithm", "optimizer.muon_config.orthogonalization"),
    Legacy(
        "optimizer.muon_config.polar_express",
        "optimizer.muon_config.orthogonalization",
        _switch("polar_express", "newton_schulz"),
    ),
)


def apply_legacy(values: Values, lines: dict[str, int], problems: list[Problem]) -> list[str]:
    """Rename in place, in `values` and in the line numbers of a file; returns one warning per old name.

    Where an old and a new name, or two old names, say different things, `problems` gets an entry.
    """
    warnings: list[str] = []
    for rule in LEGACY:
        if rule.old.endswith(".*"):
            warnings += _flatten_block(values, lines, problems, rule)
        elif (value := take(values, rule.old)) is not None:
            warnings += _rename(values, lines, problems, rule, value)
    return warnings


def _flatten_block(values: Values, lines: dict[str, int], problems: list[Problem], rule: Legacy) -> list[str]:
    old, new = rule.old.removesuffix(".*"), rule.new.removesuffix(".*")
    block = take(values, old)
    if block is None:
        return []
    if not isinstance(block, dict):
        problems.append(Problem(old, f"must be a section, got {block!r}"))
        return []
    renamed = (
        _rename(values, lines, problems, Legacy(f"{old}.{name}", f"{new}.{name}"), one) for name, one in block.items()
    )
    return [warning for warnings in renamed for warning in warnings]


def _rename(values: Values, lines: dict[str, int], problems: list[Problem], rule: Legacy, written: Any) -> list[str]:
    value, present = rule.convert(written), look(values, rule.new)
    if present is not None and rule.convert(present) != value:
        problems.append(Problem(rule.old, f"{written!r} contradicts {rule.new}: {present!r}; keep only {rule.new}"))
        return []
    put(values, rule.new, value)
    if rule.old in lines:
        lines.setdefault(rule.new, lines[rule.old])
    return [f"{rule.old} is an older name: {written!r} acts as {rule.new}: {value!r}"]


def look(values: Values, dotted: str) -> Any:
    """The value at a dotted path, or None."""
    for part in dotted.split("."):
        if not isinstance(values, dict):
            return None
        values = values.get(part)  # type: ignore[assignment]
    return values


def take(values: Values, dotted: str) -> Any:
    """Remove and return the value at a dotted path; None when there is none."""
    section, _, name = dotted.rpartition(".")
    inner = look(values, section) if section else values
    return inner.pop(name, None) if isinstance(inner, dict) else None


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
