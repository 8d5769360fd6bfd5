"""Sentence embeddings and their contrastive loss: our encoder, or any encoder of transformers' making.

The loss is computed inside `forward`, over the candidates of all processes. Texts of a step go through the encoder together,
whatever their role: anchors, positives, then hard negatives.

Shapes: N tokens, D width, n texts of this process, B rows of this process, G rows of all, A anchors, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .contrastive_loss import alignment, gather_rows, info_nce, supcon, uniformity
from .modeling_neobert import NeoBERT, NeoBERTConfig, NeoBERTPreTrainedModel
from .unpadding import Lengths, Pooling, check_not_empty, host_lengths

Tensors = dict[str, Tensor]
OBSERVED = 512  # pairs of a batch that alignment and uniformity are computed of


@dataclass(frozen=True)
class ContrastiveSettings:
    """What the loss is. `loss_type`: "simcse" (InfoNCE) or "supcon"."""

    loss_type: str = "simcse"
    temperature: float = 0.05
    hard_negative_weight: float = 0.0
    pooling: Pooling = "avg"


@dataclass
class EmbeddingOutput(ModelOutput):
    """`embeddings` n x D, not normalised; with keys `loss_sum` and `num_correct` over this process's anchors."""

    embeddings: Tensor | None = None
    loss_sum: Tensor | None = None
    num_correct: Tensor | None = None


class ContrastiveLoss(nn.Module):
    """From embeddings and keys to the loss. Keeps the vectors of the last batch in training, to be looked at when a step is
    logged.
    """

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
        """(loss sum, number correct). `row_keys_G` are the keys of the positives (or labels), `negative_rows` the row of every
        hard negative, `num_negatives` how many each process has.
        """
        with torch.autocast(embeddings_nD.device.type, enabled=False):
            vectors = F.normalize(embeddings_nD.float(), dim=-1)
            B, rank = len(row_keys_G) // len(num_negatives), _rank(num_negatives)
            if self.training and B > 1:
                observed = min(B, OBSERVED)
                self._last_pairs = vectors[:observed].detach(), vectors[B : B + observed].detach()
            is_supcon = self.settings.loss_type == "supcon"
            anchors_AD = vectors[: 2 * B] if is_supcon else vectors[:B]
            counts = tuple((2 * B if is_supcon else B) + m for m in num_negatives)
            candidates_CD = gather_rows(vectors if is_supcon else vectors[B:], counts)
            rows_G, per_row = torch.arange(len(row_keys_G), device=vectors.device), (2 if is_supcon else 1)
            keys_C = _blocks(row_keys_G, negative_keys, num_negatives, per_row)
            owners_C = _blocks(torch.full_like(rows_G, -1), negative_rows, num_negatives, per_row)
            begin = sum(counts[:rank])
            places_A = torch.arange(begin, begin + len(anchors_AD), device=vectors.device)
            rows_A = rows_G[rank * B : (rank + 1) * B].repeat(per_row)
            extra_AC = self.settings.hard_negative_weight * (owners_C == rows_A[:, None]).float()
            same_AC = keys_C == row_keys_G[rows_A][:, None]
            if is_supcon:
                return supcon(anchors_AD, candidates_CD, places_A, same_AC, self.settings.temperature, extra_AC)
            masked_AC = same_AC | (keys_C == anchor_keys_G[rows_A][:, None])
            masked_AC[torch.arange(B, device=vectors.device), places_A] = False
            return info_nce(anchors_AD, candidates_CD, places_A, masked_AC, self.settings.temperature, extra_AC)

    def observe(self) -> tuple[float, float, float]:
        """(alignment, uniformity, 1) of the last batch in training; zeros where it had one row, or none was seen."""
        if self._last_pairs is None:
            return 0.0, 0.0, 0.0
        anchors, positives = self._last_pairs
        return float(alignment(anchors, positives)), float(uniformity(anchors)), 1.0


