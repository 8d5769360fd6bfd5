"""A trained model and its tokenizer, from a checkpoint or from a folder that `neobert export` wrote."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from neobert.checkpoints.format import WEIGHTS, Tensors, load_weights
from neobert.checkpoints.layouts import from_eurobert, is_eurobert
from neobert.checkpoints.locate import CONFIG, find_model, read_model_config
from neobert.data.tokenizer import load_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError, first_line
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding, HFEncoderForSequenceClassification
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTForSequenceClassification
from neobert.optim.sharding import load_whole

EMBEDDING = "embedding"  # of our section in config.json: pooling and longest text that a model was trained with
HF_ENCODER = "neobert_head"  # section of config.json: our head on an encoder of transformers' making

Model = NeoBERTForMaskedLM | NeoBERTForSequenceClassification | NeoBERTForEmbedding
HFEncoderModel = HFEncoderForSequenceClassification | HFEncoderForEmbedding


def load_pretrained(checkpoint: str) -> tuple[NeoBERTForMaskedLM, Any]:
    """(model in evaluation mode, tokenizer). `checkpoint` is a run's folder, one step, or an export. Raises CheckpointError."""
    folder = find_model(checkpoint)
    model = load_model(folder)
    if not isinstance(model, NeoBERTForMaskedLM):
        need = "predicting tokens needs; name a pretrained masked language model"
        raise CheckpointError(f"{folder}: has no decoder, which {need}")
    return model, load_model_tokenizer(folder, model.config.vocab_size)


def load_model(folder: Path) -> Model | HFEncoderModel:
    """The model in a folder of ours, whatever its head, in float32 and evaluation mode. Raises CheckpointError."""
    fields = read_model_config(folder)
    if HF_ENCODER in fields:
        return _load_hf_model(folder, fields[HF_ENCODER]).float().eval()
    model = build_model(folder, fields)
    load_model_weights(folder, model)
    return model.float().eval()


def _load_hf_model(folder: Path, head: dict[str, Any]) -> HFEncoderModel:
    """The model of a checkpoint whose encoder is one of transformers' making. `head` is our section of its config.json."""
    encoder = load_hf_encoder(str(folder))
    if "glue_task" not in head:
        settings = ContrastiveSettings(pooling=head[EMBEDDING]["pooling"])
        return HFEncoderForEmbedding(encoder, settings, encoder.config.pad_token_id or 0)
    pooling = "bos" if head["pooling"] == "cls" else head["pooling"]
    model = HFEncoderForSequenceClassification(encoder, head["num_labels"], pooling, 0.0, 0.02)
    load_model_weights(folder, model)
    return model


def load_hf_encoder(name: str) -> Any:
    """Any encoder of `AutoModel`, in float32. Raises CheckpointError when it cannot be loaded, or not whole."""
    from transformers import AutoModel

    try:
        encoder, found = AutoModel.from_pretrained(
            name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{name!r} cannot be loaded: {first_line(error)}") from None
    if getattr(encoder.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{name!r} is an encoder with a decoder; an encoder alone is needed")
    missing = sorted(key for key in found["missing_keys"] if "pooler." not in key)
    if missing or found["mismatched_keys"]:
        listed = [*missing, *map(str, found["mismatched_keys"])]
        raise CheckpointError(f"{name!r}: {len(listed)} tensors were not loaded: {', '.join(listed[:3])}")
    return encoder


def build_model(folder: Path, fields: dict[str, Any]) -> Model:
    """The model that a config.json describes, with any weights. Raises CheckpointError."""
    name = next(iter(fields.get("architectures") or []), "")
    try:
        config = load_model_config(folder)
        if name.endswith("ForSequenceClassification"):
            return NeoBERTForSequenceClassification(config)
        if name.endswith(("Model", "ForEmbedding")) or name == "NeoBERT":
            trained = fields.get("neobert", {}).get(EMBEDDING, {})
            return NeoBERTForEmbedding(config, ContrastiveSettings(pooling=trained.get("pooling", "avg")))
        return NeoBERTForMaskedLM(config)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: describes no model: {first_line(error)}") from None


def load_model_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer of a model's folder. Raises CheckpointError when it has ids that the model does not have."""
    tokenizer = load_tokenizer("", str(tokenizer_folder(folder)))
    check_tokenizer(folder, tokenizer, vocab_size)
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    """Raises CheckpointError when a tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer does not fit: it has {len(tokenizer):,} tokens, the model's embeddings {vocab_size:,}"
        )


def load_model_weights(folder: Path, model: Model | HFEncoderModel) -> None:
    """Load a checkpoint's weights. Raises CheckpointError listing the first that do not fit."""
    is_hf = isinstance(model, HFEncoderModel)
    load_into(
        model, folder, model.from_checkpoint(load_weights(folder)) if is_hf else read_weights(folder, model.config)
    )


def load_into(model: nn.Module, folder: Path, weights: Tensors) -> None:
    """Load whole tensors, which come from `folder`. Raises CheckpointError listing the first that do not fit."""
    check_fit(folder, weights, model.state_dict())
    load_whole(model, weights)


def read_weights(folder: Path, architecture: NeoBERTConfig) -> Tensors:
    """A checkpoint's tensors under our names. Raises CheckpointError when a part of one is missing."""
    try:
        weights = load_weights(folder)
        return from_eurobert(weights) if is_eurobert(architecture) else weights
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged: {error}") from None
    except KeyError as error:
        raise CheckpointError(f"{folder}: the weights do not fit the model: {error.args[0]} is missing") from None


def check_fit(folder: Path, weights: Tensors, own: Tensors) -> None:
    """Raises CheckpointError listing the first tensors that keep `weights` from being loaded into `own`."""
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{folder}: the weights do not fit the model: {'; '.join(wrong[:3])}{more}")


def load_model_config(folder: Path) -> NeoBERTConfig:
    """The architecture in a checkpoint's config.json. Raises CheckpointError."""
    fields = read_model_config(folder).get("neobert")
    if fields is None:
        raise CheckpointError(f"{folder / CONFIG}: no `neobert` section; this is not one of our models")
    known = {*NeoBERTConfig.__annotations__, "num_labels"}
    return NeoBERTConfig(**{name: value for name, value in fields.items() if name in known})
