"""Checkpoints written while training goes on.

The loop makes a copy of what a checkpoint holds, which takes as long as copying it in memory takes; a thread writes it, in each
process, and the threads talk to each other over a connection of their own. One checkpoint is written at a time: the next one
waits. The price is memory for one more copy of weights and optimizer state, on the CPU.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from neobert.checkpoints.format import Content, ProcessGroup, save_checkpoint
from neobert.errors import UserError, first_line, print_notes


@dataclass
class Saver:
    """Saves below `root`, in the background or not. `num_saved` checkpoints took `write_seconds` to write."""

    root: Path
    team: ProcessGroup
    in_background: bool = True
    before: Callable[[], None] = lambda: None  # of every save, in the main process; may raise UserError
    num_saved: int = 0
    write_seconds: float = 0.0
    _running: Future[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="save"))

    def submit(self, content: Content, behind: Callable[[], None]) -> None:
        """Write a checkpoint, whose tensors nobody changes any more; then the main process calls `behind`. Raises what `wait`
        raises.
        """
        self.wait()
        self._running = self._thread.submit(self._save, content, behind)
        if not self.in_background:
            self.wait()

    def then(self, work: Callable[[], object]) -> None:
        """Do something in the background, after the save that is being written; if that fails, so does this. What the disk does
        not let it do is left undone, with a note.
        """
        before = self._running

        def do() -> None:
            if before is not None:
                before.result()
            try:
                work()
            except OSError as error:
                print_notes([f"{self.root}: {first_line(error)}"])

        self._running = self._thread.submit(do)

    def _save(self, content: Content, behind: Callable[[], None]) -> None:
        start = time.perf_counter()
        save_checkpoint(self.root, content, self.team, self.before, behind)
        self.write_seconds += time.perf_counter() - start
        self.num_saved += 1

    def failure(self) -> UserError | None:
        """The error that the last save has ended in, which `wait` raises."""
        error = self._running.exception() if self._running is not None and self._running.done() else None
        if error is not None and not isinstance(error, UserError):
            raise error
        return error

    def wait(self) -> None:
        """Until the last save is on the disk. Raises CheckpointError when it could not be written."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def describe(self, held_seconds: float) -> list[str]:
        """What saving cost, for the end of a run that was held for so long."""
        if not self.num_saved:
            return []
        n = self.num_saved
        how = "in the background, " if self.in_background else ""
        return [
            f"saving: {self.write_seconds / n:.2f} s a checkpoint, {how}which held training for {held_seconds / n:.2f} s"
        ]

    def close(self) -> None:
        """End the thread; a save that is being written is finished."""
        self._thread.shutdown()
