"""Sentence embeddings and their contrastive loss, which is computed in `forward`, over the candidates of all processes.

Texts of a step go through the encoder together: anchors, positives, then hard negatives. Keys say which texts are the same: a
candidate that carries the key of an anchor's positive is not a negative of that anchor. Losses are sums over the anchors.
Shapes: D width, n texts of this process, B rows of this process, G rows of all, A anchors of this process, C candidates of all.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_neobert import LossOutput, NeoBERT, NeoBERTConfig, NeoBERTPreTrainedModel
from .unpadding import Lengths, Pooling

OBSERVED = 512  # pairs of a batch that alignment and uniformity are computed of


@dataclass(frozen=True)
class ContrastiveSettings:
    """What the loss is. `loss_type`: "simcse" (InfoNCE) or "supcon"."""

    loss_type: str = "simcse"
    temperature: float = 0.05
    hard_negative_weight: float = 0.0
    pooling: Pooling = "avg"


class ContrastiveLoss(nn.Module):
    """From embeddings and keys to the loss. The vectors of the last batch in training are kept, for `observe`."""

    def __init__(self, settings: ContrastiveSettings):
        super().__init__()
        self.settings = settings
        self._last_pairs: tuple[Tensor, Tensor] | None = None  # anchors and positives, at most `OBSERVED` of each

    def forward(
        self,
        embeddings_nD: Tensor,
        row_keys_G: Tensor,
        anchor_keys_G: Tensor,
        negative_keys: Tensor,
        negative_rows: Tensor,
        num_negatives: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        """(loss sum, how many anchors are nearest to one of their own). `row_keys_G` are the keys of the positives (or labels),
        `negative_rows` the row of every hard negative, `num_negatives` how many each process has. A hard negative with weight
        w counts e^w times in the denominator (SimCSE, arXiv 2104.08821).
        """
        with torch.autocast(embeddings_nD.device.type, enabled=False):
            vectors = F.normalize(embeddings_nD.float(), dim=-1)
            world_size = len(num_negatives)
            B, rank = len(row_keys_G) // world_size, dist.get_rank() if world_size > 1 else 0
            if self.training and B > 1:
                observed = min(B, OBSERVED)
                self._last_pairs = vectors[:observed].detach(), vectors[B : B + observed].detach()
            is_supcon = self.settings.loss_type == "supcon"
            per_row = 2 if is_supcon else 1  # candidates
            anchors_AD = vectors[: per_row * B]
            counts = tuple(per_row * B + m for m in num_negatives)
            candidates_CD = vectors if is_supcon else vectors[B:]
            if world_size > 1:
                candidates_CD = _GatherRows.apply(candidates_CD, counts)
            rows_G = torch.arange(len(row_keys_G), device=vectors.device)
            keys_C = _blocks(row_keys_G, negative_keys, num_negatives, per_row)
            owners_C = _blocks(torch.full_like(rows_G, -1), negative_rows, num_negatives, per_row)
            own_A = sum(counts[:rank]) + torch.arange(len(anchors_AD), device=vectors.device)
            rows_A = rows_G[rank * B : (rank + 1) * B].repeat(per_row)
            extra_AC = self.settings.hard_negative_weight * (owners_C == rows_A[:, None]).float()
            same_AC = keys_C == row_keys_G[rows_A][:, None]
            logits_AC = anchors_AD @ candidates_CD.T / self.settings.temperature + extra_AC
            if is_supcon:
                return supcon(logits_AC, own_A, same_AC)
            masked_AC = same_AC | (keys_C == anchor_keys_G[rows_A][:, None])
            masked_AC[torch.arange(B, device=vectors.device), own_A] = False
            logits_AC = logits_AC.masked_fill(masked_AC, -torch.inf)  # InfoNCE (arXiv 1807.03748)
            return F.cross_entropy(logits_AC, own_A, reduction="sum"), (logits_AC.argmax(1) == own_A).sum()

    def observe(self) -> Tensor:
        """(alignment, uniformity, 1) of the last batch in training, float64; zeros where it had one row, or none was seen."""
        if self._last_pairs is None:
            return torch.zeros(3, dtype=torch.float64)
        anchors, positives = self._last_pairs
        aligned = alignment(anchors, positives)
        return torch.stack([aligned, uniformity(anchors), torch.ones_like(aligned)]).double()


def _blocks(of_rows_G: Tensor, of_negatives: Tensor, num_negatives: tuple[int, ...], per_row: int) -> Tensor:
    """In the order in which candidates are gathered: of every process its rows, `per_row` times, then its negatives."""
    rows = of_rows_G.chunk(len(num_negatives))
    pairs = zip(rows, of_negatives.split(num_negatives), strict=True)
    return torch.cat([part for block, negatives in pairs for part in (*[block] * per_row, negatives)])


class EmbeddingHead:
    """The forward pass of a model that has `contrastive`, its loss, and `embed`."""

    contrastive: ContrastiveLoss

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None, document_lengths: Lengths) -> Tensor:
        """One vector per row, or per document of packed rows: n x D in float32. Raises ValueError for one without tokens."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Lengths = None,
        keys: dict[str, Any] | None = None,
        **_: Any,
    ) -> LossOutput:
        """Embeddings of all texts; with `keys` (the arguments of `ContrastiveLoss`) also their loss."""
        vectors_nD = self.embed(input_ids, attention_mask, document_lengths)
        loss_sum, num_correct = (None, None) if keys is None else self.contrastive(vectors_nD, **keys)
        return LossOutput(embeddings=vectors_nD, loss_sum=loss_sum, num_correct=num_correct)


