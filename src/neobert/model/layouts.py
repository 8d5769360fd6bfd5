"""Weights under the names of other layouts, as pure functions on state dicts.

A NeoBERT with RoPE, RMSNorm and SwiGLU computes exactly what transformers' `EuroBertForMaskedLM` computes, so its
checkpoints are written under those names: `AutoModelForMaskedLM.from_pretrained` reads them without our code.
"""

from typing import Any

import torch

from .layers import swiglu_width
from .modeling_neobert import NeoBERTConfig

Tensors = dict[str, torch.Tensor]

# ours -> eurobert's, for tensors that are the same; fused ones are split along their rows.
_RENAMED = {
    "attention.out.weight": "self_attn.o_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
FUSED = {
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def is_eurobert(config: NeoBERTConfig) -> bool:
    """Whether transformers' own EuroBERT computes the same function."""
    return config.rope and config.rms_norm and config.hidden_act == "swiglu"


def eurobert_config(config: NeoBERTConfig, special_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the same model as a transformers EuroBERT; `special_ids`: bos_token_id, eos_token_id, mask_token_id."""
    from transformers import EuroBertConfig

    return EuroBertConfig(
        architectures=["EuroBertForMaskedLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=swiglu_width(config.intermediate_size),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.decoder_init_range,
        pad_token_id=config.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        dtype="float32",
        **special_ids,
    ).to_dict()


def to_eurobert(weights: Tensors) -> Tensors:
    """Our tensors under EuroBERT's names; fused matrices become views of their parts."""
    out: Tensors = {}
    for name, tensor in weights.items():
        prefix, _, part = _split_name(name)
        if part in FUSED:
            for target, piece in zip(FUSED[part], tensor.chunk(len(FUSED[part])), strict=True):
                out[prefix + target] = piece
        else:
            out[prefix + _RENAMED.get(part, part)] = tensor
    return out


def from_eurobert(weights: Tensors) -> Tensors:
    """The inverse of `to_eurobert`. Raises KeyError naming a part that is missing."""
    renamed = {theirs: ours for ours, theirs in _RENAMED.items()}
    fused = {parts[0]: (ours, parts) for ours, parts in FUSED.items()}
    inner = {part for parts in FUSED.values() for part in parts[1:]}
    out: Tensors = {}
    for name, tensor in weights.items():
        prefix, _, part = _split_name(name)
        if part in fused:
            ours, parts = fused[part]
            out[prefix + ours] = torch.cat([weights[prefix + one] for one in parts])
        elif part not in inner:
            out[prefix + renamed.get(part, part)] = tensor
    return out


def _split_name(name: str) -> tuple[str, str, str]:
    """`model.layers.3.mlp.down_proj.weight` -> (`model.layers.3.`, `3`, `mlp.down_proj.weight`)."""
    if ".layers." not in name:
        return "", "", name
    head, _, tail = name.partition(".layers.")
    number, _, part = tail.partition(".")
    return f"{head}.layers.{number}.", number, part
