"""Batches: what the model takes and the loop counts, how rows of token ids become tensors, and what all loaders share.

Shapes: B rows, T tokens of a row. Padded rows are B x T; packed ones stand one after the other in one row, 1 x their sum.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch

from neobert.data.tokenizer import Ids
from neobert.errors import CheckpointError

State = dict[str, Any]  # plain data and arrays, which are shared with what is running and never written to
Saved = tuple[dict[str, Any], dict[str, np.ndarray]]  # JSON, arrays

IGNORED = -100  # the label of a token or row that is not predicted
INPUTS = ("input_ids", "labels", "attention_mask", "document_lengths", "token_type_ids", "keys", "targets")


@dataclass(frozen=True)
class Batch:
    """A microbatch of any task. Either `attention_mask` or `document_lengths` says which tokens belong together."""

    input_ids: torch.Tensor  # int64, B x T
    labels: torch.Tensor | None = None  # int64, B x T; of a row each B, int64 or float32; None where none are needed
    attention_mask: torch.Tensor | None = None  # int64, B x T
    document_lengths: tuple[int, ...] | None = None  # their sum is B * T
    num_targets: int = 0
    num_tokens: int = 0  # without padding
    epoch: int = 0  # that the run is in after it
    ends_epoch: bool = False
    token_type_ids: torch.Tensor | None = None  # int64, B x T
    keys: dict[str, Any] | None = None  # of all processes' texts, the arguments of `ContrastiveLoss`
    targets: torch.Tensor | None = None  # int64, M: where the tokens are that `labels`, then M, belong to

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of the model's forward."""
        return {name: value for name in INPUTS if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device. Copies to a GPU run beside what it computes, on a stream of their own."""
        if device.type != "cuda":
            return self if device.type == "cpu" else self._change(lambda tensor: tensor.to(device))
        stream, current = copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            moved = self._change(lambda tensor: tensor.to(device, non_blocking=True))
        current.wait_stream(stream)
        moved._change(lambda tensor: tensor.record_stream(current) or tensor)  # its memory is not reused before that
        return moved

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
            if hasattr(value, "_fields"):  # a named tuple
                return type(value)(*map(changed, value))
            return change(value) if isinstance(value, torch.Tensor) else value

        return replace(self, **{name: changed(value) for name, value in self.inputs().items()})


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU that copies batches to it."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class RowLayout:
    """How rows become tensors: packed, or padded to `row_length` (None: the longest row), rounded up to `multiple`."""

    pad_id: int
    packed: bool = False
    row_length: int | None = None
    multiple: int = 1

    def pad(self, rows: Sequence[Ids], fill: int) -> np.ndarray:
        """int64, B x T."""
        width = -(-(self.row_length or max(map(len, rows))) // self.multiple) * self.multiple
        out = np.full((len(rows), width), fill, dtype=np.int64)
        for number, row in enumerate(rows):
            out[number, : len(row)] = row
        return out

    def mask(self, rows: Sequence[Ids]) -> torch.Tensor:
        """The attention mask of padded rows, int64, B x T."""
        return torch.from_numpy(self.pad([np.ones_like(row) for row in rows], 0))

    def batch(self, rows: Sequence[Ids], token_type_ids: Sequence[Ids] | None = None, **fields: Any) -> Batch:
        """The batch of rows; `fields` are further ones of `Batch`."""
        if self.packed:
            fields["document_lengths"] = tuple(map(len, rows))
        else:
            fields["attention_mask"] = self.mask(rows)
        if token_type_ids is not None:
            fields["token_type_ids"] = self._arrange(token_type_ids, 0)
        return Batch(self._arrange(rows, self.pad_id), num_tokens=sum(map(len, rows)), **fields)

    def _arrange(self, rows: Sequence[Ids], fill: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(rows).astype(np.int64)[None] if self.packed else self.pad(rows, fill))


class Loader(ABC, Iterator[Batch]):
    """Batches in an order that depends neither on threads nor on time; without threads each is made when it is asked for.

    `position` is that after the last batch used: what was made ahead and not used is made again after a resume. It holds for
    data of the same `fingerprint`, which subclasses set.
    """

    fingerprint: dict[str, Any]

    def __init__(self, position: State, num_threads: int, num_ahead: int = 4):
        self.position, self.num_threads, self._num_ahead = position, num_threads, num_ahead
        self.prepare: Callable[[Batch], Batch] = lambda batch: batch  # what else is done to a batch that is made
        self._pool = ThreadPoolExecutor(num_threads, "batches") if num_threads else None
        self._jobs: Iterator[Callable[[], tuple[Batch, State]]] | None = None
        self._ahead: deque[Future[tuple[Batch, State]]] = deque()

    @abstractmethod
    def jobs(self) -> Iterator[Callable[[], tuple[Batch, State]]]:
        """Functions that make the batches from `position` on, each with the position after it. Several threads call several."""

    def state_dict(self, position: State | None = None) -> Saved:
        """A `position`, or that after the last batch used, as JSON and arrays."""
        return {**(position or self.position), "fingerprint": self.fingerprint}, {}

    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continue from a saved position, before the first batch. Raises CheckpointError when the data is not the same."""
        saved = state.get("fingerprint", {})
        for name, value in self.fingerprint.items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"cannot continue exactly: {name} was {saved.get(name)}, now {value}; start a new run, or set it as it was"
                )
        self.position = {name: value for name, value in state.items() if name != "fingerprint"}

    def __next__(self) -> Batch:
        """The next batch. Raises StopIteration at the end of the data, and what making it raised, also when asked again."""
        if self._jobs is None:
            self._jobs = self.jobs()
        if self._pool is None:
            batch, self.position = self._make_one(next(self._jobs))
            return batch
        while len(self._ahead) < self._num_ahead:
            self._ahead.append(self._pool.submit(self._make_one, next(self._jobs)))
        batch, self.position = self._ahead[0].result()
        self._ahead.popleft()
        return batch

    def _make_one(self, job: Callable[[], tuple[Batch, State]]) -> tuple[Batch, State]:
        batch, position = job()
        return self.prepare(batch), position

    def next_step(self, accumulation: int) -> list[Batch]:
        """The microbatches of one optimizer step: fewer at the end of an epoch, and fewer or none at the end of the data."""
        micro: list[Batch] = []
        for batch in islice(self, accumulation):
            micro.append(batch)
            if batch.ends_epoch:
                break
        return micro

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
