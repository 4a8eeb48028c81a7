"""Schedules of an optimizer's scalars: the shapes, where they are set, and that a resumed run knows its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimizers import AdaFisher
from tests.cli.conftest import command, metrics, quick, runs, work  # noqa: F401 - fixtures
from tests.training.small_run import SignalAt, differences, events, final_state, fit
from training import Interrupted, Trainer, UserError
from training.callbacks import Callback
from training.runs.run import Run
from training.schedules import Scalars, ScalarSchedule
from training.settings.composition import compose

DAMPING = ScalarSchedule(1e-5, "exponential")
EVERY = ScalarSchedule(7, "linear", start=0.1, stop=0.5)
DECAY = ScalarSchedule(0.2, "cosine")


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From here on every run of this test has these schedules: `scheduled(damping=...)`."""
    plain = Trainer.fit
    return lambda **scalars: monkeypatch.setattr(Trainer, "fit", partialmethod(plain, scalars=scalars))


class Watch(Callback):
    """Notes what each step had, and the progress that the next one will be decided on."""

    def __init__(self) -> None:
        self.progress = [0.0]
        self.damping: list[float] = []
        self.every: list[int] = []

    def on_step(self, run: Run) -> None:
        self.progress.append(run.progress)
        self.damping.append(run.optimizer.param_groups[0]["damping"])
        self.every.append(run.optimizer.update_every)  # type: ignore[attr-defined]


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, quarter, half",
    [
        ("linear", 0.1 + 0.25 * 0.9, 0.55),
        ("exponential", 10**-0.75, 10**-0.5),
        ("cosine", 0.1 + 0.45 * (1 - math.cos(math.pi / 4)), 0.55),
    ],
)
def test_shapes(shape: Any, quarter: float, half: float) -> None:
    whole, part = ScalarSchedule(1.0, shape), ScalarSchedule(1.0, shape, start=0.2, stop=0.6)
    assert [whole.value(0.1, p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.1, quarter, half, 1.0], rel=1e-12)
    assert [part.value(0.1, p) for p in (0.3, 0.4)] == pytest.approx([quarter, half], rel=1e-12)
    assert {part.value(0.1, p) for p in (0, 0.1, 0.2)} == {0.1} and {part.value(0.1, p) for p in (0.6, 0.8, 1)} == {1.0}


def test_a_jump() -> None:
    jump = ScalarSchedule(5.0, start=0.5, stop=0.5)
    assert [jump.value(1.0, p) for p in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 5.0, 5.0]
    assert ScalarSchedule(5.0, stop=0.0).value(1.0, 0.0) == 5.0


@pytest.mark.parametrize(
    "options, name",
    [
        ({"end": math.inf}, "end"),
        ({"end": 0.0, "shape": "exponential"}, "end"),
        ({"end": 1.0, "shape": "cos"}, "shape"),
        ({"end": 1.0, "start": -0.1}, "start"),
        ({"end": 1.0, "stop": 1.1}, "stop"),
        ({"end": 1.0, "start": 0.5, "stop": 0.4}, "stop"),
    ],
)
def test_values_out_of_range_are_sentences(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        ScalarSchedule(**options)


# -- where they are set ------------------------------------------------------------------------------------------------


def test_each_group_starts_from_its_own_value() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    groups = [{"params": model[0].parameters(), "damping": 1e-2}, {"params": model[1].parameters()}]
    optimizer = AdaFisher(model, groups, damping=1e-3, update_every=1)
    scalars = Scalars(optimizer, {"damping": ScalarSchedule(1e-5, "exponential"), "update_every": ScalarSchedule(100)})
    for progress, first, second, every in ((0, 1e-2, 1e-3, 1), (0.5, 10**-3.5, 1e-4, 50), (1, 1e-5, 1e-5, 100)):
        scalars.set(progress)
        assert [g["damping"] for g in optimizer.param_groups] == pytest.approx([first, second], rel=1e-12)
        assert optimizer.update_every == every and type(optimizer.update_every) is int
        assert scalars.values == pytest.approx({"damping": first, "update_every": every}, rel=1e-12)


def test_a_float_given_as_a_whole_number_is_not_rounded() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1, momentum=0)
    Scalars(optimizer, {"momentum": ScalarSchedule(0.9)}).set(0.5)
    assert optimizer.param_groups[0]["momentum"] == 0.45


