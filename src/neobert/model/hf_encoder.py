"""Encoders of other libraries' making under our classifier: any model that transformers' `AutoModel` loads.

Pooling, hidden layer and classifier are those of `NeoBERTForSequenceClassification`, so that peers run under one protocol.
Shapes: B rows, T row length, D width.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_neobert import ClassifierLossOutput, classifier_output

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
    ) -> ClassifierLossOutput:
        """Logits B x num_labels in float32. `labels` B: class ids, or numbers where there is one label."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        segments = {"token_type_ids": token_type_ids} if self.takes_segments and token_type_ids is not None else {}
        hidden_BTD = self.model(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        hidden_BTD = hidden_BTD.float()
        if self.pooling == "bos":
            first_B = attention_mask.argmax(1)
            pooled = hidden_BTD[torch.arange(len(first_B), device=first_B.device), first_B]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
            pooled = (hidden_BTD * mask).sum(1) / mask.sum(1)
        logits = self.classifier(self.dropout(F.gelu(self.dense(self.dropout(pooled)))))
        return classifier_output(logits, labels)

    def normalize_matrices(self) -> None:
        """Nothing: only nGPT has matrices of length 1."""

    def to_checkpoint(self, weights: Tensors) -> Tensors:
        """This model's tensors under the names of the encoder's own task models, so that `AutoModel` reads the encoder."""
        prefix = self.model.base_model_prefix
        return {_renamed(name, "model.", f"{prefix}."): tensor for name, tensor in weights.items()}

    def from_checkpoint(self, weights: Tensors) -> Tensors:
        """The inverse of `to_checkpoint`."""
        prefix = self.model.base_model_prefix
        return {_renamed(name, f"{prefix}.", "model."): tensor for name, tensor in weights.items()}


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def longest_input(encoder: Any) -> int | None:
    """How many tokens of a text an encoder takes; None where nothing limits them.

    RoBERTa and its kin count positions from behind the id of the padding token; rows of their table up to it are no positions.
    """
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    longest = getattr(encoder.config, "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None
