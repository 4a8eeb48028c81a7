"""What the terminal says: a header, lines that fit, a sign of life, and of a sweep a line a run and one table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import toy as toy_functions
from scripts import toy
from tests.cli.conftest import Outcome, runs, summary
from tests.conftest import ROOT
from training.loggers import epoch_line
from training.show import heart, report


def test_a_run_says_what_it_is_before_its_first_step(quick: Callable[..., Outcome], work: Path) -> None:
    outcome = quick("logger=default", "logger.tensorboard=null", "optimizer=kfac", "averaging=ema")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("epoch "))
    head = "\n".join(lines[:first])
    (run,) = runs(work)
    for part in (
        r"optimizer +kfac: lr 0.1, .*damping .*averaging ema", r"model +mlp, 1,210 parameters",
        r"data +digits: 1,280 of 1,294 to train on \(whole batches\), 144 to validate, \d+ to test; 10 classes",
        r"on +cpu \(\d+ threads?\), fp32, 1 process", r"budget +1 epoch, 20 steps of 64",
        rf"run folder +{re.escape(str(run.relative_to(work)))}",
    ):  # fmt: skip
        assert re.search(part, head.replace("\n" + " " * 12, " ")), (part, head)
    assert max(len(line) for line in lines if "run folder" not in line and "TensorBoard" not in line) <= 80


@pytest.mark.parametrize("names", ["loss accuracy", "loss perplexity", "loss wasserstein frechet_mnist"])
@pytest.mark.parametrize("value", [0.5, 1.23456e-05, 123456.789])
def test_an_epoch_fits_a_line(names: str, value: float) -> None:
    values = {f"val/{name}": min(value, 1.0) if name == "accuracy" else value for name in names.split()}
    for epoch, step, seconds in ((1.0, 20, 3.25), (350.0, 136_718, 45_296.0)):
        record: dict[str, Any] = {"event": "eval", "epoch": epoch, "step": step, "seconds": seconds} | values
        line = epoch_line(record, value)
        assert len(line) <= 80 and line.split()[3] == str(step) and "val/loss" in line and "train" in line


def test_silence_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(heart, "SILENCE", 0.05)
    monkeypatch.setattr(heart, "_LOOK", 0.01)
    with heart.beating(), heart.at(lambda: "preparing"):
        time.sleep(0.12)
        with heart.at(lambda: "evaluating"):
            time.sleep(0.12)
    said = capsys.readouterr().out
    assert re.search(r"^preparing  \(0 s\)$", said, re.MULTILINE) and "evaluating  (0 s)" in said
    time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_scripts_break_it_beside_their_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """scripts/toy.py said nothing for three minutes."""
    monkeypatch.setattr(heart, "SILENCE", 0.05)
    monkeypatch.setattr(heart, "_LOOK", 0.01)
    slow = toy_functions.tune
    monkeypatch.setattr(toy_functions, "tune", lambda *given: (time.sleep(0.1), slow(*given))[1])
    assert toy.main(["--evaluations", "3", "--optimizers", "sgd", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "optimizers on toy functions: 1 of 2 paths, now sgd on Rastrigin" in said.err
    assert "paths, now" not in said.out and "sgd" in said.out
    with heart.working("looking", bar=True) as work:
        work.of(3, None, "points")
        time.sleep(0.1)
    assert re.search(r"^looking: 3 points  \(0 s\)$", capsys.readouterr().err, re.MULTILINE)


def test_a_run_goes_on_where_nobody_reads() -> None:
    """`python train.py | head -1`, or a `tee` that has ended."""
    more = "for _ in range(300): say('0' * 1000)"  # than a pipe holds
    code = f"from training.show.report import say\n{more}\nsay('done'); raise SystemExit(7)"
    reader, writer = os.pipe()
    streams: dict[str, Any] = {"stdout": writer, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-uc", code], cwd=ROOT, text=True, **streams)
    os.close(writer)
    assert os.read(reader, 1) == b"0"
    os.close(reader)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 7 and errors.startswith("Nobody reads what is printed any more")
    assert errors.count("\n") == 1


def test_a_sweep_is_a_line_a_run_and_one_table(command: Callable[..., Outcome], work: Path) -> None:
    given = ("model=mlp", "model.hidden=[8]", "callbacks=none", "logger.tensorboard=null", "trainer.max_epochs=1")
    outcome = command("-m", *given, "optimizer=sgd,adam", "seed=0,1")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if line]
    assert [line.split("  ")[0] for line in lines[1:5]] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert all("val/accuracy" in line and " test " in line for line in lines[1:5])
    assert "mean ± std over seeds" in lines[5] and max(map(len, lines[5:])) <= 80
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    best = {}
    for run in runs(work, "multirun/*/*"):
        key = re.match(r"optimizer-(\w+?)_", run.name)
        best.setdefault(f"optimizer-{key[1]}", []).append(summary(run)["best"]["val/accuracy"])  # type: ignore[index]
    order = sorted(best, key=lambda label: -sum(best[label]))
    assert [row[0] for row in table] == order and table[0][2].startswith("* ") and table[0][1] == "2 finished"
    assert all("±" in row[2] and row[3].endswith("%") for row in table)
    one, two = (100 * value for value in best[order[0]])
    assert table[0][2] == f"* {(one + two) / 2:.2f} ± {abs(one - two) / 2**0.5:.2f} %"


def test_a_run_of_a_sweep_fits_a_line() -> None:
    best = {"val/accuracy": 0.27, "test/accuracy": 0.26}
    ended = {"status": "finished", "monitor": "val/accuracy", "best": best, "seconds": {"training": 0.4}}
    run = ("1 of 4", "optimizer-adam_seed-0", ended)
    assert report.outcome(*run) == f"{report.outcome(*run, width=80)}, 0.4 s", "of a file, all of it"
    assert report.outcome(*run, width=80).endswith("val/accuracy 27.00 %, test 26.00 %")
    assert report.outcome(*run, width=1) == "1 of 4  optimizer-adam_seed-0: finished"


def test_a_long_sweep_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert report.rest(400.0, 3, 7) == ", about 13:20 left"
    assert report.rest(990.0, 1, 6) == "" == report.rest(0.0, 5, 5)


def test_rows_without_seeds_keep_their_names() -> None:
    rows = [("lr-1_seed-0", {"status": "finished", "best": {"val/loss": 2.0}}), ("lr-2_seed-0", {"status": "failed"})]
    table = report.sweep_table(rows, "val/loss")
    assert [*table.columns[0].cells] == ["lr-1_seed-0", "lr-2_seed-0"]
    assert [*table.columns[1].cells] == ["finished", "failed"] and [*table.columns[2].cells] == ["* 2", ""]
