"""A layer type and a Kronecker approximation that are added from outside, each a class of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import KFAC, AdaFisher, Categorical, ExactNaturalGradient
from optimizers.curvature.approximations import Approximation
from optimizers.curvature.kronecker import Factors, KroneckerFactors
from optimizers.curvature.layers import AffineLayer, ImageRows, adapt, adapts, registry
from optimizers.testing import check_curvature
from tests.optimizers.problems import images, mlp


class VolumeLayer(ImageRows, AffineLayer):
    """``nn.Conv3d`` without groups or dilation, padded with zeros."""

    def __init__(self, name: str, module: nn.Conv3d) -> None:
        super().__init__(name, module)
        self.d_in, self.d_out = module.weight[0].numel(), module.out_channels
        self._stride, self._padding, self._kernel = module.stride, module.padding, module.kernel_size

    def leading(self, x: Tensor, g: Tensor) -> int:
        return g.dim() - 4

    def respond(self, x: Tensor, tensors: Any) -> Tensor:
        return F.conv3d(x, tensors[0], tensors[1] if self.has_bias else None, self._stride, self._padding)

    def patches(self, x: Tensor) -> Tensor:
        x = F.pad(x, [p for p in reversed(self._padding) for _ in range(2)])
        for axis in range(3):
            x = x.unfold(2 + axis, self._kernel[axis], self._stride[axis])
        return x.flatten(5).movedim(1, 4).flatten(4).flatten(1, 3).unsqueeze(0)

    def gradients(self, g: Tensor) -> Tensor:
        return g.flatten(2).mT.unsqueeze(0)

    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        a = self.inputs(x)
        return a.square().sum((1, 2)), a.shape[1] * a.shape[2]

    def gradient_square_sums(self, g: Tensor) -> Tensor:
        return self.gradients(g).square().sum((1, 2))


class InputFactor(KroneckerFactors):
    """K-FAC's factor of the inputs alone: the other one is a multiple of the identity, with the same trace."""

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        factors = super().estimate(gradient_scale, examples)
        g = factors["G"]
        means = g.diagonal(dim1=-2, dim2=-1).mean(-1)
        return factors | {"G": means.view(-1, 1, 1) * torch.eye(g.shape[-1]).to(g)}


class InputKFAC(KFAC):
    def affine_block(self, layer: AffineLayer) -> Approximation:
        return InputFactor(layer, self.options)


@pytest.mark.parametrize("operations", [None, {torch.conv3d: ("input", "weight")}], ids=["module", "operation"])
@pytest.mark.parametrize("method", [KFAC, AdaFisher, ExactNaturalGradient])
def test_a_layer_type_from_outside(monkeypatch: pytest.MonkeyPatch, method: Any, operations: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1)), nn.Tanh(), nn.Flatten())
    model.append(nn.Linear(3 * 5 * 2 * 6, 4))
    x, y = torch.randn(6, 2, 4, 5, 5), torch.randint(4, (6,))
    assert adapt("0", model[0]) is None, "torch's own adapters leave it to the one below"
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    for function in operations or {}:
        monkeypatch.setitem(registry.OPERATIONS, function, ())  # taken out again
    adapts(nn.Conv3d, operations=operations)(VolumeLayer)
    report = check_curvature(model, method, x, Categorical(), targets=y)
    report.raise_if_wrong()
    assert [layer.module for layer in report.layers if not layer.reason] == ["0", "3"], str(report)


def test_a_nearer_adapter_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(nn.Linear):
        pass

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    before = type(adapt("", Wide(2, 2)))

    @adapts(Wide)
    class WideLayer(before):
        pass

    assert type(adapt("", Wide(2, 2))) is WideLayer and type(adapt("", nn.Linear(2, 2))) is before


def test_an_approximation_from_outside() -> None:
    model = mlp().double()
    x, y = images()
    blocks = {}
    for method in (KFAC, InputKFAC):
        optimizer = method(model, lr=0.0, fisher="empirical", likelihood=Categorical())
        loss = F.cross_entropy(outputs := model(x.double()), y)
        optimizer.backward(loss, outputs)
        optimizer.step()
        blocks[method] = optimizer.blocks, optimizer.curvature_matrices()
        optimizer.close()
    for name, block in blocks[KFAC][0].items():
        a, g = block.factors["A"][0], block.factors["G"][0]
        expected = torch.kron(g.trace() / len(g) * torch.eye(len(g), dtype=g.dtype), a)
        torch.testing.assert_close(blocks[InputKFAC][1][name], expected, rtol=1e-10, atol=1e-12)
