"""Jobs of a sweep are composed faster than by Hydra, and are what Hydra makes of them."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome, summary
from training.settings import composer
from training.settings.composition import Sweep, compose, prepare

# Plain values of every type; groups; a key that others refer to; keys that are not in the files; quoted text.
SWEEPS = [
    ("optimizer=sgd,adam", "optimizer.lr=0.01,1e-3,1", "seed=0,3", "model=mlp", "model.hidden=[16],[8,8]"),
    ("paths.data=here", "dataset=mnist,svhn", "dataset.root='${paths.data}/a',b", "trainer.clip_norm=1,null"),
    ("name='b c'", "optimizer=sgd", "schedules.weight_decay.end=0.1,0.2", "optimizer.nesterov=true,false"),
    ("dataset.augment='none',cutout", "model=mlp", "scheduler.warmup=0,0.1", "trainer.monitor=val/loss,null"),
    ("experiment=null,digits_mlp", "model=mlp", "model.dropout=0,0.5", "callbacks.samples=null", "seed=range(2)"),
]


@pytest.mark.parametrize("given", SWEEPS, ids=range(len(SWEEPS)))
def test_composed_as_by_hydra(given: tuple[str, ...], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hydras = []
    compose_by_hydra = composer.composition_of
    monkeypatch.setattr(composer, "composition_of", lambda job: hydras.append(job) or compose_by_hydra(job))
    sweep = prepare(["-m", *given])
    assert isinstance(sweep, Sweep) and sweep.native
    found = [sweep.job(index) for index in range(len(sweep.commands))]
    assert len(hydras) < len(found), "some needed no Hydra"
    for one, command in zip(found, sweep.commands, strict=True):
        expected = compose(command)
        assert (one.values, one.choices, one.command) == (expected.values, expected.choices, expected.command)
        assert (one.to_yaml(), one.job_id) == (expected.to_yaml(), expected.job_id)
    assert all(one.values["optimizer"] is not other.values["optimizer"] for one, other in itertools.pairwise(found))


def test_what_only_two_values_together_make_wrong_is_found_when_it_is_due(
    quick: Callable[..., Outcome], work: Path
) -> None:
    outcome = quick("-m", "optimizer=sgd", "optimizer.momentum=0.9,0", "optimizer.nesterov=false,true")
    assert outcome.code == 1 and "Nesterov momentum requires a momentum" in outcome.sentence()
    assert outcome.out.count(": finished") == 3 and outcome.out.count(": failed") == 1
    found = {path.parent.name[:-9]: summary(path.parent) for path in work.glob("multirun/*/*/summary.json")}
    assert set(found) == {
        "optimizer.momentum-0.9_optimizer.nesterov-False", "optimizer.momentum-0.9_optimizer.nesterov-True",
        "optimizer.momentum-0_optimizer.nesterov-False",
    }  # fmt: skip
    plan = json.loads((work / "multirun" / "sgd_mlp_digits" / "sweep.json").read_text())
    assert "Nesterov" in plan["refused"]["optimizer.momentum-0_optimizer.nesterov-True"] and len(plan["jobs"]) == 4


def test_many_values_and_long_names(quick: Callable[..., Outcome], work: Path) -> None:
    long = ",".join(f"[{','.join(['16'] * count)}]" for count in range(100, 104))
    outcome = quick("-m", f"model.hidden={long}", "trainer.max_epochs=null", "trainer.max_steps=1", f"name={'n' * 300}")
    assert outcome.code == 0, outcome.err
    (folder,) = work.glob("multirun/*")
    assert len(os.fsencode(folder.name)) == 255 and len([path for path in folder.iterdir() if path.is_dir()]) == 4


@pytest.mark.parametrize(
    "argv, says",
    [
        (["workers=2"], "workers=2 is for the runs of a sweep, which -m asks for"),
        (["-m", "workers=two", "seed=0,1"], "workers must be a whole number of at least 1, got two"),
        (["-m", "workers=2", "seed=0,1", "hydra/launcher=basic"], "let Hydra's launcher share out the runs"),
        (["-m", "hydra/launcher=rq", "seed=0,1"], "hydra/launcher=rq needs a package .* hydra-rq-launcher"),
        (["-m", "hydra/sweeper=ax", "seed=0,1"], "hydra/sweeper=ax needs a package .*: pip install hydra-ax-sweeper"),
    ],
)
def test_who_runs_the_jobs(argv: list[str], says: str, quick: Callable[..., Outcome], work: Path) -> None:
    assert re.search(says, quick(*argv).sentence()) and not list(work.iterdir())


def test_workers_are_for_one_launch(
    quick: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("LOCAL_RANK", "0")
    assert "start one, without torchrun" in quick("-m", "workers=2", "seed=0,1").sentence()
