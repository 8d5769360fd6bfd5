"""Processes that tokenise: pure functions of a block of text, which end with the process that started them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Generic, TypeVar

from neobert.data.tokenizer import Ids, TextTokenizer
from neobert.errors import DataError

Result = TypeVar("Result")

WORKER_DIED = (
    "a tokenising process {}; use fewer (dataset.num_workers, dataset.num_proc, --num-proc), and start again: it goes on "
    "where it was"
)
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
REASON_SECONDS = 5.0  # in which the system tells how a process ended

_worker_tokenizer: TextTokenizer | None = None


class _Worker(SpawnProcess):
    """A process that is deaf to signals until it knows what to do about them."""

    def start(self) -> None:
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new process inherits that
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)


class _Remembering(SpawnContext):
    """Starts processes and knows them when they have ended, which the pool then no longer does."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[_Worker] = []

    def Process(self, *arguments: Any, **keywords: Any) -> _Worker:  # type: ignore[override]
        self.started.append(_Worker(*arguments, **keywords))
        return self.started[-1]


class Workers(ProcessPoolExecutor):
    """Processes that tokenise blocks of text, one thread each."""

    def __init__(self, num_workers: int, tokenizer: TextTokenizer | None):
        self.context = _Remembering()
        super().__init__(num_workers, self.context, initializer=_set_worker_tokenizer, initargs=(tokenizer,))

    def explain(self) -> DataError:
        """How the process ended that made the others useless; those are then told to end."""
        end = time.monotonic() + REASON_SECONDS
        told, codes = {None, 0, -signal.SIGTERM, 128 + signal.SIGTERM}, set[int | None]()
        while not codes - told and time.monotonic() < end:
            codes = {process.exitcode for process in self.context.started}
            time.sleep(0.02)
        code = next(iter(codes - told), None)
        if code is None:
            return DataError(WORKER_DIED.format("ended unexpectedly"))
        if code < 0:
            name = signal.Signals(-code).name
            memory = ", most likely for want of memory" if -code == signal.SIGKILL else ""
            return DataError(WORKER_DIED.format(f"was killed by {name}{memory}"))
        return DataError(WORKER_DIED.format(f"ended with exit code {code}"))


def start_workers(num_workers: int, tokenizer: TextTokenizer | None = None) -> Workers:
    """Processes that tokenise; they start with the first work, and `worker_tokenizer` is theirs."""
    return Workers(num_workers, tokenizer)


def _set_worker_tokenizer(tokenizer: TextTokenizer | None) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in SIGNALS - {signal.SIGTERM}:  # for the training process, which saves and ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, daemon=True).start()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizer


def _end_when_told() -> None:
    """A scheduler sends SIGTERM to every process of a job; only that of the training process counts here."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


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


@dataclass(frozen=True)
class Work(Generic[Result]):
    """Work in hand of a process."""

    pool: Workers
    future: "Future[Result]"


def submit_to_worker(pool: Workers, function: Callable[..., Result], *arguments: Any) -> Work[Result]:
    """Hand work to a process. Raises DataError when one of them has died."""
    try:
        return Work(pool, pool.submit(function, *arguments))
    except BrokenProcessPool:
        raise pool.explain() from None


def wait_for_worker(work: Work[Result]) -> Result:
    """The result of such work. Raises DataError when its process died, saying how."""
    try:
        return work.future.result()
    except BrokenProcessPool:
        raise work.pool.explain() from None
