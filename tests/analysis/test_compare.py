"""Comparing runs: what is a group, what its figures are, what is drawn, and what the command says."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import same_color, to_hex
from rich.console import Console

from analysis import compare
from analysis.compare import Comparison, Curve, Group, LoadedRun, Reference, Spread, Target
from scripts.compare import fitted, main
from tests.cli.conftest import QUICK, Outcome, command, work  # noqa: F401 - fixtures

CONFIG: dict[str, Any] = {
    "paths": {"data": "datasets", "runs": "runs", "sweeps": "multirun"},
    "dataset": {"_target_": "data.digits", "root": "datasets/digits", "batch_size": 64},
    "model": {"_target_": "models.mlp", "hidden": [16]},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "nesterov": False},
    "scheduler": {"_target_": "training.schedules.none"},
    "trainer": {"max_epochs": 4, "max_steps": None, "device": "auto", "log_every_steps": 2},
    "callbacks": {"plots": {"_target_": "training.callbacks.CurvePlots", "dpi": 120}},
    "schedules": {},
    "seed": 0,
    "name": None,
}
CHOICES = {"dataset": "digits", "model": "mlp", "optimizer": "sgd", "scheduler": "none", "trainer": "default"}
LOSSES = (2.0, 1.0, 0.5, 0.25)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder: an epoch of four steps of half a second each, logged every second step."""

    def write(
        where: str,
        losses: tuple[float | None, ...] = LOSSES,
        *,
        optimizer: str = "sgd",
        status: str | None = "finished",
        pace: float = 0.5,
        start: dict[str, float] | None = None,
        **changes: Any,
    ) -> Path:
        config = copy.deepcopy(CONFIG) | {"choices": CHOICES | {"optimizer": optimizer}}
        config["optimizer"]["_target_"] = f"torch.optim.{optimizer}"
        for key, value in changes.items():
            group, _, leaf = key.rpartition("__")
            (config[group] if group else config)[leaf] = value
        folder = tmp_path / where
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [entry("start", 0, pace, **start)] if start else []
        for epoch, loss in enumerate(losses, 1):
            lines += [entry("train", 4 * epoch - 2, pace, train_loss=loss and 1.5 * loss)]
            lines += [entry("train", 4 * epoch, pace, train_loss=loss and 0.5 * loss, train_accuracy=epoch / 10)]
            lines += [
                entry("eval", 4 * epoch, pace, val_loss=loss and 1.1 * loss, val_accuracy=0.9 - 0.1 * (loss or 0))
            ]
        lines.append(entry("test", 4 * len(losses), pace, test_loss=9.0))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if status:
            summary = {"status": status, "hardware": {"device": "cpu", "cpu": "a chip", "threads": 1}}
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return write


def entry(event: str, step: int, pace: float, **values: float | None) -> dict[str, Any]:
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    return {"event": event, "step": step, "epoch": step / 4, "seconds": step * pace, "wall": step * pace, **named}


def load(*folders: Path) -> list[Group]:
    groups, _ = compare.group_runs([compare.read_run(folder) for folder in folders])
    return groups


def run_with(events: list[dict[str, Any]]) -> LoadedRun:
    return LoadedRun(Path("run"), CONFIG, CHOICES, events, {})


# -- curves ------------------------------------------------------------------------------------------------------------


def test_an_epochs_value_is_the_mean_over_its_steps(make: Callable[..., Path]) -> None:
    run = compare.read_run(make("run", (2.0, None, 0.5)))
    curve = run.curve("train/loss")
    assert curve.value.tolist() == [2.0, 0.5] and curve.epoch.tolist() == [1, 3], "an epoch of nulls is left out"
    assert curve.step.tolist() == [4, 12] and curve.seconds.tolist() == [2, 6]
    evaluated = run.curve("val/loss")
    assert evaluated.value == pytest.approx([2.2, 0.55]) and evaluated.epoch.tolist() == [1, 3]
    assert len(run.curve("test/loss").value) == 0 and len(run.curve("train/nothing").value) == 0


