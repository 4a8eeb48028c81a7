"""The folder of one run, and the one way its files are replaced: whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from training.errors import UserError

#: Bytes that file systems let a name have.
LONGEST = 255
#: In a sweep's folder: the labels of the jobs that its last launch has to run, and what became of them elsewhere.
PLAN = "sweep.json"
#: What to do about a file that cannot be written, by why it cannot.
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "see to it that this user may write there"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "its folder was moved or deleted: put it back"),
}

log = logging.getLogger(__name__)


class WriteError(UserError, OSError):
    """Something of a run could not be written: the disk is full, the folder read-only or gone. Built as an OSError."""

    def __str__(self) -> str:
        advice = ADVICE.get(self.errno or 0, "see to its disk")
        return f"{self.filename} cannot be written ({self.strerror}): {advice}, and resume the run."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, what the system says against writing is a sentence about ``path``.

    Raises:
        WriteError: in place of any other ``OSError``.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes ``path``'s place when the block ends, and leaves no trace if it raises.

    Whoever reads ``path``, whenever the process or the machine stops, sees the old file or the new one.

    Yields:
        The file, which has another name until then.

    Raises:
        WriteError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):  # a folder that is gone or read-only now: what went wrong first is what is told
                temporary.unlink(missing_ok=True)
            raise


def _write(descriptor: int, content: bytes) -> None:
    """Write all of it, unless the file was deleted: it would grow on unseen."""
    if os.fstat(descriptor).st_nlink == 0:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


class Record:
    """A file that only grows, line by line or record by record, and can be cut back to where it was once.

    What is appended is on its way to the disk at once and whole: of what does not fit, nothing stays.

    Args:
        path: of the file, which is made if it is missing.
        size: where it is to end; None: where it does.

    Raises:
        WriteError: it cannot be written.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        with writing(path):
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            self.size = end if size is None else min(size, end)
            self._cut()

    def _cut(self) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, self.size)
        os.lseek(self._descriptor, self.size, os.SEEK_SET)

    def cut(self, size: int) -> None:
        """Forget all beyond ``size`` bytes.

        Raises:
            WriteError: it cannot be written.
        """
        self.size = min(size, self.size)
        with writing(self.path):
            self._cut()

    def append(self, content: bytes) -> None:
        """Add to the end, whole or not at all.

        Raises:
            WriteError: the disk is full, or the file was deleted.
        """
        assert self._descriptor is not None
        with writing(self.path):
            before, self.size = self.size, self.size + len(content)
            try:
                _write(self._descriptor, content)
            except BaseException:
                self.size = before
                with suppress(OSError):
                    self._cut()
                raise

    def read(self) -> bytes:
        """All of it."""
        return self.path.read_bytes()

    def sync(self) -> None:
        """Make it last through a power cut."""
        assert self._descriptor is not None
        with writing(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder last through a power cut, where the system can."""
    if os.name == "posix":  # Windows has no file descriptors of folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def plain(value: Any) -> Any:
    """``value`` as strict JSON can hold it: NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def file_name(text: str, longest: int = LONGEST) -> str:
    """``text`` without characters that mean something to a shell, a file system or Hydra's grammar, and not too long.

    Args:
        text: what the name is to say.
        longest: bytes that the name may have.
    """
    return shortened(re.sub(r"[^\w.+-]+", "-", text).strip("-._ ") or "run", longest)


def label_name(label: str) -> str:
    """How the name of a sweep's job's folder begins, by the job's label; ``_`` and its id follow."""
    return file_name(label[:120], LONGEST - 9)


def shortened(name: str, longest: int = LONGEST) -> str:
    """``name``, or as much of it as fits into so many bytes with eight digits that tell it from others."""
    coded = name.encode()
    if len(coded) <= longest:
        return name
    return f"{coded[: longest - 9].decode(errors='ignore')}-{hashlib.sha256(coded).hexdigest()[:8]}"


def exists(path: Path) -> bool:
    """Whether something is at a path, which text that is too long for one is not."""
    try:
        return path.exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def unwritable(path: Path, error: OSError) -> str:
    """The sentence about a folder that cannot be written."""
    place = "set paths.runs, or of a sweep paths.sweeps, to one that can"
    return f"The run folder {path} cannot be written ({error.strerror}): {place}."


class RunFolder:
    """What one run leaves behind.

    ``config.yaml``, ``metrics.jsonl``, ``summary.json``, ``train.log``, ``tensorboard/``, ``checkpoints/``, pictures.

    Attributes:
        path: the folder.
        config_file: the resolved configuration.
        metrics_file: one JSON object a line, an event each.
        summary_file: how the run ended; absent while it runs.
        log_file: what happened, in words.
        tensorboard: folder of event files.
        checkpoints: folder of ``step_*.pt``, of ``best.pt``, and of ``best_*.pt``, the best by an earlier step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.log_file = path / "train.log"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path, config_yaml: str) -> RunFolder:
        """A new folder: see ``make`` and ``fill``."""
        return cls.fill(cls.make(path), config_yaml)

    @staticmethod
    def make(path: Path) -> Path:
        """Make an empty folder; a name that is taken gets -2, -3, ... appended.

        Args:
            path: the wished-for folder.

        Returns:
            The folder that was made.

        Raises:
            UserError: where it cannot be.
        """
        wished, number = path, 1
        try:
            wished.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    path.mkdir()  # fails where another process was first: no two runs share a folder
                    return path
                except FileExistsError:
                    number += 1
                    path = wished.with_name(f"{wished.name}-{number}")
        except OSError as error:
            raise UserError(unwritable(path, error)) from error

    @classmethod
    def fill(cls, path: Path, config_yaml: str) -> RunFolder:
        """Make a folder a run's.

        Args:
            path: a folder that holds nothing of a run.
            config_yaml: text of ``config.yaml``.

        Raises:
            UserError: where it cannot be written.
        """
        folder = cls(path)
        try:
            folder.checkpoints.mkdir(exist_ok=True)
            with atomic_file(folder.config_file) as file:
                file.write(config_yaml.encode())
        except OSError as error:
            with suppress(OSError):  # an empty folder goes with its claim
                folder.checkpoints.rmdir()
            raise UserError(unwritable(path, error)) from error
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing folder, to resume.

        Raises:
            UserError: if it is not a run folder.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            raise UserError(f"{path} is not a run folder (it has no config.yaml): give the folder that train.py wrote.")
        with writing(folder.checkpoints):
            folder.checkpoints.mkdir(exist_ok=True)
        return folder

    def require_writable(self) -> None:
        """See to it before a run begins that it can write what it will write.

        Raises:
            WriteError: into one of its folders, or one of its files, it cannot.
        """
        with writing(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)
        for place in filter(Path.is_dir, (self.path, self.checkpoints, self.tensorboard)):
            with writing(place):
                probe = place / f".writable.{os.getpid()}.tmp"
                try:
                    probe.write_bytes(b".")
                finally:
                    probe.unlink(missing_ok=True)
        for file in (self.config_file, self.metrics_file, self.summary_file, self.log_file):
            if file.exists():
                with writing(file), file.open("r+b"):
                    pass

    def read_summary(self) -> dict[str, Any] | None:
        """The summary; None while there is none, or with a warning if it is damaged: then the end is to be made anew.

        Raises:
            UserError: it is there and cannot be read.
        """
        try:
            summary = json.loads(self.summary_file.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{self.summary_file} cannot be read ({error.strerror}): see to it that it can, or delete it"
            ) from error
        except ValueError:  # no JSON, no text
            summary = None
        if not isinstance(summary, dict):
            log.warning("%s is damaged: what it said is made anew.", self.summary_file)
            return None
        return summary

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` atomically.

        Raises:
            WriteError: it cannot be written.
        """
        with atomic_file(self.summary_file) as file:
            file.write((json.dumps(plain(summary), indent=2, allow_nan=False) + "\n").encode())
