"""Top-5 accuracy and the confusion matrix of a classifier: sums by hand, and the run stays what it is."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.small_run import SignalAt, differences, events, final_state, fit, small_data, small_model
from training import Interrupted, UserError, tasks
from training.runs import checkpoints
from training.runs.record import identity
from training.settings.composition import compose
from training.show.watching.classes import ClassPlots
from training.show.watching.confusion import pixels, plot
from training.tasks.metrics import TopAccuracy


def test_the_target_is_among_the_first_five() -> None:
    outputs = torch.arange(8.0).expand(8, 8)  # class 7 first, class 0 last
    metric = TopAccuracy(torch.device("cpu"))
    metric.update(outputs[:6], torch.arange(6))
    metric.update(outputs[6:], torch.tensor([6, 7]))
    assert float(metric.compute()) == 5 / 8


def test_what_a_run_measures_and_leaves(tmp_path: Path) -> None:
    summary, _ = fit(tmp_path / "run", callbacks=[ClassPlots(dpi=40)], lr=0.2, schedule="none")
    logged = [event["val/top5_accuracy"] for event in events(tmp_path / "run") if event["event"] == "eval"]
    assert len(logged) == 4 and logged[-1] == summary["final"]["val/top5_accuracy"] < 1

    sets = small_data()
    net = small_model(sets)
    net.load_state_dict(checkpoints.load(checkpoints.best_file(tmp_path / "run" / "checkpoints"))["model"])
    counts = np.zeros((10, 10), dtype=int)
    within = 0
    with torch.no_grad():
        for inputs, targets in sets.test.epoch(0):
            outputs = net.eval()(inputs)
            np.add.at(counts, (targets.numpy(), outputs.argmax(1).numpy()), 1)
            within += sum(int(t in row.topk(5).indices) for t, row in zip(targets, outputs, strict=True))
    assert summary["best"]["test/top5_accuracy"] == pytest.approx(within / counts.sum())
    with (tmp_path / "run" / "confusion.csv").open(newline="") as file:
        head, *rows, total = csv.reader(file)
    assert head == ["is / taken for", *map(str, range(10)), "right"]
    assert [[int(cell) for cell in row[1:-1]] for row in rows] == counts.tolist()
    assert float(total[-1]) == pytest.approx(summary["best"]["test/accuracy"], abs=1e-6)
    assert float(rows[3][-1]) == pytest.approx(counts[3, 3] / counts[3].sum(), abs=1e-6)
    assert min(Image.open(tmp_path / "run" / "confusion.png").size) > 150


def test_the_run_stays_what_it_is(tmp_path: Path) -> None:
    fit(tmp_path / "without")
    with pytest.raises(Interrupted):
        fit(tmp_path / "with", callbacks=[ClassPlots(dpi=40), SignalAt(13)])
    fit(tmp_path / "with", callbacks=[ClassPlots(dpi=40)], resume=True)
    states: list[Any] = [final_state(tmp_path / name) for name in ("without", "with")]
    for state in states:
        state["latest"] = {name: value for name, value in state["latest"].items() if "top5" not in name}
        state["best"] = {name: value for name, value in state["best"].items() if "top5" not in name}
        state["callbacks"] = {}
    assert list(differences(*states)) == []
    assert identity(compose(["callbacks=classes"]).values) == identity(compose([]).values)


def test_it_may_choose_the_best_weights(tmp_path: Path) -> None:
    summary, _ = fit(tmp_path / "run", callbacks=[ClassPlots(dpi=40)], max_steps=5, monitor="val/top5_accuracy")
    assert summary["best"]["metric"] == "val/top5_accuracy"


def test_only_where_there_are_classes() -> None:
    few = tasks.build("classification", {"num_classes": 5})
    ClassPlots().check(few)
    assert "top5_accuracy" not in few.metrics
    other = tasks.build("reconstruction", {"likelihood": "gaussian"})
    with pytest.raises(UserError, match=r"^ClassPlots is for classifications, and this is reconstruction"):
        ClassPlots().check(other)


@pytest.mark.parametrize("classes", [2, 30, 120])
def test_the_picture(classes: int, tmp_path: Path) -> None:
    figure = plot(torch.eye(classes, dtype=torch.int64), [f"class {n}" for n in range(classes)], tmp_path, "test set")
    (axes, _) = figure.axes
    assert len(axes.texts) == (classes**2 if classes <= 20 else 0) and figure.get_suptitle().count("100.00 % right")
    assert [len(axes.get_yticklabels()) == classes, classes <= 50] in ([True, True], [False, False])
    picture = pixels(figure)
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 10
