"""Models in other layouts as ours: config, tensors and tokenizer of a folder, whoever wrote it.

| layout | recognised by | what is converted |
|---|---|---|
| checkpoint, export | `neobert` section in config.json | nothing |
| eurobert | model_type eurobert | names; grouped key and value heads are repeated; a tied decoder is written out |
| published | model_type neobert, without that section | fused q, k, v head by head; interleaved RoPE; the decoder's bias |

Tensors become float32. Only safetensors are read, and no code of a folder is run.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from neobert.checkpoints.format import STATE, WEIGHTS, Tensors
from neobert.checkpoints.layouts import FUSED, SAME_FIELDS, checkpoint_config, from_eurobert, from_published
from neobert.checkpoints.load import Layout, Source, check_fit, check_tokenizer, load_model
from neobert.checkpoints.locate import CONFIG, INDEX, find_model, read_model_config
from neobert.data.tokenizer import SPECIAL_TOKENS, fit_vocabulary, tokenizer_folder
from neobert.errors import CheckpointError, first_line
from neobert.model.layers import swiglu_width
from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM


def convert(path: str, tokenizer: str | None = None) -> Source:
    """The model at `path`: any folder of the table above, or a run's. `tokenizer`: another folder to take that from.

    Raises CheckpointError saying what is missing, what contradicts what, or which layouts are read.
    """
    folder = find_model(path, in_parts=True)
    fields = read_model_config(folder)
    hf_tokenizer = _load_tokenizer(Path(tokenizer) if tokenizer else folder)
    if "neobert" in fields:
        layout: Layout = "checkpoint" if (folder / STATE).is_file() else "export"
        found = Source(folder, fields, load_model(folder), hf_tokenizer, layout)
    else:
        found = _convert_layout(folder, fields, hf_tokenizer)
    check_tokenizer(folder, hf_tokenizer, found.model.config.vocab_size)
    fit_vocabulary(hf_tokenizer, found.model.config.vocab_size, multiple=1)
    return found


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, with what it calls bos and eos as CLS and SEP. Raises CheckpointError."""
    from transformers import AutoTokenizer

    inner = tokenizer_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(inner), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"no tokenizer can be loaded from it: {first_line(error)}; name one with --tokenizer"
        raise CheckpointError(f"{inner}: {problem}") from None
    for ours, theirs in (("cls_token", "bos_token"), ("sep_token", "eos_token"), ("pad_token", "eos_token")):
        if getattr(tokenizer, ours) is None and getattr(tokenizer, theirs) is not None:
            setattr(tokenizer, ours, getattr(tokenizer, theirs))
    missing = [name for name in SPECIAL_TOKENS if name != "unk_token" and getattr(tokenizer, name) is None]
    if missing:
        raise CheckpointError(f"{inner}: the tokenizer has no {', '.join(missing)}, which masked-LM training needs")
    return tokenizer


# --- layouts that are not ours -----------


def _convert_layout(folder: Path, fields: dict[str, Any], hf_tokenizer: Any) -> Source:
    """A EuroBERT or a published NeoBERT as ours; a decoder that is not there is drawn at random."""
    kind, notes = fields.get("model_type"), list[str]()
    if kind not in ("eurobert", "neobert"):
        known = "our checkpoints and exports, eurobert, and the published neobert"
        raise CheckpointError(f"{folder / CONFIG}: model_type {kind!r} cannot be imported; what can: {known}")
    layout: Layout = "eurobert" if kind == "eurobert" else "published"
    architecture, weights = (_from_eurobert if kind == "eurobert" else _from_published)(folder, fields, notes)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = NeoBERTForMaskedLM(architecture)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: describes no model: {error}") from None
    is_new = "lm_head.weight" not in weights
    if is_new:
        weights["lm_head.weight"] = model.lm_head.weight.detach()
        notes.append("no decoder in it: a new one, drawn at random")
    check_fit(folder, weights, model.state_dict())
    model.load_state_dict(weights)
    fields = checkpoint_config(architecture, hf_tokenizer, fields.get("name") or None)
    return Source(folder, fields, model.float().eval(), hf_tokenizer, layout, notes, is_new)


