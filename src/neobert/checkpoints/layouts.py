"""Weights under the names of other layouts, as pure functions on state dicts.

EuroBERT's: a NeoBERT with RoPE, RMSNorm and SwiGLU computes exactly what transformers' `EuroBertForMaskedLM` computes, so its
checkpoints are written under those names: `AutoModelForMaskedLM.from_pretrained` reads them without our code.

The published NeoBERT's (arXiv 2502.19587): q, k and v are fused head by head, RoPE turns interleaved pairs (0,1), (2,3), ...
where ours turns (0, K/2), (1, K/2+1), ..., and the decoder has a bias.
"""

from typing import Any

import torch

from neobert.checkpoints.format import Tensors
from neobert.data.tokenizer import special_ids
from neobert.model.layers import swiglu_width
from neobert.model.modeling_neobert import NeoBERTConfig

# ours -> eurobert's; where there are several, they are rows of ours, one below the other.
EUROBERT = {
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "attention_norm.weight": ("input_layernorm.weight",),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
}
FUSED = {ours: parts for ours, parts in EUROBERT.items() if len(parts) > 1}
SAME_FIELDS = (  # of config.json, which both call by the same name
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "pad_token_id",
)  # fmt: skip
# Matrices of transformers' encoders that hold several, one below the other, by `model_type`: name endings, and how many.
# DeBERTa's `in_proj` goes head by head and is not among them.
_FUSED_ELSEWHERE = {"modernbert": {"attn.Wqkv.weight": 3, "mlp.Wi.weight": 2}}


def fused_parts(model_type: str) -> dict[str, int]:
    """Name endings of a model's matrices that hold several, one below the other, and how many; none for models without."""
    return {ours: len(parts) for ours, parts in FUSED.items()} | _FUSED_ELSEWHERE.get(model_type, {})


def beyond_eurobert(config: NeoBERTConfig) -> list[str]:
    """What a model has and transformers' EuroBERT has not."""
    parts = {
        "nGPT": config.ngpt,
        "learned positions": not config.rope,
        "GELU": config.hidden_act != "swiglu",
        "LayerNorm": not config.rms_norm and not config.ngpt,
        "decoder bias": config.decoder_bias,
    }
    return [part for part, is_there in parts.items() if is_there]


def is_eurobert(config: NeoBERTConfig) -> bool:
    """Whether transformers' own EuroBERT computes the same function."""
    return not beyond_eurobert(config)


def eurobert_config(config: NeoBERTConfig, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of the same model as a transformers EuroBERT; `token_ids`: bos_token_id, eos_token_id, mask_token_id."""
    from transformers import EuroBertConfig

    return EuroBertConfig(
        architectures=["EuroBertForMaskedLM"],
        **{name: getattr(config, name) for name in SAME_FIELDS},
        intermediate_size=swiglu_width(config.intermediate_size),
        rms_norm_eps=config.norm_eps,
        initializer_range=config.decoder_init_range,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        dtype="float32",
        **token_ids,
    ).to_dict()


def checkpoint_config(config: NeoBERTConfig, hf_tokenizer: Any, name: str | None = None) -> dict[str, Any]:
    """config.json: transformers' EuroBERT where that is the same function, with our own fields under `neobert`."""
    own = {field: getattr(config, field) for field in NeoBERTConfig.__annotations__ if hasattr(config, field)}
    own |= {} if name is None else {"name": name}
    if is_eurobert(config):
        return {**eurobert_config(config, special_ids(hf_tokenizer)), "neobert": own}
    kind = {"model_type": "neobert", "architectures": ["NeoBERTForMaskedLM"], "dtype": "float32"}
    return {**kind, **own, "neobert": own}


def to_eurobert(weights: Tensors) -> Tensors:
    """Our tensors under EuroBERT's names; fused matrices become views of their parts."""
    out: Tensors = {}
    for name, tensor in weights.items():
        prefix, part = _split_name(name)
        names = EUROBERT.get(part, (part,))
        out |= {prefix + target: piece for target, piece in zip(names, tensor.chunk(len(names)), strict=True)}
    return out


def from_eurobert(weights: Tensors) -> Tensors:
    """The inverse of `to_eurobert`. Raises KeyError naming a part that is missing."""
    known = {parts[0]: (ours, parts) for ours, parts in EUROBERT.items()}
    others = {part for parts in EUROBERT.values() for part in parts[1:]}
    out: Tensors = {}
    for name, tensor in weights.items():
        prefix, part = _split_name(name)
        ours, parts = known.get(part, (part, (part,)))
        if part not in others:
            out[prefix + ours] = tensor if len(parts) == 1 else torch.cat([weights[prefix + one] for one in parts])
    return out


PUBLISHED = {
    "model.encoder.": "model.embed_tokens.",
    "model.transformer_encoder.": "model.layers.",
    "model.layer_norm.": "model.norm.",
    "decoder.": "lm_head.",
    ".qkv.": ".attention.qkv.",
    ".wo.": ".attention.out.",
    ".ffn.w12.": ".ffn.gate_up.",
    ".ffn.w3.": ".ffn.down.",
}


def from_published(weights: Tensors, num_heads: int) -> Tensors:
    """The published NeoBERT's tensors under our names, rows of q and k reordered. A decoder bias of zeros is left out."""
    out: Tensors = {}
    for name, tensor in weights.items():
        for theirs, ours in PUBLISHED.items():
            name = name.replace(theirs, ours)
        if name.endswith("attention.qkv.weight"):
            q, k, v = tensor.view(num_heads, 3, -1, tensor.shape[1]).unbind(1)
            pairs = [torch.cat((x[:, 0::2], x[:, 1::2]), dim=1) for x in (q, k)]
            tensor = torch.stack((*pairs, v)).reshape(tensor.shape)
        if name != "lm_head.bias" or tensor.any():
            out[name] = tensor
    return out


def _split_name(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.down_proj.weight` -> (`model.layers.3.`, `mlp.down_proj.weight`); other names are whole."""
    head, found, tail = name.partition(".layers.")
    number, _, part = tail.partition(".")
    return (f"{head}.layers.{number}.", part) if found else ("", name)
