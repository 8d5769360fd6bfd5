"""A process of a run ends when the launcher that started it has ended, however that ended. Imports nothing heavy: it is to
run before everything else does.
"""

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER = "NEOBERT_LAUNCHER"  # the launcher's process id, in the environment of the processes that it starts
PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_launcher() -> None:
    """From now on the system kills this process when its launcher dies; a thread sees to it where no system does. Does
    nothing in a process that our launcher did not start.
    """
    launcher = int(os.environ.pop(LAUNCHER, "0"))
    if not launcher:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before that
        os._exit(128 + signal.SIGKILL)
    threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(128 + signal.SIGKILL)
