"""Encoders of other libraries' making under our classifier and our contrastive loss: any model that `AutoModel` loads.

Hidden layer, classifier and losses are those of our own models, so that peers run under one protocol.
Shapes: B rows, T row length, D width.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import ContrastiveLoss, ContrastiveSettings
from .modeling_neobert import LossOutput, classifier_output
from .unpadding import Lengths, check_not_empty, host_lengths, pool_rows

Tensors = dict[str, Tensor]


class HFEncoderForSequenceClassification(nn.Module):
    """`encoder` maps padded rows to `last_hidden_state` B x T x D. `pooling` is "bos" (the first token) or "mean"."""

    def __init__(
        self, encoder: Any, num_labels: int, pooling: str, classifier_dropout: float, classifier_init_range: float
    ):
        super().__init__()
        self.config = encoder.config
        self.model = encoder
        self.pooling = pooling
        width = encoder.config.hidden_size
        self.dense, self.classifier = nn.Linear(width, width), nn.Linear(width, num_labels)
        for layer in (self.dense, self.classifier):
            nn.init.normal_(layer.weight, std=classifier_init_range)
            nn.init.zeros_(layer.bias)
        self.dropout = nn.Dropout(classifier_dropout)
        self.takes_segments = "token_type_ids" in inspect.signature(encoder.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> LossOutput:
        """Logits B x num_labels in float32. `labels` B: class ids, or numbers where there is one label."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        segments = {"token_type_ids": token_type_ids} if self.takes_segments and token_type_ids is not None else {}
        hidden_BTD = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        pooled = pool_rows(hidden_BTD, attention_mask.bool(), self.pooling)
        return classifier_output(self.classifier(self.dropout(F.gelu(self.dense(self.dropout(pooled))))), labels)

    def normalize_matrices(self) -> None:
        """Nothing: only nGPT has matrices of length 1."""

    def to_checkpoint(self, weights: Tensors) -> Tensors:
        """This model's tensors under the names of the encoder's own task models, so that `AutoModel` reads the encoder."""
        return _renamed(weights, "model.", f"{self.model.base_model_prefix}.")

    def from_checkpoint(self, weights: Tensors) -> Tensors:
        """The inverse of `to_checkpoint`."""
        return _renamed(weights, f"{self.model.base_model_prefix}.", "model.")


def _renamed(weights: Tensors, old: str, new: str) -> Tensors:
    return {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in weights.items()}


class HFEncoderForEmbedding(nn.Module):
    """An encoder under the contrastive loss. Texts of similar length are padded together, and only those."""

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
    ) -> LossOutput:
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
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(order))
        return self.contrastive.output(vectors[back.to(vectors.device)], keys)

    def to_checkpoint(self, weights: Tensors) -> Tensors:
        """This model's tensors under the names of the encoder itself."""
        return _renamed(weights, "model.", "")

    def from_checkpoint(self, weights: Tensors) -> Tensors:
        """The inverse of `to_checkpoint`."""
        return _renamed(weights, "", "model.")

    def _embed(self, texts: list[Tensor]) -> Tensor:
        ids_BT = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(text) for text in texts], device=ids_BT.device)
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths[:, None]
        hidden_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
        return pool_rows(hidden_BTD, mask_BT, self.contrastive.settings.pooling)

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


def longest_input(encoder: Any) -> int | None:
    """How many tokens of a text an encoder takes; None where nothing limits them.

    RoBERTa and its kin count positions from after the id of the padding token: the rows of their table up to it are not used.
    """
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    longest = getattr(encoder.config, "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None
