"""Imported first by a command: from then on, a package that it lacks is told of in a sentence.

Which is ``errors.not_installed``; every other error that nobody catches is shown as before. And what a terminal's
encoding lacks, of a class's name, say, is written by its number instead of ending the command.
"""

from __future__ import annotations

import io
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
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper):
        _stream.reconfigure(errors="backslashreplace")
