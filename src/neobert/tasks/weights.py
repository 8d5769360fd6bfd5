"""The weights of a model that is fine-tuned: where the first ones come from, and how they go into checkpoints and come back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from neobert.checkpoints import load
from neobert.checkpoints.format import Tensors, load_weights
from neobert.checkpoints.initial_weights import InitialWeights
from neobert.checkpoints.layouts import is_eurobert, to_eurobert
from neobert.config.schema import Config
from neobert.errors import CheckpointError, ConfigError, Problem
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.model.hf_encoder import longest_input
from neobert.model.modeling_neobert import NeoBERTForSequenceClassification
from neobert.optim.sharding import load_whole
from neobert.training.run import Storage
from neobert.training.runtime import whole_weights

OwnModel = NeoBERTForSequenceClassification | NeoBERTForEmbedding


def load_hf_encoder(config: Config, name: str, vocab_size: int, key: str, length: int) -> Any:
    """The encoder that `AutoModel` loads by `name`. `length`, which `key` says, is that of the longest text in tokens.

    Raises ConfigError or CheckpointError when it is not whole, or fits neither the tokenizer nor the texts.
    """
    try:
        encoder = load.load_hf_encoder(name)
    except CheckpointError as error:
        raise ConfigError(Problem("model.name", str(error))) from None
    longest = longest_input(encoder)
    if longest is not None and length > longest:
        raise ConfigError(Problem(key, f"{length} is longer than the {longest} tokens that {name} takes"))
    if vocab_size > encoder.config.vocab_size:
        raise CheckpointError(
            f"tokenizer: {vocab_size} tokens, but {name} has embeddings of {encoder.config.vocab_size}"
        )
    if config.trainer.gradient_checkpointing:
        encoder.gradient_checkpointing_enable()
    return encoder


def load_own_encoder(start: InitialWeights, model: OwnModel, vocab_size: int) -> str:
    """Load the encoder of a checkpoint of ours, where there is one; returns what was loaded. Raises CheckpointError."""
    if start.folder is None or start.architecture is None:
        return "random"
    if start.architecture.vocab_size != vocab_size:
        raise CheckpointError(
            f"{start.folder}: embeddings of {start.architecture.vocab_size} tokens, but its tokenizer has {vocab_size}"
        )
    weights = load.read_weights(start.folder, start.architecture)
    return load_parts(start.folder, model, weights, with_dense=start.task is not None)


def load_parts(folder: Path, model: nn.Module, weights: Tensors, with_dense: bool) -> str:
    """Load the encoder, and the hidden layer of the head where that is wanted; returns what was loaded.

    Raises CheckpointError listing what does not fit.
    """
    kinds = ("model.", "dense.") if with_dense else ("model.",)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(kinds)}
    used = {name: tensor for name, tensor in weights.items() if name.startswith(kinds)}
    load.check_fit(folder, used, own)
    model.load_state_dict(used, strict=False)
    left = sorted({name.split(".")[0] for name in weights if name not in used})
    new = sorted({name.split(".")[0] for name in model.state_dict() if name not in used}, reverse=True)
    unused = f"; not used: {', '.join(left)}" if left else ""
    fresh = f"; new: {', '.join(new)}" if new else ""
    return f"{folder}, {len(used)} tensors, all of {' and '.join(k[:-1] for k in kinds)}{fresh}{unused}"


# --- checkpoints -----------


def own_storage(model: OwnModel, fields: dict[str, Any], save_beside: Callable[[Path], None]) -> Storage:
    """Checkpoints of a model of ours, under EuroBERT's names where it is one. `fields` is their config.json."""

    def content() -> tuple[Tensors, dict[str, Any]]:
        weights = whole_weights(model)
        return to_eurobert(weights) if is_eurobert(model.config) else weights, fields

    return Storage(content, lambda folder: load.load_model_weights(folder, model), save_beside)


def hf_encoder_storage(
    model: Any,
    fields: dict[str, Any],
    save_beside: Callable[[Path], None],
    to_checkpoint: Callable[[Tensors], Tensors],
    from_checkpoint: Callable[[Tensors], Tensors],
) -> Storage:
    """Checkpoints that `AutoModel` reads. `fields` stand in their config.json besides those of the encoder; the functions turn
    the model's names of tensors into those of the checkpoint and back.
    """

    def content() -> tuple[Tensors, dict[str, Any]]:
        own = json.loads(model.config.to_json_string(use_diff=False))
        return to_checkpoint(whole_weights(model)), {**own, **fields}

    def load_back(folder: Path) -> None:
        weights = from_checkpoint(load_weights(folder))
        load.check_fit(folder, weights, model.state_dict())
        load_whole(model, weights)

    return Storage(content, load_back, save_beside)
