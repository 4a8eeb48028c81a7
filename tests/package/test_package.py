"""What `pip install` gives: the same files under one name, in an environment of its own, outside the clone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from curvlab import __version__
from curvlab.names import PARTS
from tests.conftest import ROOT
from training.command.cli import as_started

# A run of three steps on the embedded digits.
QUICK = (
    "optimizer=adafisher", "model=mlp", "model.hidden=[16]", "callbacks=none", "logger=quiet",
    "trainer.max_epochs=null", "trainer.max_steps=3",
)  # fmt: skip


def give(command: list[str], work: Path, timeout: int = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, in an environment that knows nothing of the clone but what `variables` say."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CURVLAB"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=work, env=environment, start_new_session=True, **pipes) as begun:
        try:
            out, err = begun.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(begun.pid, signal.SIGKILL)  # what torchrun started, too
            raise
    return subprocess.CompletedProcess(command, begun.returncode, out, err)


def build(*arguments: str, of: Path, to: Path) -> None:
    """Run `python -m build`, with this environment's backend: no package index is asked."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(to), *arguments, str(of)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    build(of=ROOT, to=folder)
    return folder


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment with the wheel, which finds requirements where they are installed."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    assert sorted(path.name for path in site.iterdir()) == ["curvlab", f"curvlab-{__version__}.dist-info"]
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, work: Path, script: str, **variables: str) -> str:
    """What a script prints that is run in a folder; it must succeed."""
    path = work / "script.py"
    path.write_text(textwrap.dedent(script))
    done = give([str(python), str(path)], work, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files(built: Path, tmp_path: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = [ROOT / name for name in (*PARTS, "configs")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = [path for path in files if path.suffix != ".ipynb"]  # which are read in the clone
    expected = {f"curvlab/{path.relative_to(ROOT).as_posix()}" for path in [*files, ROOT / "train.py"]}
    expected |= {f"curvlab/{path.name}" for path in (ROOT / "curvlab").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.split("/")[0] for name in names} == {"curvlab", f"curvlab-{__version__}.dist-info"}

    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"} <= held
    assert not any(name.startswith(("tests", "scripts", "docs")) for name in held)

    build("--wheel", of=ROOT, to=tmp_path)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes(), "from the clone as from the sdist"


def test_metadata(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    info = f"curvlab-{__version__}.dist-info"
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode().partition("\n\n")[0].splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in metadata if line.startswith("Requires-Dist: ")]
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert [text for text in required if ";" not in text] == [lines[0]] and lines[0].startswith("torch>=")
    extra = {text.partition(";")[0].strip().replace("_", "-") for text in required if "extra == 'train'" in text}
    assert extra == {line.replace("_", "-") for line in lines[1:]}
    assert [text for text in required if "extra == 'slurm'" in text] == ["submitit>=1.5; extra == 'slurm'"]
    assert len(required) == len(lines) + 1
    assert b"curvlab = curvlab.command:main" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt")


def test_optimizers_need_torch_alone_and_take_no_names(python: Path, tmp_path: Path) -> None:
    for name in ("data", "optimizers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    script = """
        import sys
        import time

        import torch
        import torch.optim

        before, start = set(sys.modules), time.process_time()
        from curvlab.optimizers import KFAC, Categorical

        seconds = time.process_time() - start
        added = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
        assert added <= {"curvlab", "torch"}, added
        assert seconds < 0.5, seconds  # 0.07 where nothing else runs

        model = torch.nn.Linear(3, 2)
        weight = model.weight.detach().clone()
        optimizer = KFAC(model, lr=0.1, likelihood=Categorical())
        outputs = model(torch.randn(8, 3))
        optimizer.backward(torch.nn.functional.cross_entropy(outputs, torch.randint(2, (8,))), outputs)
        optimizer.step()
        assert not torch.equal(weight, model.weight) and model.weight.isfinite().all()

        from curvlab.optimizers import table

        assert [target for _, _, target in table.present(["kfac"])] == [KFAC], "it names classes by short names"

        import data, optimizers

        assert data.mine and optimizers.mine
        for name in ("curvlab.models", "curvlab.command"):
            try:
                __import__(name)
            except ImportError as error:
                print(error)
    """
    first, second = run(python, tmp_path, script).splitlines()
    assert "import curvlab.command first" in first
    assert "needs the name 'optimizers'" in second and "run curvlab in a process of its own" in second


def test_a_run_with_a_class_of_the_working_directory(python: Path, tmp_path: Path) -> None:
    for name in (*PARTS, "configs", "train"):  # none of these is to be looked at
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('this is mine')\n")
    (tmp_path / "mine.py").write_text(textwrap.dedent("""
        import curvlab.optimizers
        import curvlab.training.errors
        import optimizers.testing
        import training.errors
        from curvlab.optimizers import testing
        from optimizers.base import CurvatureOptimizer

        assert curvlab.optimizers is optimizers and optimizers.testing is testing
        assert curvlab.training.errors.UserError is training.errors.UserError
        assert training.errors.__spec__.name == "training.errors"

        class Mine(curvlab.optimizers.AdaFisher):
            pass

        assert issubclass(Mine, CurvatureOptimizer)
    """))
    done = give([str(python.parent / "curvlab"), *QUICK, "optimizer._target_=mine.Mine"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 3 and summary["git_commit"] is None
    assert summary["versions"]["curvlab"] == __version__
    assert (folder / "config.yaml").read_text().startswith("# curvlab optimizer=adafisher model=mlp ")
    assert "curvature of Mine" in (folder / "train.log").read_text()
    assert not (tmp_path / "datasets").exists() and not (tmp_path / "multirun").exists()


def test_sentences_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a run folder of train.py: python train.py --cfg job, torchrun --nproc-per-node=2 train.py, mine/train.py"
    monkeypatch.delenv("CURVLAB_COMMAND", raising=False)
    assert as_started(text) == text
    monkeypatch.setenv("CURVLAB_COMMAND", "curvlab")
    said = "a run folder of curvlab: curvlab --cfg job, torchrun --nproc-per-node=2 -m curvlab, mine/train.py"
    assert as_started(text) == said


def test_the_readme_says_how() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install '.[train]'" in text and f"    curvlab {' '.join(QUICK[:2])}\n" in text
    assert "torchrun --nproc-per-node=2 -m curvlab " in text


def test_what_an_installation_of_the_optimizers_alone_says(python: Path, tmp_path: Path) -> None:
    script = """
        import sys

        sys.modules["hydra"] = None  # as where it is not installed

        from curvlab.command import main

        assert main(["optimizer=kfac"]) == 1
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    done = give([str(python), str(path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: hydra is not installed: pip install 'curvlab[train]' adds what curvlab needs\n"


def test_processes_that_are_spawned_know_the_names(python: Path, tmp_path: Path) -> None:
    script = """
        import multiprocessing

        from curvlab.command import main
        from training.errors import did_you_mean  # a child finds it by this name

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(did_you_mean, ("lrr", ["lr"])))
    """
    assert "lr" in run(python, tmp_path, script)


def test_both_names_in_a_clone(tmp_path: Path) -> None:
    script = f"""
        import curvlab
        import training.errors
        import curvlab.training.errors
        import curvlab.analysis  # the long name first
        import analysis

        assert curvlab.training.errors is training.errors and curvlab.training is training
        assert analysis is curvlab.analysis
        assert all(module.__file__.startswith({str(ROOT)!r}) for module in (training, analysis, curvlab))
    """
    run(Path(sys.executable), tmp_path, script, PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_two_processes(python: Path, tmp_path: Path) -> None:
    launcher = [str(python), "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "curvlab"]
    done = give([*launcher, *QUICK], tmp_path, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["hardware"]["processes"] == 2
