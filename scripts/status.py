"""How it stands with runs: state, progress, time left, last values, and where they run; a line each.

    python scripts/status.py multirun/mlp_digits
    python scripts/status.py runs --watch --sort val/loss
    python scripts/status.py multirun --json

Reads folders alone, so it may run on another machine that sees the files, and costs the runs nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from rich.console import Console
from rich.live import Live

from analysis import status
from scripts import Parser
from training.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        _main(_parser().parse_args(argv))
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _main(options: argparse.Namespace) -> None:
    def found() -> list[status.Status]:
        return status.arranged([one for folder in options.folders for one in status.look(folder)], options.sort)

    # A file has no width: enough for the names of a sweep's runs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if options.watch is None:
        if options.json:
            sys.stdout.write(status.as_json(found()) + "\n")
        else:
            console.print(status.table(found()), markup=False)
        return
    with Live(status.table(found()), console=console, auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(options.watch)
            runs = found()
            live.update(status.table(runs), refresh=True)
            if not any(one.state in ("running", "starting", "waiting") for one in runs):
                return


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="*", default=["."], metavar="FOLDER", help="of a run, a sweep, or of many (.)")
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS",
        help="look again every so many seconds (5), until nothing is left to run",
    )  # fmt: skip
    parser.add_argument("--sort", default="state", help="state (default), name, progress, or a metric such as val/loss")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"must be at least 0.1 seconds, got {text}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
