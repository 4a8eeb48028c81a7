"""TensorBoard's event files, as its pages show them best: curves first, what differs between runs beside results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import histogram, hparams, scalar
from torch.utils.tensorboard.summary import image as image_summary
from torch.utils.tensorboard.summary import text as text_summary

from training.loggers.values import HEADER, given, hyperparameters
from training.runs.run import Logger, Run
from training.show.event_file import EventFile, sizes, take_back

# Limits of a histogram's bins, as TensorBoard's own writers have them: each a tenth beyond the one before.
_POSITIVE = [1e-12 * 1.1**power for power in range(774)]
BINS = [*(-limit for limit in reversed(_POSITIVE)), 0.0, *_POSITIVE]
#: What the tags of single values begin with: pages order cards by names, and dots are to come after curves.
END = "when done/"
#: Which weights they are of, and what the summary calls these.
WHICH = {"best": "best", "last": "final"}


class TensorBoard(Logger):
    """Event files: scalars, the configuration, hyper-parameters beside their results, histograms on request.

    Args:
        histograms: of every weight and gradient at each evaluation. Slow for large models.
        flush_seconds: how often the file is brought up to date for those who watch.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, histograms: bool = False, flush_seconds: int = 30) -> None:
        if flush_seconds < 1:
            raise ValueError(f"flush_seconds must be at least 1, got {flush_seconds}")
        self.histograms, self.flush_seconds = histograms, flush_seconds
        self._file: EventFile | None = None
        self._run: Run | None = None
        self._written: dict[str, int] | None = None

    def start(self, run: Run) -> None:
        """See Logger."""
        self._run = run
        if self._written is not None:
            take_back(run.folder.tensorboard, self._written)
        # A board that is open forgets what it has read about the steps that are now repeated.
        purge = run.step + 1 if run.resumed else 0
        self._file = EventFile(run.folder.tensorboard, purge, self.flush_seconds)
        if not run.resumed:
            self.text("config", run.folder.config_file.read_text(), 0)
            values = hyperparameters(run.config)
            # SummaryWriter.add_hparams would open a run of its own in a sub-folder.
            _, start, _ = hparams(values, {})
            self._file.add(self._columns(run, values), 0)
            self._file.add(start, 0)
        self._file.flush()

    def _columns(self, run: Run, values: Mapping[str, Any]) -> Any:
        """The hyper-parameter tab's columns: it shows five values, those first that are said to differ, then metrics.

        Only one of the runs beside each other is asked, which does not know the others: what its command gives may
        differ, and nothing more likely than the optimizer and its rate.
        """
        told = {name for name in given(run) & values.keys() if not name.startswith("trainer.max_")}
        told |= {"optimizer", "optimizer.lr"} if told else {"optimizer", "optimizer.lr", "dataset", "model", "seed"}
        infos = [
            api_pb2.HParamInfo(name=name, type=_type(value), differs=name in told)
            for name, value in values.items()
        ]
        titles = {tag: tag.removeprefix(END).replace("/", " ", 1) for tag in self._results(run)}
        metrics = [
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title) for tag, title in titles.items()
        ]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
        kind = metadata.create_summary_metadata(HParamsPluginData(experiment=experiment))
        return Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=kind)])

    @staticmethod
    def _results(run: Run) -> list[str]:
        """Tags that the hyper-parameter tab shows: the best weights' first, of the metric that chose them."""
        main = run.monitor.partition("/")[2]
        names = [main, *(name for name in run.task.metrics if name != main)]
        return [f"{END}{which}/{split}/{name}" for which in WHICH for name in names for split in ("test", "val")]

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        assert self._file is not None and self._run is not None
        step = record["step"]
        for name, value in record.items():
            # Of what the test set gave there is one value a run, which `finish` writes where the likes of it are.
            if name not in HEADER and record["event"] != "test" and isinstance(value, (int, float)):
                self._file.add(scalar(name, value), step)
        if self.histograms and record["event"] == "eval":
            for name, parameter in self._run.model.named_parameters():
                self._histogram(f"weights/{name}", parameter, step)
                self._histogram(f"gradients/{name}", parameter.grad, step)

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """See Logger."""
        assert self._file is not None
        self._file.add(image_summary(name, image, dataformats="CHW"), step)

    def text(self, name: str, text: str, step: int) -> None:
        """See Logger."""
        assert self._file is not None
        self._file.add(text_summary(name, "".join(f"    {line}\n" for line in text.splitlines())), step)  # as it is

    def _histogram(self, name: str, tensor: torch.Tensor | None, step: int) -> None:
        assert self._file is not None
        if tensor is not None and bool(tensor.isfinite().all()):  # an overflowed fp16 gradient has no histogram
            values = tensor.detach().float().cpu().numpy()
            self._file.add(histogram(name, values, BINS), step)

    def flush(self) -> None:
        """See Logger."""
        assert self._file is not None
        self._file.sync()

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """See Logger."""
        assert self._file is not None
        for name in self._results(run):
            which, _, metric = name.removeprefix(END).partition("/")
            value = (summary[WHICH[which]] or {}).get(metric)
            if value is not None:
                self._file.add(scalar(name, value), run.step)
        _, _, end = hparams({}, {})
        self._file.add(end, run.step)
        self._file.sync()

    def close(self) -> None:
        """See Logger."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def state_dict(self) -> dict[str, Any]:
        """See Logger."""
        assert self._file is not None
        return {"written": sizes(self._file.folder)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Logger."""
        self._written = state["written"]


def _type(value: bool | int | float | str) -> Any:
    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64
