"""The initial weights of a run that fine-tunes, found and checked: a checkpoint of ours, any encoder of `AutoModel`, or none.

The keys that name them are `<task>.pretrained_*`: the same in every task.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.checkpoints.format import POINTERS, STATE, WEIGHTS, verify_checkpoint
from neobert.checkpoints.load import HF_ENCODER, load_model_config
from neobert.checkpoints.locate import find_checkpoint, holds_steps, read_model_config
from neobert.config.load import load_config
from neobert.config.ready import asked_weights, missing_tokenizer, missing_weights
from neobert.config.schema import Config
from neobert.data.tokenizer import load_tokenizer, text_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError, ConfigError, Problem
from neobert.model.modeling_neobert import NeoBERTConfig

# What must agree where the YAML says it too; the checkpoint decides.
ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "hidden_act", "rms_norm", "rope", "norm_eps", "ngpt", "base_scale",
)  # fmt: skip


@dataclass(frozen=True)
class InitialWeights:
    """Where the first weights come from. `folder` is a checkpoint, `hub` the name of an encoder for `AutoModel`; with neither
    they are random. `task` is the GLUE task of the checkpoint, if it was trained on one; `state` is what it counts."""

    folder: Path | None = None
    hub: str | None = None
    architecture: NeoBERTConfig | None = None
    task: str | None = None
    state: dict[str, Any] | None = None

    @property
    def inherited(self) -> dict[str, Any]:
        """What the weights decide and no key says: fields of our config."""
        return {} if self.architecture is None else {"rope_theta": self.architecture.rope_theta}

    @property
    def describe(self) -> str:
        """The weights in words, for the summary and the protocol."""
        if self.folder is None:
            return f"{self.hub} (transformers)" if self.hub else "random"
        what = f"GLUE {self.task}" if self.task else "pretraining"
        step = f", {what} step {self.state['step']:,}" if self.state else ""
        return f"{self.folder}{step}"

    @property
    def identity(self) -> str:
        """A text that differs between two sets of weights."""
        return str(self.state["checksum"])[:16] if self.state else self.describe


def find_initial_weights(config: Config) -> InitialWeights:
    """The weights that the configuration names. Raises ConfigError or CheckpointError."""
    model, transfer = config.model, config.task == "glue" and config.glue.transfer_from_task
    if model.from_hub and not model.name:
        raise ConfigError(Problem("model.name", "not set; model.from_hub loads the encoder that it names"))
    folder = find_folder(config)
    if folder is None:
        if missing := list(missing_weights(config)):
            raise ConfigError(*missing)
        return InitialWeights(hub=model.name if model.from_hub else None)
    state = read_state(folder)
    task = glue_task(folder)
    if config.task == "glue":
        _check_transfer(folder, task, transfer)
    if model.from_hub:
        if config.task != "glue" or task is None or HF_ENCODER not in read_config(folder):
            raise ConfigError(
                Problem("model.from_hub", f"{folder} is not a checkpoint of {model.name}; leave one of them out")
            )
        return InitialWeights(folder, model.name, None, task, state)
    architecture = load_model_config(folder)
    _check_architecture(config, folder, architecture)
    return InitialWeights(folder, None, architecture, task, state)


def find_folder(config: Config) -> Path | None:
    """The checkpoint that `pretrained_*` name, or None. Raises CheckpointError or ConfigError."""
    asked = asked_weights(config)
    chosen = asked.pretrained_checkpoint
    selector = str(config.pretrained_checkpoint if chosen is None else chosen)
    if selector not in POINTERS and not selector.isdigit():
        return find_checkpoint(selector)
    if asked.pretrained_checkpoint_dir is not None:
        root = Path(asked.pretrained_checkpoint_dir)
    elif asked.pretrained_model_path is not None:
        root = Path(asked.pretrained_model_path)
        root = root.parent if root.is_file() else root
        if not holds_steps(root) and (root / WEIGHTS).is_file():
            return root
    elif chosen is not None:
        where = f"{config.task}.pretrained_checkpoint"
        raise ConfigError(Problem(where, f"{selector} of what? set {where}_dir"))
    else:
        return None
    return find_checkpoint(selector, root / "checkpoints" if (root / "checkpoints").is_dir() else root)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint of ours. Raises CheckpointError."""
    found = read_model_config(folder)
    if not ({"neobert", HF_ENCODER} & set(found)):
        raise CheckpointError(
            f"{folder}: not one of our checkpoints; to start from an encoder of transformers set model.from_hub: true and "
            f"model.name: {folder}"
        )
    return found


