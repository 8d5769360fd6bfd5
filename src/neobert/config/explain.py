"""The configuration explained: one key, one file with its origins, two files compared, a starter file, the reference page."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from neobert.config.legacy import ABSENT, LEGACY, look, nearest_key
from neobert.config.reference import KeyInfo, known_keys, value_of
from neobert.config.rules import RULES
from neobert.config.schema import Config
from neobert.errors import ConfigError, Problem

FILL_IN: Any = object()
STARTERS: dict[str, dict[str, Any]] = {  # by task, the keys that one sets first
    "pretraining": {
        "dataset.path": FILL_IN, "dataset.streaming": True, "dataset.max_seq_length": 512, "tokenizer.path": FILL_IN,
        "model.hidden_size": 768, "model.num_hidden_layers": 12, "model.num_attention_heads": 12,
        "model.intermediate_size": 3072, "datacollator.pack_sequences": True, "datacollator.mlm_probability": 0.2,
        "trainer.output_dir": "outputs/pretraining", "trainer.max_steps": 100_000, "trainer.per_device_train_batch_size": 16,
        "trainer.gradient_clipping": 1.0, "trainer.save_steps": 5_000, "trainer.eval_steps": 5_000, "optimizer.lr": 5e-4,
        "scheduler.warmup_percent": 5, "seed": 0,
    },
    "glue": {
        "glue.task_name": "cola", "glue.pretrained_checkpoint_dir": FILL_IN, "glue.max_seq_length": 128,
        "tokenizer.padding": "longest", "trainer.output_dir": "outputs/glue", "trainer.max_steps": -1,
        "trainer.num_train_epochs": 3, "trainer.per_device_train_batch_size": 32, "trainer.eval_strategy": "epoch",
        "trainer.save_strategy": "epoch", "optimizer.lr": 2e-5, "scheduler.warmup_percent": 6, "seed": 0,
    },
    "contrastive": {
        "dataset.path": FILL_IN, "contrastive.pretrained_checkpoint_dir": FILL_IN, "contrastive.loss_type": "simcse",
        "contrastive.temperature": 0.05, "contrastive.pooling": "avg", "datacollator.pack_sequences": True,
        "trainer.output_dir": "outputs/contrastive", "trainer.max_steps": -1, "trainer.num_train_epochs": 1,
        "trainer.per_device_train_batch_size": 128, "optimizer.lr": 2e-5, "scheduler.warmup_percent": 10, "seed": 0,
    },
    "mteb": {"mteb_task_type": "all", "mteb_batch_size": 32, "pretrained_checkpoint": "latest", "trainer.output_dir": FILL_IN},
}  # fmt: skip


def explain_key(dotted: str) -> str:
    """Everything known about a key, as lines. Raises ConfigError with a suggestion for an unknown one."""
    info = known_keys().get(dotted)
    if info is None:
        renamed = next((rule for rule in LEGACY if rule.old == dotted), None)
        if renamed is not None:
            return f"{dotted} is an older name of {renamed.new}\n\n{explain_key(renamed.new)}"
        raise ConfigError(Problem(dotted, f"unknown key{nearest_key(dotted)}"))
    lines = [dotted, f"  {info.help}", "", f"  type      {info.type}", f"  default   {plain_json(info.default)}"]
    if info.choices:
        lines.append(f"  choices   {', '.join(info.choices)}")
    if info.bounds:
        lines.append(f"  bounds    {info.bounds}")
    lines.append(f"  changes   {info.effect}")
    older = [rule.old for rule in LEGACY if rule.new == dotted]
    if older:
        lines.append(f"  older     {', '.join(older)}")
    for rule in RULES:
        if dotted in rule.keys:
            others = ", ".join(key for key in rule.keys if key != dotted)
            lines.append(f"  {rule.kind.lower():<9} {rule.description}" + (f" (with {others})" if others else ""))
    return "\n".join(lines)


def show_config(config: Config, origins: Mapping[str, str]) -> str:
    """The whole configuration as YAML; keys in `origins` say where they were set."""
    lines: list[str] = []
    _show_section(origins, config, "", lines)
    return "\n".join(lines)


def _show_section(origins: Mapping[str, str], section: BaseModel, prefix: str, lines: list[str]) -> None:
    indent = "  " * prefix.count(".")
    older = {rule.old for rule in LEGACY}
    for name in type(section).model_fields:
        value, dotted = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            lines.append(f"{indent}{name}:")
            _show_section(origins, value, f"{dotted}.", lines)
        elif dotted not in older:
            origin = origins.get(dotted)
            lines.append(f"{indent}{name}: {plain_json(value)}" + (f"  # {origin}" if origin else ""))


def diff_configs(a: Config, b: Config) -> list[str]:
    """`key: value in a -> value in b`, for the keys that differ."""
    lines = []
    for dotted in known_keys():
        one, other = (_value_or_none(config, dotted) for config in (a, b))
        if one != other and dotted not in ("config_path", "optimizer.muon_config"):
            lines.append(f"{dotted}: {plain_json(one)} -> {plain_json(other)}")
    return lines


def changed_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a saved configuration, as YAML gives it, that are not at their defaults, by dotted name."""
    found = {dotted: look(values, dotted) for dotted in known_keys()}
    return {dotted: value for dotted, value in found.items() if value not in (ABSENT, known_keys()[dotted].default)}


