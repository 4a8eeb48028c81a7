"""The folder of one run, and the one way its files are replaced: whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from training.errors import UserError

#: Bytes that file systems let a name have.
LONGEST = 255


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes ``path``'s place when the block ends, and leaves no trace if it raises.

    Whoever reads ``path``, whenever the process or the machine stops, sees the old file or the new one.

    Yields:
        The file, which has another name until then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
    return f"The run folder {path} cannot be written ({error.strerror}): set paths.runs to one that can."


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
        checkpoints: folder of ``step_*.pt`` and ``best.pt``.
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
        folder.checkpoints.mkdir(exist_ok=True)
        return folder

    def read_summary(self) -> dict[str, Any] | None:
        """The summary, or None while there is none."""
        return json.loads(self.summary_file.read_text()) if self.summary_file.exists() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json`` atomically."""
        with atomic_file(self.summary_file) as file:
            file.write((json.dumps(plain(summary), indent=2, allow_nan=False) + "\n").encode())
