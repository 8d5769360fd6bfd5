"""What a run starts with: its initial weights and their tokenizer, found and checked, and the configuration that follows.

A run that fine-tunes starts from what `<task>.pretrained_*` name, the same keys in every task: a checkpoint of ours; or from
any encoder of `AutoModel`. Pretraining starts with fresh weights, or continues a model that is there already, of any layout
that `convert` knows (`model.from_hub`, `model.name`).
"""

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
from neobert.files import read_json
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
    """What a run starts with: the configuration with what the weights decide filled in, the weights, their tokenizer, whose
    length is the size of the vocabulary, and messages for the user.
    """

    config: Config
    weights: InitialWeights
    hf_tokenizer: Any
    messages: list[str]


def start_fine_tuning(config: Config, fill_in: Callable[[Config, InitialWeights], Config]) -> StartingPoint:
    """Find weights and the tokenizer that they were trained with; `fill_in` is the task's. Raises ConfigError, DataError, and
    CheckpointError, also when the YAML names another tokenizer.
    """
    weights = find_initial_weights(config)
    if weights.folder is None and weights.hub is None:
        hf_tokenizer = load_named_tokenizer(config)
        messages = build_vocabulary(config, hf_tokenizer)
        return StartingPoint(fill_in(config, weights), weights, hf_tokenizer, messages)
    if weights.folder is not None:
        keys: dict[str, Any] = {"path": str(tokenizer_folder(weights.folder))}
    else:
        keys = {"path": weights.hub} if Path(str(weights.hub)).is_dir() else {"name": weights.hub, "path": None}
    hf_tokenizer = load_tokenizer(keys.get("name", ""), keys["path"])
    check_named_tokenizer(config, hf_tokenizer, str(weights.folder or weights.hub))
    return StartingPoint(with_tokenizer(fill_in(config, weights), hf_tokenizer, keys), weights, hf_tokenizer, [])


def start_pretraining(config: Config, resumed: Path | None) -> StartingPoint:
    """Fresh weights, those that the configuration names, or those of the checkpoint that the run goes on from, which has all
    that is needed. Raises ConfigError, DataError or CheckpointError.
    """
    if not config.model.from_hub:
        hf_tokenizer = load_named_tokenizer(config)
        messages = build_vocabulary(config, hf_tokenizer)
        return StartingPoint(with_tokenizer(config, hf_tokenizer), InitialWeights(), hf_tokenizer, messages)
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
    check_architecture(config, folder, architecture)
    model = NeoBERTForMaskedLM(architecture)  # again, for the dropout and the positions that the YAML sets
    model.load_state_dict(found.model.state_dict())
    weights = InitialWeights(found.folder, architecture=architecture, model=model)
    config = config.with_keys(model=architecture_keys(config, weights))
    config = with_tokenizer(config, found.tokenizer, {"path": str(tokenizer_folder(found.folder))})
    row, longest = config.row_length, config.model.max_position_embeddings
    if row > longest:
        path = "dataset.max_seq_length" if row == config.dataset.max_seq_length else "datacollator.max_length"
        raise ConfigError(Problem(path, f"{row} is longer than the {longest} positions of {config.model.name}"))
    messages = [f"continuing from {found.folder} ({found.layout}) with a fresh optimizer", *found.notes]
    return StartingPoint(config, weights, found.tokenizer, [] if resumed else messages)


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
    state = None  # of a folder that is only a model
    if (folder / STATE).is_file():
        verify_checkpoint(folder)
        state = read_json(folder / STATE)
    task = glue_task(folder)
    if config.task == "glue" and transfer != (task is not None):
        problem = f"{folder} is not a checkpoint of a GLUE task"
        if task is not None:
            problem = f"{folder} is a checkpoint of the GLUE task {task}; set it to true to start from there"
        raise ConfigError(Problem("glue.transfer_from_task", problem))
    if not model.from_hub:
        architecture = load_model_config(folder)
        check_architecture(config, folder, architecture)
        return InitialWeights(folder, None, architecture, task, state)
    if config.task != "glue" or task is None or HF_ENCODER not in read_model_config(folder):
        problem = f"{folder} is not a checkpoint of {model.name}; leave one of them out"
        raise ConfigError(Problem("model.from_hub", problem))
    return InitialWeights(folder, model.name, None, task, state)


