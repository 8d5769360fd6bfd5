"""The model of a contrastive run: built, given its first weights, and stored in checkpoints."""

from pathlib import Path
from typing import Any

import torch

from neobert.checkpoints.initial_weights import InitialWeights
from neobert.checkpoints.layouts import is_eurobert
from neobert.checkpoints.load import EMBEDDING, HF_ENCODER
from neobert.config.schema import Config
from neobert.data.tokenizer import save_tokenizer
from neobert.inference.embed import EmbeddingModel
from neobert.inference.sentence_transformers import Embedding, write_sentence_transformers
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding
from neobert.tasks.contrastive.data import longest_text
from neobert.tasks.encoder import checkpoint_config, model_config
from neobert.tasks.weights import hf_encoder_storage, load_hf_encoder, load_own_encoder, own_storage
from neobert.training.run import Storage


def build_model(config: Config, start: InitialWeights, vocab_size: int, pad_id: int) -> tuple[EmbeddingModel, str]:
    """(the model with its first weights, what was loaded in one line). Raises CheckpointError and ConfigError."""
    torch.manual_seed(config.seed)
    asked = config.contrastive
    settings = ContrastiveSettings(asked.loss_type, asked.temperature, asked.hard_negative_weight, asked.pooling)
    if start.hub is not None:
        encoder = load_hf_encoder(config, start.hub, vocab_size, "dataset.max_seq_length", longest_text(config))
        return HFEncoderForEmbedding(encoder, settings, pad_id), f"{start.hub}, all of the encoder"
    model = NeoBERTForEmbedding(model_config(config, vocab_size, pad_id, **start.inherited), settings)
    model.model.gradient_checkpointing = config.trainer.gradient_checkpointing
    return model, load_own_encoder(start, model, vocab_size)


def build_storage(config: Config, model: EmbeddingModel, hf_tokenizer: Any) -> Storage:
    """How the encoder is written to checkpoints and read back; transformers' `AutoModel` reads them too."""
    trained = {EMBEDDING: {"pooling": config.contrastive.pooling, "max_length": longest_text(config)}}
    width, embedding = model.config.hidden_size, Embedding(config.contrastive.pooling, max_length=longest_text(config))

    def save_beside(folder: Path) -> None:
        save_tokenizer(hf_tokenizer, folder, has_token_types=isinstance(model, HFEncoderForEmbedding))
        write_sentence_transformers(folder, width, embedding)

    if isinstance(model, HFEncoderForEmbedding):  # stored under the names of the encoder itself
        return hf_encoder_storage(
            model,
            {HF_ENCODER: trained},
            save_beside,
            lambda weights: {name.removeprefix("model."): tensor for name, tensor in weights.items()},
            lambda weights: {f"model.{name}": tensor for name, tensor in weights.items()},
        )
    fields = checkpoint_config(model.config, hf_tokenizer, config.model.name)
    kind = "EuroBertModel" if is_eurobert(model.config) else "NeoBERTForEmbedding"
    fields |= {"architectures": [kind], "neobert": {**fields["neobert"], **trained}}
    return own_storage(model, fields, save_beside)
