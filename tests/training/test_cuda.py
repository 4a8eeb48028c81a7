"""What differs on a GPU: its clock, its random stream, its scaler. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small_run import SignalAt, differences, events, final_state, fit
from training import Interrupted, World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


@pytest.fixture
def gpu() -> World:
    return World(device=torch.device("cuda", 0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adafisher", "accumulate": 2},
        {"optimizer": "adahessian"},
        {"optimizer": "kfac", "accumulate": 2},
        {"optimizer": "ekfac"},
        {"optimizer": "deflation"},
        {"precision": "bf16", "optimizer": "adam"},
        {"precision": "fp16", "clip_norm": 1.0},
        {"precision": "fp16", "optimizer": "adafisher", "clip_norm": 1.0},
        {"precision": "fp16", "optimizer": "kfac", "clip_norm": 1.0},
    ],
)
def test_resume_is_bit_for_bit(tmp_path: Path, gpu: World, options: dict[str, Any]) -> None:
    options = {"deterministic": True, "world": gpu} | options
    fit(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[SignalAt(10)], **options)
    fit(tmp_path / "parts", resume=True, **options)
    assert list(differences(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))) == []
    assert events(tmp_path / "whole") == events(tmp_path / "parts")
    assert final_state(tmp_path / "whole")["ranks"][0]["rng"]["cuda"] is not None


def test_a_time_budget_waits_for_the_queue(tmp_path: Path, gpu: World) -> None:
    summary, _ = fit(tmp_path / "run", max_time=0.5, world=gpu, eval_every_steps=50, checkpoint_every_steps=None)
    assert 0.45 < summary["seconds"]["training"] < 0.7
    assert final_state(tmp_path / "run")["counters"]["tick"] == 1000


def test_phases_are_read_from_the_gpus_own_clock(tmp_path: Path, gpu: World) -> None:
    summary, _ = fit(tmp_path / "run", world=gpu)
    assert summary["hardware"]["gpu"] and summary["peak_memory_bytes"] > 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "time/data" in lines and "time/forward" in lines and "time/update" in lines
