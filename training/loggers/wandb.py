"""Weights & Biases, an optional package: ``logger=wandb``."""

from __future__ import annotations

import html
from typing import Any, Literal

import torch

from training.errors import UserError
from training.loggers.tracking import Tracker
from training.runs.run import Run
from training.show import report


class WandB(Tracker):
    """A run of Weights & Biases: configuration, metrics by step, pictures, texts, the summary, tags and notes.

    Its own files lie in the run folder, ``wandb/``. Offline, ``wandb sync`` sends them later, those of a resumed run
    with ``--append``. See ``Tracker`` for what a resumed run repeats.

    Args:
        project: of the run.
        entity: user or team; None: the one that is logged in.
        mode: online, offline or disabled; None: what ``WANDB_MODE`` says, or else online.

    Raises:
        UserError: the package is not installed.
    """

    name, package, module = "wandb", "wandb", "wandb"

    def __init__(
        self,
        project: str = "curvlab",
        entity: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        super().__init__()
        self.project, self.entity, self.mode = project, entity, mode
        self._run: Any = None

    def start(self, run: Run) -> None:
        """See Logger.

        Raises:
            UserError: nobody is logged in, or the server does not answer.
        """
        import wandb

        quiet = {"silent": True} if report.brief() else {}
        try:
            self._run = wandb.init(
                project=self.project, entity=self.entity, mode=self.mode, dir=run.folder.path, id=self._id,
                resume="allow" if self._id else None, name=self.title(run), config=run.config, reinit="create_new",
                tags=run.config.get("tags"), notes=run.config.get("notes"), group=self.title(run).partition("/")[0],
                settings=wandb.Settings(console="off", **quiet),
            )  # fmt: skip
        except (wandb.Error, wandb.errors.UsageError) as error:
            raise UserError(
                f"logger.wandb: {' '.join(str(error).split())}: log in by wandb login, or set logger.wandb.mode=offline"
            ) from error
        self._id = self._run.id
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        self._run.log({**self.values(record), "step": record["step"], "epoch": record["epoch"]})

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """See Logger."""
        import wandb

        self._run.log({name: wandb.Image(image.permute(1, 2, 0).squeeze(-1).numpy()), "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        """See Logger."""
        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """See Logger."""
        super().finish(run, summary)
        self._run.summary.update({**self.results(summary), "status": summary["status"]})

    def close(self) -> None:
        """See Logger."""
        if self._run is not None:
            ended, self._run = self._run, None
            ended.finish(exit_code=int(not self._finished))
