"""Attention within documents, behind one function: `attend(qkv, rotary, layout)`.

Shapes: B rows, T row length, N tokens of the whole batch (B*T, or fewer without padding), H heads, K head width,
n documents of a bucket, L its padded length. Hidden states travel as N x D; only this file knows where a document begins.
A `Layout` says so, in one of two ways:

- ragged: the lengths of the documents, one behind the other. Packed rows are this, and so are padded batches on the CPU,
  whose padding is left out before the first layer and put back behind the last.
- padded: rows of one length with a mask of the real tokens, for CUDA's SDPA, which wants static shapes.

On the CPU the ragged path is `BucketAttention`: documents of similar length are padded to a multiple of 64 and go through
batched matrix products, which is what AMX is fast at. Forward and backward together take a quarter of the time of one SDPA
call per document in bfloat16 (whose backward is slower than float32's), and 1/50 of one SDPA call with a block mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

GRANULARITY = 64  # documents are padded to a multiple of this many tokens
SCORE_BUDGET = 2**21  # attention scores held at a time: 4 MiB in bfloat16, about the L2 cache

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bucket:
    """n documents padded to L tokens each. `rows` (n*L) are their tokens' places in N; padding points at row N."""

    length: int  # L
    rows: Tensor
    mask_n1L: Tensor | None  # 0 for real keys, -inf for padding; None when no document is padded

    def gather(self, x_HNK: Tensor) -> Tensor:
        """H x (N+1) x K -> (H*n) x L x K."""
        return x_HNK.index_select(1, self.rows).view(-1, self.length, x_HNK.shape[-1])

    def scatter_(self, target_HNK: Tensor, x: Tensor) -> None:
        """The inverse of `gather`; what falls on row N is of no use."""
        target_HNK.index_copy_(1, self.rows, x.view(target_HNK.shape[0], -1, x.shape[-1]))

    def parts(self, num_heads: int) -> Iterator[slice]:
        """Runs of the H*n score matrices that stay within `SCORE_BUDGET`."""
        total = num_heads * len(self.rows) // self.length
        step = max(1, SCORE_BUDGET // self.length**2)
        return (slice(start, min(start + step, total)) for start in range(0, total, step))

    def bias(self, part: slice, num_heads: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a part: p x 1 x L."""
        if self.mask_n1L is None:
            return None
        return self.mask_n1L.to(dtype).repeat(num_heads, 1, 1)[part]


@dataclass(frozen=True)
class Layout:
    """Where documents lie in a flat batch. Exactly one of `lengths` and `mask_BT` is set."""

    lengths: tuple[int, ...] | None = None  # tokens of each document; their sum is N
    mask_BT: Tensor | None = None  # true where a token is real
    dropout: float = 0.0  # of attention weights; 0 outside training

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The documents of a ragged layout by padded length; computed once per batch, used by every layer."""
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        padded = -(-lengths // GRANULARITY) * GRANULARITY
        buckets = []
        for length in padded.unique().tolist():
            chosen = padded == length
            places = torch.arange(length)[None, :]
            real = places < lengths[chosen, None]
            rows = torch.where(real, starts[chosen, None] + places, int(lengths.sum()))
            mask = None if real.all() else torch.zeros(real.shape).masked_fill_(~real, -torch.inf)[:, None, :]
            buckets.append(Bucket(length, rows.flatten(), mask))
        return buckets


def attend(qkv_N3HK: Tensor, rotary: Rotary | None, layout: Layout) -> Tensor:
    """Softmax attention of every token to its own document; `rotary` turns queries and keys first. Returns N x H x K."""
    if layout.lengths is not None and layout.dropout == 0 and qkv_N3HK.device.type == "cpu":
        cos, sin = rotary or (None, None)
        return BucketAttention.apply(qkv_N3HK, cos, sin, layout)
    q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
    if rotary is not None:
        q_NHK, k_NHK = rotate(q_NHK, *rotary), rotate(k_NHK, *rotary)
    if layout.lengths is None:
        return _attend_padded(q_NHK, k_NHK, v_NHK, layout)
    return _attend_documents(q_NHK, k_NHK, v_NHK, layout)


def rotate(x_NHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of every head by the angles of N x K/2 tables: the half-rotation form of RoPE."""
    first, second = x_NHK.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x_NHK.dtype), sin[:, None].to(x_NHK.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attend_padded(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout) -> Tensor:
    assert layout.mask_BT is not None
    B, T = layout.mask_BT.shape
    q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q_NHK, k_NHK, v_NHK))
    mask = layout.mask_BT[:, None, None, :]
    out_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=layout.dropout)
    return out_BHTK.transpose(1, 2).reshape(q_NHK.shape)


def _attend_documents(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout) -> Tensor:
    """One SDPA call per document, over `split` pieces: slices would cost a full-size zero gradient each."""
    lengths = list(layout.lengths or ())
    pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_NHK, k_NHK, v_NHK)), strict=True)
    outs = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], dropout_p=layout.dropout)[0].transpose(0, 1)
        for q, k, v in pieces
    ]
    return torch.cat(outs)


class BucketAttention(torch.autograd.Function):
    """Rotary positions and ragged attention by batched matrix products over buckets of documents.

    Saved for the backward pass: the rotated q, k, v, head-major, so that a bucket's documents are one gather. Scores are
    computed again; at most `SCORE_BUDGET` of them exist at a time.
    """

    @staticmethod
    def forward(ctx, qkv_N3HK: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout) -> Tensor:  # type: ignore
        N, _, H, K = qkv_N3HK.shape
        heads_3HNK = qkv_N3HK.new_empty(3, H, N + 1, K)  # row N is the padding that buckets point at
        heads_3HNK[:, :, N] = 0
        _turn(qkv_N3HK.permute(1, 2, 0, 3), heads_3HNK[:, :, :N], cos, sin)
        heads_3HNK[0].mul_(K**-0.5)
        out_HNK = qkv_N3HK.new_empty(H, N + 1, K)
        for bucket in layout.buckets:
            q, k, v = (bucket.gather(x) for x in heads_3HNK)
            out = torch.empty_like(q)
            for part in bucket.parts(H):
                weights = _softmax(q[part], k[part], bucket.bias(part, H, q.dtype))
                torch.bmm(weights, v[part], out=out[part])
            bucket.scatter_(out_HNK, out)
        ctx.save_for_backward(heads_3HNK, cos, sin)
        ctx.layout = layout
        return out_HNK[:, :N].transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx, grad_NHK: Tensor):  # type: ignore
        heads_3HNK, cos, sin = ctx.saved_tensors
        N, H, K = grad_NHK.shape
        grad_HNK = F.pad(grad_NHK.transpose(0, 1), (0, 0, 0, 1))
        grads_3HNK = torch.empty_like(heads_3HNK)
        for bucket in ctx.layout.buckets:
            q, k, v = (bucket.gather(x) for x in heads_3HNK)
            grad = bucket.gather(grad_HNK)
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
            for part in bucket.parts(H):
                weights = _softmax(q[part], k[part], bucket.bias(part, H, q.dtype))
                grad_weights = torch.bmm(grad[part], v[part].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                torch.bmm(grad_scores, k[part], out=grad_q[part])
                torch.bmm(grad_scores.transpose(1, 2), q[part], out=grad_k[part])
                torch.bmm(weights.transpose(1, 2), grad[part], out=grad_v[part])
            for whole, one in zip(grads_3HNK, (grad_q, grad_k, grad_v), strict=True):
                bucket.scatter_(whole, one)
        grads_3HNK[0].mul_(K**-0.5)
        grad_qkv = heads_3HNK.new_empty(N, 3, H, K)
        _turn(grads_3HNK[:, :, :N], grad_qkv.permute(1, 2, 0, 3), cos, None if sin is None else -sin)
        return grad_qkv, None, None, None


def _softmax(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Attention weights of a part of a bucket; q comes scaled."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias is not None:
        scores += bias
    return scores.softmax(-1)


def _turn(source_3HNK: Tensor, target_3HNK: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Copy q, k, v, turning q and k by N x K/2 tables; the two may be laid out differently."""
    if cos is None or sin is None:
        target_3HNK.copy_(source_3HNK)
        return
    cos, sin = cos.to(source_3HNK.dtype), sin.to(source_3HNK.dtype)
    first, second = source_3HNK[:2].chunk(2, dim=-1)
    to_first, to_second = target_3HNK[:2].chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    target_3HNK[2].copy_(source_3HNK[2])
