"""Batches: what the model takes and the loop counts, and how rows of token ids become tensors.

Shapes: B rows, T tokens of a row. Padded rows are B x T; packed ones stand one after the other in one row, 1 x their sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from neobert.data.tokenizer import Ids

IGNORED = -100  # the label of a token or row that is not predicted
INPUTS = ("input_ids", "labels", "attention_mask", "document_lengths", "token_type_ids", "keys")


@dataclass(frozen=True)
class Batch:
    """A microbatch of any task. Either `attention_mask` or `document_lengths` says which tokens belong together."""

    input_ids: torch.Tensor  # int64, B x T
    labels: torch.Tensor | None  # int64, B x T; of a row each B, int64 or float32; None where the model needs none
    attention_mask: torch.Tensor | None  # int64, B x T
    document_lengths: tuple[int, ...] | None  # their sum is B * T
    num_targets: int
    num_tokens: int  # without padding
    epoch: int  # that the run is in after it
    ends_epoch: bool = False
    token_type_ids: torch.Tensor | None = None  # int64, B x T
    keys: dict[str, Any] | None = None  # of all processes' texts, the arguments of `ContrastiveLoss`

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        return {name: value for name in INPUTS if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self if device.type == "cpu" else self._change(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to the GPU overlap with work."""
        return self._change(torch.Tensor.pin_memory)

    def without_targets(self) -> "Batch":
        """The same rows, of which nothing is learnt: for a process that has to call the model when the others do."""
        assert self.labels is not None
        ignored = torch.full_like(self.labels, torch.nan if self.labels.is_floating_point() else IGNORED)
        return replace(self, labels=ignored, num_targets=0, num_tokens=0)

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(one) for name, one in value.items()}
            return change(value) if isinstance(value, torch.Tensor) else value

        return replace(self, **{name: changed(value) for name, value in self.inputs().items()})


@dataclass(frozen=True)
class RowLayout:
    """How rows become tensors: packed, or padded to `row_length` (None: the longest row), rounded up to `multiple`."""

    pad_id: int
    packed: bool = False
    row_length: int | None = None
    multiple: int = 1

    def pad(self, rows: Sequence[Ids], fill: int) -> np.ndarray:
        """int64, B x T."""
        out = np.full((len(rows), self._width(rows)), fill, dtype=np.int64)
        for number, row in enumerate(rows):
            out[number, : len(row)] = row
        return out

    def mask(self, rows: Sequence[Ids]) -> torch.Tensor:
        """The attention mask of padded rows, int64, B x T."""
        lengths = np.array([len(row) for row in rows])
        return torch.from_numpy((np.arange(self._width(rows)) < lengths[:, None]).astype(np.int64))

    def batch(
        self,
        rows: Sequence[Ids],
        token_type_ids: Sequence[Ids] | None = None,
        labels: torch.Tensor | None = None,
        num_targets: int = 0,
        epoch: int = 0,
        ends_epoch: bool = False,
        keys: dict[str, Any] | None = None,
    ) -> Batch:
        """Rows with what belongs to them."""
        return Batch(
            self._arrange(rows, self.pad_id),
            labels,
            None if self.packed else self.mask(rows),
            tuple(map(len, rows)) if self.packed else None,
            num_targets=num_targets,
            num_tokens=sum(map(len, rows)),
            epoch=epoch,
            ends_epoch=ends_epoch,
            token_type_ids=None if token_type_ids is None else self._arrange(token_type_ids, 0),
            keys=keys,
        )

    def _arrange(self, rows: Sequence[Ids], fill: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(rows).astype(np.int64)[None] if self.packed else self.pad(rows, fill))

    def _width(self, rows: Sequence[Ids]) -> int:
        return -(-(self.row_length or max(map(len, rows))) // self.multiple) * self.multiple
