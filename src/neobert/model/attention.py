"""Attention within documents, in one function: `attend(qkv, rotary, layout, scale)`.

Shapes: B rows, T row length, N tokens of the whole batch (B*T, or fewer without padding), H heads, K head width.
Hidden states are N x D in every layer; only the layout knows where a document begins. It is one of two kinds:

- ragged: the lengths of the documents, one after the other. Packed rows are this, and so are padded batches on the CPU or
  with a variable-length kernel, whose padding is left out before the first layer and restored after the last.
- padded: rows of one length with a mask of the real tokens, for SDPA on CUDA, which wants static shapes.

Ragged attention runs on CUDA by a variable-length kernel, of the flash-attn package or torch's own, where `Layout.kernel`
names one. On the CPU it runs as `BucketAttention` in bfloat16 (`uses_buckets`). Everything else is SDPA, one call
for documents of the same length.
"""

from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .bucket_attention import GRANULARITY, BucketAttention, Buckets, rotate_pairs

Kernel = Literal["sdpa", "flash_attn", "torch_varlen"]
CPU_CALL = 256  # tokens of an SDPA call on the CPU that holds several documents: more leave the cache


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
        """Cosines and sines of every token, N x 1 x K/2."""
        return self.cos_TK[self.positions_N][:, None], self.sin_TK[self.positions_N][:, None]

    def rotate(self, x_NHK: Tensor) -> Tensor:
        """Rotate the pairs (i, i + K/2) of every head; as `FusedRotary`, of torch's own operators."""
        first, second = x_NHK.chunk(2, dim=-1)
        cos, sin = (table.to(x_NHK.dtype) for table in self.tables_N1K)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FusedRotary(torch.autograd.Function):
    """q, k and v, N x 3 x H x K, with q and k rotated as `Rotary.rotate` does; the tables are N x 1 x K/2."""

    @staticmethod
    def forward(ctx, qkv_N3HK: Tensor, cos_N1K: Tensor, sin_N1K: Tensor) -> Tensor:  # type: ignore
        ctx.save_for_backward(cos_N1K, sin_N1K)
        cos, sin = (table[:, None].to(qkv_N3HK.dtype) for table in (cos_N1K, sin_N1K))
        out_N3HK = torch.empty_like(qkv_N3HK)
        out_N3HK[:, 2] = qkv_N3HK[:, 2]
        rotate_pairs(qkv_N3HK[:, :2], out_N3HK[:, :2], cos, sin)
        return out_N3HK

    @staticmethod
    def backward(ctx, grad_N3HK: Tensor):  # type: ignore
        cos_N1K, sin_N1K = ctx.saved_tensors
        return FusedRotary.apply(grad_N3HK, cos_N1K, -sin_N1K), None, None


@dataclass
class Layout:
    """Where documents lie in an unpadded batch. Exactly one of `lengths` and `mask_BT` is set."""

    lengths: tuple[int, ...] | None = None  # tokens of each document; with `padding` their sum is N
    mask_BT: Tensor | None = None  # true where a token is real
    dropout: float = 0.0  # of attention weights; 0 outside training
    kernel: Kernel = "sdpa"  # what ragged attention runs on CUDA
    granularity: int = GRANULARITY  # of the buckets on the CPU
    padding: int = 0  # tokens after those of the documents, which belong to none (CPU; unpadding.py)
    _starts: Tensor | None = field(default=None, init=False, repr=False)

    @cached_property
    def buckets(self) -> Buckets:
        """The documents by padded length; computed once per batch, used by every layer."""
        assert self.lengths is not None
        whole, rest = divmod(self.padding, GRANULARITY)
        return Buckets.of((*self.lengths, *[GRANULARITY] * whole, *([rest] if rest else [])), self.granularity)

    def cumulative(self, device: torch.device) -> tuple[Tensor, int]:
        """What variable-length kernels take: first tokens of the documents and the end, int32; the longest length.

        Copied to the device once per batch, as all layers ask for it.
        """
        assert self.lengths is not None
        if self._starts is None:
            self._starts = torch.tensor((0, *self.lengths)).cumsum(0).to(device, torch.int32, non_blocking=True)
        return self._starts, max(self.lengths)


