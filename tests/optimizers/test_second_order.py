"""The cheap second derivatives against torch's own, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers.curvature.second_order import SecondOrder

LAYERS = {
    "conv": nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)),
    "conv without bias": nn.Conv2d(4, 6, 3, bias=False),
    "grouped and dilated": nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "1x1": nn.Conv2d(4, 6, 1, stride=2, bias=False),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "batch norm": nn.BatchNorm2d(4),
    "batch norm without running statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "batch norm without weights": nn.BatchNorm2d(4, affine=False),
    "linear": nn.Linear(6, 3),
    "linear without bias": nn.Linear(6, 3, bias=False),
    "linear on rows": nn.Sequential(nn.Flatten(), nn.Linear(168, 5), nn.Tanh(), nn.Linear(5, 2)),
    "conv and batch norm": nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2)),
}


def derivatives(layer: nn.Module, x: Tensor, cheap: bool) -> list[Tensor]:
    """Output, first derivatives, and the derivatives of a random combination of those."""
    generator = torch.Generator().manual_seed(1)
    x = x.clone().requires_grad_()
    inputs = [x, *layer.parameters()]
    if cheap:
        with SecondOrder():
            y = layer(x)
    else:
        y = layer(x)
    loss = y.tanh().square().sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    vectors = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in first]
    second = torch.autograd.grad(first, inputs, vectors)
    return [y.detach(), *[g.detach() for g in first], *second]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_first_and_second_derivatives_are_torchs(name: str, layout: torch.memory_format) -> None:
    layer = LAYERS[name].double().train()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = (torch.randn(5, 4, 7, 6, dtype=torch.float64) * 2 + 1).to(memory_format=layout)
    for mine, theirs in zip(derivatives(layer, x, True), derivatives(layer, x, False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("function", "gate"), [(F.hardsigmoid, 0), (F.hardswish, 1)])
def test_hard_gates_have_second_derivatives(function: Callable[..., Tensor], gate: int) -> None:
    """x^gate relu6(x + 3) / 6: the gates of MobileNet, of which torch cannot differentiate the first twice."""
    x = torch.tensor([-4.0, -1.0, 0.5, 5.0], dtype=torch.float64, requires_grad=True)
    with SecondOrder():
        y = function(x, inplace=True) if gate else function(x)
    torch.testing.assert_close(y, function(x.detach()))
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)
    slopes = inside * ((2 * x.detach() + 3) / 6 if gate else 1 / 6) + gate * (x.detach() >= 3)
    bends = inside * gate / 3
    torch.testing.assert_close(first.detach(), 2 * y.detach() * slopes)
    torch.testing.assert_close(second, 2 * (slopes.square() + y.detach() * bends))


@pytest.mark.parametrize("name", ["conv", "batch norm", "linear"])
@pytest.mark.parametrize("only", [0, 1, 2])
def test_directions_that_touch_one_derivative_only(name: str, only: int) -> None:
    """The Hessian rows of input, weight and bias each on their own (the others' directions are None)."""
    layer = LAYERS[name].double().train()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    results = []
    for cheap in (True, False):
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        if cheap:
            with SecondOrder():
                y = layer(inputs[0])
        else:
            y = layer(inputs[0])
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(first[only].pow(2).sum(), inputs))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_running_statistics_move_as_usual() -> None:
    x = torch.randn(5, 4, 3, 3)
    ours, theirs = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    with SecondOrder():
        ours(x)
    theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_arguments_may_be_named_as_torch_names_them() -> None:
    x, w, b = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3, requires_grad=True), torch.randn(3)
    scale = torch.randn(4, requires_grad=True)
    with SecondOrder():
        y = F.conv2d(input=x, weight=w, bias=b, padding=1)
        z = F.batch_norm(input=x, running_mean=None, running_var=None, weight=scale, bias=scale, training=True)
        rows = F.linear(input=x, weight=w[0, 0].new_ones(2, 6, requires_grad=True))
    assert [type(t.grad_fn).__name__ for t in (y, z)] == ["_Conv2dBackward", "_BatchNormBackward"]
    torch.testing.assert_close(y, F.conv2d(x, w, b, padding=1))
    torch.testing.assert_close(z, F.batch_norm(x, None, None, scale, scale, training=True))
    torch.testing.assert_close(rows, x.sum(-1, keepdim=True).expand(-1, -1, -1, 2))


def test_the_mode_covers_what_it_claims_and_nothing_else() -> None:
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    conv, norm, linear = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 2)
    with SecondOrder():
        assert type(linear(x[0, 0]).grad_fn).__name__ == "_LinearBackward"
        assert "_LinearBackward" not in type(linear(x[0, 0, 0]).grad_fn).__name__, "one row has no batch"
        assert type(conv(x).grad_fn).__name__ == "_Conv2dBackward"
        assert type(norm(x).grad_fn).__name__ == "_BatchNormBackward"
        assert type(norm.eval()(x).grad_fn).__name__ == "NativeBatchNormBackward0"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "Convolution" in type(conv(x).grad_fn).__name__
            assert type(linear(x[0, 0]).grad_fn).__name__ != "_LinearBackward"
    assert type(F.conv2d(x, conv.weight).grad_fn).__name__ == "ConvolutionBackward0"
