"""Grids of runs: ranges of good values, heat maps, and the command that makes and reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis import compare
from analysis.sensitivity import Axis, Extent, grids, near_best, plot, to_markdown, varying
from scripts import sensitivity as script


@pytest.mark.parametrize(
    ("values", "higher", "expected"),
    [
        ([0.90, 0.97, 0.99, 0.98, 0.96, 0.98], True, (1, 2, 3)),  # past one that is worse nothing counts
        ([0.99, 0.98, None, 0.99], True, (0, 0, 1)),  # nor past one that did not end
        ([1.03, 1.02, 1.0, 1.02], False, (1, 2, 3)),
        ([None, 2.0, None], False, (1, 1, 1)),
        ([-3.0, -2.97, -2.8], False, (0, 0, 1)),  # a likelihood's loss may be below zero
    ],
)
def test_the_range_around_the_best(
    values: list[float | None], higher: bool, expected: tuple[int, int, int]
) -> None:
    assert near_best(values, higher) == expected


def test_axes_are_multiples_or_values() -> None:
    assert Axis.parse("optimizer.lr:2^-1..2^1", "x").of(0.1, "sgd") == [0.05, 0.1, 0.2]
    assert Axis.parse("optimizer.lr:10^-2..10^2/2", "x").of(0.3, "sgd") == [0.003, 0.3, 30]
    assert Axis.parse("optimizer.kl_clip:1e-2,1e-3", "y").of(None, "kfac") == [1e-3, 1e-2]
    for wrong in ("optimizer.lr", ":2^1..2^2", "k:2^3..2^1", "k:2^1..3^2", "k:1^0..1^2", "k:a,b", "k:2^0..2^4/0"):
        with pytest.raises(ValueError, match="x must be KEY:"):
            Axis.parse(wrong, "x")
    with pytest.raises(ValueError, match="is 'auto', which has no multiples"):
        Axis.parse("optimizer.lr:2^0..2^1", "x").of("auto", "kfac")


def write_run(folder: Path, optimizer: str, lr: float, damping: float | None, seed: int, value: float | None) -> None:
    """A run folder as far as an analysis reads it; None: diverged."""
    folder.mkdir(parents=True)
    own = {"_target_": f"optimizers.{optimizer}", "lr": lr} | ({} if damping is None else {"damping": damping})
    config: dict[str, Any] = {
        "seed": seed, "paths": {"data": "datasets"}, "trainer": {"max_epochs": 1}, "model": {"_target_": "models.mlp"},
        "optimizer": own, "dataset": {"_target_": "data.digits"}, "scheduler": {"_target_": "training.schedules.none"},
        "choices": {"optimizer": optimizer, "model": "mlp", "dataset": "digits"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    event = {"event": "train", "step": 1, "epoch": 1.0, "seconds": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    final = {} if value is None else {"val/accuracy": value, "train/loss": 1 - value}
    summary = {"status": "diverged" if value is None else "finished", "final": final, "monitor": "val/accuracy"}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three rates by two dampings of K-FAC with two seeds, and three rates of SGD."""
    table = {(0.1, 0.01): 0.95, (0.2, 0.01): 0.99, (0.4, 0.01): 0.98, (0.1, 0.1): 0.90, (0.2, 0.1): 0.98}
    for (lr, damping), value in table.items():
        for seed in (0, 1):
            write_run(tmp_path / "kfac" / f"{lr}_{damping}_{seed}", "kfac", lr, damping, seed, value + 0.002 * seed)
    write_run(tmp_path / "kfac" / "one", "kfac", 0.4, 0.1, 0, 0.97)
    write_run(tmp_path / "kfac" / "other", "kfac", 0.4, 0.1, 1, None)
    for lr, value in ((0.01, 0.97), (0.02, 0.975), (0.04, 0.9)):
        write_run(tmp_path / "sgd" / str(lr), "sgd", lr, None, 0, value)
    return tmp_path