@pytest.mark.parametrize(
    "name, schedule, says",
    [
        ("lr", ScalarSchedule(0.1), r"lr is the scheduler's: choose scheduler=NAME"),
        ("moment", ScalarSchedule(0.1), r"moment is no scalar of SGD \(did you mean 'momentum'\?\)"),
        ("zzz", ScalarSchedule(0.1), r"zzz is no scalar of SGD; it has dampening, momentum, weight_decay"),
        ("foreach", ScalarSchedule(0.1), r"foreach is off \(null\), so there is nothing to start from"),
        ("nesterov", ScalarSchedule(0.1), r"nesterov of SGD is not a single number"),
        ("weight_decay", ScalarSchedule(0.1, "exponential"), r"weight_decay starts from 0 and the exponential shape"),
    ],
)
def test_what_has_no_schedule(name: str, schedule: ScalarSchedule, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        Scalars(torch.optim.SGD([torch.zeros(1)], lr=0.1), {name: schedule})


# -- in the loop -------------------------------------------------------------------------------------------------------


def test_what_the_steps_of_a_run_see(tmp_path: Path, scheduled: Callable[..., None]) -> None:
    scheduled(damping=DAMPING, update_every=EVERY)
    watch = Watch()
    fit(tmp_path / "run", optimizer="adafisher", callbacks=[watch])
    assert watch.damping == pytest.approx([1e-3 * 0.01 ** (step / 20) for step in range(20)], rel=1e-12)
    # From 3 at the third step to 7 at the eleventh, by halves, which round to even.
    assert watch.every == [3, 3, 3, 4, 4, 4, 5, 6, 6, 6, *[7] * 10]
    train = {e["step"]: e for e in events(tmp_path / "run") if e["event"] == "train"}
    assert {s: e["schedule/damping"] for s, e in train.items()} == {s: watch.damping[s - 1] for s in train}
    assert {s: e["schedule/update_every"] for s, e in train.items()} == {s: watch.every[s - 1] for s in train}


def test_a_schedule_at_its_end_is_the_value_itself(tmp_path: Path, scheduled: Callable[..., None]) -> None:
    fit(tmp_path / "plain", optimizer="adafisher")  # its damping is 1e-3, its decay 0.8
    scheduled(damping=ScalarSchedule(1e-3, "exponential"), decay=ScalarSchedule(0.8, "cosine"))
    fit(tmp_path / "flat", optimizer="adafisher")
    assert list(differences(final_state(tmp_path / "plain")["model"], final_state(tmp_path / "flat")["model"])) == []

    scheduled(momentum=ScalarSchedule(0.5, stop=0.0))
    fit(tmp_path / "jump", optimizer="sgd")
    scheduled()
    halved = {"momentum": 0.5, "lr": 0.05, "weight_decay": 1e-4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fit.__globals__["OPTIMIZERS"], "sgd", (torch.optim.SGD, halved))
        fit(tmp_path / "half", optimizer="sgd")
    jump, half = final_state(tmp_path / "jump"), final_state(tmp_path / "half")
    assert list(differences(jump["model"], half["model"])) == []
    assert list(differences(jump["optimizer"], half["optimizer"])) == []


@pytest.mark.parametrize("stop", [1, 7, 10])
def test_resume_bit_for_bit(tmp_path: Path, scheduled: Callable[..., None], stop: int) -> None:
    scheduled(damping=DAMPING, update_every=EVERY, decay=DECAY)
    fit(tmp_path / "whole", optimizer="adafisher")
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", optimizer="adafisher", callbacks=[SignalAt(stop)])
    fit(tmp_path / "parts", optimizer="adafisher", resume=True)
    assert list(differences(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))) == []
    assert events(tmp_path / "whole") == events(tmp_path / "parts")
    fit(tmp_path / "parts", optimizer="adafisher", resume=True)  # at its end: the last event is written again
    assert events(tmp_path / "whole") == events(tmp_path / "parts")


def test_a_longer_budget_stretches_it(tmp_path: Path, scheduled: Callable[..., None]) -> None:
    scheduled(damping=DAMPING)
    fit(tmp_path / "run", optimizer="adafisher", max_steps=10)
    watch = Watch()
    fit(tmp_path / "run", optimizer="adafisher", max_steps=20, callbacks=[watch], resume=True)
    assert watch.damping == pytest.approx([1e-3 * 0.01 ** (step / 20) for step in range(10, 20)], rel=1e-12)


