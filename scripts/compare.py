"""Compare runs: one picture, one table, a line for all runs that differ by their seed alone.

    python scripts/compare.py multirun/curves --target train/loss=0.0796 --epochs 10,25,200
    python scripts/compare.py RUN RUN FOLDER --metric val/accuracy --baseline optimizer=adam --out pictures

Writes comparison.png, comparison.md and comparison.csv. With --html it writes FOLDER/report/index.html instead, a page
with intervals, tests and links to the runs, and beside it the table and the figures for papers; of a folder of
scripts/verdict.py, the page of that verdict:

    python scripts/compare.py multirun/curves --metric val/accuracy --html
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from rich.console import Console
from rich.table import Table

from analysis import compare, report
from analysis.compare.tables import BEST
from scripts import Parser
from training.errors import UserError
from training.show import heart


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        _main(_parser().parse_args(given, argparse.Namespace(given=given)))
    except (ValueError, UserError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _main(options: argparse.Namespace) -> None:
    target = compare.Target.parse(options.target) if options.target else None
    if options.html:
        _page(options, target)
        return
    folders = compare.find_runs(options.runs)
    groups, remarks = compare.group_runs([compare.read_run(folder) for folder in folders])
    references = {}
    for text in options.reference:
        reference, label = compare.Reference.parse(text)
        references[compare.match(groups, label, "reference").label] = reference
    comparison = compare.Comparison(
        groups,
        metric=options.metric or (target.metric if target else "train/loss"),
        target=target,
        epochs=_epochs(options.epochs),
        baseline=compare.match(groups, options.baseline, "baseline") if options.baseline else None,
        references=references,
        remarks=remarks,
    )
    out = Path(options.out or os.path.commonpath(folders))
    rows = compare.rows(comparison)
    try:
        out.mkdir(parents=True, exist_ok=True)
        compare.plot(comparison).savefig(out / "comparison.png", dpi=130)
        (out / "comparison.md").write_text(compare.to_markdown(comparison, rows), encoding="utf-8")
        (out / "comparison.csv").write_text(compare.to_csv(rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); give another folder") from error
    # A file has no width: enough for a table of a few epochs.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    tables, legend = fitted(compare.sheets(comparison, rows), console.width)
    for table in tables:
        console.print(table)
    for line in (*legend, *compare.notes(comparison), f"{out}: comparison.png, comparison.md, comparison.csv"):
        console.print(line, soft_wrap=True)
    if len(groups) > 1 and not (options.epochs or options.reference):
        console.print("Which is ahead, how sure that is, and the test set: the same command with --html")


def _page(options: argparse.Namespace, target: compare.Target | None) -> None:
    """The page of a verdict's folder, or of any runs."""
    if refused := [name for name in ("epochs", "reference") if getattr(options, name)]:
        raise UserError(f"{' and '.join(refused)}: the page has no such column; leave it out, or leave out --html")
    if target and options.metric and options.metric != target.metric:
        raise UserError(f"target: the page takes times of its own metric, {options.metric}, and not of {target.metric}")
    given = [Path(text) for text in options.runs]
    if len(given) == 1 and report.is_verdict(given[0]):
        if target or options.metric or options.baseline:
            raise UserError(f"{given[0]} is a verdict, which has its own metric, target and baseline: leave yours out")
        material = report.read_verdict(given[0])
    else:
        folders = compare.find_runs(given)
        common = Path(os.path.commonpath(folders))
        home = given[0] if len(given) == 1 else common
        metric = options.metric or (target.metric if target else None)
        material = report.read_sweep(folders, home, metric, target.value if target else None, options.baseline or "")
    found = report.results(material)
    command = shlex.join(["python", "scripts/compare.py", *options.given])
    page = report.write(found, Path(options.out) if options.out else None, command)
    console = Console(highlight=False, markup=False)
    for line in (*report.sentences(found), *(f"! {warning}" for warning in found.warnings)):
        console.print(line)
    said = f"{page}: open it in a browser; beside it lie table.csv, table.md, table.tex and the figures"
    console.print(said, soft_wrap=True)


def fitted(sheets: Sequence[compare.Sheet], width: int) -> tuple[list[Table], list[str]]:
    """Tables of which no word is broken, however long the groups' labels are.

    Args:
        sheets: of one comparison.
        width: in characters.

    Returns:
        The tables, several of a sheet that has too many columns; and lines that say which group is which, where labels
        are so long that a number stands for them.
    """
    labels = dict.fromkeys(line[0].removeprefix(BEST) for sheet in sheets for line in sheet.lines)
    names = {label: label for label in labels}
    if max(map(len, labels)) > width // 3:
        firsts = [label.split()[0].partition("=")[2] for label in labels]
        shorts = [f"{number} {first}"[: width // 4].strip() for number, first in enumerate(firsts, 1)]
        names = dict(zip(labels, shorts, strict=True))
    tables = []
    for sheet in sheets:
        title = sheet.title
        for label in sorted(labels, key=len, reverse=True):
            title = title.replace(f" to {label}", f" to {names[label]}")
        best = [BEST if line[0].startswith(BEST) else "" for line in sheet.lines]
        first = [mark + names[line[0].removeprefix(BEST)] for mark, line in zip(best, sheet.lines, strict=True)]
        columns = list(zip(sheet.header, *sheet.lines, strict=True))
        rest = [(header, *cells) for header, *cells in columns[1:]]
        while rest:
            room, taken = width - max(map(len, (sheet.header[0], *first))) - 4, 0
            while taken < len(rest) and (not taken or room >= max(map(len, rest[taken])) + 3):
                room -= max(map(len, rest[taken])) + 3
                taken += 1
            tables.append(_table(title, [(sheet.header[0], *first), *rest[:taken]]))
            title, rest = f"{sheet.title.partition(';')[0]}, more", rest[taken:]
    return tables, [f"{name}: {label}" for label, name in names.items() if name != label]


def _table(title: str, columns: Sequence[Sequence[str]]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left")
    for column, *_ in columns:
        side: Literal["left", "right"] = "left" if column in ("group", "status") else "right"
        table.add_column(column, justify=side, overflow="fold")
    for line in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*line)
    return table


def _epochs(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise ValueError(f"epochs must be whole numbers such as 10,25,200, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_FOLDER", help="run folders, or folders that hold some")
    parser.add_argument("--metric", help="what is drawn (default: the target's, or train/loss)")
    parser.add_argument("--target", help="METRIC=VALUE whose time is taken, e.g. train/loss=0.0796")
    parser.add_argument("--epochs", default="", help="at which the metric is given, e.g. 10,25,200")
    parser.add_argument("--baseline", help="the group that ratios are to, e.g. optimizer=adam (default: the first)")
    parser.add_argument(
        "--reference", nargs="+", action="extend", default=[], metavar="FILE.json:KEY=label",
        help="a published curve, one value an epoch, and the group that it is drawn beside",
    )  # fmt: skip
    parser.add_argument("--html", action="store_true", help="write a page for reading, report/index.html, instead")
    where = "folder of the results (default: what all runs have in common; of a page, report/ in it)"
    parser.add_argument("--out", help=where)
    return parser


if __name__ == "__main__":
    with heart.working("comparing"):
        sys.exit(main())