def test_windows_across_epochs_count_where_their_steps_lie() -> None:
    # Four steps an epoch, logged every three, over two and a half epochs: windows 1-3, 4-6, 7-9 and 10.
    events = [entry("train", step, 2.0, train_loss=v) for step, v in ((3, 1.0), (6, 4.0), (9, 7.0), (10, 10.0))]
    curve = run_with(events).curve("train/loss")
    expected = [(3 * 1 + 4) / 4, (2 * 4 + 2 * 7) / 4, (7 + 10) / 2]
    assert curve.value == pytest.approx(expected) and curve.epoch == pytest.approx([1, 2, 2.5])
    assert curve.seconds == pytest.approx([8, 16, 20]), "an epoch's end lies between two events"


def test_a_window_of_several_epochs_counts_in_each() -> None:
    curve = run_with([entry("train", 8, 1.0, train_loss=3.0), entry("train", 12, 1.0, train_loss=1.0)]).curve(
        "train/loss"
    )
    assert curve.value.tolist() == [3, 3, 1]


def test_time_to_target() -> None:
    epochs, seconds = np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 40])
    loss = Curve(epochs, epochs, seconds, np.array([3.0, 1.0, 2.0, 0.5]))
    assert Target("train/loss", 1.0).reached(loss) == (20, 2), "the first, though it is lost again"
    assert Target("train/loss", 0.4).reached(loss) == (math.inf, math.inf)
    accuracy = Curve(epochs, epochs, seconds, np.array([0.5, 0.7, 0.9, 0.8]))
    assert Target("val/accuracy", 0.7).reached(accuracy) == (20, 2)
    assert Target("val/accuracy", 0.95).reached(accuracy) == (math.inf, math.inf)


def test_the_plateau_is_read_where_a_run_knows_it(make: Callable[..., Path]) -> None:
    run = compare.read_run(make("run", start={"plateau_loss": 0.69}))
    assert run.plateau("train/loss") == run.plateau("val/loss") == 0.69 and run.plateau("train/accuracy") is None
    for summary, loss, mse in (({}, None, None), ({"plateau": 3}, 3.0, None), ({"plateau": {"mse": 4}}, None, 4.0)):
        run = LoadedRun(Path("run"), CONFIG, CHOICES, [], summary)
        assert (run.plateau("train/loss"), run.plateau("train/mse")) == (loss, mse)


# -- groups ------------------------------------------------------------------------------------------------------------


def test_groups_differ_by_more_than_the_seed(make: Callable[..., Path]) -> None:
    groups = load(
        make("a", seed=1), make("b", optimizer="adam"), make("c", seed=0, name="again", trainer__device="cpu"),
        make("d", optimizer="adam", seed=3, callbacks={}),
    )  # fmt: skip
    assert [group.label for group in groups] == ["optimizer=sgd", "optimizer=adam"]
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [0, 3]]


def test_labels_say_what_differs(make: Callable[..., Path]) -> None:
    one = load(make("a", seed=5))
    assert [group.label for group in one] == ["optimizer=sgd"]
    groups = load(
        make("b"), make("c", optimizer__lr=0.01), make("d", optimizer="adam"),
        make("e", model__hidden=[32, 16], schedules={"momentum": {"end": 0.5}}),
    )  # fmt: skip
    assert [group.label for group in groups] == [
        "model.hidden=[16] optimizer=sgd optimizer.lr=0.1",
        "model.hidden=[16] optimizer=sgd optimizer.lr=0.01",
        "model.hidden=[16] optimizer=adam",
        "model.hidden=[32,16] optimizer=sgd optimizer.lr=0.1 schedules.momentum.end=0.5",
    ]
    critic: dict[str, Any] = {"critic": {"lr": 1.0, "damping": 0.1}, "choices__optimizer@critic": "kfac"}
    players = load(make("h"), make("i", **critic), make("j", **critic | {"critic": {"lr": 2.0, "damping": 0.1}}))
    assert [group.label for group in players] == [
        "optimizer=sgd", "critic=kfac critic.lr=1", "critic=kfac critic.lr=2"
    ]  # fmt: skip
    budgets = load(make("f"), make("g", trainer__max_epochs=None, trainer__max_steps=9))
    assert [group.label for group in budgets] == ["trainer.max_epochs=4", "trainer.max_steps=9"]