def find_folder(config: Config) -> Path | None:
    """The checkpoint that `pretrained_*` name, or None. Raises CheckpointError or ConfigError."""
    asked = asked_weights(config)
    chosen = asked.pretrained_checkpoint
    selector = str(config.pretrained_checkpoint if chosen is None else chosen)
    if selector not in POINTERS and not selector.isdigit():
        return find_checkpoint(selector)
    named = asked.pretrained_checkpoint_dir or asked.pretrained_model_path
    if named is None:
        if chosen is None:
            return None
        where = f"{config.task}.pretrained_checkpoint"
        raise ConfigError(Problem(where, f"{selector} of what? set {where}_dir"))
    root = Path(named)
    if not asked.pretrained_checkpoint_dir:
        root = root.parent if root.is_file() else root
        if not holds_steps(root) and (root / WEIGHTS).is_file():
            return root
    return find_checkpoint(selector, root / "checkpoints" if (root / "checkpoints").is_dir() else root)


def glue_task(folder: Path) -> str | None:
    """The GLUE task that a checkpoint of ours was fine-tuned on, or None. Raises CheckpointError for a model of others."""
    found = read_model_config(folder)
    own = found.get("neobert", found.get(HF_ENCODER))
    if own is None:
        hint = f"to start from an encoder of transformers set model.from_hub: true and model.name: {folder}"
        raise CheckpointError(f"{folder}: not one of our checkpoints; {hint}")
    task: str | None = own.get("glue_task")
    return task


def check_architecture(config: Config, folder: Path, found: NeoBERTConfig) -> None:
    """Raises ConfigError where the YAML, or the model that `pretrained_model_path` names, has not the architecture `found` in
    `folder`.
    """
    values = {name: getattr(found, name) for name in ARCHITECTURE}
    problems = [
        Problem(f"model.{name}", f"{wanted}, but {folder} has {value}; leave it out")
        for name, value in values.items()
        if config.is_set(f"model.{name}") and (wanted := getattr(config.model, name)) != value
    ]
    asked = asked_weights(config)
    if config.task != "pretraining" and asked.pretrained_model_path and asked.pretrained_checkpoint_dir is not None:
        path = Path(asked.pretrained_model_path)
        if path.suffix in (".yaml", ".yml"):
            expected: Any = load_config([str(path)]).config.model
        elif path.is_file() or (path / "config.json").is_file():
            expected = load_model_config(path.parent if path.is_file() else path)
        else:
            expected = load_model_config(find_checkpoint(str(path)))
        problems += [
            Problem(f"{config.task}.pretrained_model_path", f"{path} has {name} {wanted}, {folder} has {value}")
            for name, value in values.items()
            if (wanted := getattr(expected, name)) != value
        ]
    if problems:
        raise ConfigError(*problems)


def architecture_keys(config: Config, start: InitialWeights) -> dict[str, Any]:
    """The keys of `model` as the weights have them; dropout too, where the YAML does not set it."""
    names = ARCHITECTURE if config.is_set("model.dropout_prob") else (*ARCHITECTURE, "dropout_prob")
    return {} if start.architecture is None else {name: getattr(start.architecture, name) for name in names}


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


def check_named_tokenizer(config: Config, found: Any, origin: str) -> None:
    """Raises CheckpointError when the YAML names another tokenizer than `found`, that of the weights in `origin`."""
    named = config.tokenizer
    if named.path is None and not config.is_chosen("tokenizer.name"):
        return
    wanted = load_tokenizer(named.name, named.path)
    if text_tokenizer(wanted).fingerprint != text_tokenizer(found).fingerprint:
        where = f"tokenizer.{'path' if named.path else 'name'}: {named.path or named.name!r}"
        hint = "leave it out: the tokenizer follows the weights"
        raise CheckpointError(f"{where} is another tokenizer than that of {origin}; {hint}")


def build_vocabulary(config: Config, hf_tokenizer: Any) -> list[str]:
    """Make `len(hf_tokenizer)` the model's vocabulary size; returns messages where that differs from the YAML."""
    real, asked, pad_id = len(hf_tokenizer), config.model, hf_tokenizer.pad_token_id
    wanted = asked.vocab_size if config.is_chosen("model.vocab_size") else None
    size, messages = fit_vocabulary(hf_tokenizer, wanted), list[str]()
    if wanted is not None and wanted != size:
        why = f"{real:,} tokens are real, and the size is a multiple of 64"
        messages.append(f"model.vocab_size is {size:,}, not {wanted:,}: {why}")
    if config.is_set("model.pad_token_id") and asked.pad_token_id != pad_id:
        messages.append(f"model.pad_token_id is {pad_id}, not {asked.pad_token_id}: it follows the tokenizer")
    return messages


def with_tokenizer(config: Config, hf_tokenizer: Any, keys: dict[str, Any] | None = None) -> Config:
    """The tokenizer's `keys`, and its size where that is set, as they are in this run."""
    size = {} if config.tokenizer.vocab_size is None else {"vocab_size": len(hf_tokenizer)}
    return config.with_keys(tokenizer={**(keys or {}), **size})
