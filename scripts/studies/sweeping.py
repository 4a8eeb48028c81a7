"""Runs that a script lists, as one sweep of train.py: what has ended is skipped, what was cut off is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.loop.signals import CTRL_C, REQUEUE, Interrupted
from training.runs.folder import RunFolder, atomic_file, unwritable
from training.runs.resume import sweep_folder
from training.settings.composition import Sweep, prepare


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
        code = train.main(command)
        if code in (CTRL_C, REQUEUE):
            raise Interrupted("Interrupted: what ran is saved, and the same command goes on.", code)
        found = []
        for index in range(len(rows)):
            try:
                place = sweep_folder(sweep.job(index))
            except UserError as error:  # two of its values are wrong together, of which the sweep has told
                found.append({"status": "failed", "error": str(error)})
                continue
            summary = RunFolder(place).read_summary() if place.is_dir() else None
            found.append({**(summary or {"status": "unfinished"}), "folder": str(place)})
        return found
