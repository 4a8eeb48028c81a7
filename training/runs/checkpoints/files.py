"""Checkpoint files: written whole or not at all, verified when read, rotated and set aside."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from training.errors import UserError
from training.runs.folder import atomic_file, sync_folder, writing

#: Raised whenever what a checkpoint holds changes its meaning.
FORMAT = 1
# The comment that ends the file, which is a zip archive: the checksum of all before it.
SEAL = b"curvlab crc32 %08x"
SEALED = rb"curvlab crc32 ([0-9a-f]{8})"
SEAL_LENGTH = len(SEAL % 0)
LENGTH_BYTES = 2  # in which an archive says, just before its comment, how long that is

log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be used, and why."""


class UnreadableError(CheckpointError):
    """A checkpoint that may well be whole, but cannot be read: nothing is to be built on its being damaged."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file to make or replace.
        state: tensors, primitives and containers of them.
    """
    with atomic_file(path) as file:
        sealed = _Sealed(file)
        try:
            torch.save({**state, "sealed": True}, sealed)  # type: ignore[arg-type]
        except RuntimeError as error:  # what torch makes of a write that failed
            raise sealed.failure or error from error
        sealed.close()


class _Sealed:
    """A file that torch writes a zip archive to, which then gets a comment: the checksum of all that is before it.

    Args:
        file: to write to.

    Attributes:
        failure: what the system said against writing, which torch does not pass on.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sum = file, 0
        self._held = b""  # the last bytes, which say how long the archive's comment is
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        """See BinaryIO."""
        given = memoryview(content).cast("B")
        whole = given if len(given) > LENGTH_BYTES else memoryview(self._held + bytes(given))
        if whole is given:
            self._put(self._held)
        self._put(whole[:-LENGTH_BYTES])
        self._held = bytes(whole[-LENGTH_BYTES:])
        return len(given)

    def _put(self, content: Any) -> None:
        try:
            self._file.write(content)
        except OSError as error:
            self.failure = error
            raise
        self._sum = zlib.crc32(content, self._sum)

    def flush(self) -> None:
        """See BinaryIO."""

    def close(self) -> None:
        """Write the comment."""
        self._put(SEAL_LENGTH.to_bytes(LENGTH_BYTES, "little"))
        self._file.write(SEAL % self._sum)


def link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, atomically and without writing it again where the disk has links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with writing(target):
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            with source.open("rb") as read, atomic_file(target) as write:
                shutil.copyfileobj(read, write)
            return
        temporary.replace(target)
        sync_folder(target.parent)
        temporary.unlink(missing_ok=True)  # rename does nothing where both are the same file already


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint after checking every byte of it against its checksums.

    Args:
        path: a file that ``save`` wrote.

    Returns:
        The state, on the CPU.

    Raises:
        CheckpointError: where there is none, it is damaged, or it is none of ours.
        UnreadableError: the system does not let it be read.
    """
    try:
        sealed = _is_sealed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder, where a checkpoint belongs: use an earlier one.") from error
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise UnreadableError(f"The checkpoint {path} cannot be read ({why}): see to it that it can.") from error
    except pickle.UnpicklingError as error:  # with every checksum right
        raise CheckpointError(
            f"{path} holds other objects than tensors and is not a checkpoint of a Curvlab run: give a file of its "
            "checkpoints/ folder."
        ) from error
    except Exception as error:  # whatever the bytes of a damaged file lead a reader to
        raise CheckpointError(_damaged(path, (str(error).splitlines() or [type(error).__name__])[0])) from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of a Curvlab run: give a file of its checkpoints/ folder.")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}: use the one that wrote it."
        )
    if state.pop("sealed", False) and not sealed:
        raise CheckpointError(_damaged(path, "its checksum is missing"))
    return state


def _damaged(path: Path, why: str) -> str:
    return f"The checkpoint {path} is damaged ({why}): use an earlier one."


