"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from neobert.errors import UserError
from neobert.training.checkpoint import sync


def check_target(out: Path, mark: str, replace: bool) -> None:
    """Raises UserError when `out` may not be written: something is there, and it is not an earlier result (which holds a file
    `mark`) that is to be replaced.
    """
    if not out.exists():
        return
    if replace and (out / mark).is_file():
        return
    hint = f"it has no {mark}, so it is not replaced" if replace else "choose another folder, or --replace"
    raise UserError(f"{out}: is there already; {hint}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder `<out>.tmp`, which takes the place of `out` at the end, flushed to the disk; or, when that fails, goes.

    Raises UserError when it cannot be written.
    """
    scratch, old = (out.with_name(f"{out.name}{end}") for end in (".tmp", ".old.tmp"))
    try:
        for leftover in (scratch, old):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            sync(path)
        _take_the_place(scratch, out, old)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{out}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _take_the_place(scratch: Path, out: Path, old: Path) -> None:
    """A folder that is not empty cannot be replaced at once: it steps aside, and comes back when that fails."""
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(scratch, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
