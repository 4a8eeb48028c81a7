"""A user's own pieces, named on the command line or in files, and the template of a project outside of the clone."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from scripts import predict
from tests.cli.conftest import Outcome, metrics, runs, summary, unfinish
from tests.conftest import ROOT
from training.errors import UserError
from training.runs.record import load
from training.settings.composition import compose
from training.settings.loading import load_run

PROJECT = ROOT / "examples" / "own_project"
BRIEF = ("logger=quiet", "trainer.max_epochs=null", "trainer.max_steps=6", "trainer.eval_every_steps=3")
MORE = '''
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

def plain():
    return TensorDataset(torch.rand(90, 1, 4, 4), torch.arange(90) % 3)

def split(batch_size: int = 9):
    return plain(), None, plain()

class Positional(nn.Module):
    def __init__(self, in_channels, image_size, /, num_classes=7, *, width=4):
        super().__init__()
        fan_in = in_channels * image_size**2
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(fan_in, width), nn.ReLU(), nn.Linear(width, num_classes))
    def forward(self, x):
        return self.layers(x)

class Answers(Positional):
    def forward(self, x):
        return {"logits": self.layers(x)}

class Fails(Positional):
    def forward(self, x):
        return self.layers(x) @ x

class Lazy(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))

class Detached(Positional):
    def forward(self, x):
        return self.layers(x).detach()

class Needs(nn.Module):
    def __init__(self, vocabulary): ...

def nothing(): ...
def seven(*_): return 7
def several(): return (plain(),) * 4
def spoilt(): return TensorDataset(torch.full((90, 1, 4, 4), torch.nan), torch.arange(90) % 3)
def larger(): return plain(), TensorDataset(torch.rand(9, 1, 4, 5), torch.arange(9) % 3)
def broken(): raise KeyError("gone")
'''


@pytest.fixture
def project(work: Path) -> Iterator[Path]:
    """The template, copied to where the command is given."""
    shutil.copytree(PROJECT, work, dirs_exist_ok=True)
    (work / "more.py").write_text(MORE)
    before = set(sys.modules)
    yield work
    for name in set(sys.modules) - before:  # of the same names in the next test's folder
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(work):
            del sys.modules[name]


def commands() -> list[str]:
    found = re.findall(r"^    TRAIN (.*?)(?: +#.*)?$", (PROJECT / "README.md").read_text(), re.MULTILINE)
    assert len(found) == 5
    return found


@pytest.mark.parametrize("line", commands())
def test_the_template_trains_outside_of_the_clone(line: str, command: Callable[..., Outcome], project: Path) -> None:
    outcome = command(*BRIEF, *line.split(), "callbacks.curve_plots=null")
    assert outcome.code == 0, outcome.err
    found = runs(project, "multirun/*/*" if "-m" in line else "runs/*/*")
    assert len(found) == (2 if "-m" in line else 1)
    for run in found:
        assert summary(run)["status"] == "finished" and summary(run)["steps"] == 6
    if "callbacks" in line:
        assert len((found[0] / "validation.csv").read_text().splitlines()) == 2
    assert list(project.glob("**/*.tmp")) == [] and str(project) not in sys.path


def test_a_model_by_its_name_has_its_own_values_alone(command: Callable[..., Outcome], project: Path) -> None:
    given = ("dataset._target_=more.plain", "model._target_=more.Positional", "optimizer=sgd", "callbacks=none")
    outcome = command(*BRIEF, *given, "dataset.batch_size=9", "model.width=3")
    assert outcome.code == 0, outcome.err
    (run,) = runs(project)
    values, choices = load(run)
    assert values["model"] == {"_target_": "more.Positional", "width": 3}, "nothing of the default model's file"
    assert values["dataset"] == {"_target_": "more.plain", "batch_size": 9}
    assert run.parent.name == "sgd_Positional_plain" and choices["model"] == "Positional"
    assert [event["step"] for event in metrics(run) if event["event"] == "eval"] == [3, 6]
    longer = ("trainer.max_steps=8", "callbacks=none", f"resume={run}")
    refused = command(*longer)
    assert "add dataset._target_=more.plain model._target_=more.Positional, or" in refused.sentence()
    resumed = command(*longer, *given[:2])
    assert resumed.code == 0 and summary(run)["steps"] == 8, resumed.err
    unfinish(run)
    again = command(*BRIEF, *given, "dataset.batch_size=9", "model.width=3", "trainer.max_steps=9", "resume=auto")
    assert again.code == 0 and summary(run)["steps"] == 9, again.err
    shown = command("--cfg", "job", "model._target_=more.Positional", "model.width=3")
    assert re.search(r"^model:\n  _target_: more.Positional\n  width: 3\n\S", shown.out, re.MULTILINE), shown.out


def test_lazy_layers_and_what_leads_nowhere(
    command: Callable[..., Outcome], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(project))
    brief = (*BRIEF, "optimizer=kfac", "callbacks=none")
    assert command(*brief, "model._target_=more.Lazy", "paths.runs=~/there").code == 0
    assert len(runs(project, "there/*/*")) == 1
    lost = command(*brief, "model._target_=more.Detached")
    assert lost.code == 1 and "the loss depends on no parameter that is trained" in lost.sentence()


def test_a_run_of_one_s_own_pieces_predicts_at_one_s_word(
    command: Callable[..., Outcome], project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("dataset._target_=more.plain", "model._target_=more.Positional")
    outcome = command(*BRIEF, *given, "optimizer._target_=myoptimizer.SignMomentum", "callbacks=none")
    assert outcome.code == 0, outcome.err
    (run,) = runs(project)
    Image.new("L", (9, 9), 7).save(project / "one.png")
    asked = [str(run), str(project / "one.png")]
    assert predict.main(asked) == 1
    assert "if it is yours, add --own more.Positional, or own=['more.Positional'] in Python" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"_target_=more\.Positional and dataset\._target_=more\.plain, which are no p"):
        load_run(run, None)
    assert predict.main([*asked, "--own", "more.Positional"]) == 1
    assert "does not say how images become inputs" in capfd.readouterr().err, "as its data set yields floats"
    loaded = load_run(run, own=["more.Positional"])
    with pytest.raises(UserError, match=r"add --own myoptimizer\.SignMomentum, or own="):
        loaded.build_optimizer()
    loaded.own = ["myoptimizer.SignMomentum"]
    assert type(loaded.build_optimizer()).__name__ == "SignMomentum"


def test_a_file_whose_keys_all_go_with_another_callable_keeps_its_values() -> None:
    """As before there was anything else, so that such runs stay what they were."""
    values = compose(["optimizer=adam", "optimizer._target_=torch.optim.AdamW", "optimizer.lr=0.5"]).values["optimizer"]
    assert values["_target_"] == "torch.optim.AdamW" and values["lr"] == 0.5 and values["betas"] == (0.9, 0.999)
    run = compose(["optimizer=adam", "optimizer._target_=torch.optim.AdamW"])
    assert run.choices["optimizer"] == "adam"


def test_share_of_the_test_set(quick: Callable[..., Outcome], work: Path) -> None:
    assert compose(["model=mlp"]).id == compose(["model=mlp", "dataset.limit_test=1.0"]).id
    assert compose(["model=mlp"]).id != compose(["model=mlp", "dataset.limit_test=0.5"]).id
    assert quick("dataset.limit_test=0.1", "optimizer=adam").code == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["model._target_=more.Answers"], r"the model returns what is of type dict, and classification needs a tensor"),
        (["model._target_=more.Fails"], r"the model fails on an example .*, \[1, 8, 8\], with .*\(more.py, line \d+\)"),
        (["model._target_=torch.nn.Identity"], r"optimizer: Identity has no parameters to train: choose another"),
        (["model._target_=more.Needs"], r"model: Needs needs vocabulary, which this data set does not have"),
        (["model._target_=more.seven"], r"model: more.seven returned what is of type int, and a model is"),
        (["model._target_=more.Positionel"], r"more has no callable 'Positionel' \(did you mean 'Positional'\?\)"),
        (["model._target_=nowhere.Net"], r"'nowhere' cannot be imported \(No module named 'nowhere'\)"),
        (["model._target_=wrong.Net"], r"'wrong' cannot be imported \(SyntaxError: .*\)"),
        (["model._target_=models.Net"], r"models has no callable 'Net'; models.py of this folder is hidden by another"),
        (["model._target_=more.Positional", "model.wdith=3"], r"has no such option \(did you mean 'width'\?\)"),
        (["model._target_=torch.nn.Linear"], r"model: Linear needs in_features, which .* or give model.in_features="),
        (["optimizer._target_=more.seven"], r"optimizer: seven made what is of type int, and no torch.optim.Optimizer"),
        (["optimizer._target_=torch.optim.SparseAdam"], r"optimizer: SparseAdam is for sparse gradients"),
        (["dataset._target_=more.several"], r"dataset: more.several returned 4 parts: let it return one set, or those"),
        (["dataset._target_=more.plain", "dataset.mixup=-1"], r"dataset.mixup must be at least 0, got -1.0"),
        (["dataset._target_=more.spoilt", "dataset.batch_size=9"], r"inputs of the data set hold nan or inf"),
        (["dataset._target_=more.larger", "dataset.batch_size=9"], r"model fails on an example .*, \[1, 4, 5\], with"),
        (["dataset._target_=more.nothing"], r"dataset: more.nothing returned nothing: let it return a data set"),
        (["dataset._target_=more.seven"], r"the train set is of type int, which has no length"),
        (["dataset._target_=more.broken"], r"dataset: broken raised KeyError: 'gone' \(more.py, line \d+\)"),
        (["dataset._target_=more.plain", "dataset.batchsize=3"], r"has no such option \(did you mean 'batch_size'\?\)"),
        (["dataset._target_=more.plain", "dataset.batch_size=900"], r"batch_size must be at most the \d+ examples"),
        (["callbacks.mine._target_=mycallbacks.Tabel"], r"has no callable 'Tabel' \(did you mean 'Table'\?\)"),
        (["callback.mine._target_=mycallbacks.Table"], r"unknown key 'callback.mine._target_'"),
    ],
)
def test_what_does_not_fit_says_so(argv: list[str], says: str, command: Callable[..., Outcome], project: Path) -> None:
    (project / "wrong.py").write_text("class Net(:\n")
    (project / "models.py").write_text("class Net: ...\n")
    outcome = command("optimizer=sgd", "callbacks=none", *([] if "model._" in argv[0] else ["model=mlp"]), *argv)
    assert outcome.code == 1 and re.search(says, outcome.sentence()), outcome.err
    assert runs(project) == []


@pytest.mark.parametrize(
    ("file", "text", "argv", "says"),
    [
        ("model/mine.yaml", b"# \xfc\n_target_: more.Lazy\n", "model=mine", r"file is not in UTF-8 \('utf-8' codec"),
        ("model/mine.yaml", b"defaults: [mine]\n_target_: more.Lazy\n", "model=mine", r"takes itself up, by its defau"),
        ("model/mine.yaml", b"_target_: more.Lazy\n\twidth: 3\n", "model=mine", r"not valid YAML: .*line 2, column 1$"),
        ("experiment/mine.yaml", b"seed: 3\n", "experiment=mine", r"unknown key 'experiment': .* # @package _global_$"),
    ],
)
def test_files_of_one_s_own(
    file: str, text: bytes, argv: str, says: str, command: Callable[..., Outcome], project: Path
) -> None:
    place = project / "it's mine" / file
    place.parent.mkdir(parents=True)
    place.write_bytes(text)
    outcome = command("--config-dir", "it's mine", argv)
    assert outcome.code == 1 and re.search(says, outcome.sentence()), outcome.err
    assert runs(project) == []


def test_what_the_readme_says(command: Callable[..., Outcome], project: Path) -> None:
    text = (ROOT / "README.md").read_text()
    for name in ("mydata.py", "mynet.py"):
        (block,) = re.findall(rf"```python\n# {name}\n(.*?)```", text, flags=re.DOTALL)
        (project / name).write_text(block)
    (line,) = re.findall(r"^    python train.py (dataset._target_=mydata.*)$", text, re.MULTILINE)
    outcome = command(*BRIEF, "optimizer=adam", "callbacks=none", *line.split())
    assert outcome.code == 0, outcome.err
    (run,) = runs(project)
    assert run.parent.name == "adam_MyNet_make" and load(run)[0]["dataset"] == {
        "_target_": "mydata.make", "batch_size": 32
    }  # fmt: skip
