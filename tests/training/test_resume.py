"""A run that was stopped, killed or damaged goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.small_run import OPTIMIZERS, SignalAt, differences, events, final_state, fit
from training import Interrupted
from training.callbacks import Callback, EarlyStopping
from training.runs import checkpoints
from training.runs.checkpoints import CheckpointError
from training.runs.run import Run


def assert_same_run(one: Path, other: Path) -> None:
    """Same weights, optimizer, random states and counters in the last checkpoint, and the same events."""
    assert list(differences(final_state(one), final_state(other))) == []
    assert events(one) == events(other)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, but times."""
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_and_ten_more_are_twenty(tmp_path: Path, optimizer: str) -> None:
    # An epoch is 16 steps and a log window 3: the stop at step 10 is in the middle of both.
    fit(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", optimizer=optimizer, callbacks=[SignalAt(10)])
    assert checkpoints.latest(tmp_path / "parts" / "checkpoints")[0].name == "step_00000010.pt"
    summary, _ = fit(tmp_path / "parts", optimizer=optimizer, resume=True)
    assert summary["status"] == "finished"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "parts")


def test_tensorboard_reads_the_files_of_a_resumed_run_in_their_order(tmp_path: Path) -> None:
    # It sorts them by name: the second, the host, the process and a counter, where 10 comes before 9.
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", callbacks=[SignalAt(1)])
    fit(tmp_path / "run", max_steps=2, resume=True)
    assert len({file.name.split(".")[3] for file in (tmp_path / "run" / "tensorboard").iterdir()}) == 2


