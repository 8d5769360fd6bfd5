"""Batches without padding: documents one after the other as one run of tokens; and pooling back to one vector each.

Shapes: B rows, T row length, N tokens kept, D width, n documents, M targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Kernel, Layout
from .kernels import IGNORED, round_up

Pooling = Literal["mean", "avg", "cls", "max"]
TOKENS_PER_DOCUMENT = 32  # there is room for the boundaries of so short documents; of shorter ones there are more
BOUNDARIES = 64  # which come in multiples of this


class Documents(NamedTuple):
    """The documents of a batch for kernels of variable lengths, as `unpad` lays them out."""

    lengths: tuple[int, ...]  # of the real ones, in host memory
    cu_seqlens: Tensor  # int32, on the device: 0, the end of every document, and of the pieces of padding after them
    max_seqlen: int  # nothing is longer


Lengths: TypeAlias = Sequence[int] | Tensor | Documents | None  # of packed rows; None where rows are padded


def host_lengths(document_lengths: Sequence[int] | Tensor | Documents) -> tuple[int, ...]:
    """Lengths of documents as numbers: shapes follow from them, on every device."""
    if isinstance(document_lengths, Documents):
        return document_lengths.lengths
    return tuple(document_lengths.tolist() if isinstance(document_lengths, Tensor) else document_lengths)


def cumulative(lengths: Sequence[int], padding: int = 0, size: int = 0) -> Tensor:
    """What variable-length kernels take: 0, then the end of every document, int32, in host memory. `padding` tokens after
    them are further documents, no longer than those; after these come empty ones, up to `size` boundaries.
    """
    longest = max(1, *lengths, 1)
    pieces = [longest] * (padding // longest) + ([padding % longest] if padding % longest else [])
    ends = torch.tensor((0, *lengths, *pieces), dtype=torch.int64).cumsum(0)
    return F.pad(ends, (0, max(0, size - len(ends))), value=int(ends[-1])).to(torch.int32)


def unpad(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    labels: Tensor | None = None,
    pad_id: int | None = None,
) -> dict[str, Any]:
    """A batch in host memory as arguments of our models on a device with kernels for variable lengths, which then has to be
    asked for nothing: `input_ids` 1 x N with all padding at the end, `document_lengths` as `Documents`; of labels B x T,
    `targets` M (where among the N they are) and `labels` M.

    N and the number of boundaries come in few sizes: N of packed rows is always B*T, that of padded ones `round_up`. Packed
    documents that hold nothing but `pad_id` count as padding.
    """
    ids_N = input_ids.flatten()
    if document_lengths is not None:
        lengths_n, size = torch.tensor(document_lengths, dtype=torch.int64), len(ids_N)
        is_real = torch.ones(len(lengths_n), dtype=torch.bool)
        if pad_id is not None:
            is_real = torch.segment_reduce((ids_N != pad_id).float(), "max", lengths=lengths_n) > 0
        kept_N = is_real.repeat_interleave(lengths_n).nonzero().squeeze(1)
        lengths_n = lengths_n[is_real]
    else:
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept_N, lengths_n = mask_BT.flatten().nonzero().squeeze(1), mask_BT.sum(1)
        size = round_up(max(1, len(kept_N)))
    lengths, padding = tuple(lengths_n.tolist()), size - len(kept_N)
    room = max(len(lengths) + 2, size // TOKENS_PER_DOCUMENT)
    cu_seqlens = cumulative(lengths, padding, -(-room // BOUNDARIES) * BOUNDARIES)
    inputs: dict[str, Any] = {
        "input_ids": F.pad(ids_N[kept_N], (0, padding), value=pad_id or 0)[None],
        "document_lengths": Documents(lengths, cu_seqlens, round_up(max(1, *lengths, 1))),
    }
    if labels is not None and labels.ndim == 2:
        labels_N = labels.flatten()[kept_N]
        inputs["targets"] = (labels_N != IGNORED).nonzero().squeeze(1)
        labels = labels_N[inputs["targets"]]
    return inputs if labels is None else {**inputs, "labels": labels}


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
    def laid_out(ids_1N: Tensor, documents: Documents, dropout: float, kernel: Kernel) -> "UnpaddedBatch":
        """The batch that `unpad` laid out. Positions count from 0 in every document; nothing is asked of the device."""
        ids_N, cu_seqlens = ids_1N.flatten(), documents.cu_seqlens
        tokens_N = torch.arange(len(ids_N), dtype=torch.int32, device=ids_N.device)
        starts_N = cu_seqlens.index_select(0, torch.searchsorted(cu_seqlens, tokens_N, right=True) - 1)
        layout = Layout(documents.lengths, dropout=dropout, kernel=kernel, padding=len(ids_N) - sum(documents.lengths))
        if kernel != "sdpa":
            layout.cu_seqlens, layout.max_seqlen = cu_seqlens, documents.max_seqlen
        return UnpaddedBatch(ids_N, tokens_N - starts_N, layout, ids_1N.shape, None)

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
        elif len(x_ND) < self.shape.numel():  # all padding is at the end
            x_ND = F.pad(x_ND, (0, 0, 0, self.shape.numel() - len(x_ND)))
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
        cu_seqlens = self.layout.cu_seqlens
        ends = cumulative(lengths).to(x_ND.device) if cu_seqlens is None else cu_seqlens[: len(lengths) + 1]
        if how == "cls":
            return x_ND.index_select(0, ends[:-1])
        # `unsafe`: no check of the lengths, which would wait for the device
        return torch.segment_reduce(x_ND, "max" if how == "max" else "mean", lengths=ends.diff().long(), unsafe=True)


def check_not_empty(lengths: Sequence[int]) -> None:
    """Raises ValueError for a row without tokens, which has no vector."""
    if 0 in lengths:
        raise ValueError(f"row {list(lengths).index(0)} has no tokens to pool")
