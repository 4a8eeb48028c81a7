"""Curvature-aware optimizers for PyTorch, and the program that trains with them.

``from curvlab.optimizers import KFAC`` needs torch alone; the command ``curvlab`` (or ``python -m curvlab``) is the
clone's ``train.py``. Installed, all parts lie in this folder; in a clone they lie beside it.
"""

from __future__ import annotations

from pathlib import Path

from curvlab import names

__version__ = "0.2.0"

if not (Path(__file__).parent / names.PARTS[0]).exists():
    __path__.append(str(Path(__file__).resolve().parent.parent))
names.install(__path__)
