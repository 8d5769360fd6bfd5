"""Rows of token ids as tensors: padded to one width, or packed one behind the other."""

from dataclasses import dataclass

import numpy as np
import torch

from neobert.data.tokenizer import Ids


@dataclass(frozen=True)
class Share:
    """Which part of every batch this process trains."""

    rank: int
    world: int
    rows: int  # B


@dataclass(frozen=True)
class RowLayout:
    """How rows become tensors. `row_length` None: as long as the longest row, rounded up to `multiple`."""

    pad_id: int
    packed: bool
    row_length: int | None
    multiple: int

    def arrange(self, rows: list[Ids], fill: int) -> torch.Tensor:
        """int64, B x T, or 1 x sum of lengths."""
        if self.packed:
            return torch.from_numpy(np.concatenate(rows).astype(np.int64)[None])
        out = np.full((len(rows), self._width(rows)), fill, dtype=np.int64)
        for place, row in enumerate(rows):
            out[place, : len(row)] = row
        return torch.from_numpy(out)

    def boundaries(self, rows: list[Ids]) -> tuple[torch.Tensor | None, tuple[int, ...] | None]:
        """(attention_mask, document_lengths): one of them says what is real, the other is None."""
        lengths = tuple(map(len, rows))
        if self.packed:
            return None, lengths
        return torch.from_numpy((np.arange(self._width(rows)) < np.array(lengths)[:, None]).astype(np.int64)), None

    def _width(self, rows: list[Ids]) -> int:
        return -(-(self.row_length or max(map(len, rows))) // self.multiple) * self.multiple