class NeoBERTForEmbedding(EmbeddingHead, NeoBERTPreTrainedModel):
    """Our encoder under a contrastive loss."""

    def __init__(self, config: NeoBERTConfig, settings: ContrastiveSettings | None = None):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.contrastive = ContrastiveLoss(settings or ContrastiveSettings())
        self.post_init()

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None, document_lengths: Lengths) -> Tensor:
        return self.model.embed(input_ids, attention_mask, document_lengths, self.contrastive.settings.pooling)


def supcon(logits_AC: Tensor, self_A: Tensor, same_AC: Tensor) -> tuple[Tensor, Tensor]:
    """The same with SupCon, L_out of arXiv 2004.11362. `self_A[i]` is anchor i among the candidates, which is neither positive
    nor negative; positives are all other candidates in `same_AC`. An anchor without one adds nothing.
    """
    is_self_AC = self_A[:, None] == torch.arange(logits_AC.shape[1], device=self_A.device)
    logits_AC = logits_AC.masked_fill(is_self_AC, -torch.inf)
    positive_AC = same_AC & ~is_self_AC
    log_probabilities = (logits_AC - logits_AC.logsumexp(1, keepdim=True)).masked_fill(~positive_AC, 0.0)
    losses_A = -log_probabilities.sum(1) / positive_AC.sum(1).clamp_min(1)
    return losses_A.sum(), positive_AC.gather(1, logits_AC.argmax(1, keepdim=True)).sum()


@torch.no_grad()
def alignment(anchors_AD: Tensor, positives_AD: Tensor) -> Tensor:
    """Mean squared distance of positive pairs, from 0 (arXiv 2005.10242)."""
    return (anchors_AD - positives_AD).square().sum(1).mean()


@torch.no_grad()
def uniformity(vectors_AD: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different rows (arXiv 2005.10242); 0 when all are one point."""
    squared = (2 - 2 * (vectors_AD @ vectors_AD.T)).clamp_min(0)
    n, same = len(vectors_AD), torch.eye(len(vectors_AD), dtype=torch.bool, device=vectors_AD.device)
    return (squared.mul(-2).exp().masked_fill(same, 0.0).sum() / (n * (n - 1))).log()


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, which have `counts` each; their gradients come back to where they were computed, summed."""

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
