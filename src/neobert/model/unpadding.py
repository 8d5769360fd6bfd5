"""Batches as one run of tokens: padding left out, documents one behind the other; and pooling back to one vector each.

Shapes: B rows, T row length, N tokens kept, D width, n documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .attention import Kernel, Layout
from .kernels import compute_dtype, round_up_tokens

Pooling = Literal["mean", "avg", "cls", "max"]
Lengths = Sequence[int] | Tensor


def host_lengths(document_lengths: Lengths) -> tuple[int, ...]:
    """Lengths of documents as numbers: shapes follow from them, on every device."""
    return tuple(document_lengths.tolist() if isinstance(document_lengths, Tensor) else document_lengths)


@dataclass(frozen=True)
class UnpaddedBatch:
    """A batch as a run of N tokens. `kept_N` are the places in B*T that were kept; None when all were.

    Behind the tokens there may be `layout.padding` more, which the encoder takes along and leaves out of what it returns.
    """

    ids_N: Tensor
    positions_N: Tensor
    layout: Layout
    shape: torch.Size
    kept_N: Tensor | None

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
        if how == "max":
            return torch.segment_reduce(x_ND, "max", lengths=lengths_n)
        return torch.segment_reduce(x_ND, "mean", lengths=lengths_n)


def check_not_empty(lengths: Sequence[int]) -> None:
    """Raises ValueError for a row without tokens, which has no vector."""
    if 0 in lengths:
        raise ValueError(f"row {list(lengths).index(0)} has no tokens to pool")


def flatten(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    document_lengths: Lengths | None,
    *,
    longest: int,
    dropout: float = 0.0,
    kernel: Kernel = "sdpa",
) -> UnpaddedBatch:
    """Lay a batch out unpadded. SDPA off the CPU keeps padding, so that shapes stay static; all else leaves it out.

    Raises ValueError when `document_lengths` do not sum to B*T, or when a document is longer than `longest` tokens.
    """
    unpadded = _flatten(input_ids, attention_mask, document_lengths, longest, dropout, kernel)
    num_tokens, kind = len(unpadded.ids_N), input_ids.device.type
    padding = round_up_tokens(num_tokens, kind, compute_dtype(input_ids)) - num_tokens if kind == "cpu" else 0
    if not padding:
        return unpadded
    ids, positions = (torch.cat((x, x.new_zeros(padding))) for x in (unpadded.ids_N, unpadded.positions_N))
    return replace(unpadded, ids_N=ids, positions_N=positions, layout=replace(unpadded.layout, padding=padding))


def _flatten(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    document_lengths: Lengths | None,
    longest: int,
    dropout: float,
    kernel: Kernel,
) -> UnpaddedBatch:
    B, T = input_ids.shape
    if document_lengths is not None:
        lengths = host_lengths(document_lengths)
        if sum(lengths) != B * T or min(lengths, default=1) < 1:
            raise ValueError(f"document_lengths sum to {sum(lengths)}, but the batch has {B} x {T} = {B * T} tokens")
        _check_length(max(lengths, default=0), longest)
        layout = Layout(lengths=lengths, dropout=dropout, kernel=kernel)
        positions_N = _restart(torch.tensor(lengths, dtype=torch.int64), B * T).to(input_ids.device)
        return UnpaddedBatch(input_ids.flatten(), positions_N, layout, input_ids.shape, None)
    if attention_mask is None:
        _check_length(T, longest)
        layout = Layout(lengths=(T,) * B, dropout=dropout, kernel=kernel)
        positions_N = torch.arange(T, device=input_ids.device).repeat(B)
        return UnpaddedBatch(input_ids.flatten(), positions_N, layout, input_ids.shape, None)
    mask_BT = attention_mask.bool()
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    if input_ids.device.type != "cpu" and kernel == "sdpa":
        _check_length(T, longest)
        layout = Layout(mask_BT=mask_BT, dropout=dropout)
        return UnpaddedBatch(input_ids.flatten(), positions_BT.flatten(), layout, input_ids.shape, None)
    kept_N = mask_BT.flatten().nonzero().squeeze(1)
    layout = Layout(lengths=tuple(mask_BT.sum(1).tolist()), dropout=dropout, kernel=kernel)
    _check_length(max(layout.lengths or (), default=0), longest)
    return UnpaddedBatch(input_ids.flatten()[kept_N], positions_BT.flatten()[kept_N], layout, input_ids.shape, kept_N)


def _check_length(length: int, longest: int) -> None:
    if length > longest:
        raise ValueError(f"a document of {length} tokens, but max_position_embeddings is {longest}")


def _restart(lengths: Tensor, total: int) -> Tensor:
    """Positions that count from 0 in every document: (2, 3) -> 0 1 0 1 2."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(total, device=lengths.device) - starts.repeat_interleave(lengths, output_size=total)
