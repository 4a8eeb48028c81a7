"""averaging= and step_length= as a user types them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import Outcome, metrics, runs, summary, unfinish
from training.names import AROUND
from training.runs import checkpoints
from training.settings.composition import CONFIG_FOLDER, compose

STEPS = (
    "trainer.max_epochs=null", "trainer.max_steps=6", "trainer.eval_every_epochs=null", "trainer.eval_every_steps=2",
)  # fmt: skip
FREE = ("averaging=schedule_free", "scheduler=none", "optimizer.momentum=0")
GAME = (
    "model=dcgan", "dataset=digits_generation", "callbacks=none", "logger=quiet", "dataset.batch_size=16",
    "dataset.limit_train=0.1", "dataset.limit_val=0.1", "dataset.eval_images=20",
)  # fmt: skip


def test_nothing_is_around_unless_asked_for() -> None:
    values = compose([]).values
    assert {group: values[group]["_target_"] for group in AROUND} == AROUND
    defaults = yaml.safe_load((CONFIG_FOLDER / "train.yaml").read_text())["defaults"]
    assert {"averaging": "none"} in defaults and {"step_length": "own"} in defaults


def test_a_run_without_has_the_identity_that_it_had() -> None:
    """Runs of before these groups are found by resume=auto and in sweeps."""
    run = compose(["optimizer=kfac"])
    before = {key: value for key, value in run.values.items() if key not in AROUND}
    assert type(run)(before, run.choices).id == run.id
    assert compose(["optimizer=kfac", "averaging=ema"]).id != run.id


@pytest.mark.parametrize(
    "around",
    [
        ("optimizer=kfac", "averaging=ema", "averaging.decay=0.9"),
        ("optimizer=kfac", *FREE, "averaging.warmup=2"),
        ("optimizer=adafisher", "step_length=graft"),
        ("optimizer=kfac", "step_length=graft", "step_length.to=sgd", "step_length.options={momentum: 0.9}"),
        ("optimizer=ekfac", "step_length=normalized", "step_length.hold=true", "averaging=ema"),
        ("optimizer=muon", "averaging=ema", "step_length=normalized"),
        ("optimizer=torch", "optimizer.name=NAdam", "step_length=normalized"),
        ("optimizer=sgd", "step_length=graft", "finetune.freeze=^1", "averaging=ema"),
    ],
)
def test_a_run_and_what_remains_of_it(around: tuple[str, ...], quick: Callable[..., Outcome], work: Path) -> None:
    outcome = quick(*STEPS, *around)
    assert outcome.code == 0, outcome.err
    (folder,) = runs(work)
    assert summary(folder)["status"] == "finished"
    state = checkpoints.load(folder / "checkpoints" / "best.pt")
    kinds = [word.removeprefix("averaging=").removeprefix("step_length=") for word in around if "=" in word]
    expected = [kind for kind in ("ema", "schedule_free", "normalized", "graft") if kind in kinds]
    assert list(state["optimizer"].get("wrappers", {})) == expected
    logged = [event for event in metrics(folder) if event["event"] == "train"]
    for kind in set(expected) & {"graft", "normalized"}:
        assert all(event[f"step_length/{kind}_median"] > 0 for event in logged)


def test_mixed_images_and_an_average(quick: Callable[..., Outcome], work: Path) -> None:
    """Targets are probabilities in training alone, where accuracy is that of the class with the largest part."""
    plain = compose([])
    assert compose(["dataset.mixup=0.0", "dataset.cutmix=0", "dataset.randaugment=null"]).id == plain.id
    before = {**plain.values, "dataset": {k: v for k, v in plain.values["dataset"].items() if k != "mixup"}}
    assert type(plain)(before, plain.choices).id == plain.id, "runs of before these options keep their names"
    mixed = ("dataset.mixup=0.8", "dataset.cutmix=1", "dataset.randaugment=5")
    assert compose(list(mixed)).id != plain.id
    done = quick(*STEPS, *mixed, "optimizer=kfac", "optimizer.damping=auto", "averaging=ema")
    assert done.code == 0, done.err
    (folder,) = runs(work)
    values = summary(folder)["final"]
    assert 0 < values["train/accuracy"] < 1 and 0 < values["val/accuracy"] <= 1 and values["train/loss"] > 1


def test_a_run_with_an_average_resumes_by_itself(quick: Callable[..., Outcome], work: Path) -> None:
    around = ("optimizer=kfac", "averaging=ema", "step_length=graft", "trainer.checkpoint_every_steps=2")
    assert quick(*STEPS, *around).code == 0
    (folder,) = runs(work)
    whole, lines = checkpoints.load(folder / "checkpoints" / "step_00000006.pt"), metrics(folder)
    unfinish(folder)
    outcome = quick(*STEPS, *around, "resume=auto")
    assert outcome.code == 0, outcome.err
    again = checkpoints.load(folder / "checkpoints" / "step_00000006.pt")
    assert all(torch.equal(again["model"][key], value) for key, value in whole["model"].items())
    assert metrics(folder) == lines


def test_the_weights_to_start_from_are_the_averages(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick(*STEPS, "averaging=ema", "averaging.decay=0.5").code == 0
    (first,) = runs(work)
    best = summary(first)["best"]
    again = quick(*STEPS, "optimizer=sgd", "optimizer.lr=1e-12", f"init_from={first}", "optimizer.weight_decay=0")
    assert again.code == 0, again.err
    (second,) = [run for run in runs(work) if run != first]
    assert summary(second)["final"]["val/loss"] == pytest.approx(best["val/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("averaging=emma",), "averaging has no choice 'emma' (did you mean 'ema'?)"),
        (("averaging=ema", "averaging.decay=1"), "averaging.decay must be in [0, 1), got 1.0"),
        (("averaging=ema", "averaging.beta=1"), "averaging has no key 'beta' as it is chosen: averaging=sched"),
        (("averaging=schedule_free", "averaging.beta=0"), "averaging.beta must be in (0, 1], got 0.0"),
        (("averaging=ema", "averaging.calibrate=x"), "averaging.calibrate must be a whole number, got 'x'"),
        (("step_length=graft", "step_length.per=tensor"), "step_length.per must be one of layer, all, got 'tensor'"),
        (
            ("step_length=graft", "step_length.to=adm"),
            "step_length.to must be an optimizer of torch.optim, got 'adm' (did you mean 'Adam'?)",
        ),
        (
            ("step_length=graft", "step_length.options={betaz: [0.9, 0.9]}"),
            "step_length.options: adam has no option 'betaz'; it has betas, eps, weight_decay",
        ),
        (("step_length=normalized", "step_length.cap=0"), "step_length.cap must be in (0, inf), got 0.0"),
        (("step_length=normalized", "optimizer.lr=0"), "step_length: the optimizer's lr must be above 0"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    words: tuple[str, ...], sentence: str, command: Callable[..., Outcome], work: Path
) -> None:
    outcome = command("optimizer=adafisher", *words)
    assert outcome.code == 1 and outcome.sentence().startswith(sentence), outcome.err
    assert list(work.iterdir()) == []


def test_a_momentum_of_its_own_is_said_once(quick: Callable[..., Outcome]) -> None:
    with pytest.warns(UserWarning, match="takes the place of momentum, and KFAC has its own: set mom") as told:
        assert quick(*STEPS, "optimizer=kfac", "averaging=schedule_free").code == 0
    assert sum("takes the place" in str(one.message) for one in told) == 1


def test_what_is_around_cannot_change_in_a_resumed_run(
    quick: Callable[..., Outcome], command: Callable[..., Outcome], work: Path
) -> None:
    assert quick(*STEPS, "averaging=ema", "trainer.checkpoint_every_steps=2").code == 0
    (folder,) = runs(work)
    unfinish(folder)
    outcome = command(f"resume={folder}", "averaging=none")
    assert "is a run with averaging=ema, which averaging=none contradicts" in outcome.sentence()
    outcome = command(f"resume={folder}", "averaging.decay=0.5")
    assert "averaging.decay is 0.999 in the checkpoint" in outcome.sentence()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["averaging"], config["step_length"], config["choices"]["averaging"], config["choices"]["step_length"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))  # as of before there were these groups
    outcome = command(f"resume={folder}")
    assert "here is an optimizer with nothing around it" in outcome.sentence()


def test_a_run_of_before_these_groups_resumes(
    quick: Callable[..., Outcome], command: Callable[..., Outcome], work: Path
) -> None:
    assert quick(*STEPS, "optimizer=adam", "trainer.checkpoint_every_steps=2").code == 0
    (folder,) = runs(work)
    unfinish(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["averaging"], config["step_length"], config["choices"]["averaging"], config["choices"]["step_length"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    outcome = command(f"resume={folder}")
    assert outcome.code == 0, outcome.err
    assert summary(folder)["steps"] == 6


def test_scalars_of_the_optimizer_inside_follow_their_schedules(quick: Callable[..., Outcome], work: Path) -> None:
    """Also where the average has one of that name."""
    done = quick(
        *STEPS, "optimizer=kfac", "averaging=ema", "step_length=graft", "trainer.log_every_steps=1",
        "schedules={damping: {end: 1.0}, decay: {end: 0.5}, update_every: {end: 5}}",
    )  # fmt: skip
    assert done.code == 0, done.err
    (folder,) = runs(work)
    last = [event for event in metrics(folder) if event["event"] == "train"][-1]
    assert last["schedule/damping"] > 0.8 and last["schedule/decay"] < 0.6
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["averaging"]["decay"] == 0.999


@pytest.mark.parametrize("around", [("averaging=ema",), ("averaging=ema", "step_length=graft")])
def test_games(around: tuple[str, ...], command: Callable[..., Outcome], work: Path) -> None:
    done = command(*GAME, *STEPS[:2], "optimizer=adam", "optimizer@critic=kfac", *around)
    assert done.code == 0, done.err
    (folder,) = runs(work)
    state = checkpoints.load(folder / "checkpoints" / "best.pt")["optimizer"]
    for player in ("generator", "critic"):
        assert list(state[player]["wrappers"]) == [word.partition("=")[2] for word in around]


def test_verify_looks_at_the_optimizer_inside(command: Callable[..., Outcome], work: Path) -> None:
    done = command("debug=verify", "model=mlp", "optimizer=kfac", "averaging=ema", "step_length=graft")
    assert done.code == 0, done.err
