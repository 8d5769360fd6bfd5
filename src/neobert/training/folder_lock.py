"""A folder has one owner: the process that writes there holds a lock, which says who it is.

The lock is the kernel's (`flock` on `<folder>/.lock`), which ends with the process however it ends, and which two processes
that start at once cannot both get. The text in the file names the holder. It decides where the kernel's lock does not reach:
a holder on another machine is believed until it has given no sign of life for `SILENT_SECONDS` (the time stamp of the file,
which a thread renews), and a holder on this machine, on a file system without locks, as long as its process is there. A run
that was suspended for longer looks into the file again before it writes a checkpoint.
"""

import fcntl
import json
import os
import secrets
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from neobert.errors import ConfigError, Problem, UserError

LOCK = ".lock"
BEAT_SECONDS, SILENT_SECONDS = 20.0, 300.0
NAME_SECONDS = 2.0  # in which a process that has just got the lock has written its name


class FolderLock:
    """Held from its making to `release()`. `note` tells the user of a holder that ended without releasing it."""

    def __init__(self, folder: Path):
        """Raises ConfigError, naming the holder, when another process has it; OSError when the folder cannot be written."""
        self.path, self.note = folder / LOCK, ""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            end = time.monotonic() + NAME_SECONDS
            while (is_held := self._is_held()) and not self._is_named() and time.monotonic() < end:
                time.sleep(0.01)
            holder = self._read()
            if holder is not None:
                is_held = is_held or self._seems_alive(holder)
                self.note = f"took over {folder} from process {holder['pid']} on {holder['host']}, which is gone"
            if is_held:
                raise ConfigError(Problem("trainer.output_dir", _refusal(folder, holder)))
            pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
            name = {"host": os.uname().nodename, "pid": pid, "start": process_start(pid), "since": since}
            self._own = json.dumps({**name, "id": secrets.token_hex(8)})
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self._own.encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def _is_held(self) -> bool:
        """Whether the kernel knows another holder; `_has_kernel` says whether it knows of locks here at all."""
        self._has_kernel = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            self._has_kernel = False
        return False

    def _read(self) -> dict[str, Any] | None:
        """Who holds it, or held it last without releasing it; None where nobody did."""
        try:
            found = json.loads(os.pread(self._descriptor, 4096, 0))
            return {"host": str(found["host"]), "pid": int(found["pid"]), **found}
        except (ValueError, KeyError, TypeError):
            return None  # empty, or being written

    def _is_named(self) -> bool:
        """Whether the holder that the kernel knows has written its name yet: what a dead one left is not it."""
        holder = self._read()
        return holder is not None and (
            holder["host"] != os.uname().nodename or process_start(holder["pid"]) == holder.get("start")
        )

    def _seems_alive(self, holder: dict[str, Any]) -> bool:
        """Of a holder that the kernel does not know."""
        if holder["host"] == os.uname().nodename:
            return not self._has_kernel and process_start(holder["pid"]) == holder.get("start")
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".now.") as now:  # for the file system's clock
            silent = os.fstat(now.fileno()).st_mtime - os.fstat(self._descriptor).st_mtime
        return silent < SILENT_SECONDS

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                continue  # a file system that does not answer; the next beat may come through

    def check(self) -> None:
        """Raises UserError when another process has taken the folder over meanwhile."""
        try:
            text = self.path.read_text()
        except OSError:
            return
        if text != self._own:
            raise UserError("another run has taken the folder over, since this one gave no sign of life for too long")

    def release(self) -> None:
        """Let others have the folder."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        try:
            if os.pread(self._descriptor, 4096, 0).decode() == self._own:
                os.ftruncate(self._descriptor, 0)
        except OSError:
            pass  # the name of a process that has ended stays in it, which the next one sees
        os.close(self._descriptor)


def _refusal(folder: Path, holder: dict[str, Any] | None) -> str:
    who, hint = "another process", ""
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']}, since {holder.get('since')}"
        if holder["host"] != os.uname().nodename:
            minutes = f"{SILENT_SECONDS / 60:.0f} minutes"
            hint = f". If that machine is lost, the folder is free {minutes} after its last sign of life"
    return f"another run is writing in {folder} ({who}); wait for it or stop it, or choose another folder{hint}"


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the boot: with the number it names a process. None: not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