def _rank(num_negatives: tuple[int, ...]) -> int:
    return dist.get_rank() if len(num_negatives) > 1 else 0


def _blocks(of_rows_G: Tensor, of_negatives: Tensor, num_negatives: tuple[int, ...], per_row: int) -> Tensor:
    """In the order in which candidates are gathered: of every process its rows, `per_row` times, then its negatives."""
    rows = of_rows_G.chunk(len(num_negatives))
    pairs = zip(rows, of_negatives.split(num_negatives), strict=True)
    return torch.cat([part for block, negatives in pairs for part in (*[block] * per_row, negatives)])


class NeoBERTForEmbedding(NeoBERTPreTrainedModel):
    """Our encoder under a contrastive loss."""

    def __init__(self, config: NeoBERTConfig, settings: ContrastiveSettings | None = None):
        super().__init__(config)
        self.model = NeoBERT(config)
        self.contrastive = ContrastiveLoss(settings or ContrastiveSettings())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Lengths | None = None,
        keys: dict[str, Any] | None = None,
        **_: Any,
    ) -> EmbeddingOutput:
        """Embeddings of all texts; with `keys` (the arguments of `ContrastiveLoss`) also their loss."""
        pooling = self.contrastive.settings.pooling
        embeddings = self.model.embed(input_ids, attention_mask, document_lengths, pooling)
        return _output(self.contrastive, embeddings, keys)


class HFEncoderForEmbedding(nn.Module):
    """Any encoder of `AutoModel` under the same loss. Texts of similar length are padded together, and only those."""

    def __init__(self, encoder: Any, settings: ContrastiveSettings, pad_id: int):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # of BERT's next-sentence task; vectors are pooled here
        self.config = encoder.config
        self.model = encoder
        self.pad_id = pad_id
        self.contrastive = ContrastiveLoss(settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_lengths: Lengths | None = None,
        keys: dict[str, Any] | None = None,
        **_: Any,
    ) -> EmbeddingOutput:
        """As `NeoBERTForEmbedding.forward`."""
        if document_lengths is None:
            assert attention_mask is not None
            document_lengths = attention_mask.sum(1)
            input_ids = input_ids[attention_mask.bool()][None]
        lengths = host_lengths(document_lengths)
        check_not_empty(lengths)
        texts = input_ids[0].split(lengths)
        order, groups = group_by_length(lengths)
        vectors = torch.cat([self._embed([texts[number] for number in group]) for group in groups])
        places = torch.empty(len(order), dtype=torch.int64)
        places[torch.tensor(order)] = torch.arange(len(order))
        return _output(self.contrastive, vectors[places.to(vectors.device)], keys)

    def _embed(self, texts: list[Tensor]) -> Tensor:
        ids_BT = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(text) for text in texts], device=ids_BT.device)
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths[:, None]
        hidden_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state.float()
        pooling = self.contrastive.settings.pooling
        if pooling == "cls":
            return hidden_BTD[:, 0]
        if pooling == "max":
            return hidden_BTD.masked_fill(~mask_BT[..., None], -torch.inf).amax(1)
        return (hidden_BTD * mask_BT[..., None]).sum(1) / lengths[:, None]

    def normalize_matrices(self) -> None:
        """Nothing: only nGPT has matrices of length 1."""


def group_by_length(lengths: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """(texts from long to short, the same in groups): a group ends where texts are shorter than 3/4 of its longest."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    groups: list[list[int]] = []
    for number in order:
        if not groups or lengths[number] < 0.75 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(number)
    return order, groups


def _output(loss: ContrastiveLoss, embeddings_nD: Tensor, keys: dict[str, Any] | None) -> EmbeddingOutput:
    if keys is None:
        return EmbeddingOutput(embeddings=embeddings_nD)
    loss_sum, num_correct = loss(embeddings_nD, **keys)
    return EmbeddingOutput(embeddings=embeddings_nD, loss_sum=loss_sum, num_correct=num_correct)
