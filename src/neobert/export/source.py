"""What is exported: a model of ours in float32 with its tokenizer, and what the run that trained it left beside it."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from neobert.checkpoints.format import STATE, load_weights, verify_checkpoint
from neobert.checkpoints.hf import load_encoder
from neobert.checkpoints.layouts import is_eurobert
from neobert.checkpoints.load import (
    EMBEDDING,
    HF_ENCODER,
    Model,
    build_model,
    check_fit,
    find_model,
    load_model_tokenizer,
    load_model_weights,
    read_model_config,
)
from neobert.errors import CheckpointError
from neobert.inference.sentence_transformers import SentenceSettings, read_sentence_settings
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding, HFEncoderForSequenceClassification, longest_input
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification

HFEncoderModel = HFEncoderForSequenceClassification | HFEncoderForEmbedding
POOLING = {"cls": "bos"}  # of a classifier: ours -> transformers' names
LONGEST = 512  # tokens of a text for a model that nothing limits


@dataclass(frozen=True)
class Source:
    """A model to export. `fields` is its config.json; `run` the output folder of the run, `state` what its checkpoint counts,
    `config` its YAML: empty where the source is no checkpoint."""

    folder: Path
    fields: dict[str, Any]
    model: Model | HFEncoderModel
    tokenizer: Any
    run: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model, NeoBERTForSequenceClassification | HFEncoderForSequenceClassification)

    @property
    def is_embedder(self) -> bool:
        """An encoder alone, trained to embed."""
        return isinstance(self.model, NeoBERTForEmbedding | HFEncoderForEmbedding)

    @property
    def is_hf_encoder(self) -> bool:
        """Whether the encoder is one of transformers' making."""
        return isinstance(self.model, HFEncoderModel)

    @cached_property
    def sentence(self) -> SentenceSettings:
        """How the model was trained or exported to embed. Raises CheckpointError for what an export cannot keep."""
        found = read_sentence_settings(self.folder)
        lost = {
            "Dense modules": len(found.head),
            "default_prompt_name": found.default_prompt,
            "include_prompt: false": not found.include_prompt,
            "do_lower_case": found.lower_case,
            f"similarity_fn_name {found.similarity}": found.similarity != "cosine",
        }
        if names := [name for name, is_there in lost.items() if is_there]:
            raise CheckpointError(f"{self.folder}: its {', '.join(names)} cannot be exported; use the folder as it is")
        return found

    @property
    def positions(self) -> int:
        """The longest text that it takes, in tokens."""
        return longest_input(self.model) or min(self.tokenizer.model_max_length, LONGEST)

    @property
    def longest(self) -> int:
        """The longest text it is for, in tokens."""
        return min(self.positions, self.sentence.max_length or self.positions)

    @property
    def is_native(self) -> bool:
        """Whether a class of transformers' own computes this model: EuroBERT, or that of its encoder."""
        return self.is_hf_encoder or is_eurobert(self.model.config)


def load_source(path: str) -> Source:
    """The model at `path`: a run's folder, a checkpoint, or an export. Raises CheckpointError."""
    folder = find_model(path)
    fields = read_model_config(folder)
    if HF_ENCODER in fields:
        model: Model | HFEncoderModel = _load_hf_encoder(folder, fields[HF_ENCODER])
    else:
        model = build_model(folder, fields)
        load_model_weights(folder, model)
    tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
    if not (folder / STATE).is_file():
        return Source(folder, fields, model.float().eval(), tokenizer)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    return Source(folder, fields, model.float().eval(), tokenizer, run, verify_checkpoint(folder), config)


def _load_hf_encoder(folder: Path, head: dict[str, Any]) -> HFEncoderModel:
    """The model of a checkpoint whose encoder is one of transformers' making. Raises CheckpointError."""
    encoder = load_encoder(str(folder))
    if "glue_task" not in head:
        settings = ContrastiveSettings(pooling=head[EMBEDDING]["pooling"])
        return HFEncoderForEmbedding(encoder, settings, encoder.config.pad_token_id or 0)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # as it was trained
    pooling = POOLING.get(head["pooling"], head["pooling"])
    model = HFEncoderForSequenceClassification(encoder, head["num_labels"], pooling, 0.0, 0.02)
    weights = model.from_checkpoint(load_weights(folder))
    check_fit(folder, weights, model.state_dict())
    model.load_state_dict(weights)
    return model
