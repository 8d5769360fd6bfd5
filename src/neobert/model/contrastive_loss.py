"""Losses of sentence embeddings as pure functions, and the gathering of embeddings over processes.

Shapes: A anchors of this process, C candidates of all processes, D width. Vectors come with length 1, in float32.

Keys say which texts are the same: a candidate that carries the key of an anchor's positive is not a negative of that anchor.
Sums are returned, not means: the loop divides by the number of anchors of the whole step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    anchors_AD: Tensor, candidates_CD: Tensor, own_A: Tensor, masked_AC: Tensor, temperature: float, extra_AC: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, how many anchors are nearest to their own positive): InfoNCE (arXiv 1807.03748).

    Candidate `own_A[i]` is the positive of anchor i, all others are negatives but those in `masked_AC`. `extra_AC` is added to
    the logits: a hard negative with w counts e^w times in the denominator (SimCSE, arXiv 2104.08821).
    """
    logits_AC = anchors_AD @ candidates_CD.T / temperature + extra_AC
    logits_AC = logits_AC.masked_fill(masked_AC, -torch.inf)
    return F.cross_entropy(logits_AC, own_A, reduction="sum"), (logits_AC.argmax(1) == own_A).sum()


def supcon(
    anchors_AD: Tensor, candidates_CD: Tensor, self_A: Tensor, same_AC: Tensor, temperature: float, extra_AC: Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of the losses, how many anchors are nearest to one of their own): SupCon, L_out of arXiv 2004.11362.

    `self_A[i]` is anchor i among the candidates, which is neither positive nor negative. Positives are all other candidates in
    `same_AC`; an anchor without one adds nothing.
    """
    is_self_AC = F.one_hot(self_A, len(candidates_CD)).bool()
    logits_AC = anchors_AD @ candidates_CD.T / temperature + extra_AC
    logits_AC = logits_AC.masked_fill(is_self_AC, -torch.inf)
    positive_AC = same_AC & ~is_self_AC
    log_probabilities = (logits_AC - logits_AC.logsumexp(1, keepdim=True)).masked_fill(~positive_AC, 0.0)
    losses_A = -log_probabilities.sum(1) / positive_AC.sum(1).clamp_min(1)
    nearest = logits_AC.argmax(1, keepdim=True)
    return losses_A.sum(), positive_AC.gather(1, nearest).sum()


@torch.no_grad()
def alignment(anchors_AD: Tensor, positives_AD: Tensor) -> Tensor:
    """Mean squared distance of positive pairs, from 0 (arXiv 2005.10242)."""
    return (anchors_AD - positives_AD).square().sum(1).mean()


@torch.no_grad()
def uniformity(vectors_AD: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different rows (arXiv 2005.10242); 0 when all are one point."""
    squared = (2 - 2 * (vectors_AD @ vectors_AD.T)).clamp_min(0)
    others = ~torch.eye(len(vectors_AD), dtype=torch.bool, device=vectors_AD.device)
    return squared[others].mul(-2).exp().mean().log()


class _GatherRows(torch.autograd.Function):
    """Rows of all processes one behind the other; their gradients come back to where they were computed, summed."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, counts: tuple[int, ...]):  # type: ignore
        ctx.counts = counts
        padded = rows_ND.new_zeros(max(counts), rows_ND.shape[1])
        padded[: len(rows_ND)] = rows_ND
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore
        total = grad.clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()], None


def gather_rows(rows_ND: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The rows of all processes, with gradients; `counts` says how many each of them has."""
    return rows_ND if len(counts) == 1 else _GatherRows.apply(rows_ND, counts)
