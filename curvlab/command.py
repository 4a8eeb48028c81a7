"""The console command ``curvlab``: ``train.py``, wherever it is installed.

Whoever imports this module gives Curvlab the short names of its parts (see ``curvlab.names``): processes that are
spawned import the main module anew, and with it this one.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from curvlab import names

names.take()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; modules of the working directory can be named in a configuration (``_target_: mine.Mine``).

    Args:
        argv: the arguments, None for those of the process.

    Returns:
        The exit code: train.py's; 1 where a package is missing that the program needs and the optimizers do not.

    Raises:
        ModuleNotFoundError: a module of Curvlab's own is missing.
    """
    os.environ.setdefault("CURVLAB_COMMAND", "curvlab")
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, Ctrl-C ends the process without a trace
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    if argv is None:
        importlib.import_module("training.missing")
    try:
        train = importlib.import_module("curvlab.train")
    except ModuleNotFoundError as error:
        sentence = importlib.import_module("training.errors").not_installed(error)
        if sentence is None:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        return 1
    code: int = train.main(argv)
    return code
