"""Who may write in a folder: a claim is held until it is released or its process ends, however that ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".lock"
#: Beside the lock, which only processes of this machine or of a good network file system see: who holds it, touched
#: every so many seconds as long as that process lives.
SIGN, BEAT = ".status.json", 10.0
#: Seconds between two looks at a lock that another process holds for a moment.
PAUSE = 0.01

log = logging.getLogger(__name__)

# Folders that this process has claimed, with the descriptors of their locks; None where they cannot be locked.
_held: dict[Path, int | None] = {}
# What their signs say.
_facts: dict[str, Any] = {}
_heart: threading.Thread | None = None


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
        _show()
        return True
    if descriptor is None:
        return False
    _held[folder] = descriptor
    for place in (folder, folder / "checkpoints"):
        for left in place.glob(".*.tmp"):
            left.unlink(missing_ok=True)
    _show()
    return True


def describe(**facts: Any) -> None:
    """Say more of who has claimed a folder: on which device, with how many processes.

    Args:
        facts: plain values.
    """
    _facts.update(facts)
    _show()


def namespace() -> str:
    """What process ids are ids of: this machine, or a container on it."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def release() -> None:
    """Let others have every folder that this process has claimed; one that stayed empty goes with its claim."""
    while _held:
        folder, descriptor = _held.popitem()
        with suppress(OSError):
            (folder / SIGN).unlink()
        if descriptor is None:
            continue
        lock = folder / NAME
        with suppress(OSError):  # a folder that was moved or deleted, or Windows, which keeps what is open
            lock.unlink()
        with suppress(OSError):  # whatever a run left in it
            folder.rmdir()
        os.close(descriptor)
    _facts.clear()


def _show() -> None:
    """Write the signs of what is held, and keep them alive. Where that cannot be, training says so, not this."""
    global _heart
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "namespace": namespace(), **_facts})
    for folder in _held:
        temporary = folder / f".sign.{os.getpid()}.tmp"
        with suppress(OSError):
            temporary.write_text(text + "\n")
            temporary.replace(folder / SIGN)
        with suppress(OSError):  # what a full disk has left of it
            temporary.unlink(missing_ok=True)
    if _heart is None or not _heart.is_alive():
        _heart = threading.Thread(target=_beat, name="heartbeat", daemon=True)
        _heart.start()


def _beat() -> None:
    while True:
        time.sleep(BEAT)
        for folder in [*_held]:
            with suppress(OSError):
                os.utime(folder / SIGN)


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
