"""One writer at a time: a lock file that the operating system releases when its holder dies."""

import fcntl
import os
from pathlib import Path

from autoregembed_indexes.errors import DocumentIndexError, IndexLockedError

LOCK_NAME = "writer.lock"


class WriterLock:
    """Holds the writer's lock on `folder` until `release`.

    Raises IndexLockedError, naming the holder's process id, when another writer has it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DocumentIndexError(
                f"{folder} cannot be written ({error.strerror}); open it with read_only=True to search it"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            who = "this process" if holder == str(os.getpid()) else "another process"
            raise IndexLockedError(
                f"{folder} is open for writing in {who} (pid {holder}); close it there, or open it here with "
                "read_only=True"
            ) from None
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(self._file)
            raise DocumentIndexError(f"{folder} cannot be written ({error.strerror})") from error

    def release(self) -> None:
        """Let the next writer in; a second call does nothing."""
        if self._file < 0:
            return
        # Unlocked by name, not only closed: a forked child may hold a copy of the descriptor.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)
        self._file = -1


def has_writer(folder: Path) -> bool:
    """Tell whether a process has `folder` open for writing; needs no right to write there."""
    try:
        file = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
