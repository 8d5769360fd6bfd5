"""Attention within documents on the CPU in bfloat16: batched matrix products over documents of similar length.

Documents are padded to a multiple of 32 tokens and those of one padded length form a bucket, so that every product is a
batch of equal matrices, which is what AMX is fast at, and only a few shapes occur. Padding repeats the document's own last
token, its keys are masked out and its gradients are zero: documents never touch. Forward and backward together take a
quarter of the time of one SDPA call per document in bfloat16 (whose backward is slower than float32's), and 1/50 of one
SDPA call with a block mask.

Shapes: N tokens, P tokens with padding, H heads, K head width; of a bucket: n documents, L padded length, B = H*n.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GRANULARITY = 32  # documents are padded to a multiple of this many tokens
FINE_GRANULARITY = 8  # where texts come sorted by length, so that few lengths occur: less padding
SCORE_BUDGET = 2**21  # attention scores computed at a time: 4 MiB in bfloat16, about the L2 cache
KEPT_LENGTH = 256  # weights of documents up to this length are kept for the backward pass, longer ones computed again


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


class BucketAttention(torch.autograd.Function):
    """Rotary positions and ragged attention: qkv N x 3 x H x K -> N x H x K.

    `cos` and `sin` are position x K/2 (every document starts at position 0) or None; `scale` multiplies the scores. Saved for
    the backward pass: the rotated q, k, v of every bucket, and the weights of short documents; those of long ones are
    computed again, at most `SCORE_BUDGET` at a time. Dropout of the weights is drawn again from its seed.
    """

    @staticmethod
    def forward(ctx, qkv_N3HK, cos, sin, buckets: Buckets, scale: float, dropout: float):  # type: ignore
        _, _, H, K = qkv_N3HK.shape
        qkv_P3HK = qkv_N3HK.index_select(0, buckets.tokens_P)
        out_P1HK = qkv_N3HK.new_empty(len(buckets.tokens_P), 1, H, K)
        noise = _Noise(dropout)
        saved: list[list[Tensor]] = []
        for bucket in buckets.buckets:
            heads = qkv_N3HK.new_empty(3, H, bucket.num_documents, bucket.length, K)
            _rotate(bucket.heads(qkv_P3HK), heads, cos, sin, scale)
            q, k, v = heads.flatten(1, 2)
            out, kept = torch.empty_like(q), []
            for part in bucket.parts(H):
                weights = bucket.weights(q, k, part)
                kept += [weights] if bucket.length <= KEPT_LENGTH and ctx.needs_input_grad[0] else []
                torch.bmm(noise.drop(weights), v[part], out=out[part])
            bucket.heads(out_P1HK).copy_(out.view(1, *heads.shape[1:]))
            saved.append([heads, *kept])
        ctx.save_for_backward(cos, sin, *itertools.chain(*saved))
        ctx.counts, ctx.buckets = list(map(len, saved)), buckets
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, noise.seed
        return out_P1HK.squeeze(1).index_select(0, buckets.index_N)

    @staticmethod
    def backward(ctx, grad_NHK: Tensor):  # type: ignore
        cos, sin, *saved = ctx.saved_tensors
        buckets, saved = ctx.buckets, iter(saved)
        _, H, K = grad_NHK.shape
        grad_P1HK = grad_NHK.index_select(0, buckets.tokens_P).index_fill_(0, buckets.padding, 0)[:, None]
        grads_P3HK = grad_NHK.new_empty(len(buckets.tokens_P), 3, H, K)
        noise = _Noise(ctx.dropout, ctx.seed)
        for bucket, count in zip(buckets.buckets, ctx.counts, strict=True):
            heads, *kept = itertools.islice(saved, count)
            q, k, v = heads.flatten(1, 2)
            grad = bucket.heads(grad_P1HK).reshape(q.shape)
            grads = torch.empty_like(heads)
            grad_q, grad_k, grad_v = grads.flatten(1, 2)
            for number, part in enumerate(bucket.parts(H)):
                weights = kept[number] if kept else bucket.weights(q, k, part)
                grad_weights = torch.bmm(grad[part], v[part].transpose(1, 2))
                dropped = noise.drop(weights, grad_weights)
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                torch.bmm(grad_scores, k[part], out=grad_q[part])
                torch.bmm(grad_scores.transpose(1, 2), q[part], out=grad_k[part])
                torch.bmm(dropped.transpose(1, 2), grad[part], out=grad_v[part])
            _rotate(grads, bucket.heads(grads_P3HK), cos, None if sin is None else -sin, ctx.scale)
        return grads_P3HK.index_select(0, buckets.index_N), None, None, None, None, None


class _Noise:
    """Dropout of attention weights, drawn part by part from a seed, so that the backward pass draws the same."""

    def __init__(self, probability: float, seed: int | None = None):
        self.probability, self.seed = probability, seed
        if probability:
            self.seed = int(torch.randint(2**62, ())) if seed is None else seed
            self.generator = torch.Generator().manual_seed(self.seed)

    def drop(self, weights: Tensor, grad: Tensor | None = None) -> Tensor:
        """The weights after dropout; `grad`, of the dropped weights, becomes in place that of the weights."""
        if not self.probability:
            return weights
        kept = torch.empty_like(weights).bernoulli_(1 - self.probability, generator=self.generator)
        kept.div_(1 - self.probability)
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
