"""What is exported: a model of ours in float32 with its tokenizer, and what the run that trained it left beside it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from neobert.errors import CheckpointError
from neobert.inference.load import (
    EMBEDDING,
    FOREIGN,
    Model,
    build_model,
    find_model,
    load_model_tokenizer,
    load_model_weights,
    read_model_config,
)
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.model.layouts import is_eurobert
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification
from neobert.training.checkpoint import STATE, verify_checkpoint


@dataclass(frozen=True)
class Source:
    """A model to export. `fields` is its config.json; `run` the output folder of the run, `state` what its checkpoint counts,
    `config` its YAML: empty where the source is no checkpoint."""

    folder: Path
    fields: dict[str, Any]
    model: Model
    tokenizer: Any
    run: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model, NeoBERTForSequenceClassification)

    @property
    def is_embedder(self) -> bool:
        """An encoder alone, trained to embed."""
        return isinstance(self.model, NeoBERTForEmbedding)

    @property
    def trained_embedding(self) -> dict[str, Any]:
        """`pooling` and `max_length` that the model was trained or exported with; empty otherwise."""
        return self.fields.get("neobert", {}).get(EMBEDDING, {})

    @property
    def longest(self) -> int:
        """The longest text it is for, in tokens."""
        positions = self.model.config.max_position_embeddings
        return min(positions, self.trained_embedding.get("max_length", positions))

    @property
    def is_native(self) -> bool:
        """Whether transformers' own EuroBERT computes this model."""
        return is_eurobert(self.model.config)


def load_source(path: str) -> Source:
    """The model at `path`: a run's folder, a checkpoint, or an export. Raises CheckpointError."""
    folder = find_model(path)
    fields = read_model_config(folder)
    if FOREIGN in fields:
        raise CheckpointError(f"{folder}: an encoder of {fields.get('model_type')}, which transformers loads as it is")
    model = build_model(folder, fields)
    load_model_weights(folder, model)
    tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
    if not (folder / STATE).is_file():
        return Source(folder, fields, model.float().eval(), tokenizer)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    return Source(folder, fields, model.float().eval(), tokenizer, run, verify_checkpoint(folder), config)
