"""Batches without padding: documents one after the other as one run of tokens; and pooling back to one vector each.

Shapes: B rows, T row length, N tokens kept, D width, n documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .attention import Kernel, Layout
from .kernels import compute_dtype, round_up_tokens

Pooling = Literal["mean", "avg", "cls", "max"]
Lengths: TypeAlias = Sequence[int] | Tensor


def host_lengths(document_lengths: Lengths) -> tuple[int, ...]:
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
        if how == "max":
            return torch.segment_reduce(x_ND, "max", lengths=lengths_n)
        return torch.segment_reduce(x_ND, "mean", lengths=lengths_n)


def check_not_empty(lengths: Sequence[int]) -> None:
    """Raises ValueError for a row without tokens, which has no vector."""
    if 0 in lengths:
        raise ValueError(f"row {list(lengths).index(0)} has no tokens to pool")


def pool_rows(hidden_BTD: Tensor, mask_BT: Tensor, how: str) -> Tensor:
    """One vector per padded row, in float32: of its first token ("bos", "cls"), or the maximum ("max") or mean of all."""
    hidden_BTD = hidden_BTD.float()
    if how in ("bos", "cls"):
        first_B = mask_BT.int().argmax(1)
        return hidden_BTD[torch.arange(first_B.shape[0], device=first_B.device), first_B]
    if how == "max":
        return hidden_BTD.masked_fill(~mask_BT[..., None], -torch.inf).amax(1)
    return (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)


def flatten(
    ids_BT: Tensor, mask_BT: Tensor | None, document_lengths: Lengths | None, limit: int, dropout: float, kernel: Kernel
) -> UnpaddedBatch:
    """Lay a batch out unpadded. SDPA off the CPU keeps padding, so that shapes stay static; all else leaves it out. Raises
    ValueError when `document_lengths` do not sum to B*T, or when a document is longer than `limit` tokens.
    """
    (B, T), kind = ids_BT.shape, ids_BT.device.type
    ids_N, kept_N, lengths = ids_BT.flatten(), None, (T,) * B
    if document_lengths is not None:
        lengths = host_lengths(document_lengths)
        if sum(lengths) != B * T or min(lengths, default=1) < 1:
            raise ValueError(f"document_lengths sum to {sum(lengths)}, but the batch has {B} x {T} = {B * T} tokens")
    is_static = document_lengths is None and mask_BT is not None and kind != "cpu" and kernel == "sdpa"
    if document_lengths is None and mask_BT is not None and not is_static:
        mask_BT = mask_BT.bool()
        kept_N, lengths = mask_BT.flatten().nonzero().squeeze(1), tuple(mask_BT.sum(1).tolist())
        ids_N = ids_N[kept_N]
    if max(lengths, default=0) > limit:
        raise ValueError(f"a document of {max(lengths)} tokens, but max_position_embeddings is {limit}")
    if is_static:
        return UnpaddedBatch.padded(ids_BT, mask_BT, dropout)
    lengths_n = torch.tensor(lengths, dtype=torch.int64)
    starts_N = (lengths_n.cumsum(0) - lengths_n).repeat_interleave(lengths_n, output_size=len(ids_N))
    positions_N = (torch.arange(len(ids_N)) - starts_N).to(ids_BT.device)  # from 0 in every document
    padding = round_up_tokens(len(ids_N), kind, compute_dtype(ids_BT)) - len(ids_N)
    if padding:
        ids_N, positions_N = (torch.cat((x, x.new_zeros(padding))) for x in (ids_N, positions_N))
    layout = Layout(lengths=lengths, dropout=dropout, kernel=kernel, padding=padding)
    return UnpaddedBatch(ids_N, positions_N, layout, ids_BT.shape, kept_N)
