"""What a user can get wrong. Each of these prints as plain lines and ends the command with exit code 2;
any other exception is a bug of ours and keeps its traceback. Notes are for a run that goes on."""

import errno
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import NamedTuple

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EROFS: "read-only",
    errno.EFBIG: "the file is larger than is allowed here", errno.EIO: "the disk does not work",
}  # fmt: skip


class UserError(ValueError):
    """Base of all errors that a user can repair. The message says what, where, and what to do."""


def first_line(error: BaseException) -> str:
    """An exception in one line: the system's reason, the first line of its message, or its name."""
    reason = getattr(error, "strerror", None) or str(error)
    return next(iter(str(reason).strip().splitlines()), type(error).__name__)


class Problem(NamedTuple):
    """One thing wrong in a configuration: dotted path, what is wrong, and where it was written (file:line)."""

    path: str
    message: str
    where: str = ""

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        return f"{self.path}: {self.message}{where}" if self.path else f"{self.message}{where}"


class ConfigError(UserError):
    """A configuration that cannot run; carries every problem found, not only the first."""

    def __init__(self, *problems: Problem):
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class DataError(UserError):
    """Text, a tokenizer or a data folder that cannot be used; names the file and, where known, the row."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit what is asked of it; or one that could not be written."""


class OutOfMemory(UserError):
    """A step that did not fit into the memory of this process; others of the run may know nothing of it."""


def disk_error(error: OSError, name: object = None) -> UserError | None:
    """A write that failed, in one line, with the file's name where the error has it; None for an error of another kind."""
    if error.errno not in DISK_ERRORS:
        return None
    return UserError(f"{error.filename or name or 'cannot write'}: {DISK_ERRORS[error.errno]}")


def check_installed(need: str, extra: str, *modules: str) -> None:
    """Raises UserError for the first of `modules` that is not installed; `need`, with {} for its name, says for what."""
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"{need.format(module)}: pip install 'neobert[{extra}]'")


def print_notes(notes: Iterable[str]) -> None:
    """What the user should know, a line each, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
