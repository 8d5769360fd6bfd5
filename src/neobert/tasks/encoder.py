"""The model of a run: its first weights, and the kernels and compilation that the machine allows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neobert.checkpoints import layouts
from neobert.checkpoints.initial_weights import InitialWeights, find_initial_weights, find_tokenizer
from neobert.config.schema import Config
from neobert.data.batch import RowLayout
from neobert.data.tokenizer import fit_vocabulary, special_ids
from neobert.errors import ConfigError, Problem
from neobert.model.attention import uses_buckets
from neobert.model.embedding import NeoBERTForEmbedding
from neobert.model.hf_encoder import HFEncoderForEmbedding, HFEncoderForSequenceClassification
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM, NeoBERTForSequenceClassification
from neobert.training.choices import choose_attention, choose_kernels, compile_blocks, find_kernels, gpu_capability
from neobert.training.runtime import Runtime


def build_model(config: Config, vocab_size: int, pad_token_id: int) -> NeoBERTForMaskedLM:
    """The model with fresh weights drawn by `seed`."""
    torch.manual_seed(config.seed)
    model = NeoBERTForMaskedLM(model_config(config, vocab_size, pad_token_id))
    model.model.gradient_checkpointing = config.trainer.gradient_checkpointing
    return model


def model_config(config: Config, vocab_size: int, pad_token_id: int, **head: Any) -> NeoBERTConfig:
    """The architecture that the configuration describes, with the fields of a head."""
    names = set(NeoBERTConfig.__annotations__) & set(type(config.model).model_fields)
    fields = {name: getattr(config.model, name) for name in names}
    return NeoBERTConfig(**{**fields, "vocab_size": vocab_size, "pad_token_id": pad_token_id, **head})


def build_vocabulary(config: Config, hf_tokenizer: Any) -> tuple[int, list[str]]:
    """Make `len(tokenizer)` the model's vocabulary size; returns it with notes where it differs from the YAML."""
    real = len(hf_tokenizer)
    follows = config.model.vocab_size == type(config.model).model_fields["vocab_size"].default
    wanted = None if follows else config.model.vocab_size
    size = fit_vocabulary(hf_tokenizer, wanted)
    notes = []
    if wanted is not None and wanted != size:
        notes.append(
            f"model.vocab_size is {size:,}, not {wanted:,}: {real:,} tokens are real, and the size is a multiple of 64"
        )
    if config.is_set("model.pad_token_id") and config.model.pad_token_id != hf_tokenizer.pad_token_id:
        notes.append(
            f"model.pad_token_id is {hf_tokenizer.pad_token_id}, not {config.model.pad_token_id}: it follows the tokenizer"
        )
    return size, notes


def with_vocab_size(config: Config, size: int) -> Config:
    """`tokenizer.vocab_size`, where it is set, as it is in this run."""
    if config.tokenizer.vocab_size is None:
        return config
    return with_keys(config, tokenizer={"vocab_size": size})


def checkpoint_config(architecture: NeoBERTConfig, hf_tokenizer: Any, name: str | None) -> dict[str, Any]:
    """config.json: transformers' EuroBERT where that is the same function, with our own fields under `neobert`."""
    return layouts.checkpoint_config(architecture, special_ids(hf_tokenizer), name)


Model = NeoBERTForMaskedLM | NeoBERTForSequenceClassification | NeoBERTForEmbedding
HFModel = HFEncoderForSequenceClassification | HFEncoderForEmbedding


def blocks_of(model: Model | HFModel) -> Iterable[nn.Module]:
    """The blocks of our own encoder, which FSDP2 splits one by one; one of transformers is split as a whole."""
    return () if isinstance(model, HFModel) else model.model.layers


def prepare_model(config: Config, model: Model | HFModel, runtime: Runtime) -> dict[str, str]:
    """Choose kernels and compile; returns what runs and why, for the summary.

    Raises ConfigError, also for what is not done with an encoder of transformers.
    """
    if isinstance(model, HFModel):
        refuse_own_keys(config, model)
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


def refuse_own_keys(config: Config, model: HFModel) -> None:
    """Raises ConfigError for keys that are for our own encoder only."""
    packs = config.datacollator.pack_sequences and isinstance(model, HFEncoderForSequenceClassification)
    for dotted, is_asked in (
        ("trainer.torch_compile", config.trainer.torch_compile),
        ("datacollator.pack_sequences", packs),
    ):
        if is_asked:
            raise ConfigError(Problem(dotted, "is for our own encoder; leave it out with model.from_hub"))


# --- what fine-tuning starts with -----------


@dataclass(frozen=True)
class FineTuning:
    """The configuration with what the weights decide filled in, the weights and their tokenizer, and messages."""

    config: Config
    start: InitialWeights
    hf_tokenizer: Any
    vocab_size: int
    messages: list[str]


def begin_fine_tuning(config: Config, fill_in: Callable[[Config, InitialWeights], Config]) -> FineTuning:
    """Find weights and tokenizer; `fill_in` is the task's. Raises ConfigError and CheckpointError."""
    start = find_initial_weights(config)
    hf_tokenizer, keys = find_tokenizer(config, start)
    config = with_keys(fill_in(config, start), tokenizer=keys)
    vocab_size, messages = len(hf_tokenizer), list[str]()
    if start.folder is None and start.hub is None:
        vocab_size, messages = build_vocabulary(config, hf_tokenizer)
    return FineTuning(config, start, hf_tokenizer, vocab_size, messages)


def with_keys(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with keys of its sections replaced."""
    update = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    return config.model_copy(update=update)


def hf_encoder_dropout(name: str) -> dict[str, float]:
    """The dropout that an encoder of `AutoModel` brings along, by the names of its configuration."""
    from transformers import AutoConfig

    fields = AutoConfig.from_pretrained(name).to_dict()
    return {key: value for key, value in fields.items() if "dropout" in key and isinstance(value, int | float)}


def row_layout(config: Config, pad_id: int, longest: int) -> RowLayout:
    """How texts of at most `longest` tokens become tensors."""
    collator, is_padded = config.datacollator, config.tokenizer.padding == "max_length"
    return RowLayout(pad_id, collator.pack_sequences, longest if is_padded else None, collator.pad_to_multiple_of or 1)
