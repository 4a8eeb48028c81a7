"""The table of all optimizers: complete, true to the configurations, and measured."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from optimizers import KFAC, AdaHessian, Categorical, table
from optimizers.__main__ import main
from optimizers.packaged import muon
from tests.conftest import ROOT
from training.settings import schema

FILES = {path.stem: path for path in (ROOT / "configs" / "optimizer").glob("*.yaml")}
BLOCK = ("<!-- optimizers -->\n", "\n<!-- /optimizers -->")


@pytest.fixture(scope="module")
def rows() -> dict[str, table.Row]:
    return {row.name: row for row in table.rows()}


def test_every_file_has_its_row_and_every_row_its_file() -> None:
    pytest.importorskip("pytorch_optimizer")
    assert {name for name, _, _ in table.present()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_an_entry_is_what_its_file_says(name: str) -> None:
    """The target, and the values on which the state depends."""
    node = yaml.safe_load(FILES[name].read_text())
    entry = table.CATALOGUE[name]
    assert node["_target_"] == entry.target
    assert {key: node[key] for key in entry.options} == entry.options


@pytest.mark.parametrize(
    "name", sorted(FILES.keys() & {"sgd", "adam", "kfac", "deflation", "adafisher", "shampoo", "soap"})
)
def test_state_is_that_of_the_files_values(name: str, rows: dict[str, table.Row]) -> None:
    checked = schema.check(yaml.safe_load(FILES[name].read_text()), "optimizer", "optimizer")
    target = schema.locate(checked.pop("_target_"), "optimizer")
    assert table.measure(target, checked) == rows[name].state


def test_state_of_known_methods(rows: dict[str, table.Row]) -> None:
    """One, two moments; K-FAC: momentum, and two factors with their inverses a layer, all in float32."""
    assert rows["sgd"].state == "4.0"
    assert rows["adam"].state == "8.0"
    sizes = [(784, 400), (400, 200), (200, 100)]
    parameters = sum((i + 1) * o for i, o in sizes)
    factors = sum((i + 1) ** 2 + o**2 for i, o in sizes)
    assert rows["kfac"].state == f"{4 + 8 * factors / parameters:.1f}"


def test_needs() -> None:
    assert table.needs(torch.optim.SGD) == []
    assert table.needs(AdaHessian) == ["graph"]
    assert table.needs(KFAC) == ["module", "outputs"]
    assert table.needs(muon) == ["module"]


def test_what_was_tried_out(rows: dict[str, table.Row], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows["adam"].layers == "any" and rows["kfac"].layers == "all"
    assert rows["adam"].ranks == "by gradients"
    assert rows["kfac"].ranks == "averaged" and rows["deflation"].ranks == "gathered"
    assert all(row.numbers for row in rows.values() if row.state)

    class Single(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            if self.param_groups[0]["params"][0].dtype != torch.float32:
                raise RuntimeError("float32 alone")
            return super().step(closure)

    monkeypatch.setitem(table.CATALOGUE, "sgd", table.Entry(f"{__name__}.Single", "", "", {"lr": 0.1}))
    monkeypatch.setattr(sys.modules[__name__], "Single", Single, raising=False)
    (row,) = table.rows(["sgd"])
    assert row.numbers == "fp32 autocast"


def test_layers_that_are_not_covered_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linears(KFAC):
        def __init__(self, model: nn.Module, **options: object) -> None:
            super().__init__(model, skip="^(?!0$|2$)", likelihood=Categorical())

    monkeypatch.setitem(table.CATALOGUE, "kfac", table.Entry(f"{__name__}.Linears", "", ""))
    monkeypatch.setattr(sys.modules[__name__], "Linears", Linears, raising=False)
    (row,) = table.rows(["kfac"])
    assert row.layers == "Linear, Conv2d"


def test_an_entry_without_its_class_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.CATALOGUE, "kfac", table.Entry("optimizers.NotYet", "", ""))
    monkeypatch.setitem(table.CATALOGUE, "lion", table.Entry("not_a_package.Lion", "", ""))
    assert not {"kfac", "lion"} & {name for name, _, _ in table.present()}


def test_the_table_in_columns(rows: dict[str, table.Row]) -> None:
    lines = table.text(list(rows.values())).splitlines()
    for name, row in rows.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert row.idea in line and row.paper in line
        assert line.index(row.idea) == lines[0].index("step ")


def test_limits_are_listed_with_their_reasons() -> None:
    pytest.importorskip("pytorch_optimizer")
    assert any("SophiaH: needs gradients with a graph" in line for line in table.limits())
    assert any(line.startswith("DASH, Gravity, Kron, Magma: alone in one process") for line in table.limits())


def test_the_readme_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_optimizer")
    assert main(["--markdown"]) == 0
    block = capsys.readouterr().out.strip()
    readme = (ROOT / "README.md").read_text()
    assert BLOCK[0] in readme, f"the README has no block {BLOCK[0].strip()} for: python -m optimizers --markdown"
    assert readme.split(BLOCK[0])[1].split(BLOCK[1])[0].strip() == block


def test_the_optimizers_import_torch_alone() -> None:
    program = "import sys, optimizers, optimizers.table; print(*{m.partition('.')[0] for m in sys.modules})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"pytorch_optimizer", "hydra", "omegaconf", "models", "data", "training"} & set(found.stdout.split())
