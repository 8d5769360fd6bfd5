"""The output folder of a run: held by one process, checked for being writable, and cleared of an earlier run with care.

    <output_dir>/
      .lock           who writes here
      previous/<n>/   what was moved aside: an earlier run, or the later steps of this one, when it went back. Never deleted.

Opening comes first, before anything expensive, and changes nothing but what a crash left behind; `enter_run` moves aside what
is in the way, when the run is about to begin. What is moved is collected in `previous/.moving` and gets its number last: a
process that is killed before leaves a folder in which the next one puts everything back.
"""

import fcntl
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neobert import __version__
from neobert.checkpoints.format import POINTERS, clean_leftovers, has_data, list_steps, read_pointer, verify_checkpoint
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.rules import resume_needs_a_position
from neobert.config.schema import Config
from neobert.errors import CheckpointError, ConfigError, Problem, UserError, print_notes
from neobert.files import sync, write_json, write_text
from neobert.training.runtime import Runtime

LOCK = ".lock"
BEAT_SECONDS, SILENT_SECONDS = 20.0, 300.0
NAME_SECONDS = 2.0  # in which a process that has just got the lock has written its name
SHARED_SECONDS = 30.0  # in which a network file system shows a new file
RESULT = "result.json"  # of a run that came to its end, where its task has one
RUN_FILES = (
    "checkpoints", "metrics.jsonl", "report.html", "config.yaml", "environment.json", "trackers", "wandb.json", RESULT,
    "submission",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numpy", "pyarrow", "pydantic")
MOVING = "previous/.moving"


# --- who writes here -----------


class FolderLock:
    """The lock of a folder, held until `release()`. `note` tells the user of a holder that ended without releasing it.

    It is the kernel's (`flock`), which ends with the process however it ends, and which two processes that start at once
    cannot both get. The text in the file names the holder, and decides where the kernel's lock does not reach: a holder on
    another machine is believed until it has given no sign of life for `SILENT_SECONDS` (the time stamp of the file, which a
    thread renews), and one on this machine, on a file system without locks, as long as its process is there. A run that was
    suspended for longer looks into the file again before it writes a checkpoint.
    """

    def __init__(self, folder: Path):
        """Raises ConfigError, naming the holder, when another process has it; OSError when the folder cannot be written."""
        self.path, self.note = folder / LOCK, ""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            end = time.monotonic() + NAME_SECONDS
            while (is_held := self._is_held()) and not self._is_here(self._read()) and time.monotonic() < end:
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
            host, pid = str(found["host"]), int(found["pid"])
            return {"host": host, "pid": pid, **found, "is_local": host == os.uname().nodename}
        except (ValueError, KeyError, TypeError):
            return None  # empty, or being written

    def _is_here(self, holder: dict[str, Any] | None) -> bool:
        """Whether a name is that of a process that is there, for what this machine knows: what a dead one left is not."""
        return holder is not None and (not holder["is_local"] or process_start(holder["pid"]) == holder.get("start"))

    def _seems_alive(self, holder: dict[str, Any]) -> bool:
        """Of a holder that the kernel does not know."""
        if holder["is_local"]:
            return not self._has_kernel and self._is_here(holder)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".now.") as now:  # for the file system's clock
            silent = os.fstat(now.fileno()).st_mtime - os.fstat(self._descriptor).st_mtime
        return silent < SILENT_SECONDS

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system that does not answer; the next beat may come through
                os.utime(self.path)

    def check(self) -> None:
        """Raises UserError when another process has taken the folder over meanwhile."""
        with suppress(OSError):
            if self.path.read_text() != self._own:
                raise UserError(
                    "another run has taken the folder over, since this one gave no sign of life for too long"
                )

    def release(self) -> None:
        """Let others have the folder."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        with suppress(OSError):  # else the name of a process that has ended stays in it, which the next one sees
            if os.pread(self._descriptor, 4096, 0).decode() == self._own:
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _refusal(folder: Path, holder: dict[str, Any] | None) -> str:
    who, hint = "another process", ""
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']}, since {holder.get('since')}"
        if not holder["is_local"]:
            minutes = f"{SILENT_SECONDS / 60:.0f} minutes"
            hint = f". If that machine is lost, the folder is free {minutes} after its last sign of life"
    return f"another run is writing in {folder} ({who}); wait for it or stop it, or choose another folder{hint}"


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the boot: with the number it names a process. None: not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


# --- opening -----------


@dataclass(frozen=True)
class OpenRun:
    """The folder of a run, and the checkpoint that it goes on from, verified."""

    folder: Path
    checkpoint: Path | None
    saved: dict[str, Any]  # what the checkpoint counts
    in_the_way: list[str]  # in the folder
    messages: list[str]
    lock: FolderLock | None = None  # in the main process

    @property
    def goes_on(self) -> bool:
        """Whether the checkpoint is one of this folder, and not another run's that a new run starts from."""
        return self.checkpoint is not None and _is_inside(self.checkpoint, self.folder)


@contextmanager
def open_run(config: Config, runtime: Runtime) -> Iterator[OpenRun]:
    """Hold the output folder, which all processes see, and find the checkpoint to resume from.

    Raises ConfigError when the folder cannot be written, is held by another run, or holds one that may not be moved aside;
    CheckpointError when there is no such checkpoint.
    """
    trainer, folder = config.trainer, Path(config.trainer.output_dir)
    with _locked(folder, runtime) as (lock, messages):
        if runtime.world_size > 1:
            check_shared(folder, runtime)
        checkpoint, in_the_way, more = runtime.on_main(
            lambda: plan_start(folder, trainer.resume_from_checkpoint, trainer.overwrite_output_dir)
        )
        saved: dict[str, Any] = {}
        if checkpoint is not None:
            saved = runtime.on_main(lambda: verify_checkpoint(checkpoint))
            if missing := list(resume_needs_a_position(config, has_data(checkpoint))):
                raise ConfigError(*missing)
        yield OpenRun(folder, checkpoint, saved, in_the_way, [*messages, *more], lock)


