"""Fetching what is published: one process at a time, with an end to waiting, and every failure in one sentence."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from textwrap import shorten

from filelock import FileLock

from data.base import DataError

SILENCE = 20.0  # seconds without a byte after which a download is given up

# What torchvision raises where a set is absent (RuntimeError), cut short, or out of reach.
UNLOADABLE = (RuntimeError, OSError, AssertionError, ValueError, EOFError, HTTPException)
UNREACHABLE = (OSError, HTTPException, ValueError)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Within it, this is the one process of all that fetches into a folder, and a silent server raises."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    lock = root / ".lock"
    try:
        with FileLock(lock), _socket_timeout(SILENCE):
            yield
    except BaseException:  # what was refused leaves nothing: no lock, and no folder that is empty
        with suppress(OSError):
            lock.unlink()
        inner = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True) if made else []
        for folder in (*inner, *made):
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def reason(error: Exception) -> str:
    """Why something failed, short enough for a sentence."""
    return shorten(str(error), 120)


def fetch_file(path: Path, url: str, download: bool, way_out: str, digest: str | None = None) -> None:
    """See that a published file is there; one process at a time downloads it.

    Args:
        path: where it belongs.
        url: its address.
        download: fetch it if it is not there.
        way_out: what users can do in its place.
        digest: see ``retrieve``.

    Raises:
        DataError: it is not there and is not or cannot be fetched.
    """
    if path.is_file():
        return
    absent, by_hand = f"{path.absolute()} is absent", f"put it there from {url}"
    if not download:
        raise DataError(f"{absent}: {by_hand}, set dataset.download=true, or use {way_out}")
    try:
        with alone(path.parent):
            if not path.is_file():  # no other rank or run has fetched it meanwhile
                retrieve(path, [url], digest)
    except UNREACHABLE as error:
        raise DataError(f"{absent} and cannot be downloaded ({reason(error)}): {by_hand}, or use {way_out}") from error


def fetch_archive(
    name: str, root: Path, find: Callable[[], Path | None], url: str, md5: str, download: bool
) -> Path:
    """The folder of a published set, fetched and unpacked if it is not there (by one process at a time).

    Args:
        name: of the set, for the sentences.
        root: where to unpack it.
        find: tells where its folder lies, or None.
        url: of the archive, a zip file.
        md5: of the archive.
        download: fetch it if it is not there.

    Raises:
        DataError: it is not there and is not or cannot be fetched.
    """
    if found := find():
        return found
    absent = f"{name} is absent from {root.absolute()}"
    ways_out = f"put its files there ({url} unpacked), or name another folder with dataset.root"
    if not download:
        raise DataError(f"{absent}: set dataset.download=true, {ways_out}")
    try:
        with alone(root):
            if not find():  # no other rank or run has fetched it meanwhile
                retrieve_archive(root, [url], f"md5:{md5}")
    except UNREACHABLE as error:
        raise DataError(f"{absent} and cannot be downloaded ({reason(error)}): {ways_out}") from error
    if found := find():
        return found
    raise DataError(f"{absent}, and the archive that was downloaded does not hold it: {ways_out}")


def retrieve(path: Path, urls: Sequence[str], digest: str | None = None) -> None:
    """Bring a file from the first address that has it: whole, checked, and under its name only then.

    Args:
        path: where it belongs; what is there is replaced.
        urls: its addresses, tried in turn. Without a digest they are ``https``, which a redirection may not leave.
        digest: of the content, ``md5:...`` or ``sha256:...``; None: none is published, so the length alone is checked.

    Raises:
        OSError: no address has it, and why the last one has not.
    """
    partial = path.with_name(f".{path.name}.part")
    why: Exception = OSError("there is no address")
    for url in urls:
        try:
            _receive(partial, url, digest)
            partial.replace(path)
            _sync(path.parent)
            return
        except UNREACHABLE as error:
            why = error
        finally:
            partial.unlink(missing_ok=True)
    raise OSError(reason(why)) from why


def retrieve_archive(root: Path, urls: Sequence[str], digest: str) -> None:
    """Bring a zip file and unpack it, so that a folder of the set is there whole or not at all.

    An archive that lies in the folder, whole, is not fetched again; it is removed in the end.

    Args:
        root: where to unpack it.
        urls: see ``retrieve``; their last part is the archive's name.
        digest: see ``retrieve``.

    Raises:
        OSError: see ``retrieve``; or it is no zip file, or holds a file that would lie outside of the folder.
    """
    archive = root / urls[0].rpartition("/")[2]
    if not archive.is_file() or digest_of(archive, digest) != digest:
        retrieve(archive, urls, digest)
    unpacked = root / f".{archive.name}.unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a process that was killed
    try:
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                    raise OSError(f"the archive has a member {name!r} outside of its folder")
            packed.extractall(unpacked)
        for entry in sorted(unpacked.iterdir()):
            _move(entry, root / entry.name)
    except zipfile.BadZipFile as error:
        raise OSError(f"{archive.name} is no zip file: {error}") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()


def _receive(target: Path, url: str, digest: str | None) -> None:
    """Write what an address has to a file, and see that it is what was published."""
    if digest is None and url.startswith("http:"):
        raise OSError(f"{url} is not https and there is no checksum, so anybody could have written what comes")
    with urllib.request.urlopen(url, timeout=SILENCE) as answer, target.open("wb") as file:
        if digest is None and url.startswith("https:") and not answer.url.startswith("https:"):
            raise OSError(f"{url} leads to {answer.url}, which is not https")
        said = answer.headers.get("Content-Length")
        got = 0
        while block := answer.read(1 << 20):
            got += file.write(block)
            _show(target.name[1 : -len(".part")], got, said)
        if said is not None and got != int(said):
            raise OSError(f"the connection broke off after {got} of {said} bytes")
        if said is None and digest is None:
            raise OSError("the server does not say how long the file is, and there is no checksum")
        file.flush()
        os.fsync(file.fileno())
    if digest is not None and (found := digest_of(target, digest)) != digest:
        raise OSError(f"what came has the checksum {found}, not {digest}")


def _show(name: str, got: int, said: str | None) -> None:
    """How far a download is, in one line of a terminal."""
    if sys.stderr.isatty():
        whole = f" of {int(said) / 1e6:.1f}" if said else ""
        sys.stderr.write(f"\r{name}: {got / 1e6:.1f}{whole} MB{chr(10) if said and got == int(said) else ''}")
        sys.stderr.flush()


def digest_of(path: Path, like: str) -> str:
    """The digest of a file, ``kind:hexadecimal``.

    Args:
        path: the file.
        like: another one of the kind that is wanted, ``md5:...`` or ``sha256:...``.
    """
    kind = like.partition(":")[0]
    found = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return f"{kind}:{found.hexdigest()}"


def _move(source: Path, target: Path) -> None:
    """Bring what was unpacked to its place: a folder at once, or file by file into one that is there."""
    if source.is_dir() and target.is_dir():
        for entry in sorted(source.iterdir()):
            _move(entry, target / entry.name)
    else:
        source.replace(target)


def _sync(folder: Path) -> None:
    """Make a new name last through a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
