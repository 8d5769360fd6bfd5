"""The configuration explained: one key, one file with its origins, two files compared, a starter file, the reference page."""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from neobert.config.field import TASKS, KeyInfo
from neobert.config.load import ABSENT, LEGACY, apply_legacy, look, nearest_key
from neobert.config.rules import RULES
from neobert.config.schema import Config, known_keys
from neobert.config.yaml_file import Layer
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
    newer, info = {rule.old: rule.new for rule in LEGACY}, known_keys().get(dotted)
    if info is None and dotted in newer:
        return f"{dotted} is an older name of {newer[dotted]}\n\n{explain_key(newer[dotted])}"
    if info is None:
        raise ConfigError(Problem(dotted, f"unknown key{nearest_key(dotted)}"))
    facts = {
        "type": info.type, "default": plain_json(info.default), "choices": ", ".join(info.choices or []),
        "bounds": info.bounds, "changes": info.effect, "tasks": "" if info.tasks == TASKS else ", ".join(info.tasks),
        "older": ", ".join(old for old, new in newer.items() if new == dotted),
    }  # fmt: skip
    lines = [dotted, f"  {info.help}", "", *(f"  {name:<9} {fact}" for name, fact in facts.items() if fact)]
    for rule in RULES:
        if dotted in rule.all_keys:
            others = ", ".join(key for key in rule.all_keys if key != dotted)
            lines.append(f"  {rule.kind.lower():<9} {rule.description}" + (f" (with {others})" if others else ""))
    return "\n".join(lines)


def show_config(config: Config, origins: Mapping[str, str]) -> str:
    """The whole configuration as YAML; keys in `origins` say where they were set."""
    older = {rule.old for rule in LEGACY}

    def describe(section: BaseModel, prefix: str) -> Iterator[str]:
        indent = "  " * prefix.count(".")
        for name, value in section:
            dotted = prefix + name
            if isinstance(value, BaseModel):
                yield f"{indent}{name}:"
                yield from describe(value, f"{dotted}.")
            elif dotted not in older:
                yield f"{indent}{name}: {plain_json(value)}" + (f"  # {origins[dotted]}" if dotted in origins else "")

    return "\n".join(describe(config, ""))


def diff_configs(a: Config, b: Config) -> list[str]:
    """`key: value in a -> value in b`, for the keys that differ."""
    pairs = {key: (a.value_of(key), b.value_of(key)) for key in known_keys()}
    del pairs["config_path"], pairs["optimizer.muon_config"]
    return [f"{key}: {plain_json(old)} -> {plain_json(new)}" for key, (old, new) in pairs.items() if old != new]


def changed_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a saved configuration, as YAML gives it, that are not at their defaults, by their present dotted names."""
    layer = Layer(copy.deepcopy(values), {}, [])
    apply_legacy(layer)
    found = {dotted: look(layer.values, dotted) for dotted in known_keys()}
    return {dotted: value for dotted, value in found.items() if value not in (ABSENT, known_keys()[dotted].default)}


def starter_file(task: str) -> str:
    """A commented YAML file for a task, with the keys that one sets first; it trains once what is left open is filled in."""
    lines = [f"# A starting point for task: {task}. Every key: neobert config keys", f"task: {task}"]
    for dotted, value in sorted(STARTERS[task].items(), key=lambda item: "." in item[0]):
        info, (section, _, name) = known_keys()[dotted], dotted.rpartition(".")
        if section and f"{section}:" not in lines:
            lines += ["", f"{section}:"]
        indent = "  " if section else ""
        choices = f" One of: {', '.join(info.choices)}." if info.choices else ""
        written = f"{plain_json(info.default)} # to be filled in" if value is FILL_IN else plain_json(value)
        lines += [f"{indent}# {info.help}{choices}", f"{indent}{name}: {written}"]
    return "\n".join(lines) + "\n"


def plain_json(value: Any, indent: int | None = None) -> str:
    """JSON of a value; sections become mappings."""
    return json.dumps(value, default=lambda section: section.model_dump(), ensure_ascii=False, indent=indent)


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
        "Values come from, lowest first: the defaults below, the YAML files from left to right, the overrides on the",
        "command line. Unknown keys and wrong types are errors. `neobert config check FILE` reports all of them at once.", "",
    ]  # fmt: skip
    for title, wanted in SECTIONS.items():
        prefixes = tuple(one for one in wanted if one[-1] in "._")
        keys = [info for key, info in known_keys().items() if key in wanted or key.startswith(prefixes)]
        lines += [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|", *map(_row, keys), ""]
    lines += ["## Rules between keys", "", "| type | keys | rule |", "|---|---|---|"]
    lines += [f"| {one.kind} | {', '.join(f'`{key}`' for key in one.all_keys)} | {one.description} |" for one in RULES]
    lines += [
        "", "## Older names", "",
        "They act, with a warning. Where an older and a newer name contradict each other in one file that is an error; an",
        "older name that still is a key above gives way then, with a warning, and at its default it does not act.", "",
        "| older | acts as |", "|---|---|",
        *[f"| `{rule.old}` | `{rule.new}` |" for rule in LEGACY],
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(info: KeyInfo) -> str:
    choices = f" Choices: {', '.join(info.choices)}." if info.choices else ""
    bounds = f" Bounds: {info.bounds}." if info.bounds and not choices else ""
    tasks = f" Tasks: {', '.join(info.tasks)}." if info.tasks != TASKS else ""
    kind = info.type.replace("|", "\\|")
    return f"| `{info.key}` | `{kind}` | `{plain_json(info.default)}` | {info.help}{choices}{bounds}{tasks} |"
