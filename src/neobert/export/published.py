"""The published NeoBERT (arXiv 2502.19587), computed plainly from its own tensors: what imports of it are verified against.

Nothing is shared with our model: complex numbers rotate interleaved pairs, heads are cut out of the fused projection one by
one, attention is a softmax over one document.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neobert.checkpoints.convert import published_architecture, read_tensors
from neobert.checkpoints.locate import read_model_config


def published_outputs(folder: Path, rows: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(hidden states T x D, logits T x V where there is a decoder) of every row of token ids."""
    weights, config = read_tensors(folder), published_architecture(read_model_config(folder))
    if not any(name.startswith("model.") for name in weights):  # an encoder saved by itself
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    for row in rows:
        x_TD = weights["model.encoder.weight"][torch.tensor(row)]
        width = config.hidden_size // config.num_attention_heads
        angles = torch.outer(torch.arange(len(row)), 10_000.0 ** (-torch.arange(0, width, 2) / width))
        rotation = torch.polar(torch.ones_like(angles), angles)
        for number in range(config.num_hidden_layers):
            part = f"model.transformer_encoder.{number}."
            layer = {name.removeprefix(part): tensor for name, tensor in weights.items() if name.startswith(part)}
            x_TD = _block(x_TD, layer, rotation, config.num_attention_heads, config.norm_eps)
        x_TD = _norm(x_TD, weights["model.layer_norm.weight"], config.norm_eps)
        decoder = weights.get("decoder.weight")
        logits = None if decoder is None else F.linear(x_TD, decoder, weights.get("decoder.bias")).numpy()
        yield x_TD.numpy(), logits


def _block(x_TD: Tensor, layer: dict[str, Tensor], rotation: Tensor, num_heads: int, eps: float) -> Tensor:
    qkv_THK3 = (_norm(x_TD, layer["attention_norm.weight"], eps) @ layer["qkv.weight"].T).view(len(x_TD), num_heads, -1)
    attended = []
    for head in range(num_heads):
        q, k, v = qkv_THK3[:, head].chunk(3, dim=-1)
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.reshape(len(z), -1, 2).contiguous()) * rotation).flatten(1)
            for z in (q, k)
        )
        attended.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    x_TD = x_TD + torch.cat(attended, dim=-1) @ layer["wo.weight"].T
    gate, up = (_norm(x_TD, layer["ffn_norm.weight"], eps) @ layer["ffn.w12.weight"].T).chunk(2, dim=-1)
    return x_TD + (F.silu(gate) * up) @ layer["ffn.w3.weight"].T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