def uses_buckets(dtype: torch.dtype) -> bool:
    """Whether ragged attention on the CPU runs as `BucketAttention`, which computes the same as SDPA.

    Measured forward and backward at documents of 8 to 4,096 tokens (`benchmarks/attention.py`): in bfloat16 buckets take
    half of the time of SDPA without AMX and a third with it; in float32 SDPA takes less at every length, 0.45 to 0.95.
    """
    return dtype is torch.bfloat16


def attend(qkv_N3HK: Tensor, rotary: Rotary | None, layout: Layout, scale: float) -> Tensor:
    """Softmax attention of every token to its own document: N x H x K. `scale` multiplies the products of q and k."""
    on_cpu = qkv_N3HK.device.type == "cpu"
    if layout.lengths is not None and on_cpu and uses_buckets(qkv_N3HK.dtype):
        cos, sin = (None, None) if rotary is None else (rotary.cos_TK, rotary.sin_TK)
        return BucketAttention.apply(qkv_N3HK, cos, sin, layout.buckets, scale, layout.dropout)
    if layout.lengths is not None and (on_cpu or layout.kernel == "sdpa"):
        if rotary is not None:
            qkv_N3HK = FusedRotary.apply(qkv_N3HK, *rotary.tables_N1K)
        return attend_documents(qkv_N3HK, layout, scale)
    q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
    if rotary is not None:
        q_NHK, k_NHK = rotary.rotate(q_NHK), rotary.rotate(k_NHK)
    dropout = layout.dropout
    if layout.mask_BT is not None:
        B, T = layout.mask_BT.shape
        q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q_NHK, k_NHK, v_NHK))
        mask = layout.mask_BT[:, None, None, :]
        out_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out_BHTK.transpose(1, 2).reshape(q_NHK.shape)
    starts, longest = layout.cumulative(q_NHK.device)
    spans = (starts, starts, longest, longest)
    if layout.kernel == "flash_attn":
        attend_varlen = import_module("flash_attn").flash_attn_varlen_func
        return attend_varlen(q_NHK, k_NHK, v_NHK, *spans, dropout_p=dropout, softmax_scale=scale)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q_NHK, k_NHK, v_NHK, *spans, scale=scale)


def attend_documents(qkv_N3HK: Tensor, layout: Layout, scale: float) -> Tensor:
    """SDPA over documents of the same length together, as many as `CPU_CALL` tokens hold on the CPU: N x H x K.

    Pieces come from `split`: slices would cost a full-size zero gradient each.
    """
    assert layout.lengths is not None
    lengths = (*layout.lengths, layout.padding) if layout.padding else layout.lengths
    limit = CPU_CALL if qkv_N3HK.device.type == "cpu" else len(qkv_N3HK)
    groups: list[list[int]] = []
    group_of: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        group = group_of.get(length)
        if group is None or (len(group) + 1) * length > limit:
            groups.append(group := [])
            group_of[length] = group
        group.append(number)
    if len(groups) == 1:  # rows as they lie
        return _attend_equal(qkv_N3HK.unflatten(0, (len(lengths), lengths[0])), layout.dropout, scale).flatten(0, 1)
    pieces = qkv_N3HK.split(lengths)
    outs = list(pieces)
    for group in groups:
        stacked = pieces[group[0]][None] if len(group) == 1 else torch.stack([pieces[number] for number in group])
        for number, out_LHK in zip(group, _attend_equal(stacked, layout.dropout, scale).unbind(0), strict=True):
            outs[number] = out_LHK
    return torch.cat(outs) if outs else qkv_N3HK[:, 0]


def _attend_equal(qkv_nL3HK: Tensor, dropout: float, scale: float) -> Tensor:
    """SDPA of n documents of L tokens: n x L x H x K."""
    q, k, v = qkv_nL3HK.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2)
