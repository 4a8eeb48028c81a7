"""The check of a GPU, on a CPU: it runs, finds what is wrong, keeps to its time, and says what it could not look at."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers import KFAC, CurvatureOptimizer
from scripts import benchmark, gpu_check

CPU = torch.device("cpu")


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, report and page of a toy run."""
    files = (folder / "found" / "gpu.json", folder / "found" / "gpu.md")
    code = gpu_check.main(["device=cpu", "size=toy", f"json={files[0]}", f"markdown={files[1]}", *arguments])
    return code, json.loads(files[0].read_text()), files[1].read_text()


def test_every_optimizer_of_ours_is_checked() -> None:
    def offspring(kind: type) -> set[type]:
        return {kind}.union(*(offspring(child) for child in kind.__subclasses__()))

    public = {getattr(optimizers, name) for name in optimizers.__all__}
    ours = {kind.__name__ for kind in offspring(CurvatureOptimizer) & public} - {"CurvatureOptimizer"}
    assert {target for target, _ in gpu_check.OPTIMIZERS.values()} == ours


@pytest.mark.slow
def test_a_toy_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything but what the compiler does, which differs between versions of torch."""
    kinds = ("contract", "oracle", "sync", "table", "linalg", "trainer")
    checks: list[dict[str, Any]] = []
    for kind in kinds:
        code, report, page = run(tmp_path, f"only={kind} ")
        assert code == 0, capsys.readouterr().out
        checks += report["checks"]
        if kind == "table":
            assert "## toynet, 3,202 parameters" in page and "| kfac | 10, 10 |" in page and "| fishleg | 10 |" in page
    found = {(c["status"], c["name"].split()[0]) for c in checks}
    assert found == {("skipped" if kind in ("sync", "trainer") else "ok", kind) for kind in kinds}
    assert {c["message"] for c in checks if c["status"] == "skipped"} == {"needs CUDA"}
    for precision in ("fp32", "bf16", "fp16"):
        assert sum(c["name"].startswith(f"contract {precision}") for c in checks) == 3 * len(gpu_check.OPTIMIZERS)
    (row,) = [c["data"] for c in checks if c["name"] == "table toynet kfac"]
    plain, update = row["ordinary"]["ms"], row["update"]["ms"]
    assert row["amortised"] == pytest.approx(plain + (update - plain) / 10 + (row["refresh"]["ms"] - plain) / 10)


def test_a_compiled_model(tmp_path: Path) -> None:
    assert run(tmp_path, "only=compile kfac")[0] == 0


def test_it_goes_on_after_a_failure_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stuck(KFAC):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("this step | is stuck")

    monkeypatch.setattr(optimizers, "KFAC", Stuck)
    code, report, page = run(tmp_path, "only=contract fp32 k")
    assert code == 1
    failed = [c for c in report["checks"] if c["status"] == "failed"]
    assert {c["name"].split()[2] for c in failed} == {"kfac"} and len(report["checks"]) > len(failed)
    assert failed[0]["message"] == "RuntimeError: this step | is stuck"
    assert failed[0]["trace"][-1].endswith("this step | is stuck")
    assert "## Failures" in page and "this step \\| is stuck |" in page
    out = capsys.readouterr().out
    assert "failed: contract fp32 kfac trains" in out and "3 of 9 checks failed" in out


def test_out_of_time_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, _ = run(tmp_path, "seconds=0", "only=oracle")
    assert code == 0 and {c["status"] for c in report["checks"]} == {"not run"}
    assert "not run, out of time: oracle fp32 adafisher" in capsys.readouterr().out


def test_a_check_that_hangs_is_stopped() -> None:
    def hang() -> str:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # noqa: BLE001 - what a library may do
                continue

    start = time.perf_counter()
    result = gpu_check.run_check(gpu_check.Check("hang", hang, limit=0.2), CPU, 100.0)
    assert result.status == "failed" and result.message == "TimeLimit: took longer than 0 s"
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["size=huge"], "size must be full or toy, got 'huge'"),
        (["device=tpu"], "device must be cuda or cpu, got 'tpu'"),
        (["sizes=toy"], "options: device, size, seconds, only, json, markdown"),
        (["device=cpu", "only=nothing like it"], "only='nothing like it' is in the name of no check"),
    ],
)
def test_wrong_options(arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        gpu_check.main(arguments)


# -- the checks find what they are for ---------------------------------------------------------------------------------


class Wrong(KFAC):
    """Steps that are wrong in one way at a time."""

    fault = ""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.fault == "forgets":
            state["state"] = {
                key: {name: torch.zeros_like(t) if name == "momentum_buffer" else t for name, t in entry.items()}
                for key, entry in state["state"].items()
            }
        return state

    def step(self, closure: Any = None) -> Any:
        params = list(self.model.parameters()) if self.model is not None else []
        before = params[0].detach().clone()
        super().step(closure)
        with torch.no_grad():
            if self.fault == "still":
                params[0].copy_(before)
            if self.fault == "rises":
                for p in params:
                    p.mul_(1.5)
            if self.fault == "imprecise":
                for p in params:
                    p.copy_(p.bfloat16())
            if self.fault == "counts":
                params[0].add_(0.1 if self.seen > 1 else 0.0)
        self.seen = 0
        return None

    seen = 0

    def backward(self, loss: Tensor, outputs: Tensor | None = None, **named: Any) -> None:
        self.seen += 1
        super().backward(loss, outputs, **named)


@pytest.mark.parametrize(
    ("fault", "check", "sentence"),
    [
        ("still", "contract fp32 kfac trains", "did not move: 0.weight"),
        ("rises", "contract fp32 kfac trains", "the loss went from"),
        ("forgets", "contract fp32 kfac continues", "differences, such as model"),
        ("counts", "contract fp32 kfac micro-batches", "of the distance apart"),
        ("imprecise", "oracle fp32 kfac exact", "steps by"),
    ],
)
def test_a_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, check: str, sentence: str
) -> None:
    monkeypatch.setattr(optimizers, "KFAC", Wrong)
    assert run(tmp_path, f"only={check}")[0] == 0  # it is right without a fault
    monkeypatch.setattr(Wrong, "fault", fault)
    if fault == "imprecise":  # on one of the two sides only, as a device would be
        monkeypatch.setattr(Wrong, "fault", property(lambda self: fault if _single(self) else ""))
    code, report, _ = run(tmp_path, f"only={check}")
    assert code == 1 and sentence in report["checks"][0]["message"]


def _single(optimizer: CurvatureOptimizer) -> bool:
    return optimizer.model is not None and next(optimizer.model.parameters()).dtype == torch.float32


def test_what_waits_is_told_by_our_innermost_line() -> None:
    with gpu_check.waits() as found:
        import warnings

        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        nn.Linear(2, 2).apply(lambda module: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))
    assert len(found) == 2 and all(line.startswith("tests/scripts/test_gpu_check.py:") for line in found)
    assert gpu_check.our_frame(traceback.StackSummary.from_list([("/elsewhere.py", 1, "f", "")])) == (
        "no line of this project"
    )


def test_samples_are_the_same_in_every_precision() -> None:
    logits = torch.randn(64, 5, dtype=torch.float64)
    draws = [
        gpu_check.Draws().sample(logits.to(dtype), torch.Generator().manual_seed(3))
        for dtype in (torch.float64, torch.float32)
    ]
    assert torch.equal(*draws) and len(draws[0].unique()) > 1


def test_models_of_text_in_the_benchmark() -> None:
    options = benchmark.Options(model="gpt1_mini:layers=1:width=8:heads=2", batch_size=3, sequence=5, vocabulary=7)
    model, likelihood, batches = benchmark.make_model(options)
    inputs, targets = batches[0]
    assert inputs.shape == targets.shape == (3, 5) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bool(likelihood.nll(model(inputs), targets).isfinite())
