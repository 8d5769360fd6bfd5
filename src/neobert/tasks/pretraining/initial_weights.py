"""What pretraining starts from: fresh weights, or those of a model that is there already (`model.from_hub`, `model.name`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neobert.checkpoints.convert import convert
from neobert.checkpoints.hf import model_folder
from neobert.checkpoints.initial_weights import (
    ARCHITECTURE,
    check_named_tokenizer,
    contradictions,
    load_named_tokenizer,
)
from neobert.config.schema import Config
from neobert.data.tokenizer import tokenizer_folder
from neobert.errors import CheckpointError, ConfigError, Problem
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.tasks.encoder import build_model, build_vocabulary, with_vocab_size


@dataclass(frozen=True)
class Begin:
    """Configuration (with what follows from the weights filled in), tokenizer, size of the vocabulary, what to tell the user;
    the first weights, where they are not drawn."""

    config: Config
    hf_tokenizer: Any
    vocab_size: int
    notes: list[str]
    model: NeoBERTForMaskedLM | None = None

    def build_model(self, pad_token_id: int) -> NeoBERTForMaskedLM:
        """The model with its first weights."""
        if self.model is None:
            return build_model(self.config, self.vocab_size, pad_token_id)
        torch.manual_seed(self.config.seed)
        self.model.model.gradient_checkpointing = self.config.trainer.gradient_checkpointing
        return self.model.train()

    @property
    def name(self) -> str | None:
        """The model's name, for config.json; of a folder its last part."""
        name = self.config.model.name
        return Path(name).name if name is not None and self.model is not None else name


def begin(config: Config, resumed: Path | None) -> Begin:
    """What the configuration names to start from, or the checkpoint that the run goes on from, which has all that is needed.

    Raises ConfigError, DataError or CheckpointError.
    """
    if not config.model.from_hub:
        hf_tokenizer = load_named_tokenizer(config)
        size, notes = build_vocabulary(config, hf_tokenizer)
        return Begin(with_vocab_size(config, size), hf_tokenizer, size, notes)
    folder = resumed or _named(config.model.name or "")
    found = convert(str(folder))
    if not isinstance(found.model, NeoBERTForMaskedLM):
        raise ConfigError(Problem("model.name", f"{folder} is a classifier, which has no decoder to continue with"))
    if resumed is None:  # a run that goes on has its own; that of another text is refused by the position of the data
        check_named_tokenizer(config, found.tokenizer, str(folder))
    architecture = found.model.config
    _apply_settable(config, architecture)
    if problems := contradictions(config, folder, architecture):
        raise ConfigError(*problems)
    config = _settle(config, architecture, found.folder)
    _check_rows(config)
    model = NeoBERTForMaskedLM(architecture)  # again, for the dropout and the positions that the YAML sets
    model.load_state_dict(found.model.state_dict())
    notes = [f"continuing from {found.folder} ({found.kind}) with a fresh optimizer", *found.notes]
    config = with_vocab_size(config, architecture.vocab_size)
    return Begin(config, found.tokenizer, architecture.vocab_size, [] if resumed else notes, model)


def _named(name: str) -> Path:
    try:
        return model_folder(name)
    except CheckpointError as error:
        raise ConfigError(Problem("model.name", str(error))) from None


def _apply_settable(config: Config, architecture: NeoBERTConfig) -> None:
    """What the YAML may set anew: dropout, and with RoPE, which has no parameters for positions, the longest input."""
    if architecture.rope and config.is_set("model.max_position_embeddings"):
        architecture.max_position_embeddings = config.model.max_position_embeddings
    if config.is_set("model.dropout_prob"):
        architecture.dropout_prob = config.model.dropout_prob


def _settle(config: Config, architecture: NeoBERTConfig, folder: Path) -> Config:
    """The configuration with architecture and tokenizer of the weights, as it is saved: it loads to the same run."""
    values = {name: getattr(architecture, name) for name in (*ARCHITECTURE, "dropout_prob")}
    tokenizer = {"path": str(tokenizer_folder(folder))}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=values),
            "tokenizer": config.tokenizer.model_copy(update=tokenizer),
        }
    )


def _check_rows(config: Config) -> None:
    longest = config.model.max_position_embeddings
    row = config.row_length
    if row > longest:
        path = "dataset.max_seq_length" if row == config.dataset.max_seq_length else "datacollator.max_length"
        raise ConfigError(Problem(path, f"{row} is longer than the {longest} positions of {config.model.name}"))
