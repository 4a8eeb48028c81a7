"""What goes around an optimizer, in the trainer: the average is evaluated and saved, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizers.averaging import EMA, ScheduleFree, recalibrate
from tests.training import test_adversarial as game
from tests.training.small_run import (
    AROUND,
    SignalAt,
    as_they_end,
    differences,
    events,
    final_state,
    fit,
    small_data,
    small_model,
    two_processes,
)
from tests.training.test_resume import assert_same_run
from training import Interrupted, UserError, tasks
from training.callbacks import Callback
from training.loop.precision import Precision
from training.runs import checkpoints
from training.runs.evaluation import evaluate
from training.runs.run import Run
from training.show.snapshots import Snapshots
from training.tasks.players import Players

CPU = torch.device("cpu")
CASES = [("sgd", "ema"), ("adam", "free"), ("kfac", "graft"), ("kfac", "graft ema"), ("adafisher", "normalized free")]


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if "running" not in name and "batches" not in name}


def saved(folder: Path, name: str = "best.pt") -> dict[str, Any]:
    return checkpoints.load(folder / "checkpoints" / name)


class Watch(Callback):
    """What callbacks see of the model, and what training has before and after."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.evaluated: list[dict[str, Tensor]] = []
        self.modes: list[bool] = []

    def on_step(self, run: Run) -> None:
        self.trained.append({name: t.clone() for name, t in run.model.state_dict().items()})
        self.modes.append(run.model.training)

    def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
        self.evaluated.append({name: t.clone() for name, t in run.model.state_dict().items()})


def test_an_average_beside_it_leaves_training_alone(tmp_path: Path) -> None:
    """Weights, BatchNorm's statistics and dropout's draws after every step, through evaluations and checkpoints."""
    plain, beside = Watch(), Watch()
    fit(tmp_path / "plain", callbacks=[plain])
    fit(tmp_path / "beside", around="ema", callbacks=[beside])
    assert list(differences(plain.trained, beside.trained)) == [] and all(beside.modes)
    losses = [[e["train/loss"] for e in events(tmp_path / n) if e["event"] == "train"] for n in ("plain", "beside")]
    assert losses[0] == losses[1]
    assert list(differences(plain.evaluated, beside.evaluated)) != []


