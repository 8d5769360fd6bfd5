"""Which checkpoints of a run stay, and what is left of them; and what a crash left behind."""

import json
import os
import shutil
from pathlib import Path

from neobert.checkpoints.format import REPLACED, STATE, checksum, is_of_a_rank, list_steps
from neobert.files import write_json

DELETED = ".old.tmp"  # end of the hidden name of a checkpoint that goes


def prune(root: Path, keep: int | None, protected: set[int], keep_newest: bool = True) -> list[int]:
    """Delete the oldest checkpoints beyond `keep`, never a protected one; nor the newest, unless `keep_newest` is off.

    Returns the steps deleted.
    """
    if keep is None:
        return []
    steps = list_steps(root)
    spare = max(0, len(steps) - keep)
    doomed = [step for step in (steps[:-1] if keep_newest else steps) if step not in protected][:spare]
    for step in doomed:
        _remove(root / str(step))
    return doomed


def strip_checkpoint(folder: Path) -> None:
    """Leave out what only resuming needs; what is left verifies as before. Does nothing the second time."""
    state = json.loads((folder / STATE).read_text())
    spare = [name for name in state["sha256"] if is_of_a_rank(name)]
    if spare:
        state["sha256"] = {name: value for name, value in state["sha256"].items() if name not in spare}
        del state["checksum"]
        write_json(folder / STATE, {**state, "checksum": checksum(state)})
    shutil.rmtree(folder / "optimizer", ignore_errors=True)
    for path in folder.glob("data_rank*"):
        path.unlink()


def _remove(folder: Path) -> None:
    """Delete a checkpoint under another name, so that a half-deleted one never looks whole."""
    hidden = folder.with_name(f".{folder.name}{DELETED}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clean_leftovers(root: Path) -> None:
    """Remove what a crash in the middle of a save left behind; a checkpoint that was about to be replaced comes back."""
    for old in root.glob(f".*{REPLACED}"):
        final = root / old.name.removesuffix(REPLACED)[1:]
        if not final.exists():
            os.replace(old, final)
    for path in root.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
