"""A run from the command line: its folder, its identity, resuming and starting from other weights."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from analysis.status import look
from tests.cli.conftest import QUICK, Outcome, metrics, runs, summary, unfinish
from tests.conftest import ROOT
from training.runs.warm_start import warm_start
from training.settings.composition import compose


def test_a_run_and_its_folder(command: Callable[..., Outcome], work: Path) -> None:
    outcome = command("model=mlp", "trainer.max_epochs=1", "seed=3")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    (run,) = runs(work)
    assert run.parent.name == "adafisher_mlp_digits"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_s3_[0-9a-f]{8}", run.name)
    assert f"tensorboard --logdir {run.relative_to(work)}" in outcome.out
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "data.json", "metrics.jsonl", "summary.json", "train.log", "tensorboard", "checkpoints",
        "loss.png", "accuracy.png",
    }  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["choices"]["optimizer"] == "adafisher" and config["dataset"]["_target_"] == "data.digits"
    assert summary(run)["status"] == "finished"
    assert summary(run)["config_id"] == run.name[-8:]
    assert [path.name for path in work.iterdir()] == ["runs"], "something was written beside the run folder"


def test_tags_and_notes_leave_a_run_what_it_is(quick: Callable[..., Outcome], work: Path) -> None:
    steps = ("trainer.max_epochs=null", "trainer.max_steps=2")
    said = quick(*steps, "tags=[small, 7]", "notes=it's small, so far: a=b", "name=said")
    assert said.code == 0, said.err
    (run,) = runs(work)
    assert summary(run)["tags"] == ["small", "7"] and summary(run)["notes"] == "it's small, so far: a=b"
    assert [look(work / "runs")[0].tags, run.name[-8:]] == [["small", "7"], compose([*QUICK]).id]

    assert quick(f"resume={run}", "tags=[later]", "trainer.max_epochs=null", "trainer.max_steps=3").code == 0
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["tags"] == summary(run)["tags"] == ["later"] and kept["notes"] == summary(run)["notes"]
    wrong = quick("tags=small")
    assert wrong.code == 1 and wrong.err == "error: tags must be a list (each text) or null, got 'small'\n"


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd", "adam", "adamw", "adafisher", "adafisherw", "adahessian",
        "kfac", "ekfac", "kpsvd", "deflation", "kfac_corrected", "lanczos",
    ],
)  # fmt: skip
def test_every_optimizer_trains(optimizer: str, quick: Callable[..., Outcome], work: Path) -> None:
    outcome = quick(f"optimizer={optimizer}", "trainer.max_epochs=3", "optimizer.lr=0.01")
    assert outcome.code == 0, outcome.err
    (run,) = runs(work)
    losses = [event["val/loss"] for event in metrics(run) if event["event"] == "eval"]
    assert losses[-1] < losses[0]


def test_the_same_command_gives_the_same_numbers(quick: Callable[..., Outcome], work: Path) -> None:
    for _ in range(2):
        assert quick("dataset.augment=cutout", "model.dropout=0.2").code == 0
    first, second = runs(work)
    assert metrics(first) == metrics(second)


def test_identity_ignores_what_does_not_change_the_result() -> None:
    base = compose(["dataset=cifar10"])
    same = (
        "trainer.device=cpu", "trainer.max_epochs=99", "paths.data=/elsewhere", "paths.runs=there", "logger=quiet",
        "callbacks=none", "name=other", "trainer.checkpoint_every_steps=5",
    )  # fmt: skip
    for override in same:
        assert compose(["dataset=cifar10", override]).id == base.id, override
    for override in ("seed=1", "optimizer.lr=0.5", "dataset.batch_size=32", "model=mlp", "callbacks=early_stopping"):
        assert compose(["dataset=cifar10", override]).id != base.id, override
    assert compose(["dataset=cifar10", "trainer.max_epochs=99"]).job_id != base.job_id
    assert compose(["optimizer.lr=1"]).id == compose(["optimizer.lr=1.0"]).id


def test_resume_auto(quick: Callable[..., Outcome], work: Path) -> None:
    outcome = quick("resume=auto", "trainer.max_epochs=3")
    assert outcome.code == 0 and "no run of this configuration to resume" in outcome.out
    (run,) = runs(work)
    expected = metrics(run)

    assert "not trained again" in quick("resume=auto", "trainer.max_epochs=3").out
    assert runs(work) == [run] and metrics(run) == expected

    unfinish(run)
    outcome = quick("resume=auto", "trainer.max_epochs=3")
    assert outcome.code == 0 and f"resuming {run.relative_to(work)} from step_" in outcome.out
    assert runs(work) == [run] and metrics(run) == expected

    outcome = quick(f"resume={run}", "trainer.max_epochs=4")
    assert outcome.code == 0 and "resuming" in outcome.out
    assert summary(run)["epochs"] == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 4

    assert quick("resume=auto", "trainer.max_epochs=3", "seed=1").code == 0
    assert len(runs(work)) == 2, "another configuration is another run"


def test_resume_auto_leaves_other_runs_alone(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick("optimizer=adam").code == 0
    (run,) = runs(work)
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    outcome = quick("optimizer=adam", "trainer.max_epochs=2", "resume=auto")
    assert outcome.code == 0 and "has finished another budget, starting a new one (resume=" in outcome.out
    (run / "summary.json").unlink()
    outcome = quick("optimizer=adam", "resume=auto", "name=new")
    assert outcome.code == 0 and "no run of this configuration to resume" in outcome.out
    assert [path.parent.name for path in runs(work)] == ["adam_mlp_digits", "adam_mlp_digits", "new"]
    assert (run / "config.yaml").read_bytes() == before[0] and (run / "summary.json").exists() is False
    outcome = quick("optimizer=adam", "resume=auto")
    assert f"resuming {run.relative_to(work)}" in outcome.out and summary(run)["epochs"] == 1


def test_a_budget_takes_the_place_of_the_default_one() -> None:
    assert compose(["trainer.max_steps=100"]).values["trainer"]["max_epochs"] is None
    assert compose(["trainer.max_time=60"]).values["trainer"]["max_epochs"] is None
    assert compose(["debug=smoke", "trainer.max_epochs=1"]).values["trainer"]["max_steps"] is None
    assert compose(["trainer.max_steps=null"]).values["trainer"]["max_epochs"] == 40
    same = ["trainer.max_steps=100"], ["trainer.max_steps=100", "trainer.max_epochs=null"]
    assert compose(same[0]).job_id == compose(same[1]).job_id


def test_resume_auto_begins_again_where_a_run_has_no_checkpoint(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick().code == 0
    (run,) = runs(work)
    expected = metrics(run)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    outcome = quick("resume=auto")
    assert outcome.code == 0 and "ended before its first checkpoint: it begins again" in outcome.out
    assert runs(work) == [run] and metrics(run) == expected and summary(run)["status"] == "finished"


def test_resume_by_path(quick: Callable[..., Outcome], command: Callable[..., Outcome], work: Path) -> None:
    assert quick("optimizer=adam", "optimizer.lr=0.01", "trainer.max_epochs=2").code == 0
    (run,) = runs(work)
    expected = metrics(run)
    first, last = sorted((run / "checkpoints").glob("step_*.pt"))

    unfinish(run)
    assert command(f"resume={run}").code == 0, "the saved configuration is enough"
    assert metrics(run) == expected

    outcome = command(f"resume={first.relative_to(work)}")
    assert outcome.code == 0 and f"from {first.name}" in outcome.out
    assert metrics(run) == expected and last.exists()

    assert "not trained again" in command(f"resume={run}").out
    assert command(f"resume={run}", "trainer.max_epochs=3").code == 0
    assert summary(run)["epochs"] == 3 and runs(work) == [run]

    for override, says in (
        ("optimizer=sgd", r"is a run with optimizer=adam, which optimizer=sgd contradicts"),
        ("experiment=digits_mlp", r"is a run without experiment, which experiment=digits_mlp contradicts"),
        ("optimizer.lr=0.5", r"optimizer.lr is 0.01 in the checkpoint .* cannot change"),
        ("seed=7", r"seed is 0 in the checkpoint"),
        ("model.hiden=[3]", r"no key 'hiden' \(did you mean 'hidden'\?\)"),
    ):
        assert re.search(says, command(f"resume={run}", override).sentence())
    assert command(f"resume={run}", "optimizer.lr=0.01", "model=mlp").code == 0, "saying the same again is no fault"
    assert "leave resume out" in command("-m", "seed=0,1", f"resume={run}").sentence()


def test_a_folder_with_a_strange_name(command: Callable[..., Outcome], quick: Callable[..., Outcome]) -> None:
    assert quick("paths.runs='r=1,b'").code == 0
    (run,) = runs(Path(), "r=1,b/*/*")
    outcome = command(f"resume={run}")
    assert outcome.code == 0 and "not trained again" in outcome.out


def test_data_may_have_moved(command: Callable[..., Outcome], work: Path, shared_data: Callable[..., Path]) -> None:
    source = shared_data("cifar10-subset")
    few = ("dataset.limit_train=0.02", "dataset.limit_val=0.1", "dataset.eval_batch_size=64", "dataset.batch_size=32")
    (work / "here").mkdir()
    (work / "here" / "photos").symlink_to(source)
    data = ("dataset=image_folder", "dataset.root=${paths.data}/photos")
    assert command(*QUICK, *few, *data, "paths.data=here", "trainer.max_epochs=2").code == 0
    (run,) = runs(work)
    unfinish(run)
    (work / "here").rename(work / "there")
    assert command(f"resume={run}", "paths.data=there").code == 0
    assert summary(run)["status"] == "finished"


def test_a_run_that_is_being_trained_is_left_alone(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick("optimizer=sgd").code == 0 and quick("-m", "optimizer=sgd,adam").code == 0
    (single,), swept = runs(work), runs(work, "multirun/*/*")
    for run in (single, *swept):
        unfinish(run, all_steps=True)
    with FileLock(single / ".lock"), FileLock(swept[0] / ".lock"):
        before = [sorted(run.rglob("*")) for run in (single, swept[0])]
        assert "is being trained in by another process" in quick(f"resume={single}", "optimizer=sgd").sentence()
        outcome = quick("-m", "optimizer=sgd,adam")
        assert outcome.code == 0 and "runs in another process: skipped" in outcome.out
        assert [sorted(run.rglob("*")) for run in (single, swept[0])] == before, "nothing was touched"
    assert summary(swept[1])["status"] == "finished"


def test_init_from(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick("trainer.max_epochs=2", "optimizer=adam").code == 0
    (run,) = runs(work)
    outcome = quick(f"init_from={run}", "optimizer=sgd", "optimizer.lr=0")
    assert outcome.code == 0 and f"4 of 4 tensors loaded from {run}/checkpoints/best.pt" in outcome.out
    weights = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model"]
    started = next(path for path in runs(work) if path != run)
    after = torch.load(next((started / "checkpoints").glob("step_*.pt")), weights_only=True)["model"]
    assert all(torch.equal(weights[name], after[name]) for name in weights)

    outcome = quick(f"init_from={run}/checkpoints/best.pt", "model.hidden=[16,16]")
    assert "2 of 6 tensors loaded" in outcome.out and "3.weight [10, 16] -> [16, 16]" in outcome.out
    assert "fresh (not in the file): 5.weight, 5.bias" in outcome.out

    outcome = quick(f"init_from={run}", "model.hidden=[7,7,7,7]")
    assert re.search(r"none of its 4 tensors fits this model", outcome.sentence())


def test_a_model_that_asks_for_the_version_of_its_weights(command: Callable[..., Outcome], work: Path) -> None:
    """Torchvision's MNASNet refuses a state dict that does not tell; best weights, a resume and a start need one."""
    short = ("trainer.max_epochs=null", "callbacks=none", "logger=quiet")
    job = ("model=torchvision", "model.name=mnasnet0_5", "dataset.limit_train=0.1", *short)
    assert command(*job, "trainer.max_steps=2").err == ""
    (run,) = runs(work)
    assert summary(run)["status"] == "finished"
    assert command(f"resume={run}", "trainer.max_steps=4").code == 0
    assert command(*job, "trainer.max_steps=2", f"model.pretrained={run}").code == 0


