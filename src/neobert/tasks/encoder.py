"""The model of a run: fresh weights, and the kernels and compilation that the machine allows."""

import torch

from neobert.config.schema import Config
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from neobert.training.choices import choose_attention, choose_kernels
from neobert.training.runtime import Runtime, compile_blocks, find_kernels, gpu_capability


def build_model(config: Config, vocab_size: int, pad_token_id: int) -> NeoBERTForMaskedLM:
    """The model with fresh weights drawn by `seed`."""
    torch.manual_seed(config.seed)
    names = set(NeoBERTConfig.__annotations__) & set(type(config.model).model_fields)
    fields = {name: getattr(config.model, name) for name in names} | {
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
    }
    model = NeoBERTForMaskedLM(NeoBERTConfig(**fields))
    model.model.gradient_checkpointing = config.trainer.gradient_checkpointing
    return model


def prepare_model(config: Config, model: NeoBERTForMaskedLM, runtime: Runtime) -> dict[str, str]:
    """Choose kernels and compile; returns what runs and why, for the summary. Raises ConfigError."""
    kind, (packages, has_liger) = runtime.device.type, find_kernels()
    attention, attention_why = choose_attention(
        config.model.attn_backend,
        kind,
        dtype=runtime.dtype,
        dropout=config.model.dropout_prob,
        head_width=config.model.hidden_size // config.model.num_attention_heads,
        packages=packages,
        capability=gpu_capability(runtime.device),
    )
    kernels, kernels_why = choose_kernels(config.model.kernel_backend, kind, has_liger)
    model.model.attention_kernel = attention
    model.choose_kernels(kernels)
    trainer, compiled = config.trainer, "no"
    if trainer.torch_compile:
        compile_blocks(model.model.layers, runtime, trainer.torch_compile_backend, trainer.torch_compile_dynamic)
        shapes = {None: "shapes as torch decides", True: "any shape", False: "every shape anew"}
        compiled = (
            f"{trainer.torch_compile_backend}, {shapes[trainer.torch_compile_dynamic]}; the first steps take longer"
        )
    where = "buckets of documents" if kind == "cpu" else attention
    return {
        "attention": f"{where}: {attention_why}",
        "kernels": f"{kernels}: {kernels_why}",
        "compiled": compiled,
    }