def _is_sealed(path: Path) -> bool:
    """Whether a file ends in a checksum, which is then right; one of earlier versions has those of its archive alone.

    Raises:
        CheckpointError: a checksum is wrong.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - SEAL_LENGTH
        file.seek(max(end, 0))
        seal = re.fullmatch(SEALED, file.read())
        if seal is not None:
            file.seek(0)
            found, left = 0, end
            while left > 0 and (part := file.read(min(left, 1 << 22))):
                found, left = zlib.crc32(part, found), left - len(part)
            if left > 0 or found != int(seal[1], 16):
                raise CheckpointError(_damaged(path, "checksum of the whole file"))
            return True
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise CheckpointError(_damaged(path, f"checksum of {broken!r}"))
    return False


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return folder / f"step_{step:08d}.pt"


def best_file(folder: Path, step: int | None = None) -> Path:
    """Where the best weights are; ``step``: those of that step, kept because a step checkpoint speaks of them."""
    return folder / ("best.pt" if step is None else f"best_{step:08d}.pt")


def steps(folder: Path, kind: str = "step") -> list[tuple[int, Path]]:
    """(step, path) of the step checkpoints, or of the kept best weights, newest first."""
    found = ((re.fullmatch(rf"{kind}_(\d+)\.pt", p.name), p) for p in folder.glob(f"{kind}_*.pt"))
    return sorted(((int(m[1]), p) for m, p in found if m), reverse=True)


def latest(folder: Path, parts: Iterable[str] = ()) -> tuple[Path, dict[str, Any]] | None:
    """The newest step checkpoint that is whole, with its state; a warning for each damaged one passed over.

    Args:
        folder: a run's ``checkpoints`` folder.
        parts: keys that a whole one has.

    Raises:
        UnreadableError: one may well be whole, but the system does not let it be read.
    """
    for _, path in steps(folder):
        try:
            state = load(path)
            require(state, parts, path)
            return path, state
        except UnreadableError:
            raise
        except CheckpointError as error:
            log.warning("%s Trying the one before.", error)
    return None


def require(state: Mapping[str, Any], parts: Iterable[str], path: Path) -> None:
    """See to it that a checkpoint has its parts.

    Raises:
        CheckpointError: one is missing.
    """
    if missing := [part for part in parts if part not in state]:
        raise CheckpointError(f"The checkpoint {path} lacks {missing[0]!r}: use an earlier one.")


def set_aside(folder: Path, step: int) -> None:
    """Rename what a run that is taken back to ``step`` has left of later steps, so that nothing counts it any longer.

    It is deleted by ``rotate``, once a checkpoint of the new course has been written.
    """
    for at, path in (*steps(folder), *steps(folder, "best")):
        if at > step or path.is_dir():
            put_aside(path)


def put_aside(path: Path) -> None:
    """Rename a file, or a folder in its place, so that nothing takes it for a checkpoint; see ``set_aside``."""
    aside = path.with_name(f"{path.name}.aside")
    with writing(path):
        for number in itertools.count(2):
            if not aside.is_dir():
                break
            aside = path.with_name(f"{path.name}-{number}.aside")
        path.replace(aside)


def rotate(
    folder: Path,
    keep: int,
    newest: int | None = None,
    best: int | None = None,
    aside: bool = True,
    planned: Callable[[int], bool] | None = None,
) -> None:
    """Delete step checkpoints beyond the ``keep`` newest, and what a killed process left half-written.

    Only after a checkpoint was written: what could not be written costs nothing that was there.

    Args:
        folder: a run's ``checkpoints`` folder.
        keep: how many stay.
        newest: the step just saved. Later ones belong to a past that the run was taken back from (broken files, or a
            resume from an earlier checkpoint) and are deleted too.
        best: step of the best weights so far. Those that an earlier checkpoint knew as the best stay as long as it.
        aside: whether what was set aside goes, too.
        planned: whether a checkpoint of a step is one that no signal has asked for; of the others the newest alone
            stays, so that a run that was stopped leaves what one leaves that was not. None: all are.
    """
    ours = steps(folder)
    past = [(step, p) for step, p in ours if newest is None or step <= newest]
    kept = past[:1] + [entry for entry in past[1:] if planned is None or planned(entry[0])][: keep - 1]
    bests = steps(folder, "best")
    known = {step for step, _ in bests} | ({best} if best is not None else set())
    spoken_of = {max((at for at in known if at <= step), default=None) for step, _ in kept}
    dead = [entry for entry in ours if entry not in kept] + [entry for entry in bests if entry[0] not in spoken_of]
    forgotten = folder.glob("*.aside") if aside else ()
    for path in (*(p for _, p in dead), *forgotten, *folder.glob(".*.pt.*.tmp")):
        if not path.is_dir():
            path.unlink(missing_ok=True)
