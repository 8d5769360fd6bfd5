"""The model of a run: its first weights, the kernels and compilation that the machine allows, its way into checkpoints."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neobert.checkpoints import load
from neobert.checkpoints.format import Tensors
from neobert.checkpoints.initial_weights import InitialWeights
from neobert.config.schema import Config
from neobert.data.batch import RowLayout
from neobert.errors import CheckpointError, ConfigError, Problem
from neobert.model.attention import uses_buckets
from neobert.model.hf_encoder import HFEncoderForSequenceClassification, longest_input
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.training.choices import choose_attention, choose_kernels, compile_blocks, find_kernels, gpu_capability
from neobert.training.run import Storage
from neobert.training.runtime import Runtime, whole_weights


def build_model(
    config: Config, vocab_size: int, pad_token_id: int, continued: NeoBERTForMaskedLM | None = None
) -> NeoBERTForMaskedLM:
    """The model with its first weights: fresh ones drawn by `seed`, or those of the model that is `continued`."""
    torch.manual_seed(config.seed)
    model = continued
    if model is None:
        model = NeoBERTForMaskedLM(model_config(config, vocab_size, pad_token_id))
    model.model.gradient_checkpointing = config.trainer.gradient_checkpointing
    return model.train()


def model_config(config: Config, vocab_size: int, pad_token_id: int, **head: Any) -> NeoBERTConfig:
    """The architecture that the configuration describes, with the fields of a head."""
    names = set(NeoBERTConfig.__annotations__) & set(type(config.model).model_fields)
    fields = {name: getattr(config.model, name) for name in names}
    return NeoBERTConfig(**{**fields, "vocab_size": vocab_size, "pad_token_id": pad_token_id, **head})


def blocks_of(model: load.Model | load.HFEncoderModel) -> Iterable[nn.Module]:
    """The blocks of our own encoder, which FSDP2 splits one by one; one of transformers is split as a whole."""
    return () if isinstance(model, load.HFEncoderModel) else model.model.layers


def prepare_model(config: Config, model: load.Model | load.HFEncoderModel, runtime: Runtime) -> dict[str, str]:
    """Put a model on its device, choose kernels and compile; returns what runs and why, for the summary.

    Raises ConfigError, also for what is not done with an encoder of transformers.
    """
    model.to(runtime.device)
    if isinstance(model, load.HFEncoderModel):
        packs = config.datacollator.pack_sequences and isinstance(model, HFEncoderForSequenceClassification)
        asked = {"trainer.torch_compile": config.trainer.torch_compile, "datacollator.pack_sequences": packs}
        for dotted in (dotted for dotted, is_asked in asked.items() if is_asked):
            raise ConfigError(Problem(dotted, "is for our own encoder; leave it out with model.from_hub"))
        return {"attention": f"transformers' {model.config._attn_implementation}", "kernels": "transformers'"}
    kind, trainer, dtype = runtime.device.type, config.trainer, runtime.dtype
    packages = find_kernels() if kind == "cuda" else {}
    attention, attention_why = choose_attention(
        config.model.attn_backend,
        kind,
        dtype=dtype,
        dropout=config.model.dropout_prob,
        head_width=config.model.hidden_size // config.model.num_attention_heads,
        packages=packages,
        capability=gpu_capability(runtime.device),
    )
    liger = packages.get("liger")
    kernels, kernels_why = choose_kernels(config.model.kernel_backend, kind, liger, trainer.torch_compile)
    model.model.attention_kernel = attention  # type: ignore[assignment]
    model.choose_kernels(kernels)
    compiled = "no"
    if trainer.torch_compile:
        compile_blocks(model.model, kind, trainer.torch_compile_backend, trainer.torch_compile_dynamic)
        shapes = {None: "shapes as torch decides", True: "any shape", False: "every shape anew"}
        which = shapes[trainer.torch_compile_dynamic]
        compiled = f"{trainer.torch_compile_backend}, {which}; the first steps take longer"
    in_buckets = kind == "cpu" and uses_buckets(dtype or torch.float32)
    on_cpu = "buckets of documents" if in_buckets else "sdpa"
    return {
        "attention": f"{on_cpu if kind == 'cpu' else attention}: {attention_why}",
        "kernels": f"{kernels}: {kernels_why}",
        "compiled": compiled,
    }


def hf_encoder_dropout(name: str) -> dict[str, float]:
    """The dropout that an encoder of `AutoModel` brings along, by the names of its configuration."""
    from transformers import AutoConfig

    fields = AutoConfig.from_pretrained(name).to_dict()
    return {key: value for key, value in fields.items() if "dropout" in key and isinstance(value, int | float)}


def row_layout(config: Config, pad_id: int, longest: int) -> RowLayout:
    """How texts of at most `longest` tokens become tensors."""
    collator, is_padded = config.datacollator, config.tokenizer.padding == "max_length"
    return RowLayout(pad_id, collator.pack_sequences, longest if is_padded else None, collator.pad_to_multiple_of or 1)


# --- its weights -----------


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


def load_own_encoder(weights: InitialWeights, model: load.Model, vocab_size: int) -> str:
    """Load the encoder of a checkpoint of ours, where there is one; returns what was loaded. Raises CheckpointError."""
    if weights.folder is None or weights.architecture is None:
        return "random"
    if weights.architecture.vocab_size != vocab_size:
        raise CheckpointError(
            f"{weights.folder}: embeddings of {weights.architecture.vocab_size} tokens, but its tokenizer has {vocab_size}"
        )
    tensors = load.read_weights(weights.folder, weights.architecture)
    return load_parts(weights.folder, model, tensors, with_dense=weights.task is not None)


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


def build_storage(
    model: load.Model | load.HFEncoderModel, fields: dict[str, Any], save_beside: Callable[[Path], None]
) -> Storage:
    """How a model goes into checkpoints and comes back: one of ours with `fields` as its config.json, under EuroBERT's names
    where it is one; an encoder of transformers so that `AutoModel` reads it, with `fields` besides its own.
    """

    def content() -> tuple[Tensors, dict[str, Any]]:
        is_theirs = isinstance(model, load.HFEncoderModel)
        own = json.loads(model.config.to_json_string(use_diff=False)) if is_theirs else {}
        return load.to_checkpoint(model, whole_weights(model)), own | fields

    return Storage(content, partial(load.load_model_weights, model=model), save_beside)
