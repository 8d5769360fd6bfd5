"""The one way in: YAML files, layered left to right -> older names -> overrides -> strict build -> rules -> `Config`.

All problems are reported at once, each with its dotted path and the line it was written on.

Older names act, with a warning. Two names set to different values are an error if the old one is no longer a key. Some still
are keys: at their default they do not act, and beside the new name they give way, with a warning. Every layer is renamed by
itself: a newer one may set the new name of what an older one set by the old name.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from neobert.config.rules import check_rules
from neobert.config.schema import Config, known_keys
from neobert.config.yaml_file import Layer, parse_scalar, read_yaml
from neobert.errors import ConfigError, Problem

Values = dict[str, Any]
ABSENT: Any = object()
COMMAND_LINE = "command line"  # nobody writes a default there without meaning it
FLOAT32 = ("no", "fp32")  # two names of one precision


class Legacy(NamedTuple):
    """`old` acts as `new`, its value passed through `convert`. `old` ending in `.*` is a whole block."""

    old: str
    new: str
    convert: Callable[[Any], Any] = lambda value: value


def _switch(on: str, off: str) -> Callable[[Any], Any]:
    """A boolean that became a choice; other values pass, and are refused where the choice is checked."""
    return lambda value: (on if value else off) if isinstance(value, bool) else value


FLASH = _switch("flash_attn_varlen", "sdpa")
PRECISION = _switch("bf16", "no")
POLAR = _switch("polar_express", "newton_schulz")

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
    Legacy("optimizer.muon_config.polar_express", "optimizer.muon_config.orthogonalization", POLAR),
)


def apply_legacy(layer: Layer) -> list[str]:
    """Rename in place; returns a warning per old name that acts or gives way. What contradicts goes to the layer's problems."""
    warnings: list[str] = []
    for rule in LEGACY:
        section, _, name = rule.old.removesuffix(".*").rpartition(".")
        inner = look(layer.values, section) if section else layer.values
        written = inner.pop(name, ABSENT) if isinstance(inner, dict) else ABSENT
        if written is ABSENT:
            continue
        if not rule.old.endswith(".*"):
            warnings += _rename(layer, rule, written)
        elif isinstance(written, dict):
            for one, value in written.items():
                warnings += _rename(layer, Legacy(rule.old.replace("*", one), rule.new.replace("*", one)), value)
        elif written is not None:
            layer.problems.append(Problem(f"{section}.{name}", f"must be a section, got {written!r}"))
    return warnings


def _rename(layer: Layer, rule: Legacy, written: Any) -> list[str]:
    """Set the new name to what is `written` under the old one; the warning about it, if there is one."""
    value, present, key = rule.convert(written), look(layer.values, rule.new), known_keys().get(rule.old)
    is_default = key is not None and type(written) is type(key.default) and written == key.default
    if is_default and layer.origins.get(rule.old) != COMMAND_LINE:
        return []
    if present is ABSENT:
        put(layer.values, rule.new, value)
        if rule.old in layer.origins:
            layer.origins.setdefault(rule.new, layer.origins[rule.old])
    elif (now := rule.convert(present)) != value and not (now in FLOAT32 and value in FLOAT32):
        if key is not None:
            return [f"{rule.old}: {written!r} has no effect, {rule.new}: {present!r} wins"]
        problem = f"{written!r} contradicts {rule.new}: {present!r}; keep only {rule.new}"
        layer.problems.append(Problem(rule.old, problem))
        return []
    return [f"{rule.old} is an older name: {written!r} acts as {rule.new}: {value!r}"]


def look(values: Values, dotted: str) -> Any:
    """The value at a dotted path, or ABSENT."""
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return ABSENT
        values = values[part]
    return values


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
    """`; did you mean trainer.max_steps?`: looks among the siblings of an unknown key, then anywhere, also at older names."""
    keys = {rule.old: rule.new for rule in LEGACY if not rule.old.endswith(".*")}
    keys |= {name: name for key in known_keys() for name in (key, key.rpartition(".")[0]) if name}
    section, _, name = dotted.rpartition(".")
    anywhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    found = siblings.get(_closest(name, siblings, 0.7)) or anywhere.get(name) or _closest(dotted, keys, 0.75)
    return f"; did you mean {keys[found]}?" if found else "; `neobert config keys` lists all keys"


def _closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word that is most like `word`; empty where none is."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, list(known), 1, cutoff)), "")


@dataclass(frozen=True)
class Loaded:
    """A configuration, the warnings about it, and where its keys were set."""

    config: Config
    warnings: list[str]
    origins: dict[str, str]  # file:line, or `command line`, of every key that was set


def load_config(files: list[str], overrides: list[str] | None = None, task: str | None = None) -> Loaded:
    """Build a configuration from YAML files and overrides (`a.b=v`, `--a.b=v`, or `--a.b`, `v`).

    `task`, when given, is what the command runs: a file that says otherwise is an error. Raises ConfigError.
    """
    values: Values = {}
    origins: dict[str, str] = {}
    warnings: list[str] = []
    problems: list[Problem] = []
    for layer in [*map(read_yaml, files), parse_overrides(overrides or [])]:
        warnings += apply_legacy(layer)
        problems += layer.problems
        origins |= layer.origins
        _merge(values, layer.values)
    if task and values.setdefault("task", task) != task:
        problems.append(Problem("task", f"this command runs {task!r}, the file says {values['task']!r}"))
    if files:
        values.setdefault("config_path", str(files[-1]))
    config, wrong = _build(values)
    problems += wrong
    broken, messages = check_rules(config, {p.path for p in problems}) if config else ([], [])
    problems += broken
    if problems or config is None:
        raise ConfigError(*[p._replace(where=p.where or _where(p.path, origins)) for p in problems])
    return Loaded(config, warnings + messages, {key: origins[key] for key in known_keys() if key in origins})


