"""A run folder of another person's runs nothing: not by what it wants built, nor by its pickles, tags and names."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train
from tests.cli.conftest import QUICK, Outcome, command, quick, runs, summary, work  # noqa: F401 - fixtures
from tests.conftest import ROOT
from training.runs import checkpoints
from training.settings.trust import is_known, targets

Give = Callable[..., Outcome]


def test_every_callable_of_the_configurations_is_known() -> None:
    seen = 0
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        group = file.relative_to(ROOT / "configs").parts[0]
        if group in ("experiment", "preset", "study", "debug", "hydra", "paths", "train.yaml"):
            continue
        node = {key: value for key, value in (yaml.safe_load(file.read_text()) or {}).items() if key != "defaults"}
        for where, target in targets({group: node}):
            assert is_known(where, target), f"{file}: {where}={target}"
            assert is_known(where, target if "torch" in target.partition(".")[0] else f"curvlab.{target}")
            seen += 1
    assert seen > 60


@pytest.mark.parametrize(
    ("where", "target"),
    [
        ("model._target_", "os.system"),
        ("model._target_", "runpy.run_path"),
        ("model._target_", "training.runs.folder.os.system"),
        ("model._target_", "curvlab.training.runs.folder.os.system"),
        ("model._target_", "torch.hub.load"),
        ("model._target_", "torch.load"),
        ("model._target_", "torch.utils.cpp_extension.load"),
        ("model._target_", "torch.nn.Module.__class__"),
        ("model._target_", "timm.models.create_model"),  # which reads pickles
        ("model._target_", "models.load"),  # ours, and no model
        ("model._target_", ["os.system"]),
        ("optimizer._target_", "models.mlp"),
        ("optimizer._target_", "pytorch_optimizer.load_optimizer"),
        ("dataset._target_", "shutil.rmtree"),
        ("dataset._target_", "data.text._download"),
        ("scheduler._target_", "subprocess.run"),
        ("trainer._target_", "training.runs.folder.RunFolder.make"),
        ("callbacks.plots._target_", "training.callbacks.logging.FileHandler"),
        ("callbacks.plots.deeper._target_", "training.callbacks.CurvePlots"),
        ("logger.jsonl._target_", "training.runs.run.Callback"),
        ("averaging._target_", "os.system"),
        ("finetune._target_", "os.system"),
        ("model.parts.0._target_", "models.mlp"),
    ],
)
def test_what_is_not_ours_is_not_known(where: str, target: Any) -> None:
    assert not is_known(where, target)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("honest")
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert train.main([*QUICK, "optimizer=sgd", "trainer.max_epochs=2"]) == 0
        (run,) = runs(folder)
        (run / "summary.json").unlink()
        sorted((run / "checkpoints").glob("step_*.pt"))[-1].unlink()
        yield run
    finally:
        os.chdir(here)


@pytest.fixture
def foreign(honest: Path, work: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:  # noqa: F811
    """A copy of an honest run, its configuration as an attacker would have it."""

    def make(change: Callable[[dict[str, Any]], object]) -> Path:
        run = work / "foreign"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(honest, run)
        config = yaml.safe_load((run / "config.yaml").read_text())
        change(config)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        return run

    return make


def test_nothing_of_a_foreign_configuration_is_called(foreign: Any, command: Give, work: Path) -> None:  # noqa: F811
    trace = work / "executed"
    shell = {"_target_": "os.system", "command": f"touch {trace}"}
    script = work / "script.py"
    script.write_text(f"open({str(trace)!r}, 'w')\n")
    (work / "evil" / "model").mkdir(parents=True)
    (work / "evil" / "model" / "evil.yaml").write_text("_target_: os.system\ncommand: x\n")
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda c: c["callbacks"].update(x=shell), "callbacks.x._target_=os.system"),
        (lambda c: c["callbacks"].update(x="os.abort"), "callbacks.x._target_=os.abort"),
        (lambda c: c["logger"].update(x=shell), "logger.x._target_=os.system"),
        (lambda c: c.update(model=shell), "model._target_=os.system"),
        (lambda c: c.update(trainer=shell), "trainer._target_=os.system"),
        (lambda c: c.update(optimizer=shell), "optimizer._target_=os.system"),
        (lambda c: c.update(averaging=shell), "averaging._target_=os.system"),
        (lambda c: c["model"].update(hidden=[{"a": shell}]), "model.hidden.0.a._target_=os.system"),
        (lambda c: c["callbacks"].update(x={"_target_": "runpy.run_path", "path_name": str(script)}), "runpy.run_path"),
        (lambda c: c["choices"].update({"hydra.searchpath": f"[file://{work}/evil]", "model": "evil"}), "a choice "),
        (lambda c: c["choices"].update(model="mlp hydra.run.dir=x"), "a choice that names no file"),
        (lambda c: c.update(name="${oc.env:HOME}"), "it is not taken"),
        (lambda c: c["model"].update({"hidden": ["${oc.env:HOME}"]}), "it is not taken"),
    ]
    for change, says in changes:
        run = foreign(change)
        before = sorted(path.name for path in run.rglob("*"))
        sentence = command(f"resume={run}").sentence()
        assert says in sentence and not trace.exists()
        assert os.environ.get("HOME", "/root") not in sentence.replace(str(work), "")
        assert sorted(path.name for path in run.rglob("*") if path.name != ".lock") == before
    run = foreign(lambda c: c["paths"].update(runs="/elsewhere", sweeps="/elsewhere", data=str(work / "elsewhere")))
    assert command(f"resume={run}").code == 0 and summary(run)["status"] == "finished"
    assert not Path("/elsewhere").exists() and not (work / "elsewhere").exists(), "where one writes is one's own word"


def test_one_s_own_model_is_taken_at_one_s_word(
    command: Give, work: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    (work / "mynet.py").write_text(
        "from torch import nn\n"
        "def net(width: int = 8, *, num_classes: int) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(work))
    file = work / "mine" / "model" / "mynet.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("_target_: mynet.net\nwidth: 6\n")
    shared = ("callbacks=none", "logger=quiet", "optimizer=sgd", "trainer.max_epochs=1")
    assert command("--config-dir", str(work / "mine"), "model=mynet", *shared).code == 0
    (run,) = runs(work)
    longer = "trainer.max_epochs=2"
    assert "model has no choice 'mynet'" in command(f"resume={run}", longer).sentence()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["choices"]["model"] = "mlp"  # as where the option was given with model=mlp
    named = work / "named"
    shutil.copytree(run, named)
    (named / "config.yaml").write_text(yaml.safe_dump(config))
    sentence = command(f"resume={named}", longer).sentence()
    assert "add model._target_=mynet.net, or have it in a file of the configuration folder" in sentence
    assert command(f"resume={named}", longer, "model._target_=mynet.net").code == 0
    assert command("--config-dir", str(work / "mine"), f"resume={run}", longer).code == 0
    assert summary(run)["epochs"] == summary(named)["epochs"] == 2


def test_files_that_would_run_code_do_not(honest: Path, command: Give, work: Path) -> None:  # noqa: F811
    trace = work / "executed"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(trace), "w")

    run = work / "foreign"
    shutil.copytree(honest, run)
    (checkpoint,) = (run / "checkpoints").glob("step_*.pt")
    state = checkpoints.load(checkpoint)
    torch.save(state | {"extra": Evil()}, checkpoint)
    assert "holds other objects than tensors" in command(f"resume={checkpoint}").sentence()
    checkpoint.write_bytes(pickle.dumps(Evil()))
    assert "damaged" in command(f"resume={checkpoint}").sentence()
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("../../escaped", b"out of the archive")
    assert "damaged" in command(f"resume={checkpoint}").sentence()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"x: !!python/object/apply:os.system ['touch {trace}']\n{text}")
    assert "cannot be read" in command(f"resume={run}").sentence()
    assert not trace.exists() and not list(work.rglob("escaped")) and not (work.parent / "escaped").exists()