def test_the_same_run_twice_counts_once(make: Callable[..., Path]) -> None:
    old, new = make("z_old"), make("a_new", (1.0,))
    os.utime(old / "metrics.jsonl", (1, 1))
    groups, remarks = compare.group_runs([compare.read_run(folder) for folder in (new, old)])
    assert [run.folder for run in groups[0].runs] == [new]
    assert len(remarks) == 1 and remarks[0].endswith(f"the same run again and newer: {old}")


def test_a_group_is_found_by_what_sets_it_apart(make: Callable[..., Path]) -> None:
    groups = load(make("a"), make("b", optimizer__lr=0.01), make("c", optimizer="adam"))
    assert compare.match(groups, "adam", "baseline") is groups[2]
    assert compare.match(groups, "optimizer=adam", "baseline") is groups[2]
    assert compare.match(groups, "optimizer.lr=0.01", "baseline") is groups[1]
    assert compare.match(groups, groups[0].label, "baseline") is groups[0]
    with pytest.raises(
        ValueError, match=r"^baseline: 'sgd' fits 2 groups; write one of: optimizer=sgd optimizer.lr=0.1;"
    ):
        compare.match(groups, "sgd", "baseline")
    with pytest.raises(ValueError, match=r"^reference: 'kfac' fits no group; write one of: .*optimizer=adam$"):
        compare.match(groups, "kfac", "reference")


def test_run_folders_are_found_below_those_given(make: Callable[..., Path], tmp_path: Path) -> None:
    one, two = make("sweep/one"), make("sweep/deep/two")
    make("sweep/never_began").joinpath("metrics.jsonl").unlink()
    assert compare.find_runs([tmp_path / "sweep", one]) == sorted([one, two])
    assert compare.find_runs([two]) == [two]


# -- figures -----------------------------------------------------------------------------------------------------------


def table(comparison: Comparison) -> dict[str, compare.Row]:
    return {row["group"]: row for row in compare.rows(comparison)}


def test_a_row_a_group(make: Callable[..., Path]) -> None:
    halves = tuple(loss / 2 for loss in LOSSES)
    groups = load(make("a"), make("b", halves, seed=1), make("c", (4.0, 2.0, 3.0), optimizer="adam", pace=0.25))
    target = Target("train/loss", 0.5)
    rows = table(Comparison(groups, target=target, epochs=[1, 3, 4, 5]))
    *_, last = compare.to_table(Comparison(groups, "val/loss"), ["step 4", "step 12", "step 3"]).splitlines()
    assert last == "| optimizer=adam | 4.4 | 3.3 | – |"
    sgd, adam = rows["optimizer=sgd"], rows["optimizer=adam"]
    assert (sgd["runs"], sgd["status"]) == (2, "finished")
    assert sgd["final train/loss"].mean == pytest.approx(0.1875)
    assert sgd["final train/loss"].std == pytest.approx(0.125 / math.sqrt(2))
    assert sgd["epoch 1"].mean == pytest.approx(1.5) and sgd["epoch 3"].mean == pytest.approx(0.375)
    assert sgd["best val/loss"].mean == pytest.approx(1.1 * 0.1875)
    assert (sgd["s/epoch"].mean, sgd["s/step"].mean, adam["s/step"].mean) == (2.0, 0.5, 0.25)
    assert math.isnan(sgd["epoch 5"].mean) and math.isnan(adam["epoch 4"].mean), "not reached by any"
    assert (adam["final train/loss"].mean, adam["best train/loss"].mean) == (3.0, 2.0)
    assert math.isnan(adam["final train/loss"].std)

    # The targets are reached after epochs 3 and 2.
    assert (sgd["reached"], sgd["epochs to target"], sgd["s to target"]) == (2, 2.5, 5.0)
    assert (adam["reached"], adam["s to target"], adam["s to target / baseline"]) == (0, math.inf, math.inf)
    assert sgd["s to target / baseline"] == 1 and adam["s/step / baseline"] == 0.5
    assert adam["final train/loss / baseline"] == pytest.approx(16)
    assert adam["epoch 3 / baseline"] == pytest.approx(3.0 / 0.375) and sgd["epoch 3 / baseline"] == 1
    other = table(Comparison(groups, target=target, baseline=groups[1]))["optimizer=sgd"]
    assert other["s/step / baseline"] == 2 and math.isnan(other["s to target / baseline"]), "nothing to be a ratio to"