def _value_or_none(config: Config, dotted: str) -> Any:
    if dotted.startswith("optimizer.muon_config.") and config.optimizer.muon_config is None:
        return None
    return value_of(config, dotted)


def starter_file(task: str) -> str:
    """A commented YAML file for a task, with the keys that one sets first; it trains once what it says is filled in."""
    lines = [f"# A starting point for task: {task}. Every key: neobert config keys", f"task: {task}"]
    section, keys = "", list(STARTERS[task])
    for dotted in sorted(keys, key=lambda key: (key.rpartition(".")[0] != "", keys.index(key))):
        info, (new, _, name), value = known_keys()[dotted], dotted.rpartition("."), STARTERS[task][dotted]
        if new != section:
            lines += ["", f"{new}:"]
            section = new
        indent = "  " if new else ""
        written = f"{plain_json(info.default)} # to be filled in" if value is FILL_IN else plain_json(value)
        lines += [f"{indent}# {info.help}{_alternatives(info)}", f"{indent}{name}: {written}"]
    return "\n".join(lines) + "\n"


def _alternatives(info: KeyInfo) -> str:
    return f" One of: {', '.join(info.choices)}." if info.choices else ""


def plain_json(value: Any) -> str:
    """JSON of a value; sections become mappings."""
    return json.dumps(value, default=lambda section: section.model_dump(), ensure_ascii=False)


SECTIONS = {
    "High-impact settings": ("task", "model.hidden_size", "model.num_hidden_layers", "model.num_attention_heads",
        "dataset.path", "dataset.streaming", "tokenizer.path", "trainer.per_device_train_batch_size",
        "trainer.gradient_accumulation_steps", "trainer.max_steps", "optimizer.name", "optimizer.lr",
        "datacollator.pack_sequences", "trainer.resume_from_checkpoint"),
    "Model": ("model.",), "Tokenizer": ("tokenizer.",), "Data source": ("dataset.",), "Data collator": ("datacollator.",),
    "Training loop": ("trainer.",), "Learning-rate schedule": ("scheduler.",), "Optimizer": ("optimizer.",),
    "Weights & Biases": ("wandb.",), "GLUE": ("glue.",), "Contrastive": ("contrastive.",), "MTEB": ("mteb_",),
    "Run": ("task", "seed", "debug", "pretrained_checkpoint", "pretraining_metadata", "use_deepspeed",
            "accelerate_config_file", "config_path"),
}  # fmt: skip


def reference_page() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration reference", "",
        "Generated from the schema by `make docs`; do not edit. One key: `neobert config explain KEY`.", "",
        "Values come from, lowest first: the defaults below, the YAML files from left to right, the words behind them on the",
        "command line. Unknown keys and wrong types are errors. `neobert config check FILE` reports all of them at once.", "",
    ]  # fmt: skip
    for title, wanted in SECTIONS.items():
        keys = [
            info
            for key, info in known_keys().items()
            if any(key == w or (w[-1] in "._" and key.startswith(w)) for w in wanted)
        ]
        lines += [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|", *map(_row, keys), ""]
    lines += ["## Rules between keys", "", "| type | keys | rule |", "|---|---|---|"]
    lines += [f"| {rule.kind} | {', '.join(f'`{key}`' for key in rule.keys)} | {rule.description} |" for rule in RULES]
    lines += [
        "",
        "## Older names", "",
        "They act, with a warning. Where an older and a newer name contradict each other in one file that is an error; an",
        "older name that still is a key above gives way then, with a warning, and at its default it has no say.", "",
        "| older | acts as |", "|---|---|",
        *[f"| `{rule.old}` | `{rule.new}` |" for rule in LEGACY],
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(info: KeyInfo) -> str:
    kind = info.type.replace("|", "\\|")
    more = (
        f" Choices: {', '.join(info.choices)}." if info.choices else f" Bounds: {info.bounds}." if info.bounds else ""
    )
    return f"| `{info.key}` | `{kind}` | `{plain_json(info.default)}` | {info.help}{more} |"