def test_finetune(quick: Callable[..., Outcome], work: Path) -> None:
    assert quick("optimizer=adam").code == 0
    (run,) = runs(work)
    outcome = quick(f"init_from={run}", "optimizer=kfac", "finetune.freeze=^(1)[.]", "finetune.lr_mult={3.weight: 10}")
    assert outcome.code == 0, outcome.err
    before = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model"]
    started = next(path for path in runs(work) if path != run)
    state = torch.load(next((started / "checkpoints").glob("step_*.pt")), weights_only=True)
    kept = [name for name, value in state["model"].items() if torch.equal(value, before[name])]
    assert kept == ["1.weight", "1.bias"]
    rates = [group["initial_lr"] for group in state["optimizer"]["param_groups"]]
    assert len(rates) == 2 and rates[1] == pytest.approx(10 * rates[0])
    assert quick(f"resume={started}").code == 0
    assert "finetune.freeze 'x' is found in no name" in quick("finetune.freeze=x").sentence()
    assert "finetune.lr_mult 'x' is found in no name" in quick("finetune.lr_mult={x: 3}").sentence()
    assert "finetune.lr_mult.x must be a number, got 'fast'" in quick("finetune.lr_mult={x: fast}").sentence()


def test_a_head_of_another_class_count_is_replaced(tmp_path: Path) -> None:
    def net(classes: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, classes))

    source, target = net(10), net(100)
    fresh = target[2].weight.clone()
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}}
    torch.save(wrapped, tmp_path / "other.pt")
    line = warm_start(target, tmp_path / "other.pt")
    assert torch.equal(target[0].weight, source[0].weight) and torch.equal(target[2].weight, fresh)
    assert "7 of 9 tensors loaded" in line
    assert "replaced by fresh ones (other shape): 2.weight [10, 3] -> [100, 3], 2.bias [10] -> [100]" in line


