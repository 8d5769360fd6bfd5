"""A folder that appears whole or not at all.

It is written beside its place as `.<name>.neobert-new`; what was there steps aside as `.<name>.neobert-old`. Nothing else is
ever deleted, and an old folder that a killed process left aside comes back.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from neobert.checkpoints.format import sync
from neobert.errors import UserError


def check_target(out: Path, mark: str, replace: bool) -> None:
    """Raises UserError when `out` may not be written: something is there, and it is not an earlier result (which holds a file
    `mark`) that is to be replaced.
    """
    _, old = _asides(out)
    if old.exists() and not out.exists():  # killed between stepping aside and taking the place
        os.replace(old, out)
    if not out.exists():
        return
    if replace and (out / mark).is_file():
        return
    hint = f"it has no {mark}, so it is not replaced" if replace else "choose another folder, or --replace"
    raise UserError(f"{out}: is there already; {hint}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `out` at the end, flushed to the disk; or, when that fails, goes.

    Raises UserError when it cannot be written. Call `check_target` first.
    """
    scratch, old = _asides(out)
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
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _asides(out: Path) -> tuple[Path, Path]:
    """(where `out` is written, where an earlier one steps aside)."""
    out = out.absolute()
    return out.with_name(f".{out.name}.neobert-new"), out.with_name(f".{out.name}.neobert-old")


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
