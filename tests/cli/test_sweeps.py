"""A sweep: every run once, whatever happens to some of them, and a table at the end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import train
from tests.cli.conftest import Outcome, metrics, runs, summary, unfinish

ALL = "multirun/*/*"


def test_a_sweep_and_its_second_launch(quick: Callable[..., Outcome], work: Path) -> None:
    argv = ("-m", "optimizer=sgd,adam", "seed=0,1", "optimizer.lr=0.01", "trainer.max_epochs=2")
    outcome = quick(*argv)
    assert outcome.code == 0, outcome.err
    found = runs(work, ALL)
    assert [re.sub(r"_[0-9a-f]{8}$", "", run.name) for run in found] == [
        "optimizer-adam_seed-0", "optimizer-adam_seed-1", "optimizer-sgd_seed-0", "optimizer-sgd_seed-1",
    ]  # fmt: skip
    assert {run.parent.name for run in found} == {"mlp_digits"}, "named after what the runs have in common"
    assert "4 runs" in outcome.out and outcome.out.count(": finished") == 4
    assert list(work.iterdir()) == [work / "multirun"]

    # One run killed on the way: the second launch resumes it and leaves the others alone.
    expected = {run: metrics(run) for run in found}
    written = {run: (run / "summary.json").stat().st_mtime_ns for run in found}
    unfinish(found[1])
    outcome = quick(*argv)
    assert outcome.code == 0 and outcome.out.count("skipped") == 3 and outcome.out.count("resuming") == 1
    assert runs(work, ALL) == found and {run: metrics(run) for run in found} == expected
    assert [run for run in found if (run / "summary.json").stat().st_mtime_ns != written[run]] == [found[1]]

    # A sweep over other values finds the runs that it shares with this one.
    outcome = quick("-m", "optimizer=sgd,adamw", "optimizer.lr=0.01", "trainer.max_epochs=2")
    assert outcome.out.count("skipped") == 1 and len(runs(work, ALL)) == 5


def test_a_budget_is_part_of_a_sweeps_run(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick("-m", "trainer.max_epochs=1,2").code == 0
    assert [summary(run)["epochs"] for run in runs(work, ALL)] == [1, 2]


def test_failures_are_recorded_and_the_sweep_goes_on(quick: Callable[..., Outcome], work: Path) -> None:
    argv = ("-m", "dataset.batch_size=5000,64,32", "name=sizes")
    outcome = quick(*argv)
    assert outcome.code == 1
    by_size = {re.search(r"size-(\d+)", run.name)[1]: summary(run) for run in runs(work, "multirun/sizes/*")}  # type: ignore[index]
    assert {size: found["status"] for size, found in by_size.items()} == {
        "5000": "failed", "64": "finished", "32": "finished",
    }  # fmt: skip
    assert by_size["5000"]["error"].startswith("dataset.batch_size must be at most")
    assert outcome.err.splitlines() == [f"error: {by_size['5000']['error']}"]
    assert re.search(r"batch_size-5000 +│ failed", outcome.out)

    outcome = quick(*argv)
    assert outcome.code == 1 and outcome.out.count("skipped") == 2, "what failed is tried again, what ended is not"
    assert len(runs(work, "multirun/sizes/*")) == 3


def test_a_bug_in_one_run_does_not_stop_the_others(quick: Callable[..., Outcome], work: Path, monkeypatch) -> None:
    import torch

    def fault(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug in one optimizer")

    monkeypatch.setattr(torch.optim.SGD, "step", fault)
    outcome = quick("-m", "optimizer=sgd,adam")
    assert outcome.code == 1
    adam, sgd = (summary(run) for run in runs(work, ALL))
    assert adam["status"] == "finished" and sgd["status"] == "failed"
    assert "Traceback" in sgd["error"] and "a bug in one optimizer" in sgd["error"]


def test_the_metric_is_returned_to_sweepers(quick: Callable[..., Outcome], work: Path, monkeypatch) -> None:
    returned = []
    run_job = train.cli.run_job
    monkeypatch.setattr(train.cli, "run_job", lambda *args: returned.append(run_job(*args)) or returned[-1])
    quick("-m", "dataset.batch_size=6000,64,5000", "hydra/launcher=basic")  # Hydra's, and so for its sweepers
    unknown, good, bad = returned
    assert math.isnan(unknown), "no run has said yet what its metric is, nor whether -inf or inf is bad"
    best = [(summary(run).get("best") or {}).get("val/accuracy") for run in runs(work, ALL)]
    assert [value for value in best if value is not None] == [good]
    assert bad == float("-inf"), "the worst value there is, not NaN"