def test_a_signal_saves_and_says_how_to_go_on(work: Path) -> None:
    """SIGTERM, as a queue sends it: exit code 75, and `resume=auto` goes on."""
    program = [sys.executable, str(ROOT / "train.py"), *QUICK, "trainer.max_epochs=null", "trainer.max_steps=100000"]
    program += ["trainer.checkpoint_every_steps=20", "trainer.checkpoint_every_epochs=null"]
    child = subprocess.Popen(program, cwd=work, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(work.glob("runs/*/*/checkpoints/step_*.pt")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75
    (run,) = runs(work)
    assert summary(run)["status"] == "interrupted"
    assert f"resume={run.relative_to(work)}" in err and "Traceback" not in err
    steps = summary(run)["steps"]
    program += [f"trainer.max_steps={steps + 5}", "resume=auto"]
    again = subprocess.run(program, cwd=work, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert summary(run)["steps"] == steps + 5


def test_a_run_that_leaves_the_test_set_untouched(quick: Callable[..., Outcome], work: Path) -> None:
    outcome = quick("optimizer=sgd", "trainer.test=false", "dataset.limit_train=0.1")
    assert outcome.code == 0, outcome.err
    (folder,) = runs(work)
    found = summary(folder)
    assert found["status"] == "finished" and "val/loss" in found["final"]
    assert not [key for part in ("final", "best") for key in found[part] if key.startswith("test")]
    assert "test/" not in (folder / "metrics.jsonl").read_text()