def test_half_of_the_seeds_that_miss_the_target_make_it_missed(make: Callable[..., Path]) -> None:
    group = load(make("a"), make("b", (3.0, 3.0), seed=1))
    row = table(Comparison(group, target=Target("train/loss", 0.5)))["optimizer=sgd"]
    assert (row["reached"], row["s to target"]) == (1, math.inf)


def test_what_diverged_has_no_end(make: Callable[..., Path]) -> None:
    groups = load(make("a"), make("b", (2.0, 1e9), seed=1, status="diverged"), make("c", seed=2, status=None))
    row = table(Comparison(groups))["optimizer=sgd"]
    assert row["status"] == "1 finished, 1 diverged, 1 unfinished"
    assert row["final train/loss"] == Spread(0.25, 0.0) and row["best train/loss"] == Spread(0.25, 0.0)


def reference(tmp_path: Path, **series: list[float]) -> str:
    path = tmp_path / "published.json"
    path.write_text(json.dumps({"CURVES/sgd": series}))
    return f"{path}:CURVES/sgd=optimizer=sgd"


def test_beside_published_values(make: Callable[..., Path], tmp_path: Path) -> None:
    groups = load(make("a"), make("b", optimizer="adam"))
    curve, label = Reference.parse(reference(tmp_path, train=[4.0, 2.0, 1.0, 0.125, 0.1], val=[5.0]))
    assert label == "optimizer=sgd" and curve.name == "CURVES/sgd"
    rows = table(Comparison(groups, epochs=[2, 4], references={label: curve}))
    sgd, adam = rows["optimizer=sgd"], rows["optimizer=adam"]
    assert (sgd["published epoch 2"], sgd["epoch 2 / published"]) == (2.0, 0.5)
    assert sgd["published epoch 4 / baseline"] == 1 and math.isnan(adam["published epoch 4 / baseline"])
    assert (sgd["last epoch"], sgd["published final"], sgd["final / published"]) == (4, 0.125, 2.0)
    assert math.isnan(adam["published final"]) and math.isnan(adam["final / published"])
    assert curve.curve("val/loss").tolist() == [5.0] and len(curve.curve("val/accuracy")) == 0


