"""A microbatch: what the model takes, and what the loop counts."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from neobert.data.mlm.masking import IGNORED, Masker
from neobert.data.mlm.packing import Row


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. Packed: `document_lengths`, whose sum is B*T. Padded: `attention_mask`."""

    input_ids: torch.Tensor  # int64, B x T, corrupted
    labels: torch.Tensor  # int64, B x T, -100 where nothing is predicted
    attention_mask: torch.Tensor | None
    document_lengths: tuple[int, ...] | None
    num_targets: int
    num_tokens: int  # real ones: no padding
    epoch: int  # that the run is in behind it

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "attention_mask": self.attention_mask,
            "document_lengths": self.document_lengths,
        }

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        if device.type == "cpu":
            return self

        def move(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self, input_ids=move(self.input_ids), labels=move(self.labels), attention_mask=move(self.attention_mask)
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to the GPU overlap with work."""
        mask = None if self.attention_mask is None else self.attention_mask.pin_memory()
        return replace(
            self, input_ids=self.input_ids.pin_memory(), labels=self.labels.pin_memory(), attention_mask=mask
        )


@dataclass(frozen=True)
class Collator:
    """Rows -> masked batch. `row_length` None: as long as the longest row, rounded up to `multiple`."""

    masker: Masker
    pad_id: int
    packed: bool
    row_length: int | None
    multiple: int = 1

    def __call__(self, rows: list[Row], epoch: int) -> Batch:
        length = self.row_length or max(row.num_tokens for row in rows)
        length = -(-length // self.multiple) * self.multiple
        ids = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        for place, row in enumerate(rows):
            np.concatenate(row.pieces, out=ids[place, : row.num_tokens], casting="unsafe")
        epochs = np.array([row.epoch for row in rows])
        indices = np.array([row.index for row in rows])
        inputs, labels = self.masker(ids, epochs, indices)
        counts = np.array([row.num_tokens for row in rows])
        mask = None if self.packed else torch.from_numpy((np.arange(length) < counts[:, None]).astype(np.int64))
        lengths = tuple(_lengths(rows, length)) if self.packed else None
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            mask,
            lengths,
            num_targets=int((labels != IGNORED).sum()),
            num_tokens=int(counts.sum()),
            epoch=epoch,
        )


def _lengths(rows: list[Row], row_length: int) -> list[int]:
    """Lengths of all documents in order; padding at the end of a row is one more, so that they sum to B*T."""
    lengths: list[int] = []
    for row in rows:
        lengths += [len(piece) for piece in row.pieces]
        if row.num_tokens < row_length:
            lengths.append(row_length - row.num_tokens)
    return lengths
