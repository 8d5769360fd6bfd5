"""Files and folders that appear whole or not at all: the one way in which this package writes what must not be half there."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from neobert.errors import UserError


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place at the end, flushed to the disk. Raises OSError naming `path`.

    With `shared` other processes and machines may write the same file meanwhile.
    """
    scratch = path.with_name(f".{path.name}.{f'{platform.node()}-{os.getpid()}.' if shared else ''}tmp")
    try:
        yield scratch
        sync(scratch)
        os.replace(scratch, path)
        sync(path.parent)
    except OSError as error:
        if error.filename in (None, str(scratch)):
            error.filename = str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """Write a text file atomically. Raises OSError naming it."""
    with whole_file(path, shared) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, shared: bool = False) -> None:
    """Write indented JSON with a final newline, atomically."""
    write_text(path, as_json(value), shared)


def as_json(value: Any) -> str:
    """The one way we write JSON."""
    return json.dumps(value, indent=2) + "\n"


def read_json(path: Path, kind: type[UserError] = UserError, purpose: str = "", shape: type = dict) -> Any:
    """The JSON object in a file, or the array with `shape` list. Raises an error of `kind`, which ends with `purpose`, where
    there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise kind(f"{path}: missing or not JSON{purpose}") from None
    if not isinstance(found, shape):
        raise kind(f"{path}: not a JSON {'object' if shape is dict else 'array'}{purpose}")
    return found


def replace_folder(scratch: Path, final: Path, old: Path) -> None:
    """Rename `scratch` to `final`. A folder that is there steps aside as `old`, and goes, or comes back when that fails."""
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    try:
        os.replace(scratch, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    try:
        sync(final.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def check_target(out: Path, mark: str, replace: bool) -> None:
    """Raises UserError when `out` is there, unless `replace` and it is an earlier result, which has a file `mark`. A folder
    that a killed process left aside comes back first.
    """
    _, old = _hidden_names(out)
    if old.exists() and not out.exists():  # killed between the two renames
        os.replace(old, out)
    if out.exists() and not (replace and (out / mark).is_file()):
        hint = f"it has no {mark}, so it is not replaced" if replace else "choose another folder, or --replace"
        raise UserError(f"{out}: is there already; {hint}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `out` at the end, flushed to the disk; or, when that fails, goes.

    Nothing but `.<name>.neobert-new` and `.<name>.neobert-old`, where an earlier one is meanwhile, is ever deleted. Raises
    UserError when it cannot be written. Call `check_target` first.
    """
    scratch, old = _hidden_names(out)
    try:
        for leftover in (scratch, old):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            sync(path)
        replace_folder(scratch, out, old)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{out}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _hidden_names(out: Path) -> tuple[Path, Path]:
    """(where `out` is written, where an earlier one steps aside)."""
    out = out.absolute()
    return out.with_name(f".{out.name}.neobert-new"), out.with_name(f".{out.name}.neobert-old")