def test_tables_hold_what_the_rows_hold(make: Callable[..., Path], tmp_path: Path) -> None:
    groups = load(make("a"), make("b", seed=1), make("c", (4.0, 3.0), optimizer="adam", status="interrupted"))
    curve, label = Reference.parse(reference(tmp_path, train=[4.0, 2.0]))
    target = Target("train/loss", 0.5)
    comparison = Comparison(groups, target=target, epochs=[1, 3], references={label: curve}, remarks=["a remark"])
    rows = compare.rows(comparison)
    read = list(csv.DictReader(io.StringIO(compare.to_csv(rows))))
    assert [line["group"] for line in read] == ["optimizer=sgd", "optimizer=adam"]
    assert (read[0]["epoch 3"], read[0]["epoch 3 std"], read[1]["epoch 3"]) == ("0.5", "0.0", "")
    assert read[1]["s to target"] == "inf" and float(read[0]["published epoch 1"]) == 4

    text = compare.to_markdown(comparison, rows)
    tables = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 4 * 4 and "- a remark\n" in text and "Measured on cpu, a chip, 1 thread(s)." in text
    assert "| optimizer=sgd | 2 ± 0 | 4 | 0.5 | 0.5 ± 0 | – | – |" in text
    results = text[: text.index("## train/loss at")]
    assert results.index("| * optimizer=sgd |") < results.index("| optimizer=adam |"), "the best first, with a mark"
    assert "| optimizer=adam | 1 | interrupted | 3 | 3 | 3.3 | 3.3 | 12 |" in text and "not reached" in text
    assert all(len(sheet.header) == len(line) for sheet in compare.sheets(comparison, rows) for line in sheet.lines)
    percent = Comparison(groups, metric="val/accuracy")
    assert "| 87.5 ± 0 % |" in compare.to_markdown(percent, compare.rows(percent))


# -- the picture -------------------------------------------------------------------------------------------------------


