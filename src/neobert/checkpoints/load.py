"""A trained model and its tokenizer, from a checkpoint or from a folder that `neobert export` wrote."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from neobert.checkpoints.format import (
    STATE,
    WEIGHTS,
    Tensors,
    find_checkpoint,
    list_steps,
    load_weights,
    verify_checkpoint,
)
from neobert.checkpoints.layouts import from_eurobert, is_eurobert, mismatches
from neobert.data.tokenizer import load_tokenizer, tokenizer_folder
from neobert.errors import CheckpointError
from neobert.model.embedding import ContrastiveSettings, NeoBERTForEmbedding
from neobert.model.modeling_neobert import (
    NeoBERTConfig,
    NeoBERTForMaskedLM,
    NeoBERTForSequenceClassification,
    NeoBERTPreTrainedModel,
)
from neobert.optim.sharding import load_whole
from neobert.training.choices import choose_attention
from neobert.training.machine import find_kernels, gpu_capability
from neobert.training.runtime import Runtime

CONFIG = "config.json"
PICKLE = "pytorch_model.bin"  # which loading may run code out of
CONVERT = (  # which reads tensors alone
    "convert them once, in {0}: python -c \"import torch, safetensors.torch as s; w = torch.load('pytorch_model.bin', "
    "weights_only=True); s.save_file({{k: v.clone() for k, v in w.items()}}, 'model.safetensors', {{'format': 'pt'}})\""
)
EMBEDDING = "embedding"  # of our section in config.json: pooling and longest text that a model was trained with
HF_ENCODER = "neobert_head"  # section of config.json: our head on an encoder of transformers' making

Model = NeoBERTForMaskedLM | NeoBERTForSequenceClassification | NeoBERTForEmbedding


def load_pretrained(checkpoint: str) -> tuple[NeoBERTForMaskedLM, Any]:
    """(model in evaluation mode, tokenizer). `checkpoint` is a run's folder, one step, or an export. Raises CheckpointError."""
    folder = find_model(checkpoint)
    model = build_model(folder, read_model_config(folder))
    if not isinstance(model, NeoBERTForMaskedLM):
        raise CheckpointError(
            f"{folder}: has no decoder, which predicting tokens needs; name a pretrained masked language model"
        )
    load_model_weights(folder, model)
    return model.eval(), load_model_tokenizer(folder, model.config.vocab_size)


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
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder / 'config.json'}: describes no model: {reason}") from None


def find_model(path: str) -> Path:
    """The folder of a model: a whole checkpoint, verified, or an exported folder. Raises CheckpointError."""
    folder = Path(path)
    is_run = bool(list_steps(folder) or list_steps(folder / "checkpoints"))
    if is_run or (folder / STATE).is_file() or not folder.is_dir():
        folder = find_checkpoint(path)
        verify_checkpoint(folder)
        return folder
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing == [WEIGHTS] and (folder / PICKLE).is_file():
        raise CheckpointError(
            f"{folder}: its weights are in {PICKLE}, and only safetensors are read; {CONVERT.format(folder)}"
        )
    if missing:
        raise CheckpointError(
            f"{folder}: neither a checkpoint nor an exported model: it has no {STATE}, no {' and no '.join(missing)}; "
            "expected a run's output folder, <output_dir>/checkpoints/<step>, or what `neobert export` wrote"
        )
    if (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder}: half a checkpoint: it has no {STATE}, which is written last")
    return folder


def load_model_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer of a model's folder. Raises CheckpointError when it has ids that the model does not have."""
    tokenizer = load_tokenizer("", str(tokenizer_folder(folder)))
    if len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer does not fit: it has {len(tokenizer):,} tokens, the model's embeddings {vocab_size:,}"
        )
    return tokenizer


def load_model_weights(folder: Path, model: NeoBERTPreTrainedModel) -> None:
    """Load a checkpoint's weights. Raises CheckpointError listing the first that do not fit."""
    weights = read_weights(folder, model.config)
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
    if wrong := mismatches(weights, own):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{folder}: the weights do not fit the model: {'; '.join(wrong[:3])}{more}")


def read_model_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises CheckpointError."""
    try:
        fields = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder / CONFIG}: missing or not JSON; this is no folder of a model") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{folder / CONFIG}: not a JSON object; this is no folder of a model")
    return fields


def load_model_config(folder: Path) -> NeoBERTConfig:
    """The architecture in a checkpoint's config.json. Raises CheckpointError."""
    fields = read_model_config(folder).get("neobert")
    if fields is None:
        raise CheckpointError(f"{folder / CONFIG}: no `neobert` section; this is not one of our models")
    known = {*NeoBERTConfig.__annotations__, "num_labels"}
    return NeoBERTConfig(**{name: value for name, value in fields.items() if name in known})


def place_model(model: nn.Module, runtime: Runtime) -> None:
    """Bring a model to the device of `runtime`, to compute and not to train; ours with attention that needs no padding."""
    if isinstance(model, NeoBERTForMaskedLM | NeoBERTForEmbedding):
        config = model.config
        model.model.attention_kernel, _ = choose_attention(
            "flash_attn_varlen",
            runtime.device.type,
            dtype=runtime.dtype,
            head_width=config.hidden_size // config.num_attention_heads,
            packages=find_kernels(),
            capability=gpu_capability(runtime.device),
        )
    model.to(runtime.device).eval()