@pytest.mark.parametrize("accumulate, schedule", [(2, "onecycle"), (3, "none")])
def test_resume_with_accumulation_across_epochs(tmp_path: Path, accumulate: int, schedule: str) -> None:
    mixed = {"mixup": 0.8, "cutmix": 1.0, "randaugment": 9} if accumulate == 2 else {}
    options = {"accumulate": accumulate, "schedule": schedule, "clip_norm": 0.5, "label_smoothing": 0.1, "data": mixed}
    fit(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[SignalAt(7)], **options)
    fit(tmp_path / "parts", resume=True, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("stop", range(1, 7))
def test_resume_from_every_step(tmp_path: Path, stop: int) -> None:
    # Every position between two logs (3), checkpoints (4) and evaluations (5); at 5 the evaluation is made up for.
    fit(tmp_path / "whole", max_steps=8)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", max_steps=8, callbacks=[SignalAt(stop)])
    fit(tmp_path / "parts", max_steps=8, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_goes_on_for_longer(tmp_path: Path) -> None:
    fit(tmp_path / "whole", schedule="none", max_steps=20)
    fit(tmp_path / "parts", schedule="none", max_steps=10)
    assert events(tmp_path / "parts")[-1]["event"] == "test"
    fit(tmp_path / "parts", schedule="none", max_steps=20, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_repeats_its_end(tmp_path: Path) -> None:
    first, _ = fit(tmp_path / "run", max_steps=11)  # the last step is neither logged nor evaluated by the clockwork
    lines = events(tmp_path / "run")
    again, _ = fit(tmp_path / "run", max_steps=11, resume=True)
    assert events(tmp_path / "run") == lines
    assert (again["final"], again["best"]) == (first["final"], first["best"])


def test_a_longer_budget_stretches_the_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path / "run", schedule="cosine", max_steps=10)
    fit(tmp_path / "run", schedule="cosine", max_steps=20, resume=True)
    fit(tmp_path / "whole", schedule="cosine", max_steps=20)
    assert "budget is not the checkpoint's" in caplog.text
    rates = [{e["step"]: e["lr"] for e in events(tmp_path / n) if e["event"] == "train"} for n in ("run", "whole")]
    assert rates[0][12] == rates[1][12] and rates[0][18] == rates[1][18]
    assert rates[0][9] != rates[1][9]


def test_a_damaged_newest_checkpoint_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[SignalAt(14)])
    newest = tmp_path / "parts" / "checkpoints" / "step_00000014.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    fit(tmp_path / "parts", resume=True)
    assert "step_00000014.pt is damaged" in caplog.text
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert sorted(p.name for p in newest.parent.glob("step_*")) == ["step_00000016.pt", "step_00000020.pt"]


def test_a_damaged_best_checkpoint_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", callbacks=[SignalAt(14)])
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    best.write_bytes(b"nothing")
    summary, _ = fit(tmp_path / "run", resume=True)
    assert "chosen anew" in caplog.text
    assert checkpoints.load(best)["best"]["step"] == summary["best"]["step"] >= 15


def test_best_weights_survive_a_rewind(tmp_path: Path) -> None:
    """best.pt may be newer than the checkpoint resumed from; it stays the best, and its record is believed."""
    whole, _ = fit(tmp_path / "whole", keep_checkpoints=5)
    state = checkpoints.load(tmp_path / "whole" / "checkpoints" / "step_00000008.pt")
    again, _ = fit(tmp_path / "whole", keep_checkpoints=5, resume=state)
    assert again["best"] == whole["best"] and again["final"] == whole["final"]


def test_early_stopping_remembers(tmp_path: Path) -> None:
    options = {"lr": 0.0, "eval_every_steps": 2, "max_steps": 40, "model": {"batch_norm": False}}
    whole, _ = fit(tmp_path / "whole", callbacks=[EarlyStopping(patience=4)], **options)
    assert (whole["status"], whole["steps"]) == ("stopped_early", 10)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[EarlyStopping(patience=4), SignalAt(7)], **options)
    parts, _ = fit(tmp_path / "parts", callbacks=[EarlyStopping(patience=4)], resume=True, **options)
    assert (parts["status"], parts["steps"]) == ("stopped_early", 10)
    again, _ = fit(tmp_path / "parts", callbacks=[EarlyStopping(patience=4)], resume=True, **options)
    assert (again["status"], again["steps"]) == ("stopped_early", 10)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "run", max_steps=4)
    before = (tmp_path / "run" / "summary.json").read_text()
    with pytest.raises(CheckpointError, match="another model"):
        fit(tmp_path / "run", resume=True, model={"batch_norm": False})
    with pytest.raises(CheckpointError, match="another optimizer"):
        fit(tmp_path / "run", resume=True, optimizer="adafisher")
    with pytest.raises(CheckpointError, match="batch size"):
        fit(tmp_path / "run", resume=True, max_steps=8, data={"batch_size": 128})
    assert (tmp_path / "run" / "summary.json").read_text() == before


def test_a_summary_speaks_of_the_end(tmp_path: Path) -> None:
    class Look(Callback):
        def on_step(self, run: Run) -> None:
            assert not run.folder.summary_file.exists()

    with pytest.raises(Interrupted):
        fit(tmp_path / "run", callbacks=[SignalAt(10)])
    assert (tmp_path / "run" / "summary.json").exists()
    fit(tmp_path / "run", callbacks=[Look()], resume=True)


def test_clocks_go_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", callbacks=[SignalAt(10)])
    before = checkpoints.latest(tmp_path / "run" / "checkpoints")[1]["clocks"]
    summary, _ = fit(tmp_path / "run", resume=True)
    for kind in ("training", "evaluation", "wall"):
        assert summary["seconds"][kind] > before[kind] > 0


def test_everything_a_checkpoint_holds_loads_as_weights_only(tmp_path: Path) -> None:
    for optimizer in OPTIMIZERS:
        folder = tmp_path / optimizer
        fit(folder, optimizer=optimizer, max_steps=4, callbacks=[EarlyStopping()])
        state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
        assert state["callbacks"]["EarlyStopping"]["waited"] == 0
        assert state["config_id"] == "abc"
