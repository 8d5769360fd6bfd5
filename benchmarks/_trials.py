"""Runs in forks of a process that has imported everything, so that most of their time is training."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(home: Path, work: Callable[[], int]) -> int:
    """Call `work` in a fork with a process group, a log (`log.txt`) and a folder for temporary files (`tmp`) of its own.

    What it returns is the exit status. Returns the number of the process.
    """
    home.mkdir(exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(home / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        tempfile.tempdir = str(home / "tmp")
        os.makedirs(tempfile.tempdir, exist_ok=True)
        code = work()
    except BaseException:  # noqa: BLE001, whoever waits sees the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def complete(home: Path, work: Callable[[], int]) -> float:
    """Do it to the end; returns the seconds it took. Ends the benchmark where it fails."""
    begin = time.perf_counter()
    _, status = os.waitpid(fork(home, work), 0)
    if status:
        sys.exit(f"a run in {home} ended with status {status}:\n{(home / 'log.txt').read_text()[-3000:]}")
    return time.perf_counter() - begin


def ending_at_once(work: Callable[[], object]) -> Callable[[], int]:
    """`work` as a command would do it that is one of several processes: an exception ends it, and torch's launcher does not
    write it to a file that stays.
    """

    def do() -> int:
        try:
            work()
        except BaseException:  # noqa: BLE001, the log has it
            traceback.print_exc()
            os._exit(1)
        return 0

    return do
