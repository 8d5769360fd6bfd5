"""A trained model and its tokenizer, from a checkpoint."""

import json
from pathlib import Path
from typing import Any

from neobert.data.tokenizer import load_tokenizer
from neobert.errors import CheckpointError
from neobert.model.layouts import from_eurobert, is_eurobert, mismatches
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTPreTrainedModel
from neobert.training.checkpoint import Tensors, find_checkpoint, load_weights, verify_checkpoint
from neobert.training.runtime import load_whole

FOREIGN = "neobert_head"  # section of config.json: our head on an encoder of transformers' making


def load_pretrained(checkpoint: str) -> tuple[NeoBERTForMaskedLM, Any]:
    """(model in evaluation mode, tokenizer). `checkpoint` is a run's folder or one step. Raises CheckpointError."""
    folder = find_checkpoint(checkpoint)
    verify_checkpoint(folder)
    model = NeoBERTForMaskedLM(load_model_config(folder))
    load_model_weights(folder, model)
    return model.eval(), load_tokenizer("", str(folder / "tokenizer"))


def load_model_weights(folder: Path, model: NeoBERTPreTrainedModel) -> None:
    """Load a checkpoint's weights. Raises CheckpointError listing the first that do not fit."""
    weights = read_weights(folder, model.config)
    check_fit(folder, weights, model.state_dict())
    load_whole(model, weights)


def read_weights(folder: Path, architecture: NeoBERTConfig) -> Tensors:
    """A checkpoint's tensors under our names. Raises CheckpointError when a part of one is missing."""
    weights = load_weights(folder)
    try:
        return from_eurobert(weights) if is_eurobert(architecture) else weights
    except KeyError as error:
        raise CheckpointError(f"{folder}: the weights do not fit the model: {error.args[0]} is missing") from None


def check_fit(folder: Path, weights: Tensors, own: Tensors) -> None:
    """Raises CheckpointError listing the first tensors that keep `weights` from being loaded into `own`."""
    if wrong := mismatches(weights, own):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{folder}: the weights do not fit the model: {'; '.join(wrong[:3])}{more}")


def load_model_config(folder: Path) -> NeoBERTConfig:
    """The architecture in a checkpoint's config.json."""
    fields = json.loads((folder / "config.json").read_text()).get("neobert")
    if fields is None:
        raise CheckpointError(f"{folder / 'config.json'}: no `neobert` section; this is not one of our checkpoints")
    known = {*NeoBERTConfig.__annotations__, "num_labels"}
    return NeoBERTConfig(**{name: value for name, value in fields.items() if name in known})