def test_grids_and_what_they_say(sweep: Path) -> None:
    runs = [compare.read_run(path) for path in compare.find_runs([sweep])]
    assert varying(runs) == ["optimizer.lr", "optimizer.damping"]
    kfac, sgd = grids(runs, "optimizer.lr", "optimizer.damping")
    assert (kfac.label, kfac.xs, kfac.ys, kfac.seeds) == ("kfac", [0.1, 0.2, 0.4], [0.01, 0.1], 2)
    expected = np.array([[0.951, 0.991, 0.981], [0.901, 0.981, math.nan]])
    np.testing.assert_allclose(kfac.values, expected)
    assert kfac.states[1][2] == "diverged" and kfac.best == (0, 1)
    assert kfac.near().tolist() == [[False, True, True], [False, True, False]]
    assert kfac.extent("x") == Extent(0.2, 0.2, 0.4, (False, True)) and kfac.extent("x").octaves == 1
    assert kfac.extent("y").octaves == pytest.approx(math.log2(10))
    assert kfac.near(0.05).sum() == 4
    assert (sgd.y_key, sgd.values.shape, sgd.extent("y")) == (None, (1, 3), None)
    assert str(sgd.extent("x")) == "1 (beyond 0.01 to 0.02)"
    table = to_markdown([kfac, sgd], "val/accuracy")
    assert "| kfac | 99.1 at optimizer.lr=0.2, optimizer.damping=0.01 | 1 (0.2 to beyond 0.4) |" in table
    assert "| sgd | 97.5 at optimizer.lr=0.02 | 1 (beyond 0.01 to 0.02) |  | 2 of 3 runs |" in table
    loss = grids(runs, "optimizer.lr", "optimizer.damping", "train/loss")[1]
    assert loss.best == (0, 1) and not loss.higher


def test_the_picture_has_a_map_an_optimizer(sweep: Path) -> None:
    runs = [compare.read_run(path) for path in compare.find_runs([sweep])]
    figure = plot(grids(runs, "optimizer.lr", "optimizer.damping"), "val/accuracy", title="mlp on digits")
    kfac, sgd = figure.axes[:2]
    assert kfac.get_title() == "kfac\noctaves of lr 1, damping 3.32"
    shown = [text.get_text() for text in kfac.texts]
    assert shown == ["95.1", "99.1", "98.1", "90.1", "98.1", "×"]
    assert len(kfac.patches) == 3 and len(sgd.patches) == 2
    assert sgd.get_ylabel() == "" and kfac.get_ylabel() == "optimizer.damping"


def test_what_is_missing_is_a_sentence(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [compare.read_run(path) for path in compare.find_runs([sweep])]
    with pytest.raises(ValueError, match="no run has ended with 'val/loss'; they have train/loss, val/accuracy"):
        grids(runs, "optimizer.lr", None, "val/loss")
    with pytest.raises(ValueError, match=r"no number for optimizer.betas; what varies is optimizer.lr"):
        grids(runs, "optimizer.betas", None)
    with pytest.raises(ValueError, match=r"several runs of kfac have .*lr=0.1 and differ in optimizer.damping"):
        grids(runs, "optimizer.lr", None)
    for given, said in {
        ("optimizers=[kfax]",): "optimizers has no 'kfax' (did you mean 'kfac'?)",
        ("optimizer=sgd",): "optimizer=sgd: give optimizers=[sgd], of which there may be several",
        ("optimizers=[]",): "optimizers is empty: give some",
        ("nowhere",): "there is no folder nowhere",
        (str(sweep), "model=mlp"): "model=mlp is for new runs",
        (str(sweep), "within=2"): "within must be a share in [0, 1)",
        ("x=optimizer.lr:2^a..2^4", "model=mlp"): "x must be KEY:2^-4..2^4",
    }.items():
        assert script.main(list(given)) == 1
        assert said in capsys.readouterr().err


def test_the_command_reads_runs_that_are_there(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(sweep), f"out={sweep / 'out'}"]) == 0
    assert "| kfac | 99.1 at optimizer.lr=0.2" in capsys.readouterr().out
    assert (sweep / "out" / "sensitivity.png").stat().st_size < 150_000


def test_the_command_sweeps_and_skips_what_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["optimizers=[sgd,kfac]", "x=optimizer.lr:2^1..2^1", "y=optimizer.damping:0.01,0.1", "name=grid",
               "experiment=digits_mlp", "trainer.max_epochs=null", "trainer.max_steps=2", "logger=quiet",
               "callbacks=none",
               "dataset.limit_train=0.1", "model.hidden=[8]", "metric=val/loss"]  # fmt: skip
    assert script.main(command) == 0
    said = capsys.readouterr().out
    assert "sgd has no optimizer.damping: a strip of optimizer.lr alone" in said
    assert len(list((tmp_path / "multirun" / "grid").glob("*/*/summary.json"))) == 1 + 2
    assert (tmp_path / "multirun" / "grid" / "sensitivity.png").exists()
    assert script.main(command) == 0
    assert capsys.readouterr().out.count("skipped") == 3