def drawn(axes: Axes) -> list[tuple[str, str, list[float], list[float]]]:
    """Colour, style and points of what is drawn, horizontal lines excepted."""
    lines = [line for line in axes.get_lines() if len(set(line.get_ydata())) > 1]
    return [(line.get_color(), line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def test_what_is_drawn(make: Callable[..., Path], tmp_path: Path) -> None:
    lower = tuple(0.5 * loss for loss in LOSSES)
    plateau = {"plateau_loss": 0.7}
    groups = load(
        make("a", start=plateau), make("b", lower, seed=1, start=plateau), make("c", (3.0, 2.0), optimizer="adam")
    )
    curve, label = Reference.parse(reference(tmp_path, train=[4.0, 2.0, 1.0, 0.5, 0.25, 0.1]))
    figure = compare.plot(Comparison(groups, target=Target("train/loss", 0.3), references={label: curve}))
    by_epoch, by_step, by_time = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "step", "training seconds"]
    assert (by_epoch.get_ylabel(), by_epoch.get_yscale()) == ("train/loss", "log")

    sgd, adam, published = drawn(by_epoch)
    assert sgd[1:] == ("-", [1, 2, 3, 4], pytest.approx([0.75 * loss for loss in LOSSES]))
    assert adam[1:] == ("-", [1, 2], [3, 2]) and not same_color(sgd[0], adam[0])
    assert published == (sgd[0], "--", [1, 2, 3, 4], [4, 2, 1, 0.5]), "as far as the longest run"
    assert [line[2] for line in drawn(by_step)] == [[4, 8, 12, 16], [4, 8], [4, 8, 12, 16]]
    assert len(drawn(by_time)) == 2, "published seconds are another machine's"
    assert len(by_epoch.collections) == 1, "one band: adam has one seed"
    level = {
        (line.get_linestyle(), line.get_ydata()[0]) for line in by_time.get_lines() if len(set(line.get_ydata())) == 1
    }
    assert level == {("--", 0.7), (":", 0.3)}
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [
        "optimizer=sgd (2 seeds)", "optimizer=adam", "published CURVES/sgd", "constant output 0.7", "target 0.3",
    ]  # fmt: skip


@pytest.mark.parametrize("by", [("epoch",), ("epoch", "step", "seconds")])
def test_the_legend_is_no_wider_than_the_picture(make: Callable[..., Path], by: tuple[str, ...]) -> None:
    names = [f"optimizer=a_name_that_is_long_{i}" for i in range(7)]
    groups = load(*(make(name, optimizer=name.removeprefix("optimizer=")) for name in names))
    figure = compare.plot(Comparison(groups), by)
    figure.savefig(io.BytesIO())
    assert figure.legends[0].get_window_extent().width <= figure.bbox.width


def test_runs_of_unequal_length(make: Callable[..., Path]) -> None:
    groups = load(make("a", (4.0, 3.0, 2.0, 1.0)), make("b", (2.0, 1.0), seed=1, pace=1.0))
    by_epoch, _, by_time = compare.plot(Comparison(groups)).axes
    mean, beyond = drawn(by_epoch)
    assert mean[2:] == ([1, 2], [3, 2]) and beyond[2:] == ([2, 3, 4], [3, 2, 1]), "then one run, thin"
    (mean,) = drawn(by_time)
    assert mean[2:] == ([4, 6, 8], [(3 + 2) / 2, (2 + 1.5) / 2, 1]), "at the same seconds, between the points of each"


def test_what_blew_up_does_not_flatten_the_others(make: Callable[..., Path]) -> None:
    blown = make("b", (2.0, 1e3, 1e12), seed=1, status="diverged")
    axes = compare.plot(Comparison(load(make("a"), blown, make("c", optimizer="adam")))).axes[0]
    assert 2 < axes.get_ylim()[1] < 20 and 0.1 < axes.get_ylim()[0] < 0.25
    sgd, diverged, adam = drawn(axes)
    assert sgd[3] == adam[3] == list(LOSSES) and diverged[3] == [2.0, 1e3, 1e12] and diverged[0] == sgd[0]


def test_accuracies_and_zeros_have_a_straight_axis(make: Callable[..., Path]) -> None:
    groups = load(make("a", (1.0, 0.5, 0.0)))
    assert compare.plot(Comparison(groups)).axes[0].get_yscale() == "linear"
    figure = compare.plot(Comparison(groups, metric="val/accuracy"))
    figure.draw_without_rendering()
    assert figure.axes[0].get_yticklabels()[0].get_text().endswith("%")


@pytest.mark.parametrize("count", [1, 8, 23])
def test_every_group_has_a_colour_and_a_place(make: Callable[..., Path], count: int) -> None:
    groups = load(*(make(f"run{i}", optimizer__lr=0.1 * (i + 1)) for i in range(count)))
    figure = compare.plot(Comparison(groups))
    colours = {to_hex(line[0]) for line in drawn(figure.axes[0])}
    assert len(colours) == count
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes) and legend.y0 >= 0
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["nowhere"], r"runs: there is no folder nowhere; give run folders"),
        (["empty"], r"runs: empty holds no run"),
        (["runs", "--metric", "train/los"], r"metric: no run has logged 'train/los'; they have train/accuracy, train/"),
        (["runs", "--target", "train/loss"], r"target must be METRIC=VALUE such as train/loss=0.0796, got 'train/loss"),
        (["runs", "--target", "train/loss=nan"], r"target must be METRIC=VALUE .*, got 'train/loss=nan'"),
        (["lists"], r"runs: .*summary.json is no JSON of a run"),
        (["runs", "--target", "val/los=1"], r"metric: no run has logged 'val/los'"),
        (["runs", "--metric", "val/loss", "--target", "val/los=1"], r"target: no run has logged 'val/los'"),
        (["runs", "--epochs", "1,x"], r"epochs must be whole numbers such as 10,25,200, got '1,x'"),
        (["runs", "--epochs", "0"], r"epochs must be at least 1, got 0"),
        (["runs", "--baseline", "kfac"], r"baseline: 'kfac' fits no group; write one of: optimizer=sgd"),
        (["runs", "--reference", "x.json"], r"reference must be FILE.json:KEY=label, got 'x.json'"),
        (["runs", "--reference", "x.json:k=sgd"], r"reference: x.json cannot be read as JSON"),
        (["runs", "--reference", "p.json:j=sgd"], r"reference: p.json has no curves under 'j'; it has k"),
        (["runs", "--reference", "p.json:k=adam"], r"reference: 'adam' fits no group"),
        (["runs", "--reference", "p.json:k=sgd", "--metric", "val/loss"], r"reference: k has no curve of val/loss"),
        (["runs", "--out", "p.json/x"], r"out: p.json/x cannot be written \(Not a directory\); give another folder"),
        (["broken"], r"runs: .*summary.json is no JSON"),
        (["torn"], r"line 1 of .*metrics.jsonl is not a JSON object"),
        (["foreign"], r"config.yaml is not the configuration of a run"),
        (["runs", "--colour", "red"], r"unrecognized arguments: --colour red \(see --help\)"),
        ([], r"the following arguments are required"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(
    given: list[str], says: str, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make("runs/a")
    make("broken/a").joinpath("summary.json").write_text("{")
    make("lists/a").joinpath("summary.json").write_text("[]")
    make("torn/a").joinpath("metrics.jsonl").write_text("{\n{}\n")
    make("foreign/a").joinpath("config.yaml").write_text("a: 1\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.json").write_text(json.dumps({"k": {"train": [1.0]}}))
    assert main(given) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(says, line), line
    assert not list(tmp_path.rglob("comparison.*"))


def test_from_a_sweep_to_its_comparison(command: Callable[..., Outcome], work: Path, capfd: Any) -> None:  # noqa: F811
    swept = command("-m", *QUICK, "name=small", "optimizer=sgd,adam", "seed=0,1", "trainer.max_epochs=2")
    assert swept.code == 0, swept.err
    assert main(["multirun", "--target", "train/loss=2", "--epochs", "1,2", "--baseline", "optimizer=sgd"]) == 0
    shown = capfd.readouterr().out
    assert "Results; ratios to optimizer=sgd" in shown and "optimizer=adam" in shown
    folder = work / "multirun" / "small"
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "# mlp on digits: 2 groups of runs" in (folder / "comparison.md").read_text()
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [row["group"] for row in rows] == ["optimizer=sgd", "optimizer=adam"]
    losses = [float(row["final train/loss"]) for row in rows]
    assert losses == sorted(losses) and all(float(row["final test/loss"]) > 0 for row in rows)
    assert "* optimizer=sgd" in shown and "final test/loss" in shown
    assert all(row["runs"] == "2" and float(row["epoch 2"]) < float(row["epoch 1"]) for row in rows)
    assert float(rows[0]["s/step / baseline"]) == 1


def test_tables_break_no_word_on_a_narrow_terminal() -> None:
    labels = [f"optimizer={name} optimizer.lr=0.01 optimizer.momentum=0.95" for name in ("kfac", "sgd")]
    header = ["group", "runs", "final train/loss", "best train/loss", "final val/loss", "best val/loss", "s/step ratio"]
    lines = [[f"* {labels[0]}", "5", *["0.7202 ± 0.044"] * 5], [labels[1], "5", *["1.1 ± 0.1"] * 5]]
    sheets = [compare.Sheet(f"Results; ratios to {labels[1]}", header, lines)]
    tables, legend = fitted(sheets, 80)
    console = Console(width=80, file=io.StringIO())
    for table in tables:
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(shown.count(word) == 1 for word in header[1:]) and shown.count("0.7202 ± 0.044") == 5
    assert "Results; ratios to 2 sgd" in shown and "Results, more" in shown
    assert shown.count("* 1 kfac") == len(tables) > 1
    assert legend == [f"1 kfac: {labels[0]}", f"2 sgd: {labels[1]}"]
    (wide,), none = fitted([compare.Sheet("Results", ["group", "runs"], [["optimizer=sgd", "1"]])], 80)
    assert not none and list(wide.columns[0].cells) == ["optimizer=sgd"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_reference_may_be_written_by_any_system(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "curves.json"
    path.write_bytes('{"größe": {"train": [1.0]}}\r\n'.encode(encoding))
    assert Reference.parse(f"{path}:größe=sgd")[0].name == "größe"
    path.write_bytes('{"größe": {}}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"curves.json cannot be read as JSON \(.*byte 0xf6 in position 4"):
        Reference.parse(f"{path}:größe=sgd")
