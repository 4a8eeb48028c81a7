"""The range test: what it finds of a known curve, and that what it suggests learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.training import small_run
from tests.training.small_run import SignalAt, fit
from training import Interrupted, UserError, schedules
from training.runs.checkpoints import latest
from training.show.watching.lr_finder import LRFinder, examine, plot


def test_the_rate_grows_by_the_same_factor() -> None:
    sgd = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.01)])
    scheduler = schedules.range_test(sgd, 50, start_factor=1e-2, end_factor=10.0)
    rates = []
    for _ in range(50):
        rates.append([group["lr"] for group in sgd.param_groups])
        sgd.step()
        scheduler.step()
    found = np.array(rates)
    assert found[0] == pytest.approx([1e-3, 1e-4]) and found[-1] == pytest.approx([1.0, 0.1])
    assert np.diff(np.log(found[:, 0])) == pytest.approx(np.log(1000) / 49)
    with pytest.raises(ValueError, match="end_factor"):
        schedules.range_test(sgd, 50, start_factor=1.0, end_factor=0.5)


def curve(rates: np.ndarray) -> np.ndarray:
    """A loss that falls from 2 to 0.5 around 0.1, and rises from 1 on."""
    return 2 - 1.5 / (1 + (0.1 / rates) ** 2) + (rates / 2) ** 3


def test_it_finds_where_a_known_curve_falls_fastest() -> None:
    rates = np.logspace(-3, 0.6, 200)
    # The loss before a step is that after the one before, with the rate before.
    losses = curve(np.concatenate([[rates[0] ** 2 / rates[1]], rates[:-1]]))
    found = examine(rates, losses, diverged=True)
    exact = np.logspace(-3, 0, 100_000)
    steepest = exact[np.argmin(np.gradient(curve(exact), np.log(exact)))]
    lowest = exact[np.argmin(curve(exact))]
    assert found.rates[found.steepest] == pytest.approx(steepest, rel=0.1)
    assert found.rates[found.lowest] == pytest.approx(lowest, rel=0.15)
    assert found.suggestion == pytest.approx((steepest * lowest / 10) ** 0.5, rel=0.1)
    assert f"optimizer.lr={found.suggestion:g}" in found.sentence() and "diverged at 3.8" in found.sentence()
    titles = [text.get_text() for text in plot(found, "x").axes[0].get_legend().get_texts()]
    assert any(text.startswith("falls fastest") for text in titles)


def test_what_is_not_finite_counts_for_nothing() -> None:
    rates, losses = np.logspace(-3, 0, 30), np.linspace(2, 1, 30)
    losses[20:] = [np.nan, *losses[21:]]
    assert len(examine(rates, losses, True).losses) == 20
    with pytest.raises(ValueError, match="three steps"):
        examine(rates, [2.0, np.inf, 1.0], True)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    found = examine(np.logspace(-3, 0, 30), np.linspace(2.0, 2.1, 30), False)
    assert found.suggestion is None and "fell at none of the rates" in found.sentence()
    assert "had not diverged" in found.sentence()


def test_players_are_refused() -> None:
    with pytest.raises(UserError, match="two players"):
        LRFinder().check(SimpleNamespace(name="generation", whole=False))


FINDER: dict[str, Any] = {"eval_every_steps": None, "checkpoint_every_steps": None, "log_every_steps": 1}


@pytest.mark.parametrize("optimizer, around", [("sgd", ""), ("adam", "ema"), ("kfac", "")])
def test_it_leaves_what_was_there_and_what_it_suggests_learns(
    tmp_path: Path, optimizer: str, around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(small_run.SCHEDULES, "range", schedules.range_test)
    plain: dict[str, Any] = {"model": {"dropout": 0.0, "batch_norm": False}, "writers": []}
    plain["data"] = {"batch_size": 64, "limit_train": 1.0}
    options: dict[str, Any] = {"optimizer": optimizer, "around": around} | plain | FINDER
    summary, model = fit(tmp_path / "run", schedule="range", callbacks=[LRFinder()], max_steps=200, **options)
    fresh = small_run.small_model(small_run.small_data(**plain["data"]), **plain["model"])
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (tmp_path / "run" / "lr_finder.png").exists()
    assert not any(name.startswith(("val/", "test/")) for name in summary["final"])
    lr = summary["lr_finder"]["lr"]
    assert f"optimizer.lr={lr:g}" in summary["remark"]
    learned, _ = fit(tmp_path / "learned", lr=lr, schedule="none", max_steps=100, **options)
    # The best of fixed rates reach 1.1 to 1.3 in so few steps, from 2.3; a tenth of them stays at 2.
    assert learned["final"]["train/loss"] < 1.6, (lr, summary["remark"])


def test_losses_that_are_no_numbers_end_it_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(small_run.SCHEDULES, "range", schedules.range_test)
    options: dict[str, Any] = {"optimizer": "sgd", "around": "ema", "lr": 1e30, "schedule": "range"}
    summary, model = fit(tmp_path / "run", callbacks=[LRFinder()], max_steps=40, **options, **FINDER)
    assert summary["status"] == "stopped_early" and summary["remark"].startswith("range test: ")
    for name, tensor in small_run.small_model(small_run.small_data()).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small_run.SCHEDULES, "range", schedules.range_test)
    options: dict[str, Any] = {"schedule": "range", "max_steps": 30, "data": {"batch_size": 32}} | FINDER
    whole, parts, rest = LRFinder(), LRFinder(), LRFinder()
    fit(tmp_path / "whole", callbacks=[whole], **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[SignalAt(11), parts], **options)
    _, model = fit(tmp_path / "parts", callbacks=[rest], resume=True, **options)
    assert (rest.rates, rest.losses) == (whole.rates, whole.losses)
    for name, tensor in small_run.small_model(small_run.small_data()).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    found = latest(tmp_path / "parts" / "checkpoints")
    assert found is not None and [state["start"] for state in found[1]["callbacks"].values()] == [None]