def read_state(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint counts, with its own checksum, once it is verified; None for a folder that is only a model."""
    if not (folder / STATE).is_file():
        return None
    state = verify_checkpoint(folder)
    return {**state, "checksum": json.loads((folder / STATE).read_text())["checksum"]}


def glue_task(folder: Path) -> str | None:
    """The GLUE task that a checkpoint was fine-tuned on, or None."""
    found = read_config(folder)
    task: str | None = found.get("neobert", found.get(HF_ENCODER, {})).get("glue_task")
    return task


def _check_transfer(folder: Path, task: str | None, transfer: bool) -> None:
    if task is not None and not transfer:
        problem = f"{folder} is a checkpoint of the GLUE task {task}; set it to true to start from there"
        raise ConfigError(Problem("glue.transfer_from_task", problem))
    if task is None and transfer:
        raise ConfigError(Problem("glue.transfer_from_task", f"{folder} is not a checkpoint of a GLUE task"))


def contradictions(config: Config, folder: Path, found: NeoBERTConfig) -> list[Problem]:
    """What the YAML says of the model that is not so in `folder`."""
    return [
        Problem(
            f"model.{name}", f"{getattr(config.model, name)}, but {folder} has {getattr(found, name)}; leave it out"
        )
        for name in ARCHITECTURE
        if config.is_set(f"model.{name}") and getattr(config.model, name) != getattr(found, name)
    ]


def _check_architecture(config: Config, folder: Path, found: NeoBERTConfig) -> None:
    """What the YAML says of the model, and the model that `pretrained_model_path` names, must be what is in `folder`."""
    problems = contradictions(config, folder, found)
    asked = asked_weights(config)
    path = asked.pretrained_model_path
    if path is not None and asked.pretrained_checkpoint_dir is not None:
        expected = _expected_architecture(Path(path))
        problems += [
            Problem(
                f"{config.task}.pretrained_model_path",
                f"{path} has {name} {getattr(expected, name)}, {folder} has {value}",
            )
            for name in ARCHITECTURE
            if getattr(expected, name) != (value := getattr(found, name))
        ]
    if problems:
        raise ConfigError(*problems)


def _expected_architecture(path: Path) -> Any:
    if path.suffix in (".yaml", ".yml"):
        return load_config([str(path)]).config.model
    if not path.is_file() and not (path / "config.json").is_file():
        path = find_checkpoint(str(path))
    return load_model_config(path.parent if path.is_file() else path)


def architecture_keys(config: Config, start: InitialWeights) -> dict[str, Any]:
    """The keys of `model` as the weights have them; dropout too, where the YAML does not set it."""
    if start.architecture is None:
        return {}
    found = {name: getattr(start.architecture, name) for name in ARCHITECTURE}
    if not config.is_set("model.dropout_prob"):
        found["dropout_prob"] = start.architecture.dropout_prob
    return found


def check_length(config: Config, start: InitialWeights, dotted: str, length: int) -> None:
    """Raises ConfigError for rows that are longer than the model's positions."""
    longest = config.model.max_position_embeddings
    if start.hub is None and length > longest:
        raise ConfigError(Problem(dotted, f"{length} is longer than the model's max_position_embeddings {longest}"))


# --- the tokenizer -----------


def load_named_tokenizer(config: Config) -> Any:
    """The tokenizer that `tokenizer` names. Raises ConfigError where nobody named one, and DataError."""
    if config.tokenizer.path is None and (missing := missing_tokenizer(config)):
        raise ConfigError(missing)
    return load_tokenizer(config.tokenizer.name, config.tokenizer.path)


def find_tokenizer(config: Config, start: InitialWeights) -> tuple[Any, dict[str, Any]]:
    """(tokenizer, the keys of `tokenizer` that name it): the one that the weights were trained with.

    Raises CheckpointError when the YAML names another one.
    """
    named = config.tokenizer
    if start.folder is not None:
        keys: dict[str, Any] = {"path": str(tokenizer_folder(start.folder))}
    elif start.hub is not None:
        keys = {"path": start.hub} if Path(start.hub).is_dir() else {"name": start.hub, "path": None}
    else:
        return load_named_tokenizer(config), {}
    found = load_tokenizer(keys.get("name", ""), keys["path"])
    check_named_tokenizer(config, found, str(start.folder or start.hub))
    size = {} if named.vocab_size is None else {"vocab_size": len(found)}
    return found, {**keys, **size}


def check_named_tokenizer(config: Config, found: Any, origin: str) -> None:
    """Raises CheckpointError when the YAML names another tokenizer than `found`, that of the weights in `origin`."""
    named = config.tokenizer
    by_name = config.is_set("tokenizer.name") and named.name != type(named).model_fields["name"].default
    if named.path is None and not by_name:
        return
    wanted = load_tokenizer(named.name, named.path)
    if text_tokenizer(wanted).fingerprint != text_tokenizer(found).fingerprint:
        where = f"tokenizer.{'path' if named.path else 'name'}: {named.path or named.name!r}"
        raise CheckpointError(
            f"{where} is another tokenizer than that of {origin}; leave it out: the tokenizer follows the weights"
        )
