"""``python -m optimizers`` prints the table of all optimizers; ``--markdown`` as it stands in the README."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description="Print the table of all optimizers.")
    parser.add_argument("--markdown", action="store_true", help="as it stands in the README")
    options = parser.parse_args(argv)
    found = table.rows()
    sys.stdout.write((table.markdown(found) if options.markdown else table.text(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
