"""`trainer.checkpoint_every_minutes`: what a kill costs at most is the user's choice, in wall time."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import torch

from tests.training.small_run import fit
from training.callbacks import Callback
from training.runs.run import Run

PERIOD = 0.12  # seconds


class Slow(Callback):
    """Steps of 20 ms, and the time at which each ended."""

    def __init__(self) -> None:
        self.ended: dict[int, float] = {}

    def on_step(self, run: Run) -> None:
        time.sleep(0.02)
        self.ended[run.step] = time.monotonic()


def saved(folder: Path) -> list[int]:
    return sorted(int(path.stem.partition("_")[2]) for path in folder.glob("checkpoints/step_*.pt"))


def test_a_checkpoint_whenever_the_minutes_are_over(tmp_path: Path) -> None:
    slow, kept = Slow(), {"max_steps": 30, "keep_checkpoints": 99, "eval_every_steps": None}
    _, timed = fit(
        tmp_path / "timed", callbacks=[slow], checkpoint_every_minutes=PERIOD / 60, checkpoint_every_steps=None, **kept
    )
    steps = saved(tmp_path / "timed")
    assert steps[-1] == 30 and len(steps) >= 3
    gaps = [(slow.ended[b] - slow.ended[a], b - a) for a, b in pairwise(steps)][:-1]  # the end is always saved
    assert all(seconds > PERIOD - 0.03 and count < 8 for seconds, count in gaps), gaps
    fit(
        tmp_path / "both", callbacks=[Slow()], checkpoint_every_minutes=PERIOD / 60, checkpoint_every_steps=10, **kept
    )
    assert {10, 20, 30} < set(saved(tmp_path / "both")), "beside the others"
    _, never = fit(tmp_path / "never", checkpoint_every_steps=None, **kept)
    assert saved(tmp_path / "never") == [30]
    for a, b in zip(timed.parameters(), never.parameters(), strict=True):
        assert torch.equal(a, b), "saving changes nothing"
