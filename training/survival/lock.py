"""One process on a run folder at a time."""

import os
import time
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there the folder is not guarded
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TRIES, _PAUSE = 20, 0.01  # seconds; who asks for the owner holds the file for a moment too

_held: set[int] = set()


class FolderLock:
    """Holds a folder until it is released, collected or the process ends, however it ends.

    Parameters
    ----------
    folder : Path
        Gets a file with the number of the process. The system drops the lock of a process that
        is gone, so that a file which one left behind does not matter.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            return
        path, tries = folder / LOCK, 0
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(handle, path):
                    break
            except BlockingIOError as error:
                owner = _owner(handle)
                os.close(handle)
                tries += 1
                if tries < _TRIES:
                    time.sleep(_PAUSE)
                    continue
                msg = (
                    f"{folder} is in use by another run (process {owner}): wait for its end, or "
                    f"give another folder"
                )
                raise BlockingIOError(msg) from error
            except OSError:
                os.close(handle)
                raise
            os.close(handle)
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        _held.add(handle)
        self._end = weakref.finalize(self, _release, handle, path, os.getpid())

    def release(self) -> None:
        """Let others use the folder; does nothing the second time."""
        if fcntl is not None:
            self._end()


def held_by(folder: Path) -> str | None:
    """Number of the process that holds a folder; None where none does."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # Shared, so that those who only ask do not find one another.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(handle)
    finally:
        os.close(handle)
    return None


def _is(handle: int, path: Path) -> bool:
    """Whether a path leads to an open file, or has been removed since by whoever held it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    return os.read(handle, 32).decode(errors="replace").strip() or "unknown"


def _release(handle: int, path: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked worker, which has closed its copy
        return
    _held.discard(handle)
    path.unlink(missing_ok=True)
    os.close(handle)


def _close_in_child() -> None:
    # A worker of a loader may live on for a while after its parent was killed: without the lock.
    for handle in _held:
        os.close(handle)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_in_child)
