"""Loss surfaces around the weights of runs, and the ways of optimizers over them: a picture and a page that turns.

    python scripts/landscape.py RUN                         # 51 x 51 points along two random directions
    python scripts/landscape.py RUN RUN --dims 1 --span 2   # one random direction; a line a run
    python scripts/landscape.py RUN RUN RUN --plane ways    # the ways of runs, trained with callbacks=trajectory

Random directions are as long as the weights, filter by filter (Li et al. 2018, arXiv 1712.09913), with biases and norms
left out. The plane of ways is that of the first two principal components of all runs' snapshots around their start;
beside what it shows, each snapshot is evaluated itself. Losses are those of a fixed set of examples in float32, or
--precision bf16, in the units of val/loss.

Writes landscape.png, landscape.csv, for planes landscape.html, for ways ways.csv, and landscape.jsonl, which the
picture can be drawn from again. What has been evaluated is kept in survey_*.jsonl: stopped or killed, the same command
goes on from there. Of a folder from elsewhere nothing is called but Curvlab's own parts and its packages'; a model of
your own is named again (--own mine.Net) and found in this folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from analysis import compare, landscape
from scripts import Parser
from training.errors import UserError
from training.names import TARGET
from training.runs.folder import atomic_file
from training.settings.loading import LoadedRun, load_run
from training.show import heart
from training.show.snapshots import Snapshots

SPLITS = ("train", "val", "test")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        _main(_parser().parse_args(argv))
    except (ValueError, UserError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: the same command goes on from here.\n")
        return 130
    return 0


def _main(options: argparse.Namespace) -> None:
    sys.path += [os.getcwd()] if options.own else []
    folders = compare.find_runs(options.runs)
    labels = _labels(folders)
    plane = options.plane or ("ways" if len(folders) > 1 and options.dims == 2 else "random")
    if plane == "ways" and options.dims != 2:
        raise ValueError("dims must be 2 for the plane of ways")
    out = Path(options.out or Path(os.path.commonpath(folders)) / "landscape")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); give another folder") from error
    # A file has no width: enough for a table.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    try:
        surfaces = _under(folders, labels, options, out) if plane == "ways" else _around(folders, labels, options, out)
    except BaseException:
        with suppress(OSError):  # of what was refused, nothing stays
            out.rmdir()
        raise
    picture = landscape.plot(surfaces, options.metric)
    files = _write(surfaces, picture, out, options)
    for line in _told(surfaces, options.metric):
        console.print(line, soft_wrap=True)
    console.print(f"{out}: {', '.join(files)}", soft_wrap=True)


def _around(
    folders: Sequence[Path], labels: dict[Path, str], options: argparse.Namespace, out: Path
) -> list[landscape.Surface]:
    surfaces = []
    for folder in folders:
        loaded, examples = _loaded(folder, options)
        with _bar(f"{labels[folder]}") as progress:
            surfaces.append(
                landscape.around(
                    loaded.model, loaded.task, examples, label=f"{labels[folder]}, step {loaded.step}",
                    dimensions=options.dims, span=options.span, seed=options.seed, normalise=options.normalise,
                    vectors=options.vectors, **_common(options, out, progress),
                )
            )  # fmt: skip
    return surfaces


def _under(
    folders: Sequence[Path], labels: dict[Path, str], options: argparse.Namespace, out: Path
) -> list[landscape.Surface]:
    ways = [landscape.Way.of(labels[folder], Snapshots(folder), options.snapshots) for folder in folders]
    sets = {str(compare.read_run(folder).values["dataset"].get(TARGET)) for folder in folders}
    if len(sets) > 1:
        raise ValueError(f"runs must have learned from one data set, and these have from {', '.join(sorted(sets))}")
    loaded, examples = _loaded(folders[0], options)
    label = f"the way of {ways[0].label}" if len(ways) == 1 else f"the ways of {len(ways)} runs"
    with _bar("ways") as progress:
        surface = landscape.under(
            loaded.model, loaded.task, examples, ways, label=label, through=options.through,
            margin=options.margin, **_common(options, out, progress),
        )  # fmt: skip
    return [surface]


def _common(options: argparse.Namespace, out: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    return {
        "resolution": options.resolution, "statistics": options.batch_norm, "calibrate": options.calibrate,
        "precision": options.precision, "folder": out, "workers": options.workers, "progress": progress,
    }  # fmt: skip


def _loaded(folder: Path, options: argparse.Namespace) -> tuple[LoadedRun, landscape.Examples]:
    """A run, and the examples on which its losses are evaluated."""
    loaded = load_run(folder, options.weights, data=options.data, device=options.device, own=options.own)
    if options.metric not in loaded.task.metrics:
        raise ValueError(f"metric must be one of {', '.join(loaded.task.metrics)}, got {options.metric!r}")
    examples = landscape.Examples.first(getattr(loaded.data, options.split), options.examples, options.batch_size)
    return loaded, examples


def _labels(folders: Sequence[Path]) -> dict[Path, str]:
    """What sets each run apart: its optimizer, or whatever else differs, and its seed where others have another."""
    groups, remarks = compare.group_runs([compare.read_run(folder) for folder in folders])
    if remarks:
        raise ValueError(f"runs: {remarks[0]}; leave one of them out")
    found = {}
    for group in groups:
        words = group.label.split()
        label = words[0].partition("=")[2] if len(words) == 1 else group.label
        for run in group.runs:
            found[run.folder] = f"{label}, seed {run.seed}" if len(group.runs) > 1 else label
    return found


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """Within it, a bar of how many points are done, on a terminal; elsewhere a line now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True, highlight=False)
    bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    with bar, heart.working(text, bar=True) as work:
        task = bar.add_task(text, total=None)

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            work.of(done, total, "points")

        yield told