@contextmanager
def hold_folder(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Hold a folder that is written and is not that of one run. Raises ConfigError."""
    with _locked(folder, runtime) as (_, messages):
        print_notes(messages if runtime.is_main else [])
        yield


@contextmanager
def _locked(folder: Path, runtime: Runtime) -> Iterator[tuple[FolderLock | None, list[str]]]:
    """(the lock, in the main process; messages)."""
    lock: FolderLock | None = None

    def acquire() -> str:
        nonlocal lock
        with _writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(folder)
        return lock.note

    try:
        note = runtime.on_main(acquire)
        yield lock, [note] if note else []
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(Problem("trainer.output_dir", f"cannot write to {folder}: {error.strerror}")) from None


def plan_start(folder: Path, resume: str | None, overwrite: bool) -> tuple[Path | None, list[str], list[str]]:
    """(the checkpoint to resume from or None, what in the folder is in the way, messages).

    A run that is there is in the way of a new one, also of one that starts from another run's checkpoint: it is moved aside,
    so that a forgotten `resume_from_checkpoint` costs nothing; with `overwrite` false it is an error. Steps after the
    checkpoint are in the way of a run that goes back. Call with the folder held.
    """
    root, checkpoint = folder / "checkpoints", None
    with _writing_to(folder):
        put_back(folder)
        root.mkdir(exist_ok=True)
        clean_leftovers(root)
    if resume is not None:
        try:
            checkpoint = find_checkpoint(resume, root, to_resume=True)
        except CheckpointError:
            if resume != "latest":
                raise
            message = f"resume_from_checkpoint: latest, and no checkpoint in {folder} yet: starting from the beginning"
            return None, [], [message]
        if _is_inside(checkpoint, folder):
            later = [step for step in list_steps(root) if step > int(checkpoint.name)]
            return checkpoint, [f"checkpoints/{step}" for step in later], []
    if not list_steps(root) and not (folder / "metrics.jsonl").exists():
        return checkpoint, [], []
    if not overwrite:
        way_out = "choose another trainer.output_dir, or set overwrite_output_dir: true"
        why = f"{folder} holds a run; continue it with trainer.resume_from_checkpoint: latest, {way_out}"
        raise ConfigError(Problem("trainer.overwrite_output_dir", why))
    return checkpoint, [name for name in RUN_FILES if (folder / name).exists()], []


def _is_inside(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.name.isdigit() and checkpoint.resolve().parent == (folder / "checkpoints").resolve()


def enter_run(opened: OpenRun) -> list[str]:
    """Move aside what is in the way; returns messages. Raises ConfigError where that cannot be done."""
    folder, root, messages = opened.folder, opened.folder / "checkpoints", list[str]()
    with _writing_to(folder):
        if opened.in_the_way:
            to = move_aside(folder, opened.in_the_way)
            what = "later steps of this run are" if opened.goes_on else f"the run that was in {folder} is"
            hint = "" if opened.goes_on else " (to continue it instead: resume_from_checkpoint)"
            messages.append(f"{what} now in {to}{hint}")
        root.mkdir(exist_ok=True)
        for path in (root / name for name in POINTERS):
            step = read_pointer(path)
            if step is not None and not (root / step).is_dir():
                path.unlink()
    return messages


def move_aside(folder: Path, names: list[str]) -> Path:
    """Move parts of a run to `previous/<next number>`; its metrics are copied where they stay."""
    previous, moving = folder / "previous", folder / MOVING
    (moving / "checkpoints").mkdir(parents=True)
    metrics = folder / "metrics.jsonl"
    if metrics.name not in names and metrics.exists():
        shutil.copyfile(metrics, moving / metrics.name)
    for name in names:
        os.replace(folder / name, moving / name)
    to = previous / str(1 + max((int(path.name) for path in previous.iterdir() if path.name.isdigit()), default=0))
    os.replace(moving, to)
    sync(previous)
    sync(folder)
    return to


def put_back(folder: Path) -> None:
    """Undo a move that was broken off. What is in both places is a copy."""
    moving = folder / MOVING
    if not moving.is_dir():
        return
    (folder / "checkpoints").mkdir(exist_ok=True)
    for path in [*moving.glob("checkpoints/*"), *moving.iterdir()]:
        back = folder / path.relative_to(moving)
        if not back.exists():
            os.replace(path, back)
    shutil.rmtree(moving)


def check_shared(folder: Path, runtime: Runtime) -> None:
    """Raises ConfigError, in all processes, where one of them, on another machine, has another folder of this name."""
    probe = folder / runtime.on_main(lambda: f".shared.{os.getpid()}")
    runtime.on_main(probe.touch)
    end = time.monotonic() + SHARED_SECONDS
    while not probe.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    missing = int(runtime.all_sum(not probe.is_file())[0])
    runtime.on_main(probe.unlink)
    if missing:
        which = f"{missing} of {runtime.world_size} processes do not see {folder} of process 0"
        why = f"{which}; several machines need a file system that all of them share"
        raise ConfigError(Problem("trainer.output_dir", why))


def write_run_files(folder: Path, config_yaml: str, facts: dict[str, Any]) -> None:
    """config.yaml, which loads to the same configuration, and environment.json: versions, machine, what was derived."""
    (folder / RESULT).unlink(missing_ok=True)  # of an earlier end of the run
    write_text(folder / "config.yaml", config_yaml)
    environment = {
        "neobert": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **facts,
    }
    write_json(folder / "environment.json", environment)
