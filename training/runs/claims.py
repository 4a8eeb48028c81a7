"""Who may write in a folder: a claim is held until it is released or its process ends, however that ends."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".lock"
#: Seconds between two looks at a lock that another process holds for a moment.
PAUSE = 0.01

log = logging.getLogger(__name__)

# Folders that this process has claimed, with the descriptors of their locks; None where they cannot be locked.
_held: dict[Path, int | None] = {}


def claim(folder: Path) -> bool:
    """Claim a folder, which exists, before looking into it; what dead processes left half-written is swept out.

    The claim lasts until ``release`` or the end of this process, also after ``kill -9``. Where files cannot be locked
    (some network file systems, read-only folders) a warning says so, and the folder counts as claimed.

    Returns:
        False if another process has it.
    """
    folder = folder.absolute()
    if folder in _held:
        return True
    try:
        descriptor = _take(folder / NAME)
    except OSError as error:
        log.warning("%s cannot be locked (%s): see to it that one process at a time trains in it.", folder, error)
        _held[folder] = None
        return True
    if descriptor is None:
        return False
    _held[folder] = descriptor
    for place in (folder, folder / "checkpoints"):
        for left in place.glob(".*.tmp"):
            left.unlink(missing_ok=True)
    return True


def release() -> None:
    """Let others have every folder that this process has claimed; one that stayed empty goes with its claim."""
    while _held:
        folder, descriptor = _held.popitem()
        if descriptor is None:
            continue
        lock = folder / NAME
        with suppress(OSError):  # a folder that was moved or deleted, or Windows, which keeps what is open
            lock.unlink()
        with suppress(OSError):  # whatever a run left in it
            folder.rmdir()
        os.close(descriptor)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Within it, this process alone of all that ask decides about what lies in a folder; it is made if it is missing.

    For moments: who comes second waits. Where files cannot be locked, nobody does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, descriptor = folder / NAME, None
    with suppress(OSError):  # what it is about is claimed next, which says that it cannot be locked
        while (descriptor := _take(lock)) is None:
            time.sleep(PAUSE)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)


def _take(path: Path) -> int | None:
    """The descriptor of a lock that is now this process's; None if another one has it.

    A lock file goes when it is released, so one that is no longer at its path was taken too late and counts for
    nothing: whoever comes next makes another.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor):
                os.close(descriptor)
                return None
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
