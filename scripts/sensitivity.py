"""How sensitive optimizers are to two of their values: a sweep over a grid, a heat map an optimizer, and octaves.

    python scripts/sensitivity.py optimizers=[sgd,adam,kfac] model=mlp experiment=digits_mlp trainer.max_epochs=5
    python scripts/sensitivity.py optimizers=[kfac,ekfac] x=optimizer.lr:2^-4..2^4 y=optimizer.kl_clip:1e-4,1e-3,1e-2
    python scripts/sensitivity.py multirun/NAME                                   # of runs that are there

The runs are sweeps of train.py, multirun/NAME/OPTIMIZER: launched again, what has ended is skipped and what was cut off
is resumed. What is not named below goes to train.py as it is: seed=0,1,2 takes means over seeds, workers=2 trains two
runs at a time. An optimizer that has no such value as y gets a strip of x alone.

    optimizers=[...]  files of configs/optimizer (default: sgd, adam, kfac)
    x=KEY:VALUES      2^-4..2^4: multiples of what each optimizer is configured with, by powers (2^-4..2^4/2: every
                      second one); 0.1,0.2,...: the values (default: optimizer.lr:2^-4..2^4)
    y=KEY:VALUES      likewise (default: optimizer.damping:2^-4..2^4/2); null: no second key. Of runs that are there,
                      x and y are keys alone (default: what varies)
    metric=...        at the end of a run: val/accuracy, train/loss, ... (default: that which chooses the best weights)
    within=0.02       how much worse than the best still counts: points of accuracy, or share of the loss
    name=NAME         of the sweep (default: sensitivity_MODEL_DATASET)
    out=FOLDER        of sensitivity.png, sensitivity.md (default: the sweep's)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from rich.console import Console

from analysis import compare, sensitivity
from analysis.sensitivity import Axis
from scripts import Parser
from training.errors import UserError, did_you_mean
from training.loop.signals import CTRL_C, REQUEUE
from training.runs.folder import atomic_file
from training.settings.composition import CONFIG_FOLDER, compose

#: What a grid is over unless it is said.
X, Y = "optimizer.lr:2^-4..2^4", "optimizer.damping:2^-4..2^4/2"
OWN = ("optimizers", "x", "y", "metric", "within", "out", "name")


@dataclass
class Choices:
    """What the command line says; see this file's beginning."""

    given: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)

    @property
    def near(self) -> float:
        """How much worse than the best still counts."""
        text = self.given.get("within", str(sensitivity.NEAR))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1:
            raise UserError(f"within must be a share in [0, 1), such as 0.02, got {text}")
        return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        choices = _choices(argv)
        code = 0
        if choices.folders:
            if choices.rest:
                raise UserError(f"{choices.rest[0]} is for new runs: give a folder of runs, or what to run, not both")
            folder = Path(choices.folders[0])
        else:
            folder, code = _sweep(choices)
        if code not in (CTRL_C, REQUEUE) and (folder.is_dir() or not code):  # what was refused has been told of
            _show(choices, folder)
    except (ValueError, UserError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return code


def _sweep(choices: Choices) -> tuple[Path, int]:
    """Run what is missing; the folder of all sweeps, and the exit code."""
    import train

    names = [name for name in choices.given.get("optimizers", "[sgd,adam,kfac]").strip("[]").split(",") if name]
    if not names:
        raise UserError("optimizers is empty: give some, optimizers=[sgd,kfac]")
    known = sorted(path.stem for path in (CONFIG_FOLDER / "optimizer").glob("*.yaml"))
    for name in names:
        if name not in known:
            raise UserError(f"optimizers has no {name!r}{did_you_mean(name, known)}")
    if (metric := choices.given.get("metric")) and not re.fullmatch(r"(train|val|test)/\w+", metric):
        raise UserError(f"metric must be of a split, such as val/accuracy or train/loss, got {metric}")
    x = Axis.parse(choices.given.get("x", X), "x")
    y = None if choices.given.get("y") == "null" else Axis.parse(choices.given.get("y", Y), "y")
    # Lists of values are for seeds and their like; what they have in common is composed.
    fixed = [text for text in choices.rest if text.partition("=")[0] not in ("seed", "workers")]
    commands, folder = [], Path()
    for name in names:
        run = compose([f"optimizer={name}", *fixed])
        sweep = choices.given.get("name") or "_".join(["sensitivity", *run.parts[1:]])
        folder = Path(run.values["paths"]["sweeps"]) / sweep
        command = ["-m", f"optimizer={name}", *choices.rest, f"name={sweep}/{name}"]
        for axis in (x, y):
            if axis is None:
                continue
            configured = _value(run.values, axis.key)
            if axis is y and configured is None:
                print(f"{name} has no {axis.key}: a strip of {x.key} alone")
                continue
            values = axis.of(configured, name)
            command.append(f"{axis.key}={','.join(f'{value:.6g}' for value in values)}")
        commands.append(command)
    code = 0
    for command in commands:
        code = max(code, train.main(command))
        if code in (CTRL_C, REQUEUE):
            break
    return folder, code


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _show(choices: Choices, folder: Path) -> None:
    """Draw what has come to an end."""
    runs = [compare.read_run(path) for path in compare.find_runs([folder])]
    found = sensitivity.varying(runs)
    keys = [choices.given[name].partition(":")[0] if name in choices.given else None for name in ("x", "y")]
    x_key = keys[0] or next((key for key in found if key != keys[1]), sensitivity.KEYS[0])
    y_key = None if keys[1] == "null" else keys[1] or next((key for key in found if key != x_key), None)
    monitors = [run.summary["monitor"] for run in runs if run.summary.get("monitor")]
    metric = choices.given.get("metric") or next(iter(monitors), "val/loss")
    grids = sensitivity.grids(runs, x_key, y_key, metric)
    title = " on ".join(next(iter({run.choices.get(part, "?") for run in runs})) for part in ("model", "dataset"))
    share = f"{100 * choices.near:g} {'points' if grids[0].higher else '%'} of the best"
    text = f"Within {share}:\n\n{sensitivity.to_markdown(grids, metric, choices.near)}"
    out = Path(choices.given.get("out") or folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / "sensitivity.png") as file:
            sensitivity.plot(grids, metric, choices.near, f"{title}: framed is what is within {share}").savefig(
                file, format="png", dpi=110, pil_kwargs={"optimize": True}
            )
        with atomic_file(out / "sensitivity.md") as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); give another folder") from error
    console = Console(highlight=False, markup=False)
    console.print(text, soft_wrap=True)
    console.print(f"{out}: sensitivity.png, sensitivity.md", soft_wrap=True)


def _choices(argv: Sequence[str] | None) -> Choices:
    parser = Parser(__doc__)
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE_OR_FOLDER", help="see above")
    choices = Choices()
    for text in parser.parse_args(argv).arguments:
        key, equals, value = text.partition("=")
        if key == "optimizer" and equals:
            raise UserError(f"{text}: give optimizers=[{value}], of which there may be several")
        if equals and key in OWN:
            choices.given[key] = value
        elif equals and "/" not in key:
            choices.rest.append(text)
        elif equals or Path(text).is_dir():
            (choices.rest if equals else choices.folders).append(text)
        else:
            raise UserError(f"there is no folder {text}, and it is no KEY=VALUE: give one of them (see --help)")
    if len(choices.folders) > 1:
        raise UserError("give one folder: runs of several are read where they lie in one")
    return choices


if __name__ == "__main__":
    sys.exit(main())
