"""Attention within documents, behind one function: `attend(qkv, rotary, layout, scale)`.

Shapes: B rows, T row length, N tokens of the whole batch (B*T, or fewer without padding), H heads, K head width.
Hidden states travel as N x D; only the layout knows where a document begins. It is one of two kinds:

- ragged: the lengths of the documents, one behind the other. Packed rows are this, and so are padded batches on the CPU or
  with a variable-length kernel, whose padding is left out before the first layer and put back behind the last.
- padded: rows of one length with a mask of the real tokens, for SDPA on CUDA, which wants static shapes.

Ragged attention runs on the CPU as `BucketAttention`; on CUDA by a variable-length kernel, of the flash-attn package or
torch's own, where `Layout.kernel` names one, else by one SDPA call per document.
"""

from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .bucket_attention import GRANULARITY, BucketAttention, Buckets

Kernel = Literal["sdpa", "flash_attn", "torch_varlen"]


@dataclass
class Rotary:
    """Angles of every position, T x K/2 tables in float32, and the position of every token (RoPE, arXiv 2104.09864)."""

    cos_TK: Tensor
    sin_TK: Tensor
    positions_N: Tensor

    @staticmethod
    def of(length: int, head_width: int, positions_N: Tensor, base: float = 10_000.0) -> "Rotary":
        """Tables for positions below `length`, and those that buckets pad it with."""
        length = (length + GRANULARITY - 1) // GRANULARITY * GRANULARITY  # ONNX rounds negative quotients up
        exponents = torch.arange(0, head_width, 2, device=positions_N.device, dtype=torch.float32) / head_width
        angles = torch.arange(length, device=positions_N.device)[:, None] * (1.0 / base**exponents)
        return Rotary(angles.cos(), angles.sin(), positions_N)

    @cached_property
    def tables_N1K(self) -> tuple[Tensor, Tensor]:
        """The tables' rows of every token."""
        return self.cos_TK[self.positions_N][:, None], self.sin_TK[self.positions_N][:, None]

    def rotate(self, x_NHK: Tensor) -> Tensor:
        """Turn the pairs (i, i + K/2) of every head: the half-rotation form."""
        first, second = x_NHK.chunk(2, dim=-1)
        cos, sin = (table.to(x_NHK.dtype) for table in self.tables_N1K)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass
class Layout:
    """Where documents lie in a flat batch. Exactly one of `lengths` and `mask_BT` is set."""

    lengths: tuple[int, ...] | None = None  # tokens of each document; with `filler` their sum is N
    mask_BT: Tensor | None = None  # true where a token is real
    dropout: float = 0.0  # of attention weights; 0 outside training
    kernel: Kernel = "sdpa"  # what ragged attention runs on CUDA
    granularity: int = GRANULARITY  # of the buckets on the CPU
    filler: int = 0  # tokens behind the documents that belong to none (CPU; flat.py)
    _starts: Tensor | None = field(default=None, init=False, repr=False)

    @cached_property
    def buckets(self) -> Buckets:
        """The documents by padded length; computed once per batch, used by every layer."""
        assert self.lengths is not None
        whole, rest = divmod(self.filler, GRANULARITY)
        return Buckets.of((*self.lengths, *[GRANULARITY] * whole, *([rest] if rest else [])), self.granularity)

    def cumulative(self, device: torch.device) -> tuple[Tensor, int]:
        """What variable-length kernels take: first tokens of the documents and the end, int32; the longest length.

        Copied to the device once per batch, as all layers ask for it.
        """
        assert self.lengths is not None
        if self._starts is None:
            self._starts = torch.tensor((0, *self.lengths)).cumsum(0).to(device, torch.int32, non_blocking=True)
        return self._starts, max(self.lengths)


def attend(qkv_N3HK: Tensor, rotary: Rotary | None, layout: Layout, scale: float) -> Tensor:
    """Softmax attention of every token to its own document: N x H x K.

    `rotary` turns queries and keys first; `scale` multiplies their products.
    """
    if layout.lengths is not None and qkv_N3HK.device.type == "cpu":
        cos, sin = (None, None) if rotary is None else (rotary.cos_TK, rotary.sin_TK)
        return BucketAttention.apply(qkv_N3HK, cos, sin, layout.buckets, scale, layout.dropout)
    q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
    if rotary is not None:
        q_NHK, k_NHK = rotary.rotate(q_NHK), rotary.rotate(k_NHK)
    if layout.lengths is None:
        return _attend_padded(q_NHK, k_NHK, v_NHK, layout, scale)
    if layout.kernel == "sdpa":
        return attend_documents(q_NHK, k_NHK, v_NHK, layout, scale)
    return _attend_varlen(q_NHK, k_NHK, v_NHK, layout, scale)


def _attend_padded(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, scale: float) -> Tensor:
    assert layout.mask_BT is not None
    B, T = layout.mask_BT.shape
    q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q_NHK, k_NHK, v_NHK))
    mask = layout.mask_BT[:, None, None, :]
    out_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=layout.dropout, scale=scale)
    return out_BHTK.transpose(1, 2).reshape(q_NHK.shape)


def _attend_varlen(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, scale: float) -> Tensor:
    starts, longest = layout.cumulative(q_NHK.device)
    if layout.kernel == "flash_attn":
        return import_module("flash_attn").flash_attn_varlen_func(
            q_NHK, k_NHK, v_NHK, starts, starts, longest, longest, dropout_p=layout.dropout, softmax_scale=scale
        )
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q_NHK, k_NHK, v_NHK, starts, starts, longest, longest, scale=scale)


def attend_documents(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, scale: float) -> Tensor:
    """One SDPA call per document, over `split` pieces: slices would cost a full-size zero gradient each."""
    lengths = list(layout.lengths or ())
    pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_NHK, k_NHK, v_NHK)), strict=True)
    outs = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], dropout_p=layout.dropout, scale=scale)[0]
        for q, k, v in pieces
    ]
    return torch.cat(outs, dim=1).transpose(0, 1)
