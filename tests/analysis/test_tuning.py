"""Tuning: search spaces as data, budgets that are equal, choices by the validation set, and going on after a kill."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
import yaml

from analysis.tuning import Arm, Book, Outcome, Plan, Rungs, Space, Trial, advice, markdown, preset, tune
from analysis.tuning.points import points
from analysis.tuning.space import SPACES, Key
from training.errors import UserError
from training.runs.record import as_lists
from training.settings.composition import CONFIG_FOLDER, compose

OPTIMIZERS = sorted(path.stem for path in (CONFIG_FOLDER / "optimizer").glob("*.yaml"))
#: How far from its default a range goes at least, either way: rates by a decade, other keys by half of one.
FAR = {"lr": 10.0}
Summaries = list[dict[str, Any]]


# -- spaces ------------------------------------------------------------------------------------------------------------


def test_every_optimizer_has_a_space() -> None:
    assert sorted(path.stem for path in SPACES.glob("*.yaml")) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_space_holds_the_defaults_and_composes(name: str) -> None:
    space = Space.load(name)
    assert 3 <= len(space.keys) <= 4, "none has more effort than another"
    assert space.keys[0].name == "lr", "the first numbers of all are the rates"
    values = as_lists(compose([f"optimizer={name}"]).values["optimizer"])
    assert {key: values[key] for key in space.requires} == dict(space.requires)
    owner = {"torch": torch.optim, "pytorch_optimizer": pytorch_optimizer}.get(name)
    for key in space.keys:
        if key.name.startswith("+"):
            default = inspect.signature(getattr(owner, values["name"])).parameters[key.name[1:]].default
            assert key.default == (list(default) if isinstance(default, tuple) else default)
        else:
            assert key.default == values[key.name]
        if key.values:
            assert key.default in key.values
        elif key.scale == "linear":
            assert key.low < key.default < key.high
        else:
            low, middle, high = (1 - v if key.scale == "log1m" else v for v in (key.low, key.default, key.high))
            far = FAR.get(key.name, math.sqrt(10)) * (1 - 1e-9)
            assert max(low / middle, middle / low) >= far and max(high / middle, middle / high) >= far, key
    point = space.point([0.999] * 8)
    chosen = as_lists(compose([f"optimizer={name}", *space.overrides(point)]).values["optimizer"])
    assert [chosen[key.lstrip("+")] for key in point] == [*point.values()]


def test_points_of_a_space() -> None:
    space = Space.load("sgd")
    lr, momentum, decay, nesterov = space.keys
    assert space.point([0, 0, 0, 0]) == {"lr": 1e-4, "momentum": 0.5, "weight_decay": 1e-6, "nesterov": False}
    assert lr.at(0.5) == 0.01732 and momentum.at(0.5) == pytest.approx(1 - math.sqrt(0.5 * 0.01), abs=1e-4)
    assert [nesterov.at(u) for u in (0.49, 0.5)] == [False, True]
    for u in (0.1, 0.77):
        assert space.unit(space.point([u, u, u, u]))[:3] == pytest.approx([u] * 3, abs=1e-3)
    assert space.overrides(space.point([0.5] * 4))[0] == "optimizer.lr=0.01732"
    assert decay.place("auto") == 0.5, "what has no place in a range is taken for its middle"
    assert Space.load("torch").overrides({"+betas": [0.9, 0.99]}) == ["+optimizer.betas=[0.9,0.99]"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: {low: 0.1, high: 1.0}", "must have low, high and a scale of log, linear, log1m"),
        ("lr: {low: 0.0, high: 1.0, scale: log}", "above 0 for log"),
        ("lr: {low: 2.0, high: 1.0, scale: linear}", "low below high"),
        ("momentum: {low: 0.1, high: 1.0, scale: log1m}", "below 1 for log1m"),
        ("lr: {values: [1.0]}", "must have two values or more"),
        ("lrr: {values: [1.0, 2.0]}", "is no key of this optimizer (did you mean 'lr'?)"),
        ("+update_every: {values: [1, 10]}", "changes what a step costs"),
        ("- lr", "is no search space"),
        ("name: x", "has no key to search"),
    ],
)
def test_faults_of_a_space_are_sentences(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "sgd.yaml").write_text(text)
    with pytest.raises(UserError) as fault:
        Space.load("sgd", tmp_path)
    assert says in str(fault.value)


def test_an_unknown_space_is_a_sentence() -> None:
    with pytest.raises(UserError, match="no search space for 'kfacc' \\(did you mean 'kfac'"):
        Space.load("kfacc")


# -- points ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["halton", "sobol"])
def test_points_are_the_same_for_all_and_spread(sampler: str) -> None:
    two, four = (points(sampler, d, [0.5] * d, seed=3) for d in (2, 4))
    first = [four.point(index, {}) for index in range(1, 9)]
    assert [two.point(index, {})[:2] for index in range(1, 9)] == [u[:2] for u in first]
    assert four.point(40, {}) and [four.point(index, {}) for index in range(1, 9)] == first, "more are no others"
    assert sorted(int(8 * u[0]) for u in first) == [*range(8)], "eight rates, one in each eighth of the range"
    assert points(sampler, 2, [0.5] * 2, seed=4).point(1, {}) != first[0]


def test_without_optuna_tpe_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="sampler=tpe needs a package that is not installed: pip install optuna"):
        points("tpe", 2, [0.5, 0.5], seed=0)


def test_tpe_is_a_function_of_what_it_was_told(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    told: dict[int, float] = {}
    first = points("tpe", 2, [0.5, 0.5], seed=0, journal=tmp_path / "log")
    drawn = []
    for index in range(13):
        assert index <= first.ready(told)
        if index:
            drawn.append(first.point(index, told))
        told[index] = abs((drawn[-1] if index else [0.5])[0] - 0.8)
    assert first.ready({}) == first.ready({0: 1.0, 1: 1.0}) == 4 and first.ready(told) == 16
    again = points("tpe", 2, [0.5, 0.5], seed=0)
    assert [again.point(index, told) for index in range(1, 13)] == drawn
    assert (tmp_path / "log").stat().st_size > 0
    other = points("tpe", 2, [0.5, 0.5], seed=0)
    worse = {index: -value for index, value in told.items()}
    assert [other.point(index, worse) for index in range(1, 5)] == drawn[:4] != drawn[4:8]
    assert other.point(9, worse) != drawn[8], "it heeds what it was told"


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_rungs_take_their_budget_and_end_as_long_as_a_final_run() -> None:
    for budget, final, trials, eta in [(600, 60, 16, 3), (100, 10, 8, 3), (79, 10, 8, 2), (1800, 60, 8, 2)]:
        rungs = Rungs.within(budget, final, trials, eta)
        assert rungs.full and rungs.lengths[-1] == final and rungs.counts[0] >= trials
        assert rungs.total == pytest.approx(budget)
        assert [*rungs.lengths] == sorted(rungs.lengths) and [*rungs.counts] == sorted(rungs.counts)[::-1]
    short = Rungs.within(30, 10)
    assert not short.full and short.total == pytest.approx(30) and short.counts == (8, 2)
    assert Rungs.within(120, None).total == pytest.approx(120)
    assert Rungs.within(100, 10, rungs=1).counts == (10,)
    counted = Rungs.counted(9, 90.0, 3, 3.0)
    assert counted.counts == (9, 3, 1) and counted.lengths == pytest.approx((10, 30, 90))
    for wrong in ((8, 1.0, 3, 3.0), (0, 1.0, 1, 3.0), (8, 1.0, 1, 1.0), (8, -1.0, 1, 3.0)):
        with pytest.raises(UserError):
            Rungs.counted(*wrong)


# -- the search, on runs that are made up ------------------------------------------------------------------------------


def arms_of(**paces: float) -> dict[str, Arm]:
    return {name: Arm((f"optimizer={name}",), Space.load(name), pace) for name, pace in paces.items()}


def steps_of(row: Sequence[str]) -> int:
    return int(row[-1].partition("=")[2])


def made_up(lost: float = 0.0, worth: Callable[[Sequence[str]], float] | None = None) -> Any:
    """Runs whose values are a function of their overrides; a share of them diverges somewhere on its way."""

    def run(rows: Sequence[Sequence[str]]) -> Summaries:
        made = []
        for row in rows:
            drawn = random.Random(repr([*row]))
            summary: dict[str, Any] = {"status": "finished", "monitor": "val/accuracy", "steps": steps_of(row)}
            summary["final"] = {"val/accuracy": drawn.random() if worth is None else worth(row), "val/loss": 1.0}
            if drawn.random() < lost:
                done = int(drawn.random() * steps_of(row))
                summary |= {"status": "diverged", "steps": done, "final": {"val/accuracy": None}}
            made.append(summary)
        return made

    return run


@pytest.mark.parametrize("lost", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("rungs", [1, 2, 3])
def test_arms_are_charged_alike_whatever_diverges(tmp_path: Path, lost: float, rungs: int) -> None:
    arms = arms_of(sgd=0.01, kfac=0.037, exact_ng=0.11)
    for seed in range(3):
        plan = Plan(tmp_path / str(seed), Rungs.within(200, 20, trials=9, rungs=rungs), seed=seed)
        found = tune(arms, plan, made_up(lost))
        charged = [choice.charged for choice in found.values()]
        assert max(charged) - min(charged) <= 0.05 * 200, charged
        assert max(abs(one - 200) for one in charged) <= 0.05 * 200, charged
        if lost:
            assert sum(choice.lost for choice in found.values()) > 3
            assert sum(choice.trials for choice in found.values()) > 3 * sum(plan.rungs.counts)


def test_the_validation_set_decides_at_the_end_of_the_schedule(tmp_path: Path) -> None:
    def run(rows: Sequence[Sequence[str]]) -> Summaries:
        """The larger the rate, the worse at the end, and the better of the test set and on the way."""
        found = []
        for row in rows:
            rate = next((float(t.partition("=")[2]) for t in row if t.startswith("optimizer.lr=")), 0.1)
            final = {"val/accuracy": 1 / (1 + rate), "val/loss": rate, "test/accuracy": rate, "test/loss": 1 / rate}
            best = {"val/accuracy": rate, "test/accuracy": rate}
            found.append({"status": "finished", "monitor": "val/accuracy", "steps": steps_of(row), "final": final,
                          "best": best, "folder": str(tmp_path / "runs" / str(len(found)))})  # fmt: skip
        return found

    arms = arms_of(sgd=1.0)
    choice = tune(arms, Plan(tmp_path, Rungs.counted(9, 90.0, 3, 3.0)), run)["sgd"]
    outcomes = Book(tmp_path).of("sgd")
    rates = {one.trial.trial: one.trial.values.get("lr", 0.1) for one in outcomes}
    assert choice.values["lr"] == min(rates.values()) and choice.trial == min(rates, key=lambda n: rates[n])
    assert choice.rung == 2 and not choice.rate_inside and "lr low" in choice.at_edge
    assert choice.overrides[0] == f"optimizer.lr={choice.values['lr']:.4g}"
    assert [sum(one.trial.rung == rung for one in outcomes) for rung in range(3)] == [9, 3, 1]
    assert {one.trial.overrides[-1] for one in outcomes} == {f"trainer.max_steps={n}" for n in (10, 30, 90)}
    assert outcomes[0].trial.overrides == ("optimizer=sgd", "trainer.max_steps=10"), "trial 0 is as configured"
    assert outcomes[0].folder == "runs/0"
    kept = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(kept) == 13 and kept[0]["charged"] == 10.0 and not any("test" in key for line in kept for key in line)
    (told,) = advice(arms, {"sgd": choice})
    assert "lr (the least of all tried)" in told and "configs/hparams_search/sgd.yaml" in told
    assert "| lr low" in markdown({"sgd": choice}, "val/accuracy", "steps")
    written = yaml.safe_load(preset(arms["sgd"], choice, "tuned"))
    assert written == choice.values


def test_ties_go_to_the_lower_loss_then_to_the_lower_number(tmp_path: Path) -> None:
    losses = {0: 0.5, 1: 0.4, 2: 0.4}

    def run(rows: Sequence[Sequence[str]]) -> Summaries:
        final = [{"val/accuracy": 0.9, "val/loss": losses.get(index, 0.6)} for index in range(len(rows))]
        return [{"status": "finished", "monitor": "val/accuracy", "steps": 10, "final": one} for one in final]

    choice = tune(arms_of(sgd=1.0), Plan(tmp_path, Rungs.counted(4, 10.0, 1, 3.0)), run)["sgd"]
    assert choice.trial == 1


def test_what_is_lost_is_worst_and_the_next_best_takes_its_place(tmp_path: Path) -> None:
    def worth(row: Sequence[str]) -> float:
        return 0.5 if len(row) == 3 else 0.9

    def run(rows: Sequence[Sequence[str]]) -> Summaries:
        """All but trial 0 are better at first, and diverge at once in longer runs."""
        made = made_up(worth=worth)(rows)
        for row, summary in zip(rows, made, strict=True):
            if len(row) > 3 and steps_of(row) > 10:
                summary |= {"status": "diverged", "steps": 1, "final": {}}
        return made

    choice = tune(arms_of(sgd=1.0), Plan(tmp_path, Rungs.counted(9, 30.0, 2, 3.0)), run)["sgd"]
    assert choice.trial == 0 and choice.rung == 1 and choice.value == 0.5 and choice.overrides == ()
    assert choice.lost >= 8


def test_where_all_of_the_last_rung_are_lost_what_was_not_tried_there_is_chosen(tmp_path: Path) -> None:
    def run(rows: Sequence[Sequence[str]]) -> Summaries:
        made = made_up()(rows)
        for row, summary in zip(rows, made, strict=True):
            if steps_of(row) == 30:
                summary |= {"status": "diverged", "steps": 29, "final": {}}
        return made

    choice = tune(arms_of(sgd=1.0), Plan(tmp_path, Rungs.counted(9, 30.0, 2, 3.0)), run)["sgd"]
    refused = {one.trial.trial for one in Book(tmp_path).of("sgd") if one.lost}
    assert choice.rung == 0 and choice.trial not in refused and 171 <= choice.charged <= 189


def test_what_cannot_begin_is_a_sentence(tmp_path: Path) -> None:
    def run(rows: Sequence[Sequence[str]]) -> Summaries:
        fails = {"status": "failed", "error": "no data here"}
        return [fails if "optimizer=sgd" in row else made_up()([row])[0] for row in rows]

    rungs = Rungs.counted(4, 30.0, 2, 2.0)
    with pytest.raises(UserError, match="no trial could begin: no data here"):
        tune(arms_of(sgd=1.0), Plan(tmp_path / "one", rungs), run)
    arms = arms_of(sgd=1.0, adam=1.0)
    found = tune(arms, Plan(tmp_path / "two", rungs), run)
    assert found["sgd"].value is None and found["sgd"].overrides == () and found["sgd"].trials == 4
    assert found["adam"].value is not None
    assert "sgd: none of 4 trials came to an end (no data here)" in advice(arms, found)[0]


def test_a_run_that_was_cut_off_and_another_metric_are_sentences(tmp_path: Path) -> None:
    rungs = Rungs.counted(4, 30.0, 1, 2.0)
    with pytest.raises(UserError, match="a trial of sgd has not come to an end"):
        tune(arms_of(sgd=1.0), Plan(tmp_path, rungs), lambda rows: [{"status": "unfinished"} for _ in rows])
    with pytest.raises(UserError, match="must be of the validation set"):
        Plan(tmp_path, rungs, metric="test/accuracy")
    with pytest.raises(UserError, match="too short to tell anything"):
        tune(arms_of(sgd=10.0), Plan(tmp_path / "slow", rungs), made_up())


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["halton", "tpe"])
def test_it_goes_on_from_whatever_is_recorded(tmp_path: Path, sampler: str) -> None:
    if sampler == "tpe":
        pytest.importorskip("optuna")
    arms, rungs = arms_of(sgd=0.5, kfac=1.0), Rungs.within(180, 30, trials=8, rungs=3, eta=2)
    whole = tune(arms, Plan(tmp_path / "whole", rungs, sampler=sampler), made_up(0.3))
    lines = (tmp_path / "whole" / "trials.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 7, len(lines) - 2) if sampler == "halton" else (7,):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "tuning.json").write_bytes((tmp_path / "whole" / "tuning.json").read_bytes())
        (folder / "trials.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])  # and half of the next one
        asked: list[Sequence[str]] = []

        def run(rows: Sequence[Sequence[str]], asked: list[Sequence[str]] = asked) -> Summaries:
            asked += rows
            return made_up(0.3)(rows)

        slower = {name: replace(arm, pace=7 * arm.pace) for name, arm in arms.items()}
        assert tune(slower, Plan(folder, rungs, sampler=sampler), run) == whole, "by the paces that it began with"
        assert len(asked) == len(lines) - kept, "what is written down is not asked for again"
        assert sorted((folder / "trials.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_a_folder_of_another_tuning_is_refused(tmp_path: Path) -> None:
    rungs = Rungs.counted(4, 10.0, 1, 2.0)
    tune(arms_of(sgd=1.0), Plan(tmp_path, rungs), made_up())
    with pytest.raises(UserError, match="holds a tuning that differs in seed: give another name"):
        tune(arms_of(sgd=1.0), Plan(tmp_path, rungs, seed=1), made_up())
    with pytest.raises(UserError, match=r"differs in arms\.adam"):
        tune(arms_of(sgd=1.0, adam=1.0), Plan(tmp_path, rungs), made_up())
    (tmp_path / "trials.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        Book(tmp_path)


def test_edges() -> None:
    rate = Key("lr", 0.1, 1e-3, 1.0, "log")
    assert [rate.edge(v, [0.01, 0.1, 0.3]) for v in (0.01, 0.1, 0.3)] == ["low", None, "high"]
    decay = Key("weight_decay", 0.0, values=(0.0, 0.1, 0.2))
    assert [decay.edge(v, [0.0, 0.1, 0.2]) for v in (0.0, 0.2)] == [None, "high"], "nothing is below none"
    eps = Key("eps", 1e-8, values=(1e-8, 1e-6, 1e-4))
    assert [eps.edge(v, [1e-8, 1e-6, 1e-4]) for v in eps.values] == [None, None, "high"], "nor beyond a default"
    assert Key("nesterov", False, values=(False, True)).edge(True, [True, False]) is None
    assert Key("lr", "auto", 0.1, 1.0, "log").edge("auto", ["auto", 0.2, 0.3]) is None


def test_an_outcome_survives_its_line() -> None:
    line = Outcome.of(
        made_trial(), {"status": "finished", "final": {"val/loss": math.nan}, "steps": 3}, "steps", 0.5, "val/loss"
    )
    assert line.lost and line.charged == 1.5 and Outcome.from_line(line.to_line().decode()) == line


def made_trial() -> Any:

    return Trial("sgd", 0, 1, 10.0, {"lr": 0.1, "betas": [0.9, 0.99]}, ("optimizer=sgd",))
