"""Processes that tokenise: pure functions of a block of text, which end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from neobert.data.tokenizer import Ids, TextTokenizer
from neobert.errors import DataError

Result = TypeVar("Result")

WORKER_DIED = (
    "a tokenising process ended unexpectedly, most likely killed for want of memory; use fewer (dataset.num_workers, "
    "dataset.num_proc, --num-proc), and start again: it goes on where it was"
)

_worker_tokenizer: TextTokenizer | None = None


def start_workers(num_workers: int, tokenizer: TextTokenizer) -> ProcessPoolExecutor:
    """Processes that tokenise blocks of text, one thread each."""
    return ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_set_worker_tokenizer, initargs=(tokenizer,)
    )


def _set_worker_tokenizer(tokenizer: TextTokenizer) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizer


def _end_with_parent() -> None:
    """A worker must not outlive a training process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def worker_tokenizer() -> TextTokenizer:
    """The tokenizer of this worker process."""
    assert _worker_tokenizer is not None
    return _worker_tokenizer


def encode_in_worker(texts: list[str]) -> list[Ids]:
    return worker_tokenizer().encode(texts)


def submit_to_worker(pool: ProcessPoolExecutor, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
    """Hand work to a process. Raises DataError when one of them has died."""
    try:
        return pool.submit(function, *arguments)
    except BrokenProcessPool:
        raise DataError(WORKER_DIED) from None


def wait_for_worker(future: "Future[Result]") -> Result:
    """The result of such work. Raises DataError when its process died."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise DataError(WORKER_DIED) from None
