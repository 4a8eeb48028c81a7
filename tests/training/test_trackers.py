"""Loggers for what peers have: a table, and other people's trackers, offline, in their own records."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small_run import SignalAt, fit
from training import Interrupted, UserError, loggers
from training.callbacks import Callback
from training.loggers.csv import CSV
from training.loggers.mlflow import MLflow
from training.loggers.trackio import Trackio
from training.loggers.wandb import WandB
from training.runs.run import Run

SAID = {"tags": ["small", "first"], "notes": "what is worth knowing, and more"}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


class Showing(Callback):
    """Hands the loggers a picture and a text at the end."""

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        for logger in run.loggers:
            logger.image("picture", torch.arange(192, dtype=torch.uint8).view(3, 8, 8), run.step)
            logger.text("sample", "a <b> c", run.step)


def interrupted(folder: Path, make: Callable[[], list[loggers.Logger]]) -> dict[str, Any]:
    """Train to step 13, then go on from step 12; returns the summary."""
    said: dict[str, Any] = {"config": SAID, "checkpoint_every_steps": 6, "eval_every_steps": None}
    with pytest.raises(Interrupted):
        fit(folder, writers=make(), callbacks=[SignalAt(13)], **said)
    (folder / "checkpoints" / "step_00000013.pt").unlink()  # as if it had been killed: back to step 12
    summary, _ = fit(folder, resume=True, writers=make(), callbacks=[Showing()], **said)
    return summary


def test_a_table_holds_what_the_record_does(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", lambda: [CSV(), loggers.JSONLines()])
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(events) == 9
    for row, event in zip(rows, events, strict=True):
        told = {name: text for name, text in row.items() if text}
        assert told.keys() == event.keys() and told.pop("event") == event.pop("event")
        assert {name: float(text) for name, text in told.items()} == event


@pytest.mark.parametrize("kind", [WandB, MLflow, Trackio])
def test_a_package_that_is_missing_is_named(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "module", "no_such_module")
    with pytest.raises(UserError, match=rf"^logger={kind.name} needs .* not installed: pip install {kind.package}$"):
        kind()


@needs("wandb")
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline; both parts of a run that was stopped have one id, which ``wandb sync --append`` joins."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    summary = interrupted(tmp_path / "run", lambda: [WandB(mode="offline")])
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    parts = [_records(path) for path in files]
    begun = next(record.run for record in parts[0] if record.HasField("run"))
    assert list(begun.tags) == SAID["tags"] and begun.notes == SAID["notes"]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["optimizer"]["lr"] == 0.05
    rows = [[_row(record.history.item) for record in part if record.HasField("history")] for part in parts]
    assert [row["step"] for row in rows[0] if "train/loss" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows[1] if "train/loss" in row] == [15, 18, 20]
    assert {"picture", "sample"} <= {name.partition("/")[0] for row in rows[1] for name in row}
    found: dict[str, Any] = {}
    for record in parts[1]:
        found |= _row(record.summary.update)
    assert found["best/val/accuracy"] == summary["best"]["val/accuracy"] and found["status"] == "finished"


def _records(path: Path) -> list[Any]:
    """What a file of wandb holds: LevelDB's format of logs, behind seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # too little for a head: the next block
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record in one piece, or its last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


def _row(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@needs("mlflow")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    summary = interrupted(tmp_path / "run", lambda: [MLflow(uri=uri)])
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("curvlab")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == f"{tmp_path.name}/run"
    assert run.data.params["optimizer.lr"] == "0.05" and run.data.params["optimizer.betas"] == "[0.9, 0.99]"
    assert run.data.tags["small"] == "true" and run.data.tags["mlflow.note.content"] == SAID["notes"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [3, 6, 9, 12, 15, 18, 20]
    assert run.data.metrics["best/val/accuracy"] == summary["best"]["val/accuracy"]
    names = [one.path for one in client.list_artifacts(run.info.run_id)]
    assert {"config.yaml", "sample_20.txt", "images"} <= set(names)


@needs("trackio")
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # which is read when it is imported
    from trackio.sqlite_storage import SQLiteStorage

    summary = interrupted(tmp_path / "run", lambda: [Trackio()])
    (name,) = SQLiteStorage.get_runs("curvlab")
    assert name == f"{tmp_path.name}/run"
    config = SQLiteStorage.get_run_config("curvlab", name)
    assert config["tags"] == SAID["tags"] and config["notes"] == SAID["notes"] and config["optimizer"]["lr"] == 0.05
    rows = SQLiteStorage.get_logs("curvlab", name)
    assert [row["step"] for row in rows if "train/loss" in row] == [3, 6, 9, 12, 15, 18, 20]
    assert [row["best/val/accuracy"] for row in rows if "best/val/accuracy" in row] == [summary["best"]["val/accuracy"]]
    assert any("picture" in row for row in rows) and any("sample" in row for row in rows)
