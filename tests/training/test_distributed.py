"""Two processes are one: the same weights, the same metrics, one decision on when to stop, one folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small_run import OPTIMIZERS, as_they_end, differences, events, final_state, fit, two_processes
from training import UserError, session
from training.loop.distributed import World, broadcast_object, gather_objects, maximum
from training.show.watching.diagnostics import CurvatureDiagnostics

EXACT: dict[str, Any] = {
    "model": {"dropout": 0.0, "batch_norm": False, "float64": True},
    "data": {"eval_batch_size": 7},  # shares of 4 and 3, and a last batch that may leave one rank without any
}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "randaugment": 9}
SGD: dict[str, Any] = {**EXACT, "clip_norm": 0.7, "accumulate": 2, "label_smoothing": 0.1}
SGD["data"] = EXACT["data"] | MIXED
OTHERS = [name for name in OPTIMIZERS if name not in ("sgd", "adamw", "adafisherw")]  # siblings of what is there
DROPOUT: dict[str, Any] = {"optimizer": "adam", "max_steps": 12, "eval_every_steps": 4}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs that two processes made, all in one launch."""
    root = tmp_path_factory.mktemp("two")
    runs = [
        {"folder": f"{root}/sgd", **SGD},
        *({"folder": f"{root}/{name}", "optimizer": name, **EXACT} for name in OTHERS),
        {"folder": f"{root}/whole", **DROPOUT},
        {"folder": f"{root}/parts", **DROPOUT, "signal_at": 6, "signal_rank": 1},  # one rank alone hears the signal
        {"folder": f"{root}/parts", **DROPOUT, "resume": True},
        {"folder": f"{root}/timed", "max_time": 0.3, "slow": True},
        {"folder": f"{root}/minutes", "checkpoint_every_steps": None, "checkpoint_every_minutes": 0.001, "slow": True,
         "keep_checkpoints": 99, **EXACT},
        {"folder": f"{root}/early", "lr": 0.0, "patience": 2, "model": {"batch_norm": False}},
        {"folder": f"{root}/watched", "optimizer": "kfac", "watch": 4, **EXACT},
        {"folder": f"{root}/diverged", "lr": 1e30, "schedule": "none", **EXACT},
    ]  # fmt: skip
    two_processes(as_they_end, (runs, [0, *(0 for _ in OTHERS), 0, 75, 0, 0, 0, 0, 0, 1]))
    return root


def weights(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def test_two_processes_equal_one_on_the_joint_batch(two: Path, tmp_path: Path) -> None:
    _, model = fit(tmp_path / "one", **SGD)
    for name, tensor in model.state_dict().items():
        assert (weights(two / "sgd", 0)[name] - tensor).abs().max() < 1e-12
    ours, theirs = events(two / "sgd"), events(tmp_path / "one")
    assert [(e["event"], e["step"]) for e in ours] == [(e["event"], e["step"]) for e in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-11) if mine.pop("event") == other.pop("event") else False
    accuracy = [[e["val/accuracy"] for e in run if "val/accuracy" in e] for run in (ours, theirs)]
    assert accuracy[0] == accuracy[1] and len(accuracy[0]) == 4


@pytest.mark.parametrize("optimizer", OTHERS)
def test_other_optimizers_too(two: Path, tmp_path: Path, optimizer: str) -> None:
    _, model = fit(tmp_path / "one", optimizer=optimizer, **EXACT)
    for name, tensor in model.state_dict().items():
        assert (weights(two / optimizer, 0)[name] - tensor).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["sgd", *OTHERS, "whole", "parts", "timed"])
def test_replicas_are_bit_identical(two: Path, name: str) -> None:
    # Buffers too: BatchNorm sees other examples on each rank, and rank 0's statistics count.
    assert list(differences(weights(two / name, 0), weights(two / name, 1))) == []


def test_two_processes_resume_bit_for_bit(two: Path) -> None:
    """Dropout draws on each rank from a stream of its own, and both streams go on."""
    assert list(differences(final_state(two / "whole"), final_state(two / "parts"))) == []
    assert events(two / "whole") == events(two / "parts")
    streams = [rank["rng"]["torch"] for rank in final_state(two / "whole")["ranks"]]
    assert len(streams) == 2 and not torch.equal(*streams)


def test_what_is_seen_of_two_processes_is_that_of_one(two: Path, tmp_path: Path) -> None:
    fit(tmp_path / "one", optimizer="kfac", callbacks=[CurvatureDiagnostics(4)], **EXACT)
    pairs = zip(events(two / "watched"), events(tmp_path / "one"), strict=True)
    seen = [(mine, other) for mine, other in pairs if mine["event"] == "curvature"]
    assert [mine["step"] for mine, _ in seen] == [1, 4, 8, 12, 16, 20]
    for mine, other in seen:
        assert mine.pop("event") == other.pop("event")
        assert mine == pytest.approx(other, rel=1e-6, abs=1e-9)
    assert list(differences(weights(two / "watched", 0), weights(two / "kfac", 0))) == []


def test_every_rank_ends_at_the_same_step(two: Path) -> None:
    timed = json.loads((two / "timed" / "summary.json").read_text())
    assert timed["status"] == "finished" and 0.3 <= timed["seconds"]["training"] < 1.0
    early = json.loads((two / "early" / "summary.json").read_text())
    assert (early["status"], early["steps"]) == ("stopped_early", 15)
    assert json.loads((two / "diverged" / "summary.json").read_text())["status"] == "diverged"


def test_ranks_agree_on_when_minutes_are_over(two: Path) -> None:
    """Each has a clock of its own, and saving takes all of them."""
    assert 2 <= len(list((two / "minutes" / "checkpoints").glob("step_*.pt"))) < 20


def test_one_process_writes(two: Path) -> None:
    assert len(list((two / "sgd" / "tensorboard").iterdir())) == 1
    steps = [e["step"] for e in events(two / "sgd") if e["event"] == "eval"]
    assert steps == [5, 10, 15, 20]


def test_one_process_goes_on_where_two_stopped(two: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {**EXACT, "schedule": "none"}
    state = final_state(two / "sgd")
    state |= {"clocks": {}, "loggers": {}, "budget": {"ticks": -1}}
    # The same rows make the same batches whatever the number of processes, so the run can change hands.
    _, resumed = fit(tmp_path / "resumed", resume=state, max_steps=22, **options | {"accumulate": 2})
    assert "dropout draws other masks" in caplog.text
    assert events(tmp_path / "resumed")[-1]["step"] == 22
    assert all(t.isfinite().all() for t in resumed.state_dict().values())


def test_alone_there_is_no_process_group() -> None:
    with session("cpu") as world:
        assert (world.rank, world.world_size, world.device.type, world.is_main) == (0, 1, "cpu", True)
        assert not torch.distributed.is_initialized()
        assert broadcast_object([1], world) == [1] and gather_objects(2, world) == [2]
        assert maximum([0.5, 2.0], world) == [0.5, 2.0]


@pytest.mark.parametrize(
    "environment, device, kind, sentence",
    [
        ({"WORLD_SIZE": "2"}, "cpu", UserError, "RANK=None: start several processes with `torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "cpu", UserError, "RANK=x"),
        ({}, "tpu9", ValueError, "device must be auto, cpu, cuda"),
        ({}, "cuda:99", UserError, "device=cuda"),
    ],
)
def test_what_cannot_be_joined_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str, kind: type[Exception], sentence: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    enter: Callable[[], Any] = session(device).__enter__
    with pytest.raises(kind, match=sentence):
        enter()


def test_a_world_knows_its_writer() -> None:
    assert World().is_main and not World(rank=1, world_size=2).is_main
