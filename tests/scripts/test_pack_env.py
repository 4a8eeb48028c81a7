"""An environment that is carried to where there is no network: of this project and one small package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = str(ROOT / "scripts" / "pack_env.sh")


def run(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_what_is_packed_installs_elsewhere_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "light.txt").write_text("filelock>=3.12  # a lock\n")
    packed = run(SCRIPT, "env", "-r", "light.txt", cwd=tmp_path)
    if packed.returncode and not (tmp_path / "env").exists():
        pytest.skip(f"no package index here: {packed.stderr[-300:]}")
    assert packed.returncode == 0, packed.stderr
    assert run(SCRIPT, "env", cwd=tmp_path).stderr.startswith("error: env is there already")
    shutil.move(tmp_path / "env", tmp_path / "moved")
    done = run("moved/install.sh", "venv", cwd=tmp_path, PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    code = "import filelock, curvlab; print(curvlab.__version__)"
    python = tmp_path / "venv" / "bin" / "python"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert shown.stdout.strip(), shown.stderr
    wheel = next((tmp_path / "moved" / "wheels").glob("filelock*"))
    wheel.write_bytes(wheel.read_bytes()[:-100])
    again = run("moved/install.sh", "other", cwd=tmp_path, PIP_NO_INDEX="1")
    assert again.returncode == 1 and "error: copy the folder again" in again.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--fast"], "unknown flag --fast"), (["-r"], "-r needs a value"), (["-r", "none.txt"], "no file none.txt")],
)
def test_what_cannot_be(words: list[str], says: str, tmp_path: Path) -> None:
    done = run(SCRIPT, *words, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and says in done.stderr
