"""Files behind URLs (`hf://…`, whatever `fsspec` opens), read again from where the connection broke off."""

import errno
import io
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

ATTEMPTS = 6  # of one read, until it is an error
FIRST_WAIT_SECONDS = 1.0  # then twice as long each time: half a minute in all
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # another attempt changes nothing

Result = TypeVar("Result")


class RemoteFile(io.RawIOBase):
    """The bytes behind a URL. A read that fails is tried again, on a new connection, at the same offset.

    Raises OSError when `ATTEMPTS` of them failed, or for a file that is not there.
    """

    def __init__(self, url: str):
        self.url = url
        self._offset = 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += self._try(lambda file: int(file.size))
        self._offset = offset + (self._offset if whence == io.SEEK_CUR else 0)
        return self._offset

    def readinto(self, buffer: Any) -> int:
        chunk = self._try(lambda file: self._read(file, len(buffer)))
        buffer[: len(chunk)] = chunk
        self._offset += len(chunk)
        return len(chunk)

    def _read(self, file: Any, num_bytes: int) -> bytes:
        chunk: bytes = file.read(num_bytes)
        if not chunk and num_bytes and self._offset < (getattr(file, "size", None) or 0):
            raise OSError("the connection ended early")
        return chunk

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _try(self, action: Callable[[Any], Result]) -> Result:
        import fsspec

        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._file is None:
                    self._file = fsspec.open(self.url, "rb").open()
                _go_to(self._file, self._offset)
                return action(self._file)
            except FINAL:
                raise
            except _network_errors() as error:
                self._file = None
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            if attempt < ATTEMPTS:
                told = f"note: {self.url}: {reason}; reading on from byte {self._offset:,}, attempt {attempt + 1} of {ATTEMPTS}"
                print(told, file=sys.stderr, flush=True)
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise OSError(errno.EIO, f"{reason} ({ATTEMPTS} attempts)")


def _go_to(file: Any, offset: int) -> None:
    """Go to a byte; what a server only sends from the beginning is read up to there."""
    if file.tell() == offset:
        return
    try:
        file.seek(offset)
    except ValueError:  # fsspec's word for it
        while (missing := offset - file.tell()) > 0 and file.read(min(missing, 2**20)):
            continue
        if file.tell() != offset:
            raise OSError(f"byte {offset:,} cannot be reached") from None  # another connection begins before it


def _network_errors() -> tuple[type[Exception], ...]:
    """What clients raise; those of a library that was not imported cannot come."""
    found = [("aiohttp", "ClientError"), ("httpx", "HTTPError")]
    return (OSError, *(getattr(sys.modules[module], name) for module, name in found if module in sys.modules))
