"""What is past is not believed: discarded futures, other runs' checkpoints, clocks that jump, folders of dead runs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, Outcome, command, metrics, quick, runs, summary, work  # noqa: F401 - fixtures
from tests.survival import kills
from tests.training.small_run import SignalAt, events, fit
from tests.training.test_resume import assert_same_run, scalars
from training import Interrupted
from training.callbacks import Callback
from training.runs import checkpoints
from training.runs.run import Run

Give = Callable[..., Outcome]


class Die(Callback):
    def on_step(self, run: Run) -> None:
        if run.step == 9:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_taken_back_counts_nothing_of_its_discarded_future(tmp_path: Path) -> None:
    options = {"schedule": "none", "keep_checkpoints": 9}
    fit(tmp_path / "whole", max_steps=12, **options)
    long, _ = fit(tmp_path / "run", max_steps=24, **options)
    assert long["best"]["step"] > 12
    step = checkpoints.step_file(tmp_path / "run" / "checkpoints", 8)
    died = kills.forked(
        lambda: bool(fit(tmp_path / "run", max_steps=12, resume=checkpoints.load(step), callbacks=[Die()], **options)),
        tmp_path,
    )
    assert died.code == -signal.SIGKILL
    found = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found[0] == step, "what was discarded is not resumed"
    summary, _ = fit(tmp_path / "run", max_steps=12, resume=True, **options)
    whole, _ = fit(tmp_path / "whole", max_steps=12, resume=True, **options)
    assert (summary["best"], summary["final"]["val/loss"]) == (whole["best"], whole["final"]["val/loss"])
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "run")
    names = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("whole", "run")]
    assert names[0] == names[1]


def test_the_best_until_then_is_found_again_or_said_to_be_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"schedule": "none", "keep_checkpoints": 9, "max_steps": 16}
    whole, _ = fit(tmp_path / "run", **options)
    folder = tmp_path / "run" / "checkpoints"
    state = checkpoints.load(checkpoints.step_file(folder, 12))
    assert state["best"]["step"] == 10, "of no step checkpoint, and not the last best"
    for path in folder.glob("best_*"):
        path.unlink()
    again, _ = fit(tmp_path / "run", resume=state, **options)
    assert "of step 10, are lost: they are chosen anew" in caplog.text
    assert again["best"]["step"] == whole["best"]["step"] == 16


def test_a_checkpoint_of_other_settings_is_refused(quick: Give, command: Give, work: Path) -> None:  # noqa: F811
    several = ("optimizer=kfac", "trainer.checkpoint_every_steps=5", "dataset.limit_train=0.2")
    assert quick(*several, "seed=0").code == 0
    (mine,) = (work / "runs").glob("*/*")
    for other in ("seed=1", "optimizer.lr=0.001", "optimizer=twolevel_kfac"):
        assert quick(*several, other).code == 0
    others = [run for run in (work / "runs").glob("*/*") if run != mine]
    assert len(others) == 3
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file() and path.name != ".lock"}
    texts = []
    for run in others:
        foreign = mine / "checkpoints" / "foreign.pt"
        shutil.copy(sorted((run / "checkpoints").glob("step_*.pt"))[0], foreign)
        texts.append(command(f"resume={foreign}").sentence())
        foreign.unlink()
    text = "\n".join(sorted(texts))
    for says in ("seed (seed is 1 in it and 0 here)", "optimizer (optimizer.lr is", "optimizer (optimizer._target_ is"):
        assert f"is of another {says}" in text, text
    assert {path: path.read_bytes() for path in before} == before, "what was refused left the run as it found it"


def test_the_newest_run_is_the_one_that_began_last_whatever_the_clock_says(
    quick: Give, work: Path  # noqa: F811
) -> None:
    assert quick().code == 0
    (first,) = runs(work)
    future = first.with_name(f"2099-12-31_23-59-59{first.name[19:]}")
    first.rename(future)  # made before the clock was set back
    assert quick().code == 0
    second = next(run for run in runs(work) if run != future)
    assert second.name > future.name
    (second / "summary.json").unlink()
    outcome = quick("resume=auto", "trainer.max_epochs=2")
    assert f"resuming {second.relative_to(work)} from step_" in outcome.out and outcome.code == 0


def test_tensorboard_reads_what_comes_later_last_whatever_the_clock_says(tmp_path: Path) -> None:
    fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", callbacks=[SignalAt(10)])
    (early,) = (tmp_path / "run" / "tensorboard").iterdir()
    parts = early.name.split(".")
    state = checkpoints.load(checkpoints.step_file(tmp_path / "run" / "checkpoints", 10))
    late = early.rename(early.with_name(".".join([*parts[:3], "4000000000", *parts[4:]])))
    state["loggers"]["TensorBoard"]["written"] = {late.name: late.stat().st_size}
    fit(tmp_path / "run", resume=state)
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "run")
    assert events(tmp_path / "whole") == events(tmp_path / "run")


def test_a_run_killed_before_its_first_checkpoint_is_the_newest_still(quick: Give, work: Path) -> None:  # noqa: F811
    argv = [*QUICK, "resume=auto"]
    assert quick().code == 0
    (finished,) = runs(work)
    for file in ("config.yaml", "best.pt"):
        ended = kills.command(*QUICK, cwd=work, before=kills.at_file(file))
        assert ended.code == -signal.SIGKILL
        dead = runs(work)[-1]
        assert dead != finished and not (dead / "summary.json").exists()
        ended = kills.command(*argv, cwd=work)
        assert ended.code == 0 and "ended before its first checkpoint: it begins again" in ended.out, ended.err
        assert summary(dead)["status"] == "finished" and metrics(dead) == metrics(finished)
        assert list(dead.rglob("*.tmp")) == []
        shutil.rmtree(dead)
    assert runs(work) == [finished]


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root on Linux gives up its power")
def test_what_may_not_be_read_is_not_taken_for_damaged(quick: Give, work: Path) -> None:  # noqa: F811
    assert quick("trainer.max_epochs=2").code == 0
    (run,) = runs(work)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        path.chmod(0)
    ended = kills.command(*QUICK, "trainer.max_epochs=2", "resume=auto", cwd=work, before=kills.bound)
    assert ended.code == 1 and "cannot be read (Permission denied): see to it that it can" in ended.sentence()
    assert runs(work) == [run], "nothing begun anew"
    for path in (run / "checkpoints").iterdir():
        path.chmod(0o600)
    ended = kills.command(*QUICK, "trainer.max_epochs=2", "resume=auto", cwd=work, before=kills.bound)
    assert ended.code == 0 and summary(run)["status"] == "finished", ended.err