def test_a_time_budget(tmp_path: Path, scheduled: Callable[..., None]) -> None:
    scheduled(damping=DAMPING)
    watch = Watch()
    summary, _ = fit(tmp_path / "run", optimizer="adafisher", max_time=0.4, callbacks=[watch])
    assert summary["steps"] == len(watch.damping) > 5 and watch.progress[-1] == 1.0
    assert watch.damping == [DAMPING.value(1e-3, p) for p in watch.progress[:-1]]
    assert watch.damping == sorted(watch.damping, reverse=True) and watch.damping[-1] < 5e-5


def test_the_trainer_refuses_before_it_writes(tmp_path: Path, scheduled: Callable[..., None]) -> None:
    scheduled(dampng=DAMPING)
    with pytest.raises(ValueError, match=r"^dampng is no scalar of AdaFisher \(did you mean 'damping'\?\)"):
        fit(tmp_path / "run", optimizer="adafisher")
    assert not (tmp_path / "run" / "train.log").exists()


# -- on the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, says",
    [
        (["schedules.dampng.end=1"], r"^schedules.dampng is no scalar of AdaFisher \(did you mean 'damping'\?\)$"),
        (["schedules={lr: {end: 0}}"], r"^schedules.lr is the scheduler's"),
        (["schedules=3"], r"^schedules must be a group of keys or null, got 3$"),
        (["schedules.damping=3"], r"^schedules.damping must be a group of keys, got 3$"),
        (["schedules.damping.shape=linear"], r"^schedules.damping.end is missing"),
        (["schedules.damping.shap=linear"], r"^schedules.damping.shap: .*did you mean 'shape'"),
        (["schedules.damping={end: x}"], r"^schedules.damping.end must be a number, got 'x'$"),
        (["schedules.damping={end: 1, stop: 2}"], r"^schedules.damping.stop must be in \[0, 1\], got 2"),
        (["schedules.damping.end=0"], r"^schedules.damping.end: damping must be in \(0, inf\), got 0.0$"),
        (["schedules.update_every.end=0.3"], r"^schedules.update_every.end: update_every must be in .*, got 0$"),
        (["optimizer=sgd", "schedules.weight_decay.end=-1"], r"^schedules.weight_decay.end: Invalid weight_decay"),
        (["schedules.damping.end=1", "optimzer=sgd"], r"^unknown key 'optimzer'"),
    ],
)
def test_refused_before_a_run_folder_is_made(given: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        compose(["optimizer=adafisher", *given])


def test_forms_of_giving_it() -> None:
    given = "schedules={damping: {end: 1e-4, shape: exponential}, update_every: {end: 100}}"
    run = compose(["optimizer=adafisher", given])
    expected = {"damping": {"end": 1e-4, "shape": "exponential"}, "update_every": {"end": 100.0}}
    assert run.values["schedules"] == expected
    assert run.command == ["optimizer=adafisher", given], "what config.yaml says can be given again"
    dotted = ["schedules.damping.end=1e-4", "schedules.damping.shape=exponential", "schedules.update_every.end=100"]
    assert compose(dotted).values["schedules"] == expected
    assert compose([given, "schedules.damping=null"]).values["schedules"] == {"update_every": {"end": 100.0}}
    assert compose().values["schedules"] == compose([given, "schedules=null"]).values["schedules"] == {}
    assert compose().id != run.id


def logged(folder: Path) -> list[float]:
    return [event["schedule/damping"] for event in metrics(folder) if event["event"] == "train"]


def test_from_the_command_to_the_log(quick: Callable[..., Any], work: Path) -> None:  # noqa: F811
    outcome = quick("optimizer=adafisher", "schedules.damping={end: 1e-5, shape: exponential}")
    assert outcome.code == 0, outcome.err
    (folder,) = runs(work)
    values = logged(folder)
    assert 1e-3 > values[0] > values[-1] > 1e-5

    outcome = quick(f"resume={folder}", "trainer.max_epochs=2", "schedules.damping.end=1e-4")
    assert outcome.code == 1 and "schedules.damping.end is 1e-05 in the checkpoint" in outcome.sentence()
    outcome = quick(f"resume={folder}", "trainer.max_epochs=2")
    assert outcome.code == 0, outcome.err
    assert logged(folder)[-1] < values[-1], "its last step is nearer to the end of the budget"


def test_a_sweep_over_the_end_of_a_schedule(quick: Callable[..., Any], work: Path) -> None:  # noqa: F811
    outcome = quick("-m", "optimizer=adafisher", "schedules.damping.end=1e-4,1e-5")
    assert outcome.code == 0, outcome.err
    ends = {name.split("_")[0] for name in (path.name for path in runs(work, "multirun/*/*"))}
    assert ends == {"schedules.damping.end-0.0001", "schedules.damping.end-1e-05"}
