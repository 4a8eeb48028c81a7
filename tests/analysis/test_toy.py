"""Two functions in the plane: their minima, the price of a path, the choice of a learning rate, the picture."""

from __future__ import annotations

import csv
import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis import toy
from optimizers import AdaHessian
from scripts.toy import main

ROSENBROCK, RASTRIGIN = toy.SURFACES


def sgd(tensors: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=lr)


@pytest.mark.parametrize("surface", toy.SURFACES, ids=lambda surface: surface.name)
def test_the_minimum_is_one(surface: toy.Surface) -> None:
    at = torch.tensor(surface.minimum, dtype=torch.float64, requires_grad=True)
    value = surface.function(at[0], at[1])
    (gradient,) = torch.autograd.grad(value, at)
    assert value.item() == 0 and gradient.tolist() == [0, 0]
    x, y = np.meshgrid(np.linspace(-5, 5, 201), np.linspace(-5, 5, 201))
    values = surface.function(x, y)
    assert values.min() >= 0
    best = np.unravel_index(values.argmin(), values.shape)
    assert (x[best], y[best]) == pytest.approx(surface.minimum)
    left, right, bottom, top = surface.window
    for px, py in (surface.start, surface.minimum):
        assert left < px < right and bottom < py < top


def test_known_values() -> None:
    assert toy.rosenbrock(-2.0, 2.0) == 409
    assert toy.rastrigin(np.array(0.5), np.array(1.0)) == pytest.approx(0.25 + 1 + 20)


@pytest.mark.parametrize("build", [sgd, lambda ps, lr: AdaHessian(ps, lr=lr)], ids=["sgd", "adahessian"])
def test_every_step_costs_one_evaluation(build: toy.Build) -> None:
    calls = 0

    def counted(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return toy.rosenbrock(x, y)

    surface = toy.Surface("counted", counted, (0.5, 0.5), (1.0, 1.0), (-1, 2, -1, 2), np.array([1.0]))
    path = toy.run("any", build, surface, 1e-4, 7)
    assert calls == path.evaluations == 7
    assert path.points.shape == (8, 2) and tuple(path.points[0]) == surface.start


def test_a_path_is_that_of_the_optimizer() -> None:
    """Gradient descent by hand."""
    x, y = ROSENBROCK.start
    for _ in range(5):
        slope = y - x**2
        x, y = x - 1e-4 * (-2 * (1 - x) - 400 * x * slope), y - 1e-4 * 200 * slope
    assert toy.run("sgd", sgd, ROSENBROCK, 1e-4, 5).points[-1] == pytest.approx((x, y), rel=1e-12)


def test_newtons_step_on_a_bowl() -> None:
    """AdaHessian's first step is exact where the Hessian is diagonal: |h| in the denominator, lr 1."""
    bowl = toy.Surface(
        "bowl", lambda x, y: 2 * x**2 + 50 * y**2, (-1.0, 2.0), (0.0, 0.0), (-2, 2, -3, 3), np.array([1.0])
    )
    path = toy.run("adahessian", partial(_adahessian, eps=1e-12), bowl, 1.0, 1)
    assert path.distance < 1e-9 and path.value < 1e-15


def _adahessian(tensors: list[Tensor], lr: float, eps: float) -> torch.optim.Optimizer:
    return AdaHessian(tensors, lr=lr, eps=eps, max_update=None)


def test_the_rate_that_ends_lowest_is_chosen_and_divergence_never() -> None:
    path = toy.tune("sgd", sgd, ROSENBROCK, 60, rates=(1e-5, 3e-4, 1.0))
    assert path.lr == 3e-4
    runs = {lr: toy.run("sgd", sgd, ROSENBROCK, lr, 60) for lr in (1e-5, 3e-4, 1.0)}
    assert runs[1.0].value == math.inf and runs[1.0].evaluations < 60
    assert path.value == min(run.value for run in runs.values()) < runs[1e-5].value


def test_no_evaluations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^evaluations must be at least 1, got 0$"):
        toy.tune("sgd", sgd, ROSENBROCK, 0)


def test_the_picture_has_a_cell_for_every_path_and_stays_in_its_window() -> None:
    far = toy.Path("pkg:Far", ROSENBROCK, 1.0, 2, np.array([(-2.0, 2.0), (1e9, -1e9), (math.inf, math.nan)]))
    paths = [far, *(toy.run(f"sgd{i}", sgd, surface, 1e-4, 3) for i in range(4) for surface in toy.SURFACES)]
    figure = toy.plot(paths)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert len(drawn) == len(paths)
    for axes in drawn:
        surface = ROSENBROCK if "Rosenbrock" in axes.get_title() else RASTRIGIN
        assert (*axes.get_xlim(), *axes.get_ylim()) == surface.window
    assert any(axes.get_title().startswith("Far, lr 1\n") for axes in drawn)
    figure.savefig(io.BytesIO())
    boxes = [axes.title.get_window_extent() for axes in drawn]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_the_command_writes_the_same_twice_and_says_who_needs_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "sgd,adahessian,torch:RAdam,kfac"
    for out in ("a", "b"):
        assert main(["--evaluations", "5", "--optimizers", names, "--out", str(tmp_path / out)]) == 0
    printed = capsys.readouterr().out
    assert "of which a function of two numbers has none: kfac" in printed
    for file in ("toy.csv", "toy.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    rows = list(csv.DictReader((tmp_path / "a" / "toy.csv").open()))
    assert [(row["optimizer"], row["function"]) for row in rows] == [
        (name, surface.name) for name in ("sgd", "adahessian", "torch:RAdam") for surface in toy.SURFACES
    ]
    for row in rows:
        surface = ROSENBROCK if row["function"] == "Rosenbrock" else RASTRIGIN
        point = float(row["x"]), float(row["y"])
        assert row["evaluations"] == "5"
        assert float(row["distance"]) == pytest.approx(math.dist(point, surface.minimum), rel=1e-4)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--optimizers", "adm"], "optimizers: there is no 'adm' (did you mean 'adam'?)"),
        (["--optimizers", "torch:RAdm"], "did you mean 'RAdam'?"),
        (["--optimizers", "torch"], "name must be an optimizer of torch.optim, got ''"),
        (["--optimizers", "torch:LBFGS"], "name must not be LBFGS, which calls the model itself"),
        (["--optimizers", "kfac"], "optimizers must name one that takes two numbers"),
        (["--evaluations", "0", "--optimizers", "sgd"], "evaluations must be at least 1, got 0"),
        (["--evaluations", "x"], "invalid int value: 'x' (see --help)"),
        (["--evaluations", "1", "--optimizers", "sgd", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_one_sentence(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line
