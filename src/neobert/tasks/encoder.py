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
from neobert.checkpoints.layouts import checkpoint_config, is_eurobert
from neobert.config.schema import Config
from neobert.data.batch import RowLayout
from neobert.data.tokenizer import save_tokenizer
from neobert.errors import CheckpointError, ConfigError, Problem
from neobert.model.attention import uses_buckets
from neobert.model.hf_encoder import HFEncoderForSequenceClassification, longest_input
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.training.choices import choose_kernels, compile_blocks, dynamic_shapes, find_kernels
from neobert.training.run import Storage
from neobert.training.runtime import Runtime, whole_weights


def build_model(
    config: Config, vocab_size: int, pad_token_id: int, continued: NeoBERTForMaskedLM | None = None
) -> NeoBERTForMaskedLM:
    """The model with its first weights: fresh ones drawn by `seed`, or those of the model that is `continued`."""
    torch.manual_seed(config.seed)
    model = continued or NeoBERTForMaskedLM(model_config(config, vocab_size, pad_token_id))
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
    """Put a model on its device, choose kernels and compile; returns what runs and why, for the summary. Raises ConfigError,
    also for what is not done with an encoder of transformers.
    """
    model.to(runtime.device)
    if isinstance(model, load.HFEncoderModel):
        packs = config.datacollator.pack_sequences and isinstance(model, HFEncoderForSequenceClassification)
        asked = {"trainer.torch_compile": config.trainer.torch_compile, "datacollator.pack_sequences": packs}
        asked["trainer.gradient_checkpointing_interval"] = config.trainer.gradient_checkpointing_interval > 1
        for dotted in (dotted for dotted, is_asked in asked.items() if is_asked):
            raise ConfigError(Problem(dotted, "is for our own encoder; leave it out with model.from_hub"))
        return {"attention": f"transformers' {model.config._attn_implementation}", "kernels": "transformers'"}
    kind, trainer = runtime.device.type, config.trainer
    attention_why = runtime.set_attention(model, config.model.attn_backend, config.model.dropout_prob)
    in_buckets = kind == "cpu" and uses_buckets(runtime.dtype or torch.float32)
    attention = "buckets of documents" if in_buckets else model.model.attention_kernel
    liger = find_kernels().get("liger") if kind == "cuda" else None
    kernels, why = choose_kernels(config.model.kernel_backend, kind, liger, trainer.torch_compile)
    model.choose_kernels(kernels)
    model.model.checkpointing_interval = trainer.gradient_checkpointing_interval
    compiled = "no"
    if trainer.torch_compile:
        backend, mode, dynamic = (
            trainer.torch_compile_backend,
            trainer.torch_compile_mode,
            trainer.torch_compile_dynamic,
        )
        if model.model.attention_kernel != "sdpa":
            dynamic = dynamic_shapes(dynamic, config.datacollator.pack_sequences)
        compile_blocks(model.model, kind, backend, dynamic, mode)
        which = {None: "shapes as torch decides", True: "any shape", False: "every shape anew"}[dynamic]
        compiled = f"{backend}{f' ({mode})' if mode else ''}, {which}; the first steps take longer"
    return {"attention": f"{attention}: {attention_why}", "kernels": f"{kernels}: {why}", "compiled": compiled}


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
    """The encoder that `AutoModel` loads by `name`. `length`, which `key` says, is that of the longest text in tokens. Raises
    ConfigError or CheckpointError when it is not whole, or fits neither the tokenizer nor the texts.
    """
    try:
        encoder = load.load_hf_encoder(name)
    except CheckpointError as error:
        raise ConfigError(Problem("model.name", str(error))) from None
    longest, size = longest_input(encoder), encoder.config.vocab_size
    if longest is not None and length > longest:
        raise ConfigError(Problem(key, f"{length} is longer than the {longest} tokens that {name} takes"))
    if vocab_size > size:
        raise CheckpointError(f"tokenizer: {vocab_size} tokens, but {name} has embeddings of {size}")
    if config.trainer.gradient_checkpointing:
        encoder.gradient_checkpointing_enable()
    return encoder


def load_own_encoder(weights: InitialWeights, model: load.Model, vocab_size: int) -> str:
    """Load the encoder of a checkpoint of ours, where there is one; returns what was loaded. Raises CheckpointError."""
    folder, found = weights.folder, weights.architecture
    if folder is None or found is None:
        return "random"
    if found.vocab_size != vocab_size:
        size = found.vocab_size
        raise CheckpointError(f"{folder}: embeddings of {size} tokens, but its tokenizer has {vocab_size}")
    return load_parts(folder, model, load.read_weights(folder, found), with_dense=weights.task is not None)


def load_parts(folder: Path, model: nn.Module, weights: Tensors, with_dense: bool) -> str:
    """Load the encoder, and the hidden layer of the head where that is wanted; returns what was loaded. Raises
    CheckpointError listing what does not fit.
    """
    kinds = ("model.", "dense.") if with_dense else ("model.",)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(kinds)}
    used = {name: tensor for name, tensor in weights.items() if name.startswith(kinds)}
    load.check_fit(folder, used, own)
    model.load_state_dict(used, strict=False)
    loaded = f"{folder}, {len(used)} tensors, all of {' and '.join(k[:-1] for k in kinds)}"
    if new := sorted({name.split(".")[0] for name in model.state_dict() if name not in used}, reverse=True):
        loaded += f"; new: {', '.join(new)}"
    if left := sorted({name.split(".")[0] for name in weights if name not in used}):
        loaded += f"; not used: {', '.join(left)}"
    return loaded


def build_storage(
    model: load.Model | load.HFEncoderModel, name: str | None, hf_tokenizer: Any, section: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None, save_more: Callable[[Path], None] = lambda folder: None,
) -> Storage:  # fmt: skip
    """How a model, called `name`, goes into checkpoints with its tokenizer and comes back: ours under EuroBERT's names where it
    is one, an encoder of transformers so that `AutoModel` reads it. config.json also gets `fields`, and in our part `section`.
    """
    is_hf, section = isinstance(model, load.HFEncoderModel), section or {}
    if isinstance(model, load.HFEncoderModel):
        fields = {**json.loads(model.config.to_json_string(use_diff=False)), **(fields or {}), load.HF_ENCODER: section}
    else:
        own, kind = checkpoint_config(model.config, hf_tokenizer, name), type(model).__name__
        if is_eurobert(model.config):
            kind = "EuroBertModel" if kind == "NeoBERTForEmbedding" else kind.replace("NeoBERT", "EuroBert")
        fields = {**own, **(fields or {}), "neobert": own["neobert"] | section, "architectures": [kind]}

    def content() -> tuple[Tensors, dict[str, Any]]:
        return load.to_checkpoint(model, whole_weights(model)), fields

    def save_beside(folder: Path) -> None:
        save_tokenizer(hf_tokenizer, folder, has_token_types=is_hf)
        save_more(folder)

    return Storage(content, partial(load.load_model_weights, model=model), save_beside)
