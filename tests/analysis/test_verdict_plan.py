"""A budget of time, divided among optimizers; and the file that a verdict goes on by."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.pace import Pace
from analysis.verdict import State, divide, steps_of
from training.errors import UserError

PACES = {
    "sgd": Pace(0.01, 0.009, 0.012, 0.2, 20.0, 4, "val/loss"),
    "kfac": Pace(0.02, 0.02, 0.02, 0.1, 20.0, 9, "val/loss"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_parts_add_up_to_the_budget(workers: int, share: float) -> None:
    found = divide(1200, PACES, trials=8, seeds=5, share=share, workers=workers, spent=60)
    assert found.wall == pytest.approx(1200)
    training = 2 * (found.tuning + 5 * found.final)
    assert training + found.beside == pytest.approx((1200 - 60) * workers)
    assert found.tuning == pytest.approx(share * training / 2)
    assert found.rungs.total == pytest.approx(found.tuning, rel=0.05) and found.rungs.counts[0] >= 8
    runs = sum(found.rungs.counts)
    assert found.beside == pytest.approx(2 * (runs * (1 + 0.2) + 5 * (1 + 12 * 0.2)))


def test_seconds_become_steps_by_each_pace() -> None:
    assert (steps_of(10, PACES["sgd"]), steps_of(10, PACES["kfac"]), steps_of(1e-9, PACES["sgd"])) == (1000, 500, 1)


def test_too_little_is_a_sentence_and_what_it_advises_is_enough() -> None:
    with pytest.raises(
        UserError, match=r"budget=40 seconds is too little for 2 optimizers, 8 trials and 5 seeds"
    ) as told:
        divide(40, PACES, trials=8, seeds=5)
    minutes = int(str(told.value).partition("give ")[2].partition("m ")[0])
    assert divide(60 * minutes, PACES, trials=8, seeds=5).rungs.counts[0] >= 8
    with pytest.raises(UserError, match="share between 0 and 1, got 1"):
        divide(1200, PACES, trials=8, seeds=5, share=1.0)
    with pytest.raises(UserError, match="seeds must be at least 2"):
        divide(1200, PACES, trials=8, seeds=1)


def test_the_file_goes_on_with_what_it_was_begun_with(tmp_path: Path) -> None:
    asked = {"optimizers": ["sgd", "kfac"], "budget": 600.0, "seeds": [1, 2]}
    state = State.open(tmp_path / "v", asked, "the command", threads=1)
    state.paces, state.metric, state.choices = PACES, "val/loss", {"sgd": {"overrides": ["optimizer.lr=0.1"]}}
    state.save()
    again = State.open(tmp_path / "v", asked, "another command", threads=2)
    assert again == state
    with pytest.raises(UserError, match=r"budget=600.0, and budget=60.0 is asked for: give name=ANOTHER"):
        State.open(tmp_path / "v", asked | {"budget": 60.0}, "", threads=1)
    (tmp_path / "v" / "verdict.json").write_text('{"version": 1')
    with pytest.raises(UserError, match=r"verdict\.json is damaged"):
        State.open(tmp_path / "v", asked, "", threads=1)
