"""`verdict.json`: what a verdict was asked for, what was measured and chosen; launched again, it goes on from there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.pace import Pace
from training.errors import UserError
from training.runs.folder import atomic_file, plain

FILE = "verdict.json"
VERSION = 1


@dataclass
class State:
    """A verdict, as far as it has come.

    Attributes:
        folder: where it lives.
        asked: all that decides what is run; another value is another verdict.
        command: the line that asked for it.
        threads: of torch in each run, the same whatever the number of workers.
        metric: of the validation set, which decides: val/accuracy, ...
        higher: whether more of it is better.
        paces: by arm, as first measured; {} before.
        tuning: seconds and rungs of each arm.
        final: seconds of each final run, and their steps by arm.
        choices: by arm, once it is tuned.
        target: of the metric, whose time is told; None: the report finds one.
    """

    folder: Path
    asked: dict[str, Any]
    command: str = ""
    threads: int = 1
    metric: str = ""
    higher: bool = False
    paces: dict[str, Pace] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    target: float | None = None

    @classmethod
    def open(cls, folder: Path, asked: dict[str, Any], command: str, threads: int) -> State:
        """The verdict of a folder: a new one, or that which it holds.

        Args:
            folder: of the verdict; it need not exist.
            asked: all that decides what is run.
            command: the line that asks for it.
            threads: of each run, if it is new.

        Raises:
            UserError: the folder holds another verdict, or its file is damaged.
        """
        path, now = folder / FILE, json.loads(json.dumps(asked))
        if not path.exists():
            return cls(folder, now, command, threads)
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["version"] != VERSION:
                raise UserError(f"{path} is of another version of this program: give another name")
            paces = {name: Pace(**pace) for name, pace in read["measured"].items()}
            kept = {
                key: read[key]
                for key in ("command", "threads", "metric", "higher", "tuning", "final", "choices", "target")
            }
            before = read["asked"]
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: give another name, or delete the folder") from error
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                was, new = (json.dumps(one.get(key)) for one in (before, now))
                raise UserError(
                    f"{folder} holds a verdict with {key}={was}, and {key}={new} is asked for: give name=ANOTHER, or "
                    "the command that it was begun with"
                )
        return cls(folder=folder, asked=before, paces=paces, **kept)

    def save(self) -> None:
        """Write `verdict.json`.

        Raises:
            WriteError: it cannot be written.
        """
        unit = next(iter(self.paces.values()), None)
        unit = self.paces.get("sgd", unit)
        content = {
            "version": VERSION,
            "command": self.command,
            "asked": self.asked,
            "optimizers": [*self.paces],
            "budget": self.asked.get("budget"),
            "metric": self.metric,
            "higher": self.higher,
            "test_metric": self.metric.replace("val/", "test/", 1),
            "seeds": self.asked.get("seeds"),
            "threads": self.threads,
            "measured": {name: asdict(pace) for name, pace in self.paces.items()},
            "pace": {
                name: {
                    "seconds": pace.seconds, "low": pace.low, "high": pace.high, "memory": pace.state,
                    "ratio": pace.seconds / unit.seconds if unit else None,
                }
                for name, pace in self.paces.items()
            },
            "tuning": self.tuning,
            "final": self.final,
            "choices": self.choices,
            "target": self.target,
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / FILE) as file:
            file.write((json.dumps(plain(content), indent=1) + "\n").encode())
