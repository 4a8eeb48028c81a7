"""A callback that makes runs last, so that there is time to stop them."""

from __future__ import annotations

import time

from training.runs.run import Callback, Run


class Slow(Callback):
    """Waits after each step.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_step(self, run: Run) -> None:
        """See Callback."""
        time.sleep(self.seconds)
