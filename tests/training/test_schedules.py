"""Budgets, and schedules that are torch's own, step by step."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler as official

from training import schedules
from training.loop.budgets import TIME_TICKS, Budget, Clock, Every, Phases

CPU = torch.device("cpu")


def optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates or (0.1,)])


def rates(
    make: Callable[[torch.optim.Optimizer], official.LRScheduler], steps: int, *groups: float
) -> list[list[float]]:
    """Learning rates used at each step, and the ones left at the end."""
    sgd = optimizer(*groups)
    scheduler = make(sgd)
    used = []
    for _ in range(steps):
        used.append([g["lr"] for g in sgd.param_groups])
        sgd.step()
        scheduler.step()
    return [*used, [g["lr"] for g in sgd.param_groups]]


@pytest.mark.parametrize(
    "ours, torchs",
    [
        (lambda o: schedules.none(o, 40), lambda o: official.LambdaLR(o, lambda _: 1.0)),
        (lambda o: schedules.cosine(o, 40), lambda o: official.CosineAnnealingLR(o, 40)),
        (lambda o: schedules.step(o, 40, every=0.25, gamma=0.5), lambda o: official.StepLR(o, 10, 0.5)),
        (lambda o: schedules.multistep(o, 40, [0.75, 0.5], 0.2), lambda o: official.MultiStepLR(o, [20, 30], 0.2)),
        (
            lambda o: schedules.onecycle(o, 40),
            lambda o: official.OneCycleLR(o, [0.1, 0.01], total_steps=40, cycle_momentum=False),
        ),
    ],
)
def test_schedules_are_torchs(ours: Callable, torchs: Callable) -> None:
    mine, theirs = (rates(make, 40, 0.1, 0.01) for make in (ours, torchs))
    assert mine == [pytest.approx(rate, rel=1e-12) for rate in theirs]


def test_cosine_with_a_floor_and_a_warm_up() -> None:
    def torchs(o: torch.optim.Optimizer) -> official.LRScheduler:
        fall = official.CosineAnnealingLR(o, 30, eta_min=0.01)
        rise = official.LinearLR(o, start_factor=0.1, total_iters=10)
        return official.SequentialLR(o, [rise, fall], milestones=[10])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = rates(lambda o: schedules.cosine(o, 40, warmup=0.25, min_factor=0.1), 40)
    assert ours == [pytest.approx(rate, rel=1e-12) for rate in rates(torchs, 40)]
    assert ours[0] == [pytest.approx(0.01)] and ours[10] == [pytest.approx(0.1)] and ours[40] == [pytest.approx(0.01)]
    assert all(a < b for a, b in itertools.pairwise(ours[:11]))


def test_cosine_floor_is_each_groups_own() -> None:
    values = rates(lambda o: schedules.cosine(o, 20, warmup=0.2, min_factor=0.1), 20, 0.1, 0.001)
    for index, rate in enumerate((0.1, 0.001)):
        alone = rates(lambda o: schedules.cosine(o, 20, warmup=0.2, min_factor=0.1), 20, rate)
        assert [v[index] for v in values] == [pytest.approx(v[0], rel=1e-9) for v in alone]


@pytest.mark.parametrize("ticks", range(1, 14))
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_no_length_of_budget_breaks_a_schedule(ticks: int, warmup: float) -> None:
    for make in (schedules.cosine, schedules.onecycle):
        values = rates(lambda o, make=make: make(o, ticks, warmup=warmup), ticks)
        assert all(math.isfinite(v) and -1e-12 <= v <= 0.1 + 1e-12 for (v,) in values)
    for make in (schedules.none, schedules.step, schedules.multistep):
        assert len(rates(lambda o, make=make: make(o, ticks), ticks)) == ticks + 1


@pytest.mark.parametrize(
    "make, options, name",
    [
        (schedules.cosine, {"warmup": 1.5}, "warmup"),
        (schedules.cosine, {"min_factor": -0.1}, "min_factor"),
        (schedules.cosine, {"warmup": float("nan")}, "warmup"),
        (schedules.step, {"every": 0.0}, "every"),
        (schedules.step, {"gamma": 2.0}, "gamma"),
        (schedules.multistep, {"milestones": [0.5, 2.0]}, "milestones"),
        (schedules.onecycle, {"end_factor": 0.5}, "end_factor"),
    ],
)
def test_values_out_of_range_are_sentences(make: Callable, options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be in"):
        make(optimizer(), 10, **options)


@pytest.mark.parametrize("name", ["none", "cosine", "step", "multistep", "onecycle"])
def test_schedule_state_goes_through_a_file_and_on(name: str, tmp_path: object) -> None:
    make = getattr(schedules, name)
    whole = [r for (r,) in rates(lambda o: make(o, 20), 20)]
    sgd = optimizer()
    scheduler = make(sgd, 20)
    for _ in range(7):
        sgd.step()
        scheduler.step()
    file = f"{tmp_path}/s.pt"
    torch.save([sgd.state_dict(), scheduler.state_dict()], file)
    again = optimizer()
    resumed = make(again, 20)
    for part, saved in zip((again, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    later = []
    for _ in range(13):
        later.append(again.param_groups[0]["lr"])
        again.step()
        resumed.step()
    assert later == whole[7:20]


def test_budgets_count_in_their_own_unit() -> None:
    assert Budget(10.0, max_epochs=2.5).total_steps == 25
    assert Budget(10.0, max_epochs=0.001).total_steps == 1
    assert Budget(10 / 4, max_epochs=3).total_steps == 8  # accumulation straddles epochs
    steps = Budget(10.0, max_steps=7)
    assert (steps.ticks, steps.progress(3, 1e9), steps.done(6, 1e9), steps.done(7, 0.0)) == (7, 3 / 7, False, True)
    timed = Budget(10.0, max_time=20.0)
    assert (timed.total_steps, timed.ticks, timed.progress(10**6, 5.0)) == (None, TIME_TICKS, 0.25)
    assert not timed.done(10**6, 19.99) and timed.done(0, 20.0) and timed.progress(0, 50.0) == 1.0


def test_a_step_budget_moves_the_schedule_one_tick_a_step() -> None:
    sgd = optimizer()
    scheduler, budget, tick = schedules.cosine(sgd, 5), Budget(10.0, max_steps=5), 0
    for step in range(1, 8):
        sgd.step()
        tick = budget.advance(scheduler, tick, step, 0.0)
        assert tick == scheduler.last_epoch == min(step, 5)


def test_a_time_budget_anneals_to_the_end_and_no_further() -> None:
    sgd = optimizer()
    budget = Budget(10.0, max_time=10.0)
    scheduler, tick, seen = schedules.cosine(sgd, budget.ticks), 0, []
    for step, seconds in enumerate((0.5, 2.5, 2.5, 5.0, 9.0, 13.0), 1):
        sgd.step()
        tick = budget.advance(scheduler, tick, step, seconds)
        seen.append(sgd.param_groups[0]["lr"])
    expected = [0.05 * (1 + math.cos(math.pi * p)) for p in (0.05, 0.25, 0.25, 0.5, 0.9, 1.0)]
    assert seen == [pytest.approx(e, rel=1e-9, abs=1e-12) for e in expected]


def test_replay_brings_a_new_schedule_to_its_place() -> None:
    sgd = optimizer()
    scheduler = schedules.cosine(sgd, 20, warmup=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Budget.replay(scheduler, 11)
    assert sgd.param_groups[0]["lr"] == rates(lambda o: schedules.cosine(o, 20, warmup=0.2), 20)[11][0]


@pytest.mark.parametrize(
    "every, due",
    [
        (Every(None, None, 10.0), []),
        (Every(4, None, 10.0), [4, 8, 12, 16, 20, 24]),
        (Every(None, 1, 10.0), [10, 20]),
        (Every(None, 0.5, 10.0), [5, 10, 15, 20, 25]),
        (Every(None, 2, 10.0), [20]),
        (Every(None, 1, 10 / 3), [4, 7, 10, 14, 17, 20, 24]),
        (Every(15, 1, 10.0), [10, 15, 20]),
        (Every(None, 0.1, 30 / 7), list(range(1, 26))),
    ],
)
def test_what_is_due_when(every: Every, due: list[int]) -> None:
    assert [step for step in range(1, 26) if every.due(step)] == due


def test_clocks_count_each_second_once() -> None:
    clock = Clock(CPU)
    with clock.count("training"):
        time.sleep(0.05)
        with clock.count("evaluation"):
            time.sleep(0.03)
            with clock.count("other"):
                time.sleep(0.02)
        running = clock.seconds("training")
        time.sleep(0.01)
        assert clock.seconds("training") >= running + 0.01
    state = clock.state_dict()
    assert 0.06 <= state["training"] < 0.09 and 0.03 <= state["evaluation"] < 0.05 and 0.02 <= state["other"] < 0.04
    assert state["wall"] == pytest.approx(state["training"] + state["evaluation"] + state["other"])
    later = Clock(CPU)
    later.load_state_dict(state)
    assert later.seconds("training") == state["training"] and later.seconds("wall") >= state["wall"]


def test_phases_are_means_a_step_without_what_lies_between_steps() -> None:
    phases = Phases(CPU)
    for _ in range(2):
        phases.mark(None)
        time.sleep(0.01)
        phases.mark("data")
        time.sleep(0.02)
        phases.mark("forward")
        time.sleep(0.05)  # an evaluation, say
    means = phases.read()
    assert set(means) == {"data", "forward", "step"}
    assert 0.01 <= means["data"] < 0.02 <= means["forward"] < 0.04
    assert means["step"] == means["data"] + means["forward"]
    assert phases.read() == {}
