"""``python -m curvlab``, and ``torchrun --nproc-per-node=2 -m curvlab``: the command ``curvlab``."""

from __future__ import annotations

import sys

from curvlab.command import main

if __name__ == "__main__":
    sys.exit(main())
