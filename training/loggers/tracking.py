"""What the loggers for other people's trackers have in common: their packages are imported when a run begins."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

from training.errors import UserError
from training.loggers.values import HEADER
from training.runs.run import Logger, Run


class Tracker(Logger):
    """A logger that writes into another program's records, and goes on in the same record when a run is resumed.

    These cannot be taken back: what a resumed run repeats since its checkpoint is there twice, with the same values.

    Attributes:
        name: of its file under ``configs/logger``.
        package: what it needs.
        module: that the package is imported by.

    Raises:
        UserError: the package is not installed.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]

    def __init__(self) -> None:
        if importlib.util.find_spec(self.module) is None:
            raise UserError(f"logger={self.name} needs a package that is not installed: pip install {self.package}")
        self._id: str | None = None
        self._finished = False

    @staticmethod
    def title(run: Run) -> str:
        """What the run is called: what is compared with it shares the beginning."""
        path = run.folder.path.absolute()
        return f"{path.parent.name}/{path.name}"

    @staticmethod
    def values(record: dict[str, Any]) -> dict[str, float]:
        """The metrics of an event."""
        return {name: value for name, value in record.items() if name not in HEADER and isinstance(value, (int, float))}

    @staticmethod
    def results(summary: dict[str, Any]) -> dict[str, float]:
        """The single values that a run came to: ``best/val/accuracy``, ``seconds/training``, ``parameters``, ..."""
        found = {name: summary[name] for name in ("steps", "epochs", "parameters")}
        found |= {f"seconds/{name}": value for name, value in summary["seconds"].items()}
        for which, short in (("final", "last"), ("best", "best")):
            found |= {f"{short}/{name}": value for name, value in (summary[which] or {}).items() if "/" in name}
        return {name: value for name, value in found.items() if isinstance(value, (int, float))}

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """See Logger."""
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        """See Logger."""
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Logger."""
        self._id = state["id"]
