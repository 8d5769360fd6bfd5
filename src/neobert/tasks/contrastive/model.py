"""The model of a contrastive run: built, given its first weights, and stored in checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neobert.checkpoints.format import Tensors, load_weights
from neobert.checkpoints.initial_weights import InitialWeights, check_encoder_length
from neobert.checkpoints.layouts import is_eurobert, to_eurobert
from neobert.checkpoints.load import EMBEDDING, HF_ENCODER, check_fit, load_model_weights, read_weights
from neobert.config.schema import Config
from neobert.data.tokenizer import save_tokenizer
from neobert.errors import CheckpointError
from neobert.inference.embed import EmbeddingModel
from neobert.inference.sentence_transformers import Embedding, write_sentence_transformers
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding
from neobert.optim.sharding import load_whole
from neobert.tasks.contrastive.data import longest_text
from neobert.tasks.encoder import checkpoint_config, load_encoder, load_hf_encoder, model_config
from neobert.training.run import Storage
from neobert.training.runtime import whole_weights


def build_model(config: Config, start: InitialWeights, vocab_size: int, pad_id: int) -> tuple[EmbeddingModel, str]:
    """(the model with its first weights, what was loaded in one line). Raises CheckpointError and ConfigError."""
    torch.manual_seed(config.seed)
    asked = config.contrastive
    settings = ContrastiveSettings(asked.loss_type, asked.temperature, asked.hard_negative_weight, asked.pooling)
    if start.hub is not None:
        return _hf_encoder(config, start.hub, settings, vocab_size, pad_id), f"{start.hub}, all of the encoder"
    model = NeoBERTForEmbedding(model_config(config, vocab_size, pad_id, **start.inherited), settings)
    model.model.gradient_checkpointing = config.trainer.gradient_checkpointing
    if start.folder is None or start.architecture is None:
        return model, "random"
    if start.architecture.vocab_size != vocab_size:
        raise CheckpointError(
            f"{start.folder}: embeddings of {start.architecture.vocab_size} tokens, but its tokenizer has {vocab_size}"
        )
    return model, load_encoder(start.folder, model, read_weights(start.folder, start.architecture))


def _hf_encoder(
    config: Config, name: str, settings: ContrastiveSettings, vocab_size: int, pad_id: int
) -> HFEncoderForEmbedding:
    encoder = load_hf_encoder(name)
    if vocab_size > encoder.config.vocab_size:
        raise CheckpointError(
            f"tokenizer: {vocab_size} tokens, but {name} has embeddings of {encoder.config.vocab_size}"
        )
    check_encoder_length(encoder, name, "dataset.max_seq_length", longest_text(config))
    if config.trainer.gradient_checkpointing:
        encoder.gradient_checkpointing_enable()
    return HFEncoderForEmbedding(encoder, settings, pad_id)


def build_storage(config: Config, model: EmbeddingModel, hf_tokenizer: Any) -> Storage:
    """How the encoder is written to checkpoints and read back; transformers' `AutoModel` reads them too."""
    trained = {EMBEDDING: {"pooling": config.contrastive.pooling, "max_length": longest_text(config)}}
    width, embedding = model.config.hidden_size, Embedding(config.contrastive.pooling, max_length=longest_text(config))

    def save_beside(folder: Path) -> None:
        save_tokenizer(hf_tokenizer, folder, has_token_types=isinstance(model, HFEncoderForEmbedding))
        write_sentence_transformers(folder, width, embedding)

    if isinstance(model, HFEncoderForEmbedding):
        return _hf_encoder_storage(model, trained, save_beside)

    def content() -> tuple[Tensors, dict[str, Any]]:
        weights, fields = whole_weights(model), checkpoint_config(model.config, hf_tokenizer, config.model.name)
        is_euro = is_eurobert(model.config)
        kind = "EuroBertModel" if is_euro else "NeoBERTForEmbedding"
        fields = {**fields, "architectures": [kind], "neobert": {**fields["neobert"], **trained}}
        return to_eurobert(weights) if is_euro else weights, fields

    return Storage(content, lambda folder: load_model_weights(folder, model), save_beside)


def _hf_encoder_storage(
    model: HFEncoderForEmbedding, trained: dict[str, Any], save_beside: Callable[[Path], None]
) -> Storage:
    """Under the names of the encoder itself."""

    def content() -> tuple[Tensors, dict[str, Any]]:
        fields = json.loads(model.config.to_json_string(use_diff=False))
        weights = {name.removeprefix("model."): tensor for name, tensor in whole_weights(model).items()}
        return weights, {**fields, HF_ENCODER: trained}

    def load(folder: Path) -> None:
        weights = {f"model.{name}": tensor for name, tensor in load_weights(folder).items()}
        check_fit(folder, weights, model.state_dict())
        load_whole(model, weights)

    return Storage(content, load, save_beside)
