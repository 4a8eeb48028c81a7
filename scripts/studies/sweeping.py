"""Runs that a script lists, as one sweep of train.py: what has ended is skipped, what was cut off is resumed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.loop.signals import CTRL_C, REQUEUE, Interrupted, StopSignals, requested
from training.runs.folder import RunFolder, atomic_file, unwritable
from training.runs.resume import sweep_folder
from training.settings.composition import Sweep, prepare

#: How a run is said to be that has no summary.
UNFINISHED = "unfinished"
#: Seconds between two looks at runs that another process trains, on another machine perhaps; and until they are
#: launched again, since that process may have died.
PAUSE, AGAIN = 5.0, 60.0


@dataclass(frozen=True)
class Sweeping:
    """Runs lists of overrides as sweeps of one name, so that all runs lie in one folder.

    Attributes:
        name: of the sweep.
        folder: of its runs, and of the lists.
        shared: overrides that all runs have, and what is said of the sweep: `workers=2`, `hydra/launcher=slurm`.
        flags: of train.py: `--config-dir DIR`.
    """

    name: str
    folder: Path
    shared: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def run(self, rows: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """The summaries of runs, each with its `folder`, in their order; those that have none are `unfinished`.

        Args:
            rows: the overrides of each run beyond those that are shared.

        Raises:
            Interrupted: a signal asked to stop; all that ran has been saved.
            UserError: the sweep is refused.
        """
        import train

        text = "".join(f"{json.dumps([*row])}\n" for row in rows).encode()
        path = self.folder / f"runs_{hashlib.sha256(text).hexdigest()[:8]}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(text)
        except OSError as error:
            raise UserError(unwritable(self.folder, error)) from error
        command = [*self.flags, "-m", f"runs={path}", *self.shared, f"name={self.name}"]
        sweep = prepare(command)
        assert isinstance(sweep, Sweep)
        while True:
            code = train.main(command)
            if code in (CTRL_C, REQUEUE):
                raise Interrupted("Interrupted: what ran is saved, and the same command goes on.", code)
            found = self._found(sweep)
            if code or not (others := _unfinished(found)):
                return found
            print(f"{others} of these runs are trained by another process: waiting for them", flush=True)
            until = time.monotonic() + AGAIN
            while time.monotonic() < until and _unfinished(found):
                with StopSignals(command=True):
                    time.sleep(PAUSE)
                    if signal := requested():
                        raise Interrupted("Interrupted: the same command goes on.", signal)
                found = self._found(sweep)

    @staticmethod
    def _found(sweep: Sweep) -> list[dict[str, Any]]:
        """What became of a sweep's runs."""
        found = []
        for index in range(len(sweep.commands)):
            try:
                place = sweep_folder(sweep.job(index))
            except UserError as error:  # two of its values are wrong together, of which the sweep has told
                found.append({"status": "failed", "error": str(error)})
                continue
            summary = RunFolder(place).read_summary() if place.is_dir() else None
            found.append({**(summary or {"status": UNFINISHED}), "folder": str(place)})
        return found


def _unfinished(found: Sequence[dict[str, Any]]) -> int:
    return sum(summary["status"] == UNFINISHED for summary in found)
