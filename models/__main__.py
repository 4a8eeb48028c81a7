"""``python -m models`` lists what models there are; with a name, it prints one layer by layer.

    python -m models
    python -m models resnet50
    python -m models resnet18 optimizer=kfac batch_size=128 image_size=32 num_classes=10
    python -m models gpt1_mini model.layers=2 optimizer=ekfac optimizer.rank=64 sequence=128

With ``optimizer=...`` there follows which layers it keeps curvature of, and a forecast of memory and step cost. A model
is joined with an optimizer and configurations by ``training``, which this package does not know otherwise.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    command = importlib.import_module("training.command.modelling")  # beside this package
    code: int = command.main(list(sys.argv[1:] if argv is None else argv), __doc__ or "")
    return code


if __name__ == "__main__":
    sys.exit(main())