def _where(dotted: str, origins: dict[str, str]) -> str:
    """Where a key is set; failing that, where its section stands."""
    while dotted and dotted not in origins:
        dotted = dotted.rpartition(".")[0]
    return origins.get(dotted, "")


def dump_config(config: Config) -> str:
    """What was set or has been filled in, as YAML that loads to the same run.

    Which of its own checkpoints a run went on from belongs to the call and is left out; one of another run stays.
    """
    values = config.model_dump(exclude_unset=True)
    selector = config.trainer.resume_from_checkpoint
    if selector is not None:
        is_inside = Path(config.trainer.output_dir).resolve() in Path(selector).resolve().parents
        if is_inside or selector == "latest" or selector.isdigit():
            del values["trainer"]["resume_from_checkpoint"]
    return yaml.safe_dump({"task": config.task, **values}, sort_keys=False, allow_unicode=True)


def parse_overrides(arguments: list[str]) -> Layer:
    """`["--a.b", "3", "c.d=x"]` -> `{"a": {"b": 3}, "c": {"d": "x"}}`. Raises ConfigError for one that fits neither form."""
    layer, rest = Layer({}, {}, []), list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--"):
                raise ConfigError(Problem("", f"{argument!r}: expected section.key=value or --section.key value"))
            if not rest:
                raise ConfigError(Problem(name, "no value given"))
            text = rest.pop(0)
        put(layer.values, name, _override_value(name, text))
        layer.origins[name] = COMMAND_LINE
    return layer


def _override_value(name: str, text: str) -> Any:
    """`text` as YAML reads it, or as it is where the key takes text and not that; lists may be written with commas alone."""
    value = parse_scalar(text)
    info = known_keys().get(name)
    if info and info.type in ("list[str]", "list[float]") and isinstance(value, str | int | float):
        parts = [part.strip() for part in text.split(",")]
        return parts if info.type == "list[str]" else [parse_scalar(part) for part in parts]
    kinds = info.type.split(" | ") if info else []
    is_text = "str" in kinds and type(value).__name__.removesuffix("Type") not in kinds  # None's is NoneType
    return text if is_text else value


def _merge(into: Values, new: Values, is_top: bool = True) -> None:
    """Lay one layer over another. `trainer:` with nothing below it is YAML for null; it means an empty section."""
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value, is_top=False)
        elif not (is_top and value is None and name in Config.model_fields and name not in known_keys()):
            into[name] = value


def _build(values: Values) -> tuple[Config | None, list[Problem]]:
    """(the configuration, where possible without the keys that are wrong, so that rules can be checked too; these keys)."""
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    rest = copy.deepcopy(values)
    for details in found:  # leave out the key at its location, which may go on inside the value
        *sections, last = map(str, details["loc"])
        inner = rest
        while sections and isinstance(inner.get(sections[0]), dict):
            inner = inner[sections.pop(0)]
        inner.pop(sections[0] if sections else last, None)
    problems = [_problem(details) for details in found]
    try:
        return Config.model_validate(rest), problems
    except ValidationError:
        return None, problems


def _problem(details: Any) -> Problem:
    """One of pydantic's errors as a line of ours. Where its location goes on inside a value, an index and a field of an entry
    of a list are named; a member of a union or a validator is not."""
    location = [str(part) for part in details["loc"]]
    value, kind, whole = details["input"], details["type"], ".".join(location)
    if kind == "extra_forbidden":
        return Problem(whole, f"unknown key{nearest_key(whole)}")
    is_in_entry = any(part.isdigit() for part in location[:-1])
    parents = [".".join(location[:end]) for end in range(len(location), 0, -1)]
    dotted = whole if is_in_entry else next((one for one in parents if one in known_keys()), whole)
    info = known_keys().get(dotted)
    if kind == "model_type":
        return Problem(whole, "must be a section with keys")
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if info is not None and info.choices and (isinstance(value, str) or kind == "literal_error"):
        message = f"must be one of {', '.join(info.choices)}, got {shown}"
        if dotted == "trainer.eval_strategy" and value in (False, "no"):
            hint = "; set trainer.eval_steps to more than the steps of the run to train without evaluations"
        else:
            near = _closest(str(value), info.choices)
            hint = f"; did you mean {near}?" if near else ""
        return Problem(dotted, message + hint)
    if info is not None and (kind.endswith("_type") or kind.startswith(("is_", "int_from", "finite"))):
        return Problem(dotted, f"must be {info.type}, got {shown} ({type(value).__name__})")
    message = details["msg"].lower().removeprefix("input ").replace("should be", "must be").replace("should", "must")
    return Problem(dotted, f"{message}, got {shown}")
