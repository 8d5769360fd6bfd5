"""Attention within documents, in one function: `attend(qkv, rotary, layout, scale)`.

Shapes: B rows, T row length, N tokens of the whole batch (B*T, or fewer without padding), H heads, K head width; of buckets:
P tokens with padding, n documents, L padded length, in matrix products B = H*n.
Hidden states are N x D in every layer; only the layout knows where a document begins. It is one of two kinds:

- ragged: the lengths of the documents, one after the other. Packed rows are this, and so are padded batches, whose padding is
  left out before the first layer and restored after the last. On CUDA all documents are one call of a kernel for variable
  lengths (`attend_varlen`), whose `Layout.cu_seqlens` are on the device; on the CPU in bfloat16 it is `BucketAttention`; else
  SDPA, one call for documents of the same length.
- padded: rows of one length with a mask of the real tokens, for SDPA where shapes have to be static (exports, other devices).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["sdpa", "flash_attn", "torch_varlen", "torch_efficient"]
Tables: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines of every token, N x 1 x K/2
GRANULARITY = 32  # documents are padded to a multiple of this many tokens
FINE_GRANULARITY = 8  # where texts come sorted by length, so that few lengths occur: less padding
SCORE_BUDGET = 2**21  # attention scores computed at a time: 4 MiB in bfloat16, about the L2 cache
KEPT_LENGTH = 256  # weights of documents up to this length are kept for the backward pass, longer ones computed again
CPU_CALL = 256  # tokens of an SDPA call on the CPU that holds several documents: more leave the cache


@dataclass
class Rotary:
    """Angles of every position, T x K/2 tables in float32, and the position of every token (RoPE, arXiv 2104.09864)."""

    cos_TK: Tensor
    sin_TK: Tensor
    positions_N: Tensor
    _cast: Tables | None = field(default=None, init=False, repr=False)

    @staticmethod
    def of(length: int, head_width: int, positions_N: Tensor, base: float = 10_000.0) -> "Rotary":
        """Tables for positions below `length`, and those that buckets pad it with."""
        length = (length + GRANULARITY - 1) // GRANULARITY * GRANULARITY  # ONNX rounds negative quotients up
        exponents = torch.arange(0, head_width, 2, device=positions_N.device, dtype=torch.float32) / head_width
        angles = torch.arange(length, device=positions_N.device)[:, None] * (1.0 / base**exponents)
        return Rotary(angles.cos(), angles.sin(), positions_N)

    @cached_property
    def tables_N1K(self) -> Tables:
        """Cosines and sines of every token, N x 1 x K/2."""
        return self.cos_TK[self.positions_N][:, None], self.sin_TK[self.positions_N][:, None]

    def tables_of(self, dtype: torch.dtype) -> Tables:
        """The same in another dtype: cast once per batch, as all layers ask for it."""
        if self._cast is None or self._cast[0].dtype != dtype:
            self._cast = (self.tables_N1K[0].to(dtype), self.tables_N1K[1].to(dtype))
        return self._cast

    def rotate(self, x_NHK: Tensor) -> Tensor:
        """Rotate every head by the position of its token."""
        return rotate(x_NHK, *self.tables_of(x_NHK.dtype))


def rotate(x_NHK: Tensor, cos_N1K: Tensor, sin_N1K: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of every head; as `FusedRotary`, of torch's own operators."""
    first, second = x_NHK.chunk(2, dim=-1)
    return torch.cat((first * cos_N1K - second * sin_N1K, second * cos_N1K + first * sin_N1K), dim=-1)


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


