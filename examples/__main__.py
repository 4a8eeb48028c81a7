"""`python -m examples NAME`: run one of the examples, with K-FAC, and print its losses."""

import argparse
from pathlib import Path

import training.missing  # noqa: F401 - a package that is not installed is a sentence
from examples._load import load

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--resume", action="store_true", help="go on where the last run of this example ended")
    given = parser.parse_args()
    _, losses = load(given.name).main(steps=given.steps, resume=given.resume)
    print("\n".join(f"{loss:.4f}" for loss in losses))


if __name__ == "__main__":
    main()
