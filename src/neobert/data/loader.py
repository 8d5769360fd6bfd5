"""Batches with a position, made ahead of training by threads: what the loaders of all tasks share."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from neobert.data.batch import Batch
from neobert.errors import CheckpointError

Saved = tuple[dict[str, Any], dict[str, np.ndarray]]  # JSON, arrays
Position = TypeVar("Position")


class Loader(ABC, Iterator[Batch], Generic[Position]):
    """Batches in an order that depends neither on threads nor on time; without threads each is made when it is asked for.

    `position` is that after the last batch used: what was made ahead and not used is made again after a resume.
    """

    def __init__(self, position: Position, num_threads: int, num_ahead: int):
        self.position = position
        self.num_threads = num_threads
        self._num_ahead = num_ahead
        self._pool = ThreadPoolExecutor(num_threads, "batches") if num_threads else None
        self._jobs: Iterator[Callable[[], tuple[Batch, Position]]] | None = None
        self._ahead: deque[Future[tuple[Batch, Position]]] = deque()

    @abstractmethod
    def jobs(self) -> Iterator[Callable[[], tuple[Batch, Position]]]:
        """Functions that make the batches from `position` on, each with the position after it. Several threads call several."""

    @abstractmethod
    def state_dict(self, position: Position | None = None) -> Saved:
        """A `position`, or that after the last batch used, as JSON and arrays."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continue from a saved position, before the first batch. Raises CheckpointError when the data is not the same."""

    def __next__(self) -> Batch:
        """The next batch. Raises StopIteration at the end of the data, and what making it raised, also when asked again."""
        if self._jobs is None:
            self._jobs = self.jobs()
        if self._pool is None:
            batch, self.position = next(self._jobs)()
            return batch
        while len(self._ahead) < self._num_ahead:
            self._ahead.append(self._pool.submit(next(self._jobs)))
        batch, self.position = self._ahead[0].result()
        self._ahead.popleft()
        return batch

    def next_step(self, accumulation: int) -> list[Batch]:
        """The microbatches of one optimizer step: fewer at the end of an epoch, and fewer or none at the end of the data."""
        micro: list[Batch] = []
        while len(micro) < accumulation and not (micro and micro[-1].ends_epoch):
            batch = next(self, None)
            if batch is None:
                break
            micro.append(batch)
        return micro

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def require_same(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises CheckpointError naming the first thing that a position depends on and that is not as it was."""
    for name, value in current.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"cannot continue exactly: {name} was {saved.get(name)}, now {value}; start a new run, or set it as it was"
            )
