"""Trackio, an optional package: ``logger=trackio``."""

from __future__ import annotations

from typing import Any

import torch

from training.loggers.tracking import Tracker
from training.runs.run import Run


class Trackio(Tracker):
    """A run of Trackio: configuration with tags and notes, metrics by step, pictures, texts, the results at the end.

    It lies in a database of this machine's user (``TRACKIO_DIR``), which ``trackio show`` draws. See ``Tracker`` for
    what a resumed run repeats.

    Args:
        project: of the run.
        space: a Space of Hugging Face to send it to; None: nowhere.

    Raises:
        UserError: the package is not installed.
    """

    name, package, module = "trackio", "trackio", "trackio"

    def __init__(self, project: str = "curvlab", space: str | None = None) -> None:
        super().__init__()
        self.project, self.space = project, space
        self._run: Any = None

    def start(self, run: Run) -> None:
        """See Logger."""
        import trackio

        resumed, self._id = self._id is not None, self._id or self.title(run)
        self._run = trackio.init(
            project=self.project, name=self._id, config=run.config, space_id=self.space, embed=False,
            resume="allow" if resumed else "never", group=self.title(run).partition("/")[0],
        )  # fmt: skip

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        self._run.log({**self.values(record), "epoch": record["epoch"]}, step=record["step"])

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """See Logger."""
        import trackio

        self._run.log({name: trackio.Image(image.permute(1, 2, 0).squeeze(-1).numpy())}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """See Logger."""
        import trackio

        self._run.log({name: trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """See Logger."""
        super().finish(run, summary)
        self._run.log(self.results(summary), step=run.step)

    def close(self) -> None:
        """See Logger."""
        if self._run is not None:
            ended, self._run = self._run, None
            ended.finish()
