"""This process as a part of a run: its runtime, what it prints, and the signals that ask it to stop.

A run that is asked to stop saves a checkpoint first, where there is something to save.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from neobert.config.deepspeed import read_zero
from neobert.config.schema import Config
from neobert.errors import print_notes
from neobert.ranks import Ranks
from neobert.training.loop import Interrupt
from neobert.training.runtime import Runtime, build_runtime

DEAF_SECONDS = 2.0  # in which a process takes notice of a signal, unless it waits outside of Python
ONE_STOP_SECONDS = 3.0  # signals within this time are one: a scheduler and a launcher both send them
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Slurm warns of the end of a job with SIGUSR1


@contextmanager
def stop_signals(interrupt: Interrupt) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 end a run with exit code 128 + their number.

    Before the first step there is nothing to save: the process ends at once, also where it waits for others outside of Python,
    which calls no handler. Then they are noted, and the loop ends after the step in progress, with a checkpoint; a second one,
    after `ONE_STOP_SECONDS`, ends the process at once.
    """
    first, heard = 0.0, threading.Event()

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        heard.set()
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

    arrived, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_deaf, args=(arrived, heard, interrupt), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_when_deaf(arrived: int, heard: threading.Event, interrupt: Interrupt) -> None:
    """The system writes the number of every signal that has a handler to `arrived`, whatever Python is doing."""
    with open(arrived, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in SIGNALS and not heard.wait(DEAF_SECONDS) and not interrupt.has_started:
                os._exit(128 + number[0])


@contextmanager
def main_prints_only(ranks: Ranks) -> Iterator[None]:
    """Inside, only the main process prints."""
    if ranks.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def start_runtime(config: Config) -> Runtime:
    """Device, precision and engine of this process, as the configuration and the launcher have it. Raises ConfigError."""
    trainer, asked = config.trainer, read_zero(config, os.environ)
    runtime = build_runtime(
        use_cpu=trainer.use_cpu,
        mixed_precision=trainer.mixed_precision,
        tf32=trainer.tf32,
        engine=trainer.engine,
        zero_options=None if asked is None else asked.options,
    )
    print_notes(asked.notes if asked is not None and runtime.is_main else [])
    return runtime