def _write(surfaces: Sequence[landscape.Surface], picture: Any, out: Path, options: argparse.Namespace) -> list[str]:
    contents: dict[str, bytes | None] = {"landscape.png": None}
    with atomic_file(out / "landscape.png") as file:
        picture.savefig(file, format="png", dpi=options.dpi)
    contents["landscape.jsonl"] = landscape.to_record(surfaces).encode()
    several = len(surfaces) > 1
    for number, surface in enumerate(surfaces, 1):
        contents[f"landscape{f'_{number}' if several else ''}.csv"] = landscape.to_csv(surface).encode()
        if surface.tracks:
            contents["ways.csv"] = landscape.tracks_csv(surface).encode()
    if len(surfaces[0].y):
        png = (out / "landscape.png").read_bytes()
        contents["landscape.html"] = landscape.to_page(surfaces, png, options.metric).encode()
    for name, content in contents.items():
        if content is not None:
            with atomic_file(out / name) as file:
                file.write(content)
    return list(contents)


def _told(surfaces: Sequence[landscape.Surface], metric: str) -> Iterator[Any]:
    for surface in surfaces:
        values = surface.metric(metric)
        yield f"{metric} {surface.title}: {values.min():.4g} to {values.max():.4g} ({'; '.join(surface.notes)})"
        if surface.explained:
            yield f"variance by principal direction: {', '.join(f'{share:.1%}' for share in surface.explained)}"
            yield _table(surface, metric)


def _table(surface: landscape.Surface, metric: str) -> Table:
    table = Table()
    table.add_column("run", overflow="fold")
    columns = ("snapshots", "last step", f"{metric} there", "of the plane there", "cosine", "least cosine", "left out")
    for column in columns:
        table.add_column(column, justify="right")
    for track in surface.tracks:
        ends = (track.true[metric][-1], track.projected[metric][-1])
        facts = [f"{value:.4g}" for value in ends] + [f"{c:.3f}" for c in (track.cosine[-1], track.cosine.min())]
        row = [str(len(track.steps)), str(track.steps[-1]), *facts, f"{track.left_out[-1]:.1%}"]
        table.add_row(track.label, *row)
    return table


def _weights(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_OR_FOLDER", help="run folders, or folders that hold some")
    add("--plane", choices=("random", "ways"),
        help="random: around each run's weights; ways: through the runs' snapshots (default: ways of several runs)")
    add("--through", default="start",
        help="origin of the plane of ways: start, end (mean of the ends) or mean (of all snapshots) (default: start)")
    add("--dims", type=int, default=2, help="directions, 1 or 2 (default: 2)")
    add("--weights", type=_weights, default="best", help="best, last or a step, of the middle (default: best)")
    add("--resolution", type=int, default=51, help="points along each direction (default: 51)")
    add("--span", type=float, default=1.0, help="of random directions, in lengths of the weights (default: 1)")
    add("--margin", type=float, default=0.2, help="around ways, as a share of their extent (default: 0.2)")
    add("--seed", type=int, default=0, help="of random directions (default: 0)")
    add("--normalise", default="filter", help="random directions by filter, by layer, or none (default: filter)")
    add("--vectors", default="ignore", help="biases and norms in random directions: ignore or scale (default: ignore)")
    add("--batch-norm", default="estimated",
        help="its statistics: estimated anew at each point, or fixed as the run has them (default: estimated)")
    add("--calibrate", type=int, default=500, metavar="N", help="examples to estimate them on (default: 500)")
    add("--examples", type=int, default=2000, metavar="N", help="to evaluate on, at most (default: 2000)")
    add("--split", choices=SPLITS, default="train", help="that they are from (default: train, as training sees it)")
    add("--batch-size", type=int, default=100, metavar="N", help="of the evaluation (default: 100)")
    add("--precision", default="fp32", help="of forward passes: fp32, or bf16, which is faster (default: fp32)")
    add("--data", metavar="FOLDER", help="where data sets lie (default: where they lay when the runs were trained)")
    add("--own", action="append", default=[], metavar="NAME", help="a callable of yours that runs may call: mine.Net")
    add("--metric", default="loss", help="what is drawn, of the task's (default: loss)")
    add("--snapshots", type=int, default=40, metavar="N", help="of each run, evenly spread, at most (default: 40)")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--device", default="cpu", help="to evaluate on (default: cpu)")
    add("--dpi", type=int, default=120, help="of the picture (default: 120)")
    add("--out", help="folder of the results (default: landscape/ in the folder that all runs have in common)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
