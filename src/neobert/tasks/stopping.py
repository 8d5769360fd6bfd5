"""Signals: a run that is asked to stop saves a checkpoint first, where there is something to save."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neobert.training.loop import Interrupt

ONE_STOP_SECONDS = 3.0  # signals within this time are one: a scheduler and a launcher both send them
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns of the end of a job with SIGUSR1


@contextmanager
def stop_signals(interrupt: Interrupt) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 end a run with exit code 128 + their number.

    Before the first step there is nothing to save: the process ends at once. Then they are noted, and the loop ends behind
    the step in progress, with a checkpoint; a second one, after `ONE_STOP_SECONDS`, ends the process at once.
    """
    first = 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if not interrupt.has_started:
            print(
                f"stopped by {signal.Signals(number).name} before the first step; nothing had to be saved", flush=True
            )
            sys.exit(128 + number)
        if not interrupt.signal:
            interrupt.signal, first = number, time.monotonic()
        elif time.monotonic() - first > ONE_STOP_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
