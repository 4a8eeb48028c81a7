"""Imported first by a command: from then on, a package that it lacks is told of in a sentence.

Which is ``errors.not_installed``; every other error that nobody catches is shown as before.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

from training.errors import not_installed

_shown = sys.excepthook


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sentence = not_installed(error)
    if sentence is None or os.environ.get("CURVLAB_DEBUG") == "1":
        _shown(kind, error, trace)
    if sentence is not None:
        sys.stderr.write(f"error: {sentence}\n")


sys.excepthook = _tell
