"""What steps take, measured side by side."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from analysis import pace
from optimizers.forecast import held
from training.errors import UserError
from training.runs import step
from training.settings.composition import compose

PLAIN = ("model=mlp", "model.hidden=[8]", "trainer.max_steps=1000", "dataset.batch_size=16")


def test_a_slow_optimizer_is_seen_to_be_slow_and_a_round_of_intervals_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, sleeps = torch.optim.SGD.step, 4e-3

    def slow(self: torch.optim.SGD, closure: None = None) -> None:
        plain(self, closure)
        if self.param_groups[0]["momentum"] == 0.5:
            time.sleep(sleeps)

    monkeypatch.setattr(torch.optim.SGD, "step", slow)
    taken: list[int] = []
    take = step.take
    monkeypatch.setattr(pace.step, "take", lambda run, *rest: (taken.append(id(run)), take(run, *rest)))
    before = torch.get_num_threads()
    arms = {"fast": "sgd optimizer.momentum=0.9", "slow": "sgd optimizer.momentum=0.5", "kfac": "kfac"}
    configs = {name: compose([*PLAIN, *f"optimizer={arm}".split()]) for name, arm in arms.items()}
    found = pace.measure(configs, seconds=0, threads=1)
    assert found["slow"].low > sleeps and found["fast"].seconds + 0.5 * sleeps < found["slow"].seconds
    assert all(one.low <= one.seconds <= one.high and one.evaluation > 0 for one in found.values())
    assert found["fast"].steps_per_epoch == len(range(0, 1293 - 15, 16))
    assert {one.monitor for one in found.values()} == {"val/accuracy"}
    assert torch.get_num_threads() == before and not [*tmp_path.rglob("*")]
    per_arm = [taken.count(run) for run in dict.fromkeys(taken)]
    assert per_arm == [pace.WARM + pace.ROUNDS[0] * 10] * 3  # K-FAC's intervals are of ten steps
    weights = (64 * 8 + 8) + (8 * 10 + 10)
    assert found["fast"].state == 4 * weights == held_by_sgd()


def held_by_sgd() -> int:
    weight = torch.nn.Parameter(torch.ones((64 * 8 + 8) + (8 * 10 + 10)))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return sum(held(optimizer).values())


def test_what_two_measured_at_a_time_is_averaged() -> None:
    one = pace.Pace(1.0, 0.5, 2.0, 4.0, 20.0, 7, "val/loss")
    other = pace.Pace(3.0, 0.7, 5.0, 8.0, 20.0, 7, "val/loss")
    assert pace.averaged([{"a": one}, {"a": other}]) == {"a": pace.Pace(2.0, 0.5, 5.0, 6.0, 20.0, 7, "val/loss")}


def test_what_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: torch.optim.SGD, closure: None = None) -> None:
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(torch.optim.SGD, "step", fails)
    with pytest.raises(UserError, match=r"^wild: its first steps fail \(no room for it\)"):
        pace.measure({"wild": compose([*PLAIN, "optimizer=sgd"])}, seconds=0, threads=1)
