"""Gradients that are not finite end a run before they reach a checkpoint, whatever the optimizer makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.optimizers.test_contract import OPTIMIZERS
from tests.training import small_run
from training import Diverged
from training.callbacks import Callback
from training.runs import checkpoints
from training.runs.run import Run


class Spoil(Callback):
    """From step 6 on, what flows back out of the first layer is NaN; the loss of that step is finite."""

    def on_fit_start(self, run: Run) -> None:
        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            if run.step >= 6 and output.requires_grad:
                output.register_hook(lambda g: g * float("nan"))

        next(m for m in run.model.modules() if isinstance(m, nn.Linear)).register_forward_hook(forward)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_are_not_finite_raise(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {key: value for key, value in OPTIMIZERS[name].keywords.items() if key != "likelihood"}
    monkeypatch.setitem(small_run.OPTIMIZERS, name, (OPTIMIZERS[name].func, options))
    with pytest.raises(Diverged):
        small_run.fit(
            tmp_path / "run", optimizer=name, callbacks=[Spoil()], max_steps=12, log_every_steps=3, writers=[]
        )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
    found = checkpoints.latest(tmp_path / "run" / "checkpoints")
    assert found is not None and found[1]["counters"]["step"] == 4
    assert all(t.isfinite().all() for t in found[1]["model"].values())