@pytest.mark.parametrize("batches", [3, 0])
def test_the_average_is_evaluated_with_statistics_of_its_own(
    tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by hand: the recursion over the weights of training, then a pass over the first batches of the first epoch."""
    monkeypatch.setitem(AROUND, "ema", lambda o: EMA(o, decay=0.9, calibrate=batches))
    watch = Watch()
    summary, model = fit(tmp_path / "run", around="ema", callbacks=[watch])
    sets = small_data()
    expected = weights(small_model(sets).state_dict())
    twin = small_model(sets)
    task = tasks.build(sets.task, sets.facts, 0.0)
    losses = []
    for t, now in enumerate(watch.trained, 1):
        d = min(0.9, (1 + t) / (10 + t))
        expected = {name: expected[name].lerp(now[name], 1 - d) for name in expected}
        if t % 5 == 0:
            twin.load_state_dict(now | expected)
            if batches:
                recalibrate(twin, [x for x, _ in list(sets.train.epoch(0))[:batches]])
            assert list(differences(dict(twin.state_dict()), watch.evaluated[t // 5 - 1])) == []
            losses.append(evaluate(twin, sets.val, task, Precision("fp32", CPU))["loss"])
    found = [e["val/loss"] for e in events(tmp_path / "run") if e["event"] == "eval"]
    assert found == pytest.approx(losses, rel=1e-6) and len(found) == 4
    # The last checkpoint, the model afterwards and the test are of the same weights.
    last = saved(tmp_path / "run", "step_00000020.pt")["model"]
    assert list(differences(dict(model.state_dict()), dict(last))) == []
    assert list(differences(dict(twin.state_dict()), dict(last))) == []
    test = evaluate(twin, sets.test, task, Precision("fp32", CPU))
    assert summary["final"]["test/loss"] == pytest.approx(test["loss"], rel=1e-6)


def test_the_best_weights_are_the_best_average(tmp_path: Path) -> None:
    watch = Watch()
    summary, _ = fit(tmp_path / "run", around="ema", callbacks=[watch])
    best = saved(tmp_path / "run")
    place = best["best"]["step"] // 5 - 1
    assert list(differences(dict(best["model"]), watch.evaluated[place])) == []
    sets = small_data()
    model = small_model(sets)
    model.load_state_dict(best["model"])
    task = tasks.build(sets.task, sets.facts, 0.0)
    assert evaluate(model, sets.val, task, Precision("fp32", CPU))["loss"] == pytest.approx(best["best"]["val/loss"])
    found = evaluate(model, sets.test, task, Precision("fp32", CPU))["loss"]
    assert summary["best"]["test/loss"] == pytest.approx(found)


@pytest.mark.parametrize(("optimizer", "around"), CASES)
@pytest.mark.parametrize("stop", [3, 10])
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(
    tmp_path: Path, optimizer: str, around: str, stop: int
) -> None:
    fit(tmp_path / "whole", optimizer=optimizer, around=around)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", optimizer=optimizer, around=around, callbacks=[SignalAt(stop)])
    summary, _ = fit(tmp_path / "parts", optimizer=optimizer, around=around, resume=True)
    assert summary["status"] == "finished"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert list(differences(saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"])) == []


@pytest.mark.parametrize("around", ["ema", "graft free"])
def test_resume_with_accumulation_across_epochs(tmp_path: Path, around: str) -> None:
    options: dict[str, Any] = {"accumulate": 3, "clip_norm": 0.5, "around": around, "optimizer": "adam"}
    fit(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[SignalAt(7)], **options)
    fit(tmp_path / "parts", resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_goes_on_for_longer(tmp_path: Path) -> None:
    fit(tmp_path / "whole", around="ema", schedule="none", max_steps=20)
    fit(tmp_path / "parts", around="ema", schedule="none", max_steps=10)
    fit(tmp_path / "parts", around="ema", schedule="none", max_steps=20, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("around", ["ema", "free", "graft"])
def test_bfloat16_trains_and_is_evaluated(tmp_path: Path, around: str) -> None:
    summary, _ = fit(tmp_path / "run", optimizer="adam", around=around, precision="bf16")
    assert summary["status"] == "finished" and 0 < summary["final"]["val/loss"] < 10


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("", "ema", "nothing around it and here is ema around an optimizer"),
        ("ema", "", "of ema around an optimizer and here is an optimizer with nothing around it"),
        ("graft", "graft ema", "of graft around an optimizer and here is ema around graft"),
    ],
)
@pytest.mark.parametrize("optimizer", ["adam", "kfac"])
def test_a_checkpoint_of_other_wrappers_is_a_sentence(
    tmp_path: Path, optimizer: str, first: str, second: str, sentence: str
) -> None:
    fit(tmp_path / "run", optimizer=optimizer, around=first, max_steps=4)
    before = (tmp_path / "run" / "summary.json").read_text()
    with pytest.raises(UserError, match=f"checkpoint is of another optimizer .*{sentence}"):
        fit(tmp_path / "run", optimizer=optimizer, around=second, resume=True)
    assert (tmp_path / "run" / "summary.json").read_text() == before


def test_factors_are_logged(tmp_path: Path) -> None:
    fit(tmp_path / "run", optimizer="kfac", around="graft ema")
    logged = [e for e in events(tmp_path / "run") if e["event"] == "train"]
    assert all(0 < e["step_length/graft_min"] <= e["step_length/graft_max"] for e in logged)
    assert all("curvature/rejected" in e for e in logged)


# -- several processes -------------------------------------------------------------------------------------------------

EXACT: dict[str, Any] = {"optimizer": "adam", "model": {"dropout": 0.0, "batch_norm": False, "float64": True}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    runs = [
        {"folder": f"{root}/ema", "around": "ema", **EXACT},
        {"folder": f"{root}/free", "around": "graft free", **EXACT},
        {"folder": f"{root}/whole", "around": "ema", "max_steps": 12, "snapshots_every": 5},
        {"folder": f"{root}/parts", "around": "ema", "max_steps": 12, "snapshots_every": 5, "signal_at": 6,
         "signal_rank": 1},
        {"folder": f"{root}/parts", "around": "ema", "max_steps": 12, "snapshots_every": 5, "resume": True},
    ]  # fmt: skip
    two_processes(as_they_end, (runs, [0, 0, 0, 75, 0]))
    return root


@pytest.mark.parametrize(("name", "around"), [("ema", "ema"), ("free", "graft free")])
def test_two_processes_equal_one(two: Path, tmp_path: Path, name: str, around: str) -> None:
    _, model = fit(tmp_path / "one", around=around, **EXACT)
    for rank in range(2):
        found = torch.load(two / name / f"rank{rank}.pt", weights_only=True)
        for key, tensor in model.state_dict().items():
            assert (found[key] - tensor).abs().max() < 1e-9
    losses = [[e["val/loss"] for e in events(f) if "val/loss" in e] for f in (two / name, tmp_path / "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_two_processes_resume_bit_for_bit_and_end_alike(two: Path) -> None:
    """With BatchNorm, whose statistics are gathered on both shares."""
    assert list(differences(final_state(two / "whole"), final_state(two / "parts"))) == []
    assert events(two / "whole") == events(two / "parts")
    files = [two / name / "trajectory.snapshots" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes() and Snapshots(files[0]).steps == [0, 5, 10, 12]
    for name in ("whole", "parts"):
        ranks = [torch.load(two / name / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
        assert list(differences(*ranks)) == []


# -- two players -------------------------------------------------------------------------------------------------------


def players(kind: str) -> tuple[Any, Players]:
    torch.manual_seed(0)
    model = game.dense_players()
    around = {"ema": lambda o: EMA(o, decay=0.5), "free": ScheduleFree}[kind]
    return model, Players(around(game.sgd(model.generator)), around(game.sgd(model.critic)))


@pytest.mark.parametrize("kind", ["ema", "free"])
def test_a_game_is_judged_by_its_averages_and_resumes(tmp_path: Path, kind: str) -> None:
    model, both = players(kind)
    game.fit(tmp_path / "whole", model, both, max_steps=10, eval_every_steps=5)
    whole = saved(tmp_path / "whole", "step_00000010.pt")
    assert list(differences(dict(model.state_dict()), dict(whole["model"]))) == []
    model, both = players(kind)
    with pytest.raises(Interrupted):
        game.fit(tmp_path / "parts", model, both, max_steps=10, eval_every_steps=5, callbacks=[SignalAt(4)])
    model, both = players(kind)
    game.fit(tmp_path / "parts", model, both, max_steps=10, eval_every_steps=5, resume=True)
    parts = saved(tmp_path / "parts", "step_00000010.pt")
    assert list(differences(whole["model"], parts["model"])) == []
    assert list(differences(whole["optimizer"], parts["optimizer"])) == []


def test_a_generators_statistics_are_gathered_anew(tmp_path: Path) -> None:
    """A generator with BatchNorm, and what training has of it comes back."""
    seen: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_step(self, run: Run) -> None:
            if run.step == 4:
                seen.append({name: b.clone() for name, b in run.model.named_buffers()})

        def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
            seen.append({name: b.clone() for name, b in run.model.named_buffers()})
            assert run.training_buffers is not None
            seen.append(run.training_buffers)

    from models import dcgan

    torch.manual_seed(0)
    model = dcgan(**game.SMALL, in_channels=1, image_size=8)
    both = Players(EMA(game.sgd(model.generator)), EMA(game.sgd(model.critic)))
    game.fit(tmp_path / "run", model, both, max_steps=4, eval_every_steps=4, callbacks=[Look()])
    norms = [name for name in seen[0] if name.endswith("running_var")]
    assert norms, "no BatchNorm in this generator"
    for name in norms:
        assert torch.equal(seen[0][name], seen[2][name]) and not torch.equal(seen[0][name], seen[1][name])
