"""MLflow, an optional package: ``logger=mlflow``."""

from __future__ import annotations

import time
from typing import Any

import torch

from training.errors import UserError
from training.loggers.tracking import Tracker
from training.loggers.values import flattened
from training.runs.run import Run

#: What MLflow takes at once, and of a parameter's value.
BATCH, LONGEST = 100, 500


class MLflow(Tracker):
    """A run of MLflow: parameters, metrics by step, pictures, texts, ``config.yaml``, the results, tags and notes.

    See ``Tracker`` for what a resumed run repeats.

    Args:
        experiment: that the run belongs to; made if there is none of that name.
        uri: of the server or store, such as http://127.0.0.1:5000, sqlite:///mlflow.db, or a folder for files; None:
            what ``MLFLOW_TRACKING_URI`` says, or else MLflow's own default.

    Raises:
        UserError: the package is not installed.
    """

    name, package, module = "mlflow", "mlflow", "mlflow"

    def __init__(self, experiment: str = "curvlab", uri: str | None = None) -> None:
        super().__init__()
        self.experiment, self.uri = experiment, uri
        self._client: Any = None

    def start(self, run: Run) -> None:
        """See Logger.

        Raises:
            UserError: the server does not answer, or the store cannot be opened.
        """
        import mlflow

        try:
            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            if self._id is not None:
                self._client.update_run(self._id, status="RUNNING")
                return
            found = self._client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(self.experiment)
            tags = dict.fromkeys(run.config.get("tags") or [], "true")
            tags |= {"mlflow.note.content": run.config["notes"]} if run.config.get("notes") else {}
            self._id = self._client.create_run(experiment, tags=tags, run_name=self.title(run)).info.run_id
        except (mlflow.MlflowException, ModuleNotFoundError, OSError) as error:
            self._client = None
            raise UserError(f"logger.mlflow: {' '.join(str(error).split())}") from error
        parameters = [
            mlflow.entities.Param(key, str(value)[:LONGEST])
            for key, value in flattened(run.config).items()
            if key != "notes"
        ]
        for begin in range(0, len(parameters), BATCH):
            self._client.log_batch(self._id, params=parameters[begin : begin + BATCH])
        self._client.log_artifact(self._id, str(run.folder.config_file))

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        self._metrics({**self.values(record), "epoch": record["epoch"]}, record["step"])

    def _metrics(self, values: dict[str, float], step: int) -> None:
        import mlflow

        now = int(1000 * time.time())
        metrics = [mlflow.entities.Metric(name, float(value), now, step) for name, value in values.items()]
        for begin in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + BATCH])

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """See Logger."""
        self._client.log_image(self._id, image.permute(1, 2, 0).numpy(), key=name, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """See Logger."""
        self._client.log_text(self._id, text, f"{name}_{step}.txt")

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """See Logger."""
        super().finish(run, summary)
        self._metrics(self.results(summary), run.step)
        self._client.set_tag(self._id, "status", summary["status"])

    def close(self) -> None:
        """See Logger."""
        if self._client is not None:
            client, self._client = self._client, None
            client.set_terminated(self._id, "FINISHED" if self._finished else "FAILED")
