"""What a run needs besides a valid configuration: text, a tokenizer, weights. Looked for on the disk only, and not read."""

from collections.abc import Iterator
from glob import has_magic, iglob
from pathlib import Path

from neobert.config.load import Loaded
from neobert.config.schema import Config, ContrastiveConfig, GlueConfig
from neobert.errors import ConfigError, Problem

NO_DATA = "not set; name a file, a folder or a glob here, or a dataset of the Hugging Face hub in {0}.name"
TRAIN_ONE = "train one with `neobert tokenizer train FILES -o {}`"
NO_DONOR = "needs a checkpoint of another task: glue.pretrained_checkpoint_dir"
NO_WEIGHTS = (
    "no weights to start from: name a run in {0}.pretrained_checkpoint_dir, a model in {0}.pretrained_model_path, or an "
    "encoder of transformers in model.name with model.from_hub: true; {0}.allow_random_weights: true trains without"
)


def check_ready(loaded: Loaded) -> None:
    """Raises ConfigError with everything that a run of this configuration would not find."""
    if problems := list(find_missing(loaded.config)):
        raise ConfigError(*(one._replace(where=loaded.origins.get(one.path, "")) for one in problems))


def find_missing(config: Config) -> Iterator[Problem]:
    """Everything that the run of a configuration would not find."""
    if config.task == "mteb":
        yield from _absent("mteb_local_tasks", config.mteb_local_tasks)
        if not (Path(config.trainer.output_dir) / "checkpoints").is_dir():
            problem = f"{config.trainer.output_dir}: no run there; train one, name another, or a model with --model"
            yield Problem("trainer.output_dir", problem)
        return
    yield from _absent("dataset.path", config.dataset.path) if config.task == "glue" else _missing_text(config)
    is_new = config.task == "pretraining"
    if not is_new:
        yield from missing_weights(config)
        is_new = asked_weights(config).allow_random_weights and not names_weights(config)
    if is_new and not config.model.from_hub and (missing := missing_tokenizer(config)):
        yield missing


def asked_weights(config: Config) -> GlueConfig | ContrastiveConfig:
    """The section whose `pretrained_*` keys count."""
    return config.glue if config.task == "glue" else config.contrastive


def names_weights(config: Config) -> bool:
    """Whether one of the task's `pretrained_*` keys names weights of ours."""
    asked = asked_weights(config)
    return {asked.pretrained_checkpoint_dir, asked.pretrained_model_path, asked.pretrained_checkpoint} != {None}


def missing_tokenizer(config: Config) -> Problem | None:
    """What is wrong where the run takes the tokenizer that `tokenizer` names: the hub is asked for no other one."""
    path = config.tokenizer.path
    if path is not None:
        problem = f"no folder at {path!r}; {TRAIN_ONE.format(path)}"
        return None if Path(path).is_dir() else Problem("tokenizer.path", problem)
    problem = f"not set; {TRAIN_ONE.format('tokenizer')}, or name one of the Hugging Face hub in tokenizer.name"
    return None if config.is_set("tokenizer.name") else Problem("tokenizer.path", problem)


def _missing_text(config: Config) -> Iterator[Problem]:
    dataset = config.dataset
    is_named = bool(dataset.name) and config.is_chosen("dataset.name")
    if not dataset.path and config.task == "pretraining":  # the default dataset, unless a path is left to be filled in
        is_named = bool(dataset.name) and (config.is_set("dataset.name") or not config.is_set("dataset.path"))
    paths = {f"dataset.mixture.{number}": one.path for number, one in enumerate(dataset.mixture) if not one.name}
    if not dataset.mixture and not is_named:
        paths["dataset"] = dataset.path
    for section, path in paths.items():
        yield from _absent(f"{section}.path", path) if path else [Problem(f"{section}.path", NO_DATA.format(section))]


def missing_weights(config: Config) -> Iterator[Problem]:
    """What a run that fine-tunes would not find to start from."""
    asked = asked_weights(config)
    if config.task == "glue" and config.glue.transfer_from_task and not names_weights(config):
        yield Problem("glue.transfer_from_task", NO_DONOR)
    elif not (names_weights(config) or config.model.from_hub or asked.allow_random_weights):
        yield Problem(f"{config.task}.pretrained_checkpoint_dir", NO_WEIGHTS.format(config.task))
    yield from _absent(f"{config.task}.pretrained_checkpoint_dir", asked.pretrained_checkpoint_dir)
    yield from _absent(f"{config.task}.pretrained_model_path", asked.pretrained_model_path)


def _absent(key: str, path: str | None) -> Iterator[Problem]:
    """What is wrong with a path, if it is set, not on the hub, and names nothing, be it a file, a folder or a glob."""
    if not path or "://" in path or Path(path).exists():
        return
    if not has_magic(path) or next(iglob(path, recursive=True), None) is None:
        yield Problem(key, f"nothing at {path!r}")
