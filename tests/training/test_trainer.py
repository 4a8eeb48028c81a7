"""What one run does: the loop's arithmetic, its budget, its choices and its ends."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimizers import AdaFisher
from tests.conftest import ROOT
from tests.training.small_run import SignalAt, Slow, events, final_state, fit, small_data, small_model
from training import Diverged, Interrupted, RunFolder, Trainer, backward, loggers, schedules, tasks
from training.callbacks import Callback, EarlyStopping
from training.loop import rng
from training.loop.precision import Precision
from training.runs import checkpoints, provenance
from training.runs.evaluation import evaluate
from training.runs.run import Run
from training.tasks.classification import Classification
from training.tasks.language_modelling import LanguageModelling
from training.tasks.reconstruction import Reconstruction
from training.tasks.task import Task

PLAIN = {"dropout": 0.0, "batch_norm": False}
CPU = torch.device("cpu")


class Watch(Callback):
    """Notes something of the run after every step."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_step(self, run: Run) -> None:
        self.seen.append(self.look(run))


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# -- the arithmetic of a step ------------------------------------------------------------------------------------------


def test_the_loop_is_the_loop_one_would_write(tmp_path: Path) -> None:
    data = small_data()
    model = small_model(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = schedules.cosine(optimizer, 20, warmup=0.2)
    losses = []
    batches = [batch for epoch in range(2) for batch in data.train.epoch(epoch)][:20]
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    _, ours = fit(tmp_path / "run", label_smoothing=0.1, clip_norm=0.7)
    assert torch.equal(weights(ours), weights(model))
    logged = [e["train/loss"] for e in events(tmp_path / "run") if e["event"] == "train"]
    assert logged == [pytest.approx(np.mean(losses[i : i + 3]), rel=1e-12) for i in range(0, 20, 3)]


def test_an_optimizer_is_told_the_scale_inside_the_loss() -> None:
    factors = []
    for scale in (1.0, 1024.0):
        data = small_data()
        model = small_model(data, **PLAIN)
        optimizer = AdaFisher(model, lr=0.0)
        inputs, targets = next(iter(data.train.epoch(0)))
        outputs = model(inputs)
        backward(optimizer, F.cross_entropy(outputs, targets) * scale, outputs, scale)
        optimizer.step()
        factors.append(optimizer.curvature_matrices())
    for name, matrix in factors[0].items():
        assert torch.allclose(matrix, factors[1][name], rtol=1e-5)


@pytest.mark.parametrize("k", [2, 4])
def test_k_micro_batches_equal_one_batch(tmp_path: Path, k: int) -> None:
    options: dict[str, Any] = {"model": PLAIN | {"float64": True}, "max_steps": 6, "schedule": "none"}
    _, whole = fit(tmp_path / "whole", data={"batch_size": 32, "augment": "none"}, **options)
    parts = {"batch_size": 32 // k, "augment": "none"}
    _, model = fit(tmp_path / "parts", data=parts, accumulate=k, **options)
    assert (weights(whole) - weights(model)).abs().max() < 1e-13
    one, other = (
        [e["train/accuracy"] for e in events(tmp_path / name) if e["event"] == "train"] for name in ("whole", "parts")
    )
    assert one == other


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    watch = Watch(lambda run: float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()))
    fit(tmp_path / "run", clip_norm=0.01, callbacks=[watch])
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in watch.seen)
    assert all(e["train/grad_norm"] > 0.02 for e in events(tmp_path / "run") if e["event"] == "train")


def test_smoothing_is_for_training_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 0.0, "max_steps": 5, "model": PLAIN, "data": {"augment": "none"}}
    plain, smooth = (fit(tmp_path / str(s), label_smoothing=s, **options)[0] for s in (0.0, 0.3))
    assert plain["final"]["train/loss"] != smooth["final"]["train/loss"]
    for name in ("val/loss", "test/loss"):
        assert plain["final"][name] == smooth["final"][name]


def test_bf16_trains_and_fp16_needs_a_gpu(tmp_path: Path) -> None:
    summary, model = fit(tmp_path / "bf16", precision="bf16")
    assert summary["status"] == "finished" and all(p.dtype == torch.float32 for p in model.parameters())
    _, exact = fit(tmp_path / "fp32")
    assert not torch.equal(weights(model), weights(exact))
    with pytest.raises(Exception, match="precision=fp16 needs a CUDA GPU"):
        fit(tmp_path / "fp16", precision="fp16")


