"""Curvature-aware optimizers for PyTorch, and the program that trains with them.

``from curvlab.optimizers import KFAC`` needs torch alone; the command ``curvlab`` (or ``python -m curvlab``) is the
clone's ``train.py``, and ``curvlab.load_run`` opens what it has trained. Installed, all parts lie in this folder; in a
clone they lie beside it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from curvlab import names

__version__ = "0.2.0"

if not (Path(__file__).parent / names.PARTS[0]).exists():
    __path__.append(str(Path(__file__).resolve().parent.parent))
names.install(__path__)


def __getattr__(name: str) -> Any:
    if name != "load_run":  # which needs the program, and so takes its short names for this process
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    names.take()
    return importlib.import_module("training.settings.loading").load_run