def _from_eurobert(folder: Path, fields: dict[str, Any], notes: list[str]) -> tuple[NeoBERTConfig, Tensors]:
    """(our config, our tensors). Every key and value head is repeated for the query heads that share it, which computes the
    same; `notes` get what is left out.
    """
    architecture, num_sharing = eurobert_architecture(folder, fields)
    weights = _known_parts(read_tensors(folder), "lm_head", notes)
    width = architecture.hidden_size // architecture.num_attention_heads
    for name, tensor in weights.items():
        if num_sharing > 1 and name.endswith(FUSED["attention.qkv.weight"][1:]):
            heads = tensor.view(-1, width, tensor.shape[1])
            weights[name] = heads.repeat_interleave(num_sharing, 0).reshape(-1, tensor.shape[1])
    if fields.get("tie_word_embeddings") and "lm_head.weight" not in weights:
        embeddings = next((name for name in weights if name.endswith("embed_tokens.weight")), None)
        weights |= {"lm_head.weight": weights[embeddings].clone()} if embeddings else {}
    try:
        return architecture, from_eurobert(weights)
    except KeyError as error:
        raise CheckpointError(f"{folder}: the weights do not fit the model: {error.args[0]} is missing") from None


def _from_published(folder: Path, fields: dict[str, Any], notes: list[str]) -> tuple[NeoBERTConfig, Tensors]:
    """(our config, our tensors); `notes` get what is left out."""
    architecture, weights = published_architecture(fields), _known_parts(read_tensors(folder), "decoder", notes)
    try:
        weights = from_published(weights, architecture.num_attention_heads)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / CONFIG}: contradicts the weights: {error}") from None
    architecture.decoder_bias = "lm_head.bias" in weights
    return architecture, weights


def eurobert_architecture(folder: Path, fields: dict[str, Any]) -> tuple[NeoBERTConfig, int]:
    """(our config of a EuroBERT, how many query heads share a key head). Raises CheckpointError for what ours cannot be."""
    from transformers import EuroBertConfig

    try:
        theirs = EuroBertConfig(**fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {str(error).splitlines()[0]}") from None
    rope, heads = dict(theirs.rope_parameters or {}), theirs.num_attention_heads
    inner, nominal = theirs.intermediate_size, 3 * theirs.intermediate_size // 2
    refused = {
        f"hidden_act {theirs.hidden_act}": theirs.hidden_act != "silu",
        "attention_bias": theirs.attention_bias,
        "mlp_bias": theirs.mlp_bias,
        f"rope_type {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        f"head_dim {theirs.head_dim}": theirs.head_dim not in (None, theirs.hidden_size // heads),
        f"intermediate_size {inner}, not a multiple of 8": swiglu_width(nominal) != inner,
    }
    if wrong := [what for what, holds in refused.items() if holds]:
        raise CheckpointError(f"{folder / CONFIG}: our model has no {'; no '.join(wrong)}")
    architecture = NeoBERTConfig(
        **{name: getattr(theirs, name) for name in SAME_FIELDS},
        intermediate_size=nominal,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        embedding_init_range=theirs.initializer_range,
        decoder_init_range=theirs.initializer_range,
    )
    return architecture, heads // (theirs.num_key_value_heads or heads)


def published_architecture(fields: dict[str, Any]) -> NeoBERTConfig:
    """Our config of the published NeoBERT; where its config.json is silent, its code's defaults hold."""
    names = {*SAME_FIELDS, "intermediate_size", "norm_eps", "embedding_init_range"}
    given = {name: value for name, value in fields.items() if name in names}
    longest = fields.get("max_position_embeddings", fields.get("max_length", 1024))
    return NeoBERTConfig(**{"num_hidden_layers": 28, "norm_eps": 1e-6, **given, "max_position_embeddings": longest})


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder, in one file or several, as float32. Raises CheckpointError."""
    try:
        names = [WEIGHTS]
        if (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        return {name: tensor.float() for file in names for name, tensor in load_file(folder / file).items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read: {error}") from None


def _known_parts(weights: Tensors, decoder: str, notes: list[str]) -> Tensors:
    """Encoder and decoder; `notes` get what is left out. An encoder saved by itself has no `model.` in its names."""
    if not any(name.startswith("model.") for name in weights):
        weights = {name if name.startswith(decoder) else f"model.{name}": tensor for name, tensor in weights.items()}
    kept = {name: tensor for name, tensor in weights.items() if name.startswith(("model.", f"{decoder}."))}
    left = sorted({name.partition(".")[0] for name in weights if name not in kept})
    notes += [f"not imported: {', '.join(left)}"] if left else []
    return kept
