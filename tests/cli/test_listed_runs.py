"""Sweeps whose runs a file lists: `-m runs=FILE`, and so many threads for each: `threads=N`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import Outcome, runs, summary
from training.settings.composition import Sweep, compose, prepare

ROWS = """# what is tried
optimizer=sgd

optimizer=sgd optimizer.lr=0.2
["optimizer=adam", "optimizer.betas=[0.8,0.99]", "trainer.max_steps=3"]
"""


def test_each_line_is_what_its_own_command_would_be(work: Path) -> None:
    Path("rows.txt").write_text(ROWS)
    shared = ["model=mlp", "trainer.max_epochs=2", "optimizer.lr=0.5"]
    sweep = prepare(["-m", "runs=rows.txt", "seed=1,2", "name=listed", *shared])
    assert isinstance(sweep, Sweep) and sweep.folder.name == "listed" and len(sweep.commands) == 6
    rows = [
        ["optimizer=sgd", "trainer.max_epochs=2", "optimizer.lr=0.5"],
        ["optimizer=sgd", "trainer.max_epochs=2", "optimizer.lr=0.2"],
        ["optimizer=adam", "optimizer.lr=0.5", "optimizer.betas=[0.8,0.99]", "trainer.max_steps=3"],
    ]
    alone = [compose([*row, f"seed={seed}", "model=mlp", "name=listed"]).values for row in rows for seed in (1, 2)]
    assert [sweep.job(index).values for index in range(6)] == alone
    assert (
        sweep.labels[0] == "optimizer.lr-0.5_optimizer-sgd_seed-1"
        and sweep.labels[3] == "optimizer.lr-0.2_optimizer-sgd_seed-2"
    )


def test_a_line_that_leaves_a_value_to_its_files_gets_it(work: Path) -> None:
    Path("rows.txt").write_text("optimizer.lr=0.2 optimizer.momentum=0.5\noptimizer.lr=0.3\n")
    sweep = prepare(["-m", "runs=rows.txt", "model=mlp", "optimizer=sgd"])
    assert isinstance(sweep, Sweep)
    assert [sweep.job(index).values["optimizer"]["momentum"] for index in (0, 1)] == [0.5, 0.9]


def test_a_line_may_name_its_run(work: Path) -> None:
    Path("rows.txt").write_text('first: optimizer=sgd\n["the second:", "optimizer=adam"]\noptimizer=adamw\n')
    sweep = prepare(["-m", "runs=rows.txt", "model=mlp", "seed=1,2"])
    assert isinstance(sweep, Sweep)
    names = [f"{name}_seed-{seed}" for name in ("first", "the second", "optimizer-adamw") for seed in (1, 2)]
    assert sweep.labels == names and sweep.job(2).label == "the second_seed-1"


def test_they_run_with_their_threads_and_are_skipped_the_second_time(
    quick: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("rows.txt").write_text(ROWS)
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: seen.append(count))
    outcome = quick("-m", "runs=rows.txt", "threads=3", "name=listed")
    assert outcome.code == 0, outcome.err
    assert seen == [3, before] * 3
    folders = runs(work, "multirun/listed/*/")
    budgets = [yaml.safe_load((folder / "config.yaml").read_text())["trainer"] for folder in folders]
    assert sorted((one["max_epochs"] or 0, one["max_steps"] or 0) for one in budgets) == [(0, 3), (1, 0), (1, 0)]
    assert [summary(folder)["status"] for folder in folders] == ["finished"] * 3
    again = quick("-m", "runs=rows.txt", "threads=3", "name=listed")
    assert again.out.count("is finished: skipped") == 3


@pytest.mark.parametrize(
    ("text", "given", "says"),
    [
        (None, ["-m", "runs=rows.txt"], "runs=rows.txt: No such file or directory; give a file with a line"),
        ("# nothing\n", ["-m", "runs=rows.txt"], "runs=rows.txt lists no run"),
        (ROWS, ["runs=rows.txt"], "is for the runs of a sweep, which -m asks for: leave it out"),
        (ROWS, ["threads=2"], "which -m asks for: set OMP_NUM_THREADS for one run"),
        (ROWS, ["-m", "seed=0,1", "threads=0"], "threads must be a whole number of at least 1, got 0"),
        (ROWS, ["-m", "seed=0,1", "threads=2", "hydra/launcher=joblib"], "this program hands out itself"),
        ("optimizer=sgd optimizer.lr=1,2\n", ["-m", "runs=rows.txt"], "optimizer.lr=1,2 holds several values"),
        ("optimizer=sgd hydra.verbose=true\n", ["-m", "runs=rows.txt"], "is for the command, not for one of its runs"),
        ("optimizer=sgd optimizer.lrr=1\n", ["-m", "runs=rows.txt"], "no key 'lrr' (did you mean 'lr'?)"),
        ('["optimizer=sgd"\n', ["-m", "runs=rows.txt"], "rows.txt, line 1: "),
        ("optimizer\n", ["-m", "runs=rows.txt"], "each run is a list of key=value, got optimizer"),
        ("seed=1\nseed=1\n", ["-m", "runs=rows.txt"], "two jobs of this sweep are the same run"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(
    command: Callable[..., Outcome], work: Path, text: str | None, given: list[str], says: str
) -> None:
    if text is not None:
        Path("rows.txt").write_text(text)
    outcome = command("model=mlp", *given)
    assert outcome.code == 1 and says in outcome.sentence()
