"""Encoders that `AutoModel` loads under our classifier and our contrastive loss, so that peers run under one protocol.

Shapes: B rows, T row length, D width.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .embedding import ContrastiveLoss, ContrastiveSettings, EmbeddingHead
from .modeling_neobert import LossOutput, classify
from .unpadding import Lengths, check_not_empty, host_lengths

Tensors = dict[str, Tensor]


def pool_rows(hidden_BTD: Tensor, mask_BT: Tensor, how: str) -> Tensor:
    """One vector per padded row, B x D in float32: of its first token ("bos", "cls"), or the maximum ("max") or mean of all."""
    hidden_BTD, mask_BT1 = hidden_BTD.float(), mask_BT[..., None]
    if how in ("bos", "cls"):
        return hidden_BTD[torch.arange(mask_BT.shape[0], device=mask_BT.device), mask_BT.int().argmax(1)]
    if how == "max":
        return hidden_BTD.masked_fill(~mask_BT1, -torch.inf).amax(1)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)


class HFEncoder(nn.Module):
    """`model` maps padded rows to `last_hidden_state` B x T x D; models of ours put a head on it. In checkpoints its tensors
    have the names that `AutoModel` reads: those of the encoder itself, or after `prefix` those of its own task models.
    """

    def __init__(self, encoder: Any, prefix: str = ""):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # of BERT's next-sentence task; vectors are pooled here
        self.config, self.model, self.prefix = encoder.config, encoder, prefix

    def pool(self, ids_BT: Tensor, mask_BT: Tensor, pooling: str, segments_BT: Tensor | None = None) -> Tensor:
        """One vector per row, as `pool_rows`. `segments_BT` are token types, if any are known."""
        more = {} if segments_BT is None else {"token_type_ids": segments_BT}
        hidden_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT.long(), **more).last_hidden_state
        return pool_rows(hidden_BTD, mask_BT.bool(), pooling)

    def normalize_matrices(self) -> None:
        """Nothing: only nGPT has matrices of length 1."""

    def to_checkpoint(self, weights: Tensors) -> Tensors:
        """This model's tensors under the names of a checkpoint."""
        return _renamed(weights, "model.", self.prefix)

    def from_checkpoint(self, weights: Tensors) -> Tensors:
        """The inverse of `to_checkpoint`."""
        return _renamed(weights, self.prefix, "model.")


class HFEncoderForSequenceClassification(HFEncoder):
    """An encoder under our classifier. `pooling` is "bos" (the first token) or "mean"."""

    def __init__(self, encoder: Any, num_labels: int, pooling: str, dropout: float, init_range: float):
        super().__init__(encoder, f"{encoder.base_model_prefix}.")
        self.pooling = pooling
        width = encoder.config.hidden_size
        self.dense, self.classifier = nn.Linear(width, width), nn.Linear(width, num_labels)
        for layer in (self.dense, self.classifier):
            nn.init.normal_(layer.weight, std=init_range)
            nn.init.zeros_(layer.bias)
        self.dropout = nn.Dropout(dropout)
        self.takes_segments = "token_type_ids" in inspect.signature(encoder.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **more: Any
    ) -> LossOutput:
        """Logits B x num_labels in float32. `labels` B: class ids, or numbers where there is one label."""
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        segments_BT = more.get("token_type_ids") if self.takes_segments else None
        return classify(self, self.pool(input_ids, mask_BT, self.pooling, segments_BT), labels)


def _renamed(weights: Tensors, old: str, new: str) -> Tensors:
    return {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in weights.items()}


class HFEncoderForEmbedding(EmbeddingHead, HFEncoder):
    """An encoder under the contrastive loss. Texts of similar length are padded together, and only those."""

    def __init__(self, encoder: Any, settings: ContrastiveSettings, pad_id: int):
        super().__init__(encoder)
        self.pad_id = pad_id
        self.contrastive = ContrastiveLoss(settings)

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None, document_lengths: Lengths) -> Tensor:
        if document_lengths is None:
            assert attention_mask is not None
            document_lengths = attention_mask.sum(1)
            input_ids = input_ids[attention_mask.bool()][None]
        lengths = host_lengths(document_lengths)
        check_not_empty(lengths)
        texts, device = input_ids[0].split(lengths), input_ids.device
        order, groups = group_by_length(lengths)
        vectors = []
        for group in groups:
            ids_BT = nn.utils.rnn.pad_sequence([texts[number] for number in group], True, self.pad_id)
            lengths_B1 = torch.tensor([[lengths[number]] for number in group], device=device)
            mask_BT = torch.arange(ids_BT.shape[1], device=device) < lengths_B1
            vectors.append(self.pool(ids_BT, mask_BT, self.contrastive.settings.pooling))
        return torch.cat(vectors)[torch.tensor(order, device=device).argsort()]


def group_by_length(lengths: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """(texts from long to short, the same in groups): a group ends where texts are shorter than 3/4 of its longest."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    groups: list[list[int]] = []
    for number in order:
        if not groups or lengths[number] < 0.75 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(number)
    return order, groups


def longest_input(encoder: Any) -> int | None:
    """How many tokens of a text an encoder takes; None where nothing limits them. RoBERTa and its kin count positions from
    after the id of the padding token: the rows of their table up to it are not used.
    """
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    longest = getattr(encoder.config, "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None
