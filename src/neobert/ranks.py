"""Which of the processes of a run this one is, and that it ends with the launcher that started it, however that ended.

Imports nothing heavy: `end_with_launcher` is to run before everything else does.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

LAUNCHER = "NEOBERT_LAUNCHER"  # the launcher's process id, in the environment of the processes that it starts
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class Ranks:
    """The process `rank`, counted from 0, of `world_size` processes."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the files of which there is one."""
        return self.rank == 0


def launched_ranks() -> Ranks:
    """What the launcher (torchrun, `--nproc`, DeepSpeed) says in RANK and WORLD_SIZE; one process without it."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def end_with_launcher() -> None:
    """From now on the system kills this process when its launcher dies; a thread sees to it where no system does. Does
    nothing in a process that our launcher did not start.
    """
    launcher = int(os.environ.pop(LAUNCHER, "0"))
    if not launcher:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before that
        os._exit(128 + signal.SIGKILL)
    threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(128 + signal.SIGKILL)
