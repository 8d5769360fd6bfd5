"""Batches without padding: documents one after the other as one run of tokens; and pooling back to one vector each.

Shapes: B rows, T row length, N tokens kept, D width, n documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .attention import Layout

Pooling = Literal["mean", "avg", "cls", "max"]
Lengths: TypeAlias = Sequence[int] | Tensor | None  # of the documents in packed rows; None where rows are padded


def host_lengths(document_lengths: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Lengths of documents as numbers: shapes follow from them, on every device."""
    return tuple(document_lengths.tolist() if isinstance(document_lengths, Tensor) else document_lengths)


@dataclass(frozen=True)
class UnpaddedBatch:
    """A batch as a run of N tokens. `kept_N` are the positions in B*T that were kept; None when all were. After the tokens
    there may be `layout.padding` more, which the encoder takes along and leaves out of what it returns.
    """

    ids_N: Tensor
    positions_N: Tensor
    layout: Layout
    shape: torch.Size
    kept_N: Tensor | None

    @staticmethod
    def padded(input_ids: Tensor, attention_mask: Tensor, dropout: float = 0.0) -> "UnpaddedBatch":
        """The batch with all its padding and a mask of the real tokens: shapes do not depend on what is in it."""
        mask_BT = attention_mask.bool()
        positions_BT = (mask_BT.long().cumsum(1) - 1).clamp_min(0)
        layout = Layout(mask_BT=mask_BT, dropout=dropout)
        return UnpaddedBatch(input_ids.flatten(), positions_BT.flatten(), layout, input_ids.shape, None)

    def select(self, x_BT: Tensor) -> Tensor:
        """The same tokens' values of another B x T tensor, unpadded."""
        return x_BT.flatten() if self.kept_N is None else x_BT.flatten()[self.kept_N]

    def restore(self, x_ND: Tensor) -> Tensor:
        """N x D -> B x T x D, zeros in place of padding."""
        width = x_ND.shape[-1]
        if self.kept_N is not None:
            x_ND = x_ND.new_zeros(self.shape.numel(), width).index_copy(0, self.kept_N, x_ND)
        elif self.layout.mask_BT is not None:
            x_ND = x_ND.masked_fill(~self.layout.mask_BT.flatten()[:, None], 0)
        return x_ND.view(*self.shape, width)

    def pool(self, x_ND: Tensor, how: Pooling) -> Tensor:
        """One vector per document, n x D in float32: its tokens' mean ("mean", "avg"), maximum, or its first one ("cls").
        Documents are rows, or the pieces of packed rows. Raises ValueError for a document without tokens.
        """
        x_ND, lengths = x_ND.float(), self.layout.lengths
        if lengths is None:
            mask_BT = self.layout.mask_BT
            assert mask_BT is not None
            x_ND, lengths = x_ND[mask_BT.flatten()], mask_BT.sum(1).tolist()
        check_not_empty(lengths)
        lengths_n = torch.tensor(lengths, dtype=torch.int64, device=x_ND.device)
        if how == "cls":
            return x_ND[lengths_n.cumsum(0) - lengths_n]
        return torch.segment_reduce(x_ND, "max" if how == "max" else "mean", lengths=lengths_n)


def check_not_empty(lengths: Sequence[int]) -> None:
    """Raises ValueError for a row without tokens, which has no vector."""
    if 0 in lengths:
        raise ValueError(f"row {list(lengths).index(0)} has no tokens to pool")