@dataclass(frozen=True)
class Bucket:
    """n documents of padded length L, which lie at `span` of the padded batch."""

    length: int
    num_documents: int
    span: slice
    mask_n1L: Tensor | None  # 0 for real keys, -inf for padding; None when no document is padded

    def heads(self, x_PXHK: Tensor) -> Tensor:
        """A view of the bucket's part of P x X x H x K as X x H x n x L x K."""
        shape = (self.num_documents, self.length, *x_PXHK.shape[1:])
        return x_PXHK[self.span].view(shape).permute(2, 3, 0, 1, 4)

    def parts(self, num_heads: int) -> Iterator[slice]:
        """Runs of the B score matrices that stay within `SCORE_BUDGET`."""
        total = num_heads * self.num_documents
        step = max(1, SCORE_BUDGET // self.length**2)
        return (slice(start, min(start + step, total)) for start in range(0, total, step))

    def weights(self, q_BLK: Tensor, k_BLK: Tensor, part: slice) -> Tensor:
        """Attention weights of a part; q comes scaled."""
        scores = torch.bmm(q_BLK[part], k_BLK[part].transpose(1, 2))
        if self.mask_n1L is not None:
            repeats = q_BLK.shape[0] // self.num_documents
            scores += self.mask_n1L.to(scores.dtype).repeat(repeats, 1, 1)[part]
        return scores.softmax(-1)


@dataclass(frozen=True)
class Buckets:
    """All documents of a batch by padded length."""

    buckets: list[Bucket]
    tokens_P: Tensor  # the token at every index of the padded batch
    index_N: Tensor  # the index of every token in the padded batch
    padding: Tensor  # indices that hold padding

    @staticmethod
    def of(document_lengths: tuple[int, ...], granularity: int = GRANULARITY) -> "Buckets":
        lengths = torch.tensor(document_lengths, dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        padded = -(-lengths // granularity) * granularity
        buckets, start = [], 0
        tokens, real = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.bool)]
        for length in padded[padded > 0].unique().tolist():
            chosen = padded == length
            n, offsets = int(chosen.sum()), torch.arange(length)
            real_nL = offsets < lengths[chosen, None]
            tokens.append((starts[chosen, None] + offsets.minimum(lengths[chosen, None] - 1)).flatten())
            real.append(real_nL.flatten())
            mask = None if real_nL.all() else torch.zeros(real_nL.shape).masked_fill_(~real_nL, -torch.inf)[:, None]
            buckets.append(Bucket(length, n, slice(start, start + n * length), mask))
            start += n * length
        tokens_P, real_P = torch.cat(tokens), torch.cat(real)
        index_N = torch.empty(int(lengths.sum()), dtype=torch.int64)
        index_N[tokens_P[real_P]] = real_P.nonzero().squeeze(1)
        return Buckets(buckets, tokens_P, index_N, (~real_P).nonzero().squeeze(1))


@dataclass
class Layout:
    """Where documents lie in an unpadded batch. Exactly one of `lengths` and `mask_BT` is set."""

    lengths: tuple[int, ...] | None = None  # tokens of each document; with `padding` their sum is N
    cu_seqlens: Tensor | None = None  # int32: 0, then the end of each document and piece of padding, for `kernel`
    max_seqlen: int = 0  # nothing between two of `cu_seqlens` is longer
    mask_BT: Tensor | None = None  # true where a token is real
    dropout: float = 0.0  # of attention weights; 0 outside training
    kernel: Kernel = "sdpa"  # what documents of `cu_seqlens` run
    granularity: int = GRANULARITY  # of the buckets on the CPU
    padding: int = 0  # tokens after those of the documents, which belong to none

    @cached_property
    def buckets(self) -> Buckets:
        """The documents by padded length; computed once per batch, used by every layer."""
        assert self.lengths is not None
        whole, rest = divmod(self.padding, GRANULARITY)
        return Buckets.of((*self.lengths, *[GRANULARITY] * whole, *([rest] if rest else [])), self.granularity)


def uses_buckets(dtype: torch.dtype) -> bool:
    """Whether ragged attention on the CPU runs as `BucketAttention`, which computes the same as SDPA: in bfloat16 it takes half
    of the time without AMX and a third with it; in float32 SDPA takes 0.45 to 0.95 of its time (`benchmarks/attention.py`).
    """
    return dtype is torch.bfloat16


def attend(qkv_N3HK: Tensor, rotary: Rotary | None, layout: Layout, scale: float) -> Tensor:
    """Softmax attention of every token to its own document: N x H x K. `scale` multiplies the products of q and k."""
    if layout.cu_seqlens is not None:
        return attend_varlen(qkv_N3HK, layout.cu_seqlens, layout, scale)
    if layout.lengths is not None and qkv_N3HK.device.type == "cpu" and uses_buckets(qkv_N3HK.dtype):
        cos, sin = (None, None) if rotary is None else (rotary.cos_TK, rotary.sin_TK)
        return BucketAttention.apply(qkv_N3HK, cos, sin, layout, scale)
    if layout.lengths is not None:
        if rotary is not None:
            qkv_N3HK = FusedRotary.apply(qkv_N3HK, *rotary.tables_N1K)
        return attend_documents(qkv_N3HK, layout, scale)
    assert layout.mask_BT is not None
    q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
    if rotary is not None:
        q_NHK, k_NHK = rotary.rotate(q_NHK), rotary.rotate(k_NHK)
    B, T = layout.mask_BT.shape
    q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q_NHK, k_NHK, v_NHK))
    mask = layout.mask_BT[:, None, None, :]
    out_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=layout.dropout, scale=scale)
    return out_BHTK.transpose(1, 2).reshape(q_NHK.shape)


