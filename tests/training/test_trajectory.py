"""Snapshots of weights while training: near to what was there, and the same file whatever happened to the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.survival import kills
from tests.training.small_run import differences, final_state, fit
from training import UserError
from training.callbacks import Callback
from training.runs import checkpoints
from training.runs.run import Run
from training.settings.composition import compose
from training.show.snapshots import NAME, Snapshots, Writer, put, state
from training.show.trajectory import Trajectory


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(5, 4, dtype=torch.float64)
        self.short = nn.Parameter(torch.randn(7).bfloat16())
        self.pair = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(4)


class Die(Callback):
    def on_step(self, run: Run) -> None:
        if run.step == 9:
            os.kill(os.getpid(), signal.SIGKILL)


def file(run: Path) -> bytes:
    return (run / NAME).read_bytes()


def test_snapshots_are_near_to_the_weights_and_errors_do_not_add_up(tmp_path: Path) -> None:
    net, there, kept = Net(), [], []
    writer = Writer(tmp_path / NAME, net)
    for step in range(0, 60, 2):
        assert writer.append(net, step, step / 10)
        weights, buffers = state(net)
        there.append(weights)
        kept.append(buffers)
        with torch.no_grad():
            for number, tensor in enumerate(net.parameters()):
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype), alpha=(1e-12, 1e-3, 30.0)[number % 3])
            net.norm.running_mean.normal_()
    with torch.no_grad():
        net.wide.weight[0, 0] = torch.nan
    assert not writer.append(net, 60, 6.0), "what is not finite is not stored"
    size = writer.layout.size(30)
    writer.close()
    assert (tmp_path / NAME).stat().st_size == size
    read = Snapshots(tmp_path)
    assert read.steps == list(range(0, 60, 2)) and read.epochs[3] == 0.6 and "frozen" not in read.names
    last = read[0]
    assert list(differences(last.weights, there[0])) == []
    for snapshot, weights, buffers in zip(read, there, kept, strict=True):
        assert list(differences(snapshot.buffers, buffers)) == []
        for name, weight in weights.items():
            moved = (weight - last.weights[name]).abs()
            rounding = torch.finfo(weight.dtype).eps * weight.abs()
            assert ((snapshot.weights[name] - weight).abs() <= moved / 2**11 + moved.max() / 2**39 + rounding).all()
        last = snapshot
    assert list(differences(read[17].weights, {n: read.series(n, [3, 17])[1] for n in read.names})) == []
    other = Net()
    put(other, last.weights, last.buffers)
    found, buffers = state(other)
    assert list(differences({**found, "short": last.weights["short"]}, last.weights)) == []
    assert list(differences(buffers, last.buffers)) == []
    torch.testing.assert_close(found["short"], last.weights["short"], rtol=2**-8, atol=0)


def test_what_is_damaged_or_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="callbacks=trajectory"):
        Snapshots(tmp_path)
    net = nn.Linear(3, 2)
    writer = Writer(tmp_path / NAME, net)
    for step in range(3):
        writer.append(net, step, 0.0)
    end, frame = writer.size, writer.layout.frame
    writer.close()
    content = bytearray(file(tmp_path))
    (tmp_path / NAME).write_bytes(content[: end - 3])
    assert Snapshots(tmp_path).steps == [0, 1], "half a snapshot is that of a run under way"
    content[end - frame - 10] ^= 1
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match="damaged at its snapshot 2"):
        Snapshots(tmp_path)
    (tmp_path / NAME).write_bytes(b"something else")
    with pytest.raises(UserError, match="no file of snapshots"):
        Snapshots(tmp_path)


@pytest.mark.parametrize("around", ["", "ema"])
def test_a_run_is_the_same_with_and_without_and_ends_where_its_checkpoint_does(tmp_path: Path, around: str) -> None:
    fit(tmp_path / "without", around=around)
    fit(tmp_path / "with", around=around, callbacks=[Trajectory(every_steps=3)])
    with_, without = final_state(tmp_path / "with"), final_state(tmp_path / "without")
    assert with_.pop("callbacks").keys() == {"Trajectory"} and without.pop("callbacks") == {}
    assert list(differences(with_, without)) == []
    read = Snapshots(tmp_path / "with")
    assert read.steps == [0, 3, 6, 9, 12, 15, 18, 20]
    last = read[-1]
    for name, value in {**last.weights, **last.buffers}.items():
        torch.testing.assert_close(value, with_["model"][name], rtol=1e-5, atol=1e-6)


def test_a_killed_run_and_one_that_was_taken_back_leave_the_same_file(tmp_path: Path) -> None:
    def run(folder: str, steps: int, *others: Callback, resume: object = False) -> None:
        fit(tmp_path / folder, schedule="none", keep_checkpoints=9, max_steps=steps, resume=resume,
            callbacks=[Trajectory(every_steps=2), *others])  # fmt: skip

    run("whole", 15)
    died = kills.forked(lambda: bool(run("killed", 15, Die())), tmp_path)
    assert died.code == -signal.SIGKILL and Snapshots(tmp_path / "killed").steps == [0, 2, 4, 6, 8]
    run("killed", 15, resume=True)
    assert file(tmp_path / "killed") == file(tmp_path / "whole")
    run("long", 21)
    run("long", 15, resume=checkpoints.load(checkpoints.step_file(tmp_path / "long" / "checkpoints", 4)))
    assert file(tmp_path / "long") == file(tmp_path / "whole"), "of the discarded steps there is none"
    run("whole", 17, resume=True)
    assert Snapshots(tmp_path / "whole").steps == [*range(0, 17, 2), 17], "15 was the end, and is it no longer"


def test_a_file_that_is_gone_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    fit(run, max_steps=4, callbacks=[Trajectory(every_steps=2)])
    (run / NAME).unlink()
    fit(run, max_steps=8, resume=True, callbacks=[Trajectory(every_steps=2)])
    assert "They begin anew" in caplog.text and Snapshots(run).steps == [6, 8]


def test_the_size_is_said_before_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path / "run", max_steps=9, callbacks=[Trajectory(every_steps=2)])
    assert "at most 6 snapshots" in caplog.text
    assert len(Snapshots(tmp_path / "run")) == 6
    size = (tmp_path / "run" / NAME).stat().st_size / 1e6
    assert f"{size:.3g} MB" in caplog.text
    with pytest.raises(UserError, match=r"6 snapshots take 0.0\d+ MB, and limit_mb is 0.02: raise every_steps to 3"):
        fit(tmp_path / "small", max_steps=9, callbacks=[Trajectory(every_steps=2, limit_mb=0.02)])
    fit(tmp_path / "larger", max_steps=9, callbacks=[Trajectory(every_steps=3, limit_mb=0.02)])
    fit(tmp_path / "timed", max_time=0.5, callbacks=[Trajectory(every_steps=1, limit_mb=0.02)])
    assert "limit_mb is reached" in caplog.text and (tmp_path / "timed" / NAME).stat().st_size <= 20_000
    for wrong in ({"every_steps": 0}, {"limit_mb": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Trajectory(**wrong)


def test_the_run_of_a_configuration_is_the_same(tmp_path: Path) -> None:
    assert compose(["callbacks=trajectory", "model=mlp"]).id == compose(["model=mlp"]).id
