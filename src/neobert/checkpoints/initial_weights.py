"""What a run starts with: its initial weights and their tokenizer, found and checked, and the configuration that follows.

A run that fine-tunes starts from what `<task>.pretrained_*` name, the same keys in every task: a checkpoint of ours; or from
any encoder of `AutoModel`. Pretraining starts with fresh weights, or continues a model that is there already, of any layout
that `convert` knows (`model.from_hub`, `model.name`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.checkpoints.convert import convert
from neobert.checkpoints.format import POINTERS, STATE, WEIGHTS, verify_checkpoint
from neobert.checkpoints.load import HF_ENCODER, load_model_config
from neobert.checkpoints.locate import download_model, find_checkpoint, holds_steps, read_model_config
from neobert.config.load import load_config
from neobert.config.ready import asked_weights, missing_tokenizer, missing_weights
from neobert.config.schema import Config
from neobert.data.tokenizer import fit_vocabulary, load_tokenizer, text_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError, ConfigError, Problem
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM

# What must agree where the YAML says it too; the checkpoint decides.
ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "hidden_act", "rms_norm", "rope", "norm_eps", "ngpt", "base_scale",
)  # fmt: skip


@dataclass(frozen=True)
class InitialWeights:
    """Where the first weights come from. `folder` is a checkpoint, `hub` the name of an encoder for `AutoModel`; with neither
    they are random. `task` is the GLUE task of the checkpoint, if it was trained on one; `state` is what it counts; `model` has
    the weights that pretraining continues with.
    """

    folder: Path | None = None
    hub: str | None = None
    architecture: NeoBERTConfig | None = None
    task: str | None = None
    state: dict[str, Any] | None = None
    model: NeoBERTForMaskedLM | None = None

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


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts with: the configuration with what the weights decide filled in, the weights, their tokenizer, the size
    of the vocabulary, and messages for the user.
    """

    config: Config
    weights: InitialWeights
    hf_tokenizer: Any
    vocab_size: int
    messages: list[str]


def start_fine_tuning(config: Config, fill_in: Callable[[Config, InitialWeights], Config]) -> StartingPoint:
    """Find weights and tokenizer; `fill_in` is the task's. Raises ConfigError and CheckpointError."""
    weights = find_initial_weights(config)
    hf_tokenizer, keys = find_tokenizer(config, weights)
    config = fill_in(config, weights).with_keys(tokenizer=keys)
    vocab_size, messages = len(hf_tokenizer), list[str]()
    if weights.folder is None and weights.hub is None:
        vocab_size, messages = build_vocabulary(config, hf_tokenizer)
    return StartingPoint(config, weights, hf_tokenizer, vocab_size, messages)


def start_pretraining(config: Config, resumed: Path | None) -> StartingPoint:
    """Fresh weights, those that the configuration names, or those of the checkpoint that the run goes on from, which has all
    that is needed. Raises ConfigError, DataError or CheckpointError.
    """
    if not config.model.from_hub:
        hf_tokenizer = load_named_tokenizer(config)
        size, messages = build_vocabulary(config, hf_tokenizer)
        return StartingPoint(with_vocab_size(config, size), InitialWeights(), hf_tokenizer, size, messages)
    try:
        folder = resumed or download_model(config.model.name or "")
    except CheckpointError as error:
        raise ConfigError(Problem("model.name", str(error))) from None
    found = convert(str(folder))
    if not isinstance(found.model, NeoBERTForMaskedLM):
        raise ConfigError(Problem("model.name", f"{folder} is a classifier, which has no decoder to continue with"))
    if resumed is None:  # a run that goes on has its own; that of another text is refused by the position of the data
        check_named_tokenizer(config, found.tokenizer, str(folder))
    architecture = found.model.config
    if architecture.rope and config.is_set("model.max_position_embeddings"):  # RoPE has no parameters for positions
        architecture.max_position_embeddings = config.model.max_position_embeddings
    if config.is_set("model.dropout_prob"):
        architecture.dropout_prob = config.model.dropout_prob
    if problems := contradictions(config, folder, architecture):
        raise ConfigError(*problems)
    keys = {name: getattr(architecture, name) for name in (*ARCHITECTURE, "dropout_prob")}
    config = config.with_keys(model=keys, tokenizer={"path": str(tokenizer_folder(found.folder))})
    row, longest = config.row_length, config.model.max_position_embeddings
    if row > longest:
        path = "dataset.max_seq_length" if row == config.dataset.max_seq_length else "datacollator.max_length"
        raise ConfigError(Problem(path, f"{row} is longer than the {longest} positions of {config.model.name}"))
    model = NeoBERTForMaskedLM(architecture)  # again, for the dropout and the positions that the YAML sets
    model.load_state_dict(found.model.state_dict())
    weights = InitialWeights(found.folder, architecture=architecture, model=model)
    messages = [f"continuing from {found.folder} ({found.kind}) with a fresh optimizer", *found.notes]
    config = with_vocab_size(config, architecture.vocab_size)
    return StartingPoint(config, weights, found.tokenizer, architecture.vocab_size, [] if resumed else messages)


# --- the weights -----------


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
    state, task = read_state(folder), glue_task(folder)
    if config.task == "glue" and transfer != (task is not None):
        problem = f"{folder} is not a checkpoint of a GLUE task"
        if task is not None:
            problem = f"{folder} is a checkpoint of the GLUE task {task}; set it to true to start from there"
        raise ConfigError(Problem("glue.transfer_from_task", problem))
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


def build_vocabulary(config: Config, hf_tokenizer: Any) -> tuple[int, list[str]]:
    """Make `len(tokenizer)` the model's vocabulary size; returns it with messages where it differs from the YAML."""
    real = len(hf_tokenizer)
    follows = config.model.vocab_size == type(config.model).model_fields["vocab_size"].default
    wanted = None if follows else config.model.vocab_size
    size = fit_vocabulary(hf_tokenizer, wanted)
    messages = []
    if wanted is not None and wanted != size:
        messages.append(
            f"model.vocab_size is {size:,}, not {wanted:,}: {real:,} tokens are real, and the size is a multiple of 64"
        )
    if config.is_set("model.pad_token_id") and config.model.pad_token_id != hf_tokenizer.pad_token_id:
        messages.append(
            f"model.pad_token_id is {hf_tokenizer.pad_token_id}, not {config.model.pad_token_id}: it follows the tokenizer"
        )
    return size, messages


def with_vocab_size(config: Config, size: int) -> Config:
    """`tokenizer.vocab_size`, where it is set, as it is in this run."""
    if config.tokenizer.vocab_size is None:
        return config
    return config.with_keys(tokenizer={"vocab_size": size})