def attend_varlen(qkv_N3HK: Tensor, cu_seqlens: Tensor, layout: Layout, scale: float) -> Tensor:
    """All documents in one call of the kernel that `layout` names: N x H x K. q and k come rotated.

    torch's kernel for variable lengths takes bfloat16 and float16 and has no dropout; the memory-efficient one of SDPA takes
    every dtype and has it.
    """
    q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
    spans = (cu_seqlens, cu_seqlens, layout.max_seqlen, layout.max_seqlen)
    if layout.kernel == "flash_attn":
        flash_attn = import_module("flash_attn").flash_attn_varlen_func
        return flash_attn(q_NHK, k_NHK, v_NHK, *spans, dropout_p=layout.dropout, softmax_scale=scale)
    if layout.kernel == "torch_varlen":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q_NHK, k_NHK, v_NHK, *spans, scale=scale)
    one_row = (q_NHK[None], k_NHK[None], v_NHK[None])
    no_mask, logsumexp = 0, qkv_N3HK.requires_grad  # the backward pass needs it
    attend = torch.ops.aten._efficient_attention_forward
    return attend(*one_row, None, *spans, layout.dropout, no_mask, logsumexp, scale=scale)[0].squeeze(0)


def attend_documents(qkv_N3HK: Tensor, layout: Layout, scale: float) -> Tensor:
    """SDPA over documents of the same length together, as many as `CPU_CALL` tokens hold on the CPU: N x H x K. Pieces come
    from `split`: slices would cost a full-size zero gradient each.
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


class BucketAttention(torch.autograd.Function):
    """Rotary positions and ragged attention by batched matrix products: qkv N x 3 x H x K -> N x H x K.

    Documents are padded to a multiple of `GRANULARITY` tokens, and those of one padded length form a bucket: a batch of equal
    matrices, which is what AMX is fast at, and only a few shapes occur. Padding repeats the document's own last token, its keys
    are masked out and its gradients are zero: documents never touch. In bfloat16 forward and backward take a quarter of the
    time of one SDPA call per document, and 1/50 of one with a block mask.

    `cos` and `sin` are position x K/2 (every document starts at position 0) or None; `scale` multiplies the scores. Saved for
    the backward pass: the rotated q, k, v of every bucket, and the weights of short documents; those of long ones are
    computed again, at most `SCORE_BUDGET` at a time. Dropout of the weights is drawn again from its seed.
    """

    @staticmethod
    def forward(ctx, qkv_N3HK, cos, sin, layout: Layout, scale: float):  # type: ignore
        (_, _, H, K), buckets = qkv_N3HK.shape, layout.buckets
        qkv_P3HK = qkv_N3HK.index_select(0, buckets.tokens_P)
        out_P1HK = qkv_N3HK.new_empty(len(buckets.tokens_P), 1, H, K)
        seed = int(torch.randint(2**62, ())) if layout.dropout else None
        noise = None if seed is None else torch.Generator().manual_seed(seed)
        saved: list[list[Tensor]] = []
        for bucket in buckets.buckets:
            heads = qkv_N3HK.new_empty(3, H, bucket.num_documents, bucket.length, K)
            _rotate(bucket.heads(qkv_P3HK), heads, cos, sin, scale)
            q, k, v = heads.flatten(1, 2)
            out, kept = torch.empty_like(q), []
            for part in bucket.parts(H):
                weights = bucket.weights(q, k, part)
                kept += [weights] if bucket.length <= KEPT_LENGTH and ctx.needs_input_grad[0] else []
                torch.bmm(_drop(weights, layout.dropout, noise), v[part], out=out[part])
            bucket.heads(out_P1HK).copy_(out.view(1, *heads.shape[1:]))
            saved.append([heads, *kept])
        ctx.save_for_backward(cos, sin, *itertools.chain(*saved))
        ctx.counts, ctx.layout, ctx.scale, ctx.seed = list(map(len, saved)), layout, scale, seed
        return out_P1HK.squeeze(1).index_select(0, buckets.index_N)

    @staticmethod
    def backward(ctx, grad_NHK: Tensor):  # type: ignore
        cos, sin, *saved = ctx.saved_tensors
        (_, H, K), buckets, saved = grad_NHK.shape, ctx.layout.buckets, iter(saved)
        grad_P1HK = grad_NHK.index_select(0, buckets.tokens_P).index_fill_(0, buckets.padding, 0)[:, None]
        grads_P3HK = grad_NHK.new_empty(len(buckets.tokens_P), 3, H, K)
        noise = None if ctx.seed is None else torch.Generator().manual_seed(ctx.seed)
        for bucket, count in zip(buckets.buckets, ctx.counts, strict=True):
            heads, *kept = itertools.islice(saved, count)
            q, k, v = heads.flatten(1, 2)
            grad = bucket.heads(grad_P1HK).reshape(q.shape)
            grads = torch.empty_like(heads)
            grad_q, grad_k, grad_v = grads.flatten(1, 2)
            for number, part in enumerate(bucket.parts(H)):
                weights = kept[number] if kept else bucket.weights(q, k, part)
                grad_weights = torch.bmm(grad[part], v[part].transpose(1, 2))
                dropped = _drop(weights, ctx.layout.dropout, noise, grad_weights)
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                torch.bmm(grad_scores, k[part], out=grad_q[part])
                torch.bmm(grad_scores.transpose(1, 2), q[part], out=grad_k[part])
                torch.bmm(dropped.transpose(1, 2), grad[part], out=grad_v[part])
            _rotate(grads, bucket.heads(grads_P3HK), cos, None if sin is None else -sin, ctx.scale)
        return grads_P3HK.index_select(0, buckets.index_N), None, None, None, None


def _drop(weights: Tensor, probability: float, generator: torch.Generator | None, grad: Tensor | None = None) -> Tensor:
    """The weights after dropout; `grad`, of the dropped weights, becomes in place that of the weights."""
    if generator is None:
        return weights
    kept = torch.empty_like(weights).bernoulli_(1 - probability, generator=generator).div_(1 - probability)
    if grad is not None:
        grad.mul_(kept)
    return kept.mul_(weights)


def rotate_pairs(source: Tensor, target: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write every head of `source` to `target` with its pairs (i, i + K/2) rotated: RoPE (arXiv 2104.09864)."""
    first, second = source.chunk(2, dim=-1)
    to_first, to_second = target.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)


def _rotate(source: Tensor, target: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float) -> None:
    """Copy q, k, v (3 x H x n x L x K, laid out differently), rotating q and k by their positions and scaling q."""
    target[2].copy_(source[2])
    if cos is None or sin is None:
        torch.mul(source[0], scale, out=target[0])
        target[1].copy_(source[1])
        return
    factors = torch.tensor([scale, 1.0]).view(2, 1, 1, 1, 1)
    cos_2LK, sin_2LK = (table[: source.shape[3]].mul(factors).to(source.dtype) for table in (cos, sin))
    rotate_pairs(source[:2], target[:2], cos_2LK, sin_2LK)
