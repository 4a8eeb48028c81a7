"""analysis/notebooks: short, stored without outputs, and run from top to bottom by a kernel, as Jupyter would."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "analysis" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LINES = 60  # of code, that a reader takes in

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert "own_model" in {path.stem for path in NOTEBOOKS}


@every_notebook
def test_a_notebook_is_whole_stripped_and_short(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# "), "no title"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "outputs: strip them"
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(lines) < LINES, f"{len(lines)} lines of code"
    assert max(map(len, lines)) <= 120


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, in the notebook's folder: no error, no warning, and a picture at least."""
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="pip install -r requirements-dev.txt")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))  # a user's settings are no matter of tests
    before = {entry.name for entry in FOLDER.iterdir()}
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    complaints = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not complaints, complaints
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert {entry.name for entry in FOLDER.iterdir()} == before, "it left something in its folder"