def test_channels_last_is_a_layout_not_a_result(tmp_path: Path) -> None:
    data = small_data()
    task = tasks.build("classification", data.facts)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = Watch(lambda run: run.model[0].weight.is_contiguous(memory_format=torch.channels_last))
    folder = RunFolder.create(tmp_path / "run", "")
    Trainer(max_steps=3, channels_last=True).fit(model, optimizer, data, task, folder=folder, callbacks=[seen])
    assert seen.seen == [True] * 3


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_fractions_of_epochs(tmp_path: Path) -> None:
    summary, _ = fit(tmp_path / "run", max_epochs=1.5, eval_every_steps=None, eval_every_epochs=0.5)
    assert (summary["steps"], summary["epochs"]) == (24, 1.5)
    assert [e["step"] for e in events(tmp_path / "run") if e["event"] == "eval"] == [8, 16, 24]


class SlowEvaluation(Callback):
    def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
        time.sleep(0.1)


def test_a_time_budget_counts_training_alone_and_ends_within_a_step(tmp_path: Path) -> None:
    watch = Watch(lambda run: (run.seconds, run.optimizer.param_groups[0]["lr"]))
    slow = Slow()
    summary, _ = fit(tmp_path / "run", max_time=0.5, callbacks=[watch, slow, SlowEvaluation()], writers=[])
    times = [seconds for seconds, _ in watch.seen]
    assert times[-2] < 0.5 <= times[-1] <= summary["seconds"]["training"]  # no step began after the end
    assert times[-1] - times[-2] < 0.2 and summary["steps"] > 5
    assert summary["seconds"]["wall"] > 0.5 + 0.1 * (summary["steps"] // 5)
    assert watch.seen[-1][1] < 0.1 * max(rate for _, rate in watch.seen)
    assert final_state(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert final_state(tmp_path / "run")["counters"]["tick"] == 1000


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({}, "max_epochs, max_steps or max_time must be set"),
        ({"max_epochs": 1, "max_steps": 1}, "max_steps and max_epochs are both set"),
        ({"max_epochs": 0}, "max_epochs must be above 0"),
        ({"max_time": float("inf")}, "max_time must be above 0"),
        ({"max_steps": 1, "accumulate": 0}, "accumulate must be at least 1"),
        ({"max_steps": 1, "clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"max_steps": 1, "checkpoint_every_minutes": 0}, "checkpoint_every_minutes must be above 0"),
        ({"max_steps": 1, "label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"max_steps": 1, "precision": "int8"}, "precision must be"),
        ({"max_steps": 1, "eval_every_epochs": -1}, "eval_every_epochs must be above 0"),
        ({"max_steps": 1, "log_every_steps": 0}, "log_every_steps must be at least 1"),
        ({"max_steps": 1, "keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ],
)
def test_settings_out_of_range_are_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        Trainer(**options)


def test_settings_that_do_not_go_together_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^monitor must be one of val/loss, val/accuracy"):
        fit(tmp_path / "a", monitor="val/acuracy")
    with pytest.raises(ValueError, match=r"^compile must be false for AdaHessian"):
        fit(tmp_path / "b", compile=True, optimizer="adahessian")
    with pytest.raises(ValueError, match=r"^metric must be one of"):
        fit(tmp_path / "c", callbacks=[EarlyStopping(metric="loss")])
    data = small_data()
    model = small_model(data)
    task = tasks.build("classification", data.facts)
    with pytest.raises(ValueError, match="LBFGS calls the model itself"):
        Trainer(max_steps=1).check(data, task, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match=r"^warmup must be in"):
        Trainer(max_steps=1).check(data, task, schedule=partial(schedules.cosine, warmup=3))
    assert not list(tmp_path.rglob("summary.json"))


# -- evaluation and the choice of weights ------------------------------------------------------------------------------


def test_evaluation_is_exact_and_leaves_no_trace() -> None:
    data = small_data(eval_batch_size=7)
    model = small_model(data).double()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = list(data.test.epoch(0))
    inputs, targets = torch.cat([x for x, _ in seen]).double(), torch.cat([y for _, y in seen])
    assert len(targets) == data.test.num_examples and len(seen[-1][1]) < 7
    model.eval()
    outputs = model(inputs)
    model.train()
    before = (rng.get_state(CPU), {k: v.clone() for k, v in model.state_dict().items()})

    class Noisy(nn.Module):
        """Draws from every generator in evaluation too."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand(1)
            random.random()
            np.random.rand()
            assert not torch.is_grad_enabled()
            return model(x.double())

    noisy = Noisy()
    noisy.model = model
    values = evaluate(noisy, data.test, tasks.build("classification", data.facts, 0.2), Precision("fp32", CPU))
    assert values["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-14)
    assert values["accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item(), rel=1e-7)
    after = rng.get_state(CPU)
    assert torch.equal(before[0]["torch"], after["torch"]) and before[0]["numpy"][2] == after["numpy"][2]
    assert torch.equal(before[0]["python"][1], after["python"][1])
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before[1].items()) and model.training


def test_how_often_one_evaluates_changes_nothing(tmp_path: Path) -> None:
    _, often = fit(tmp_path / "often", eval_every_steps=1, checkpoint_every_steps=1)
    _, never = fit(tmp_path / "never", eval_every_steps=None, checkpoint_every_steps=None, log_every_steps=100)
    assert torch.equal(weights(often), weights(never))


def test_the_best_weights_are_chosen_on_validation_and_tested_once(tmp_path: Path) -> None:
    class Ruin(Callback):
        """A rate that ruins the weights in the last steps, too few of them to recover in."""

        def on_step(self, run: Run) -> None:
            if run.step == 35:
                run.optimizer.param_groups[0]["lr"] = 1.0

    options: dict[str, Any] = {"optimizer": "adam", "lr": 0.01, "schedule": "none", "max_steps": 40}
    summary, model = fit(tmp_path / "run", monitor="val/loss", callbacks=[Ruin()], **options)
    recorded = events(tmp_path / "run")
    evaluations = [e for e in recorded if e["event"] == "eval"]
    best = min(evaluations, key=lambda e: e["val/loss"])
    assert (summary["best"]["step"], summary["best"]["value"]) == (best["step"], best["val/loss"])
    assert best["step"] <= 35 and evaluations[-1]["val/loss"] > 2 * best["val/loss"]
    tests = [e for e in recorded if e["event"] == "test"]
    assert len(tests) == 1 and tests[0]["test/loss"] == summary["final"]["test/loss"]
    assert tests[0]["best/test/loss"] == summary["best"]["test/loss"] != summary["final"]["test/loss"]
    data = small_data()
    task, precision = tasks.build("classification", data.facts), Precision("fp32", CPU)
    assert evaluate(model, data.test, task, precision)["loss"] == summary["final"]["test/loss"]
    model.load_state_dict(checkpoints.load(tmp_path / "run" / "checkpoints" / "best.pt")["model"])
    assert evaluate(model, data.test, task, precision)["loss"] == summary["best"]["test/loss"]


@pytest.mark.parametrize(
    "accuracy, loss, better", [(0.9, 0.4, True), (0.9, 0.5, False), (0.8, 0.1, False), (1.0, 9.0, True)]
)
def test_of_equally_good_weights_those_with_the_lower_loss_are_the_best(
    accuracy: float, loss: float, better: bool
) -> None:
    best = {"value": 0.9, "val/accuracy": 0.9, "val/loss": 0.5}
    task = tasks.build("classification", {"num_classes": 2})
    run: Any = SimpleNamespace(monitor="val/accuracy", task=task, best=best)
    assert Run.improves(run, {"val/accuracy": accuracy, "val/loss": loss}) is better


def test_the_best_checkpoint_is_written_once(tmp_path: Path) -> None:
    fit(tmp_path / "run", max_steps=4, eval_every_steps=4)
    best, step = (tmp_path / "run" / "checkpoints" / name for name in ("best.pt", "step_00000004.pt"))
    assert best.samefile(step)


def test_without_validation_examples_there_is_no_best(tmp_path: Path) -> None:
    data = small_data()
    data.val.num_examples = 0
    model = small_model(data)
    task = tasks.build("classification", data.facts)
    folder = RunFolder.create(tmp_path / "run", "")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    summary = Trainer(max_steps=3).fit(model, optimizer, data, task, folder=folder, loggers=[loggers.JSONLines()])
    assert summary["best"] is None and "test/loss" in summary["final"]
    assert not (folder.checkpoints / "best.pt").exists()


def test_early_stopping(tmp_path: Path) -> None:
    stop = EarlyStopping(metric="val/loss", patience=2, min_delta=100.0)  # nothing improves by that much
    summary, _ = fit(tmp_path / "run", eval_every_steps=2, callbacks=[stop])
    assert (summary["status"], summary["steps"]) == ("stopped_early", 6)
    assert "val/loss has not improved for 2 evaluations" in summary["stop_reason"]
    assert checkpoints.latest(tmp_path / "run" / "checkpoints")[1]["counters"]["step"] == 6
    for options in ({"patience": 0}, {"min_delta": -1.0}):
        with pytest.raises(ValueError, match="must be at least"):
            EarlyStopping(**options)


# -- the ends of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer, lr", [("sgd", 1e20), ("adam", 1e30)])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, optimizer: str, lr: float) -> None:
    class Ruin(Callback):
        def on_step(self, run: Run) -> None:
            if run.step == 9:
                run.optimizer.param_groups[0]["lr"] = lr

    options: dict[str, Any] = {"schedule": "none", "max_steps": 60, "model": PLAIN, "optimizer": optimizer}
    with pytest.raises(Diverged, match=r"loss is (nan|inf) by step 1\d.*step_00000008\.pt|no longer finite"):
        fit(tmp_path / "run", callbacks=[Ruin()], checkpoint_every_steps=4, log_every_steps=10, **options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "diverged" and "lower the learning rate" in summary["error"]
    assert summary["steps"] <= 20
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        state = checkpoints.load(path)
        assert all(t.isfinite().all() for t in state["model"].values())
        tensors = [t for s in state["optimizer"]["state"].values() for t in s.values() if torch.is_tensor(t)]
        assert tensors and not any(t.isnan().any() for t in tensors)


def test_divergence_is_noticed_at_the_next_log_even_if_nothing_else_looks(tmp_path: Path) -> None:
    never: dict[str, Any] = {"eval_every_steps": None, "checkpoint_every_steps": None, "max_steps": 60}
    with pytest.raises(Diverged):
        fit(tmp_path / "run", lr=1e30, schedule="none", model=PLAIN, log_every_steps=5, **never)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 5


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    class Poison(Callback):
        """The loss of this step was finite; the weights behind it no longer are."""

        def on_step(self, run: Run) -> None:
            if run.step == 8:
                next(run.model.parameters()).data[0, 0] = float("nan")

    with pytest.raises(Diverged, match="A weight or the optimizer's state is no longer finite at step 8"):
        fit(tmp_path / "run", callbacks=[Poison()], log_every_steps=100)
    assert checkpoints.latest(tmp_path / "run" / "checkpoints")[1]["counters"]["step"] == 4


def test_a_bug_leaves_a_summary_that_says_failed(tmp_path: Path) -> None:
    class Bug(Callback):
        def on_step(self, run: Run) -> None:
            if run.step == 3:
                raise ZeroDivisionError("a bug in a callback")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", callbacks=[Bug()])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["error"], summary["steps"]) == ("failed", "a bug in a callback", 3)
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


def test_the_summary_of_a_finished_run(tmp_path: Path) -> None:
    summary, model = fit(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary["status"] == "finished" and summary["error"] is None and summary["config_id"] == "abc"
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert summary["hardware"]["device"] == "cpu" and summary["peak_memory_bytes"] > 10**7
    assert {"train/loss", "val/accuracy", "test/loss"} <= summary["final"].keys()
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert summary["git_commit"].removesuffix("+changes") == head


def test_the_checkout_is_asked_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`git status` would write the index anew, under a lock that a kill leaves behind: no commit could be made then."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    here = tmp_path / "training" / "runs" / "provenance.py"
    here.parent.mkdir(parents=True)
    here.write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(here))
    os.utime(here, (1, 1))  # which git looks into, and would note
    index = tmp_path / ".git" / "index"
    before = index.read_bytes()
    commit = provenance.git_commit()
    assert commit is not None and len(commit) == 40 and index.read_bytes() == before
    here.write_text("changed")
    assert provenance.git_commit() == f"{commit}+changes"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signals_end_the_run_after_its_step(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with pytest.raises(Interrupted, match="after step 7") as stopped:
        fit(tmp_path / "run", callbacks=[SignalAt(7, number)])
    assert stopped.value.exit_code == code
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*7.pt")] == ["step_00000007.pt"]


def test_a_stopped_run_leaves_the_checkpoints_of_one_that_was_not(tmp_path: Path) -> None:
    budget = {"max_epochs": None, "max_steps": 8, "checkpoint_every_epochs": None, "checkpoint_every_steps": 3}
    fit(tmp_path / "whole", **budget)
    with pytest.raises(Interrupted, match="after step 7"):
        fit(tmp_path / "parts", callbacks=[SignalAt(7)], **budget)
    fit(tmp_path / "parts", resume=True, callbacks=[SignalAt(7)], **budget)
    left = [sorted(p.name for p in (tmp_path / run / "checkpoints").glob("step_*")) for run in ("whole", "parts")]
    assert left[0] == left[1] == ["step_00000006.pt", "step_00000008.pt"]


def test_a_signal_ends_a_process_after_its_step(tmp_path: Path) -> None:
    arguments = json.dumps({"folder": str(tmp_path / "run"), "max_steps": 5000, "slow": True})
    command = [sys.executable, "-m", "tests.training.small_run", arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["error"] is None
    assert checkpoints.latest(tmp_path / "run" / "checkpoints")[1]["counters"]["step"] == summary["steps"] < 5000


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    fit(tmp_path / "run", max_steps=1)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    class Impatient(Callback):
        def on_step(self, run: Run) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", callbacks=[Impatient()])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_settings_of_the_process_are_put_back(tmp_path: Path) -> None:
    inside = Watch(lambda run: torch.are_deterministic_algorithms_enabled())
    fit(tmp_path / "run", max_steps=1, deterministic=True, callbacks=[inside])
    assert inside.seen == [True] and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_compiled_training_uses_the_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The eager backend of torch.compile: graphs are captured, no compiler is needed.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    _, compiled = fit(tmp_path / "compiled", compile=True, model=PLAIN, max_steps=6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    _, plain = fit(tmp_path / "plain", model=PLAIN, max_steps=6)
    assert torch.allclose(weights(compiled), weights(plain), rtol=1e-5)
    assert all(not k.startswith("_orig_mod") for k in final_state(tmp_path / "compiled")["model"])


def test_profile_writes_a_table_and_a_trace(tmp_path: Path) -> None:
    fit(tmp_path / "run", profile=True)
    assert "Self CPU" in (tmp_path / "run" / "train.log").read_text()
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])


def test_interrupted_is_not_swallowed_as_a_user_error() -> None:
    from training import UserError

    assert not issubclass(Interrupted, UserError) and math.isclose(Interrupted("x", 75).exit_code, 75)


@pytest.mark.parametrize(
    ("task", "last", "size", "told"),
    [
        (Classification(4), nn.Softmax(-1), 4, True),
        (Classification(4), nn.LogSoftmax(-1), 4, False),
        (Classification(4), nn.ReLU(), 4, False),
        (LanguageModelling(4), nn.Softmax(-1), 4, True),
        (Reconstruction("bernoulli"), nn.Sigmoid(), 16, True),
        (Reconstruction("bernoulli"), nn.Identity(), 16, False),
        (Reconstruction("gaussian"), nn.Sigmoid(), 16, False),
    ],
)
def test_probabilities_where_logits_belong_are_told_of(
    task: Task, last: nn.Module, size: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(5, size), last)
    inputs = torch.randn(3, 2, 5) if task.name == "language_modelling" else torch.randn(3, 5)
    targets = torch.rand(3, size) if task.name == "reconstruction" else torch.zeros(inputs.shape[:-1]).long()
    task.check(model, inputs, targets)
    assert ("look like probabilities" in caplog.text) == told
