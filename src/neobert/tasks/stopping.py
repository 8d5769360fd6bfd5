"""Signals: a run that is asked to stop saves a checkpoint first, where there is something to save."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neobert.training.loop import Interrupt

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns of the end of a job with SIGUSR1


@contextmanager
def stop_signals(interrupt: Interrupt) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 end a run with exit code 128 + their number.

    Before the first step there is nothing to save: the process ends at once. Then they are noted, and the loop ends behind
    the step in progress, with a checkpoint; a second one ends the process at once.
    """

    def stop(number: int, frame: Any) -> None:
        if not interrupt.has_started:
            print(
                f"stopped by {signal.Signals(number).name} before the first step; nothing had to be saved", flush=True
            )
            sys.exit(128 + number)
        interrupt.signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
