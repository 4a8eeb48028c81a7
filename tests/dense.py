"""Dense float64 references, assembled by autograd and plain loops, of everything the optimizers approximate.

Nothing here imports from ``optimizers``: the oracle must not share code with what it judges. Small nets only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def hessian(loss: Tensor, params: list[Tensor]) -> Tensor:
    """Hessian of a scalar by all params, row by row."""
    gradient = flatten(list(torch.autograd.grad(loss, params, create_graph=True)))
    rows = []
    for entry in gradient:
        row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(flatten([torch.zeros_like(p) if r is None else r for r, p in zip(row, params, strict=True)]))
    return torch.stack(rows)


def per_example_gradients(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, params: list[Tensor]
) -> Tensor:
    """[batch, parameters]: the gradient of each example's own loss (a batch of one at a time)."""
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        value = loss(model(x.unsqueeze(0)), y.unsqueeze(0))
        grads = torch.autograd.grad(value, params, allow_unused=True)
        rows.append(flatten([torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]))
    return torch.stack(rows)


def empirical_fisher(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, params: list[Tensor]) -> Tensor:
    """(1/m) sum_i grad_i grad_iᵀ over the given targets."""
    grads = per_example_gradients(model, loss, inputs, targets, params)
    return grads.T @ grads / len(grads)


def layer_flow(
    model: nn.Module, layer: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Per example: the layer's input and the gradient of the example's loss by its output (no batch dimension)."""
    xs, gs = [], []
    for x, y in zip(inputs, targets, strict=True):
        kept: dict[str, Tensor] = {}
        handle = layer.register_forward_hook(lambda m, args, out, kept=kept: kept.update(x=args[0], y=out))
        value = loss(model(x.unsqueeze(0)), y.unsqueeze(0))
        handle.remove()
        (g,) = torch.autograd.grad(value, kept["y"])
        xs.append(kept["x"].detach()[0])
        gs.append(g[0])
    return xs, gs


def positions(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """One example's (a_t, g_t) by group and position, cut out by plain loops: ``a[group][t]``, bias entry included."""
    one = torch.ones(1, dtype=x.dtype)
    if isinstance(layer, nn.Linear):
        a = [torch.cat([v, one]) if layer.bias is not None else v for v in x.reshape(-1, layer.in_features)]
        return [a], [list(g.reshape(-1, layer.out_features))]
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    if isinstance(layer, nn.Conv1d):
        x, g = x.unsqueeze(1), g.unsqueeze(1)
        kernel, stride, dilation = (1, *layer.kernel_size), (1, *layer.stride), (1, *layer.dilation)
        pad = [layer.padding[0], layer.padding[0], 0, 0] if not isinstance(layer.padding, str) else None
    else:
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        pad = (
            [layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]]
            if not isinstance(layer.padding, str)
            else None
        )
    if pad is None:  # padding="same": the total is dilation * (kernel - 1), the odd one on the right
        pad = []
        for k, d in zip(reversed(kernel), reversed(dilation), strict=True):
            total = d * (k - 1) if layer.padding == "same" else 0
            pad += [total // 2, total - total // 2]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if mode == "constant":
        x = F.pad(x, pad)
    else:
        x = F.pad(x.unsqueeze(0), pad, mode=mode)[0] if isinstance(layer, nn.Conv2d) else F.pad(x, pad[:2], mode=mode)
    channels_in, channels_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    a_groups, g_groups = [], []
    for group in range(layer.groups):
        a_group, g_group = [], []
        for row in range(g.shape[1]):
            for col in range(g.shape[2]):
                entries = [
                    x[group * channels_in + c, row * stride[0] + i * dilation[0], col * stride[1] + j * dilation[1]]
                    for c in range(channels_in)
                    for i in range(kernel[0])
                    for j in range(kernel[1])
                ]
                vector = torch.stack(entries)
                a_group.append(torch.cat([vector, one]) if layer.bias is not None else vector)
                g_group.append(g[group * channels_out : (group + 1) * channels_out, row, col])
        a_groups.append(a_group)
        g_groups.append(g_group)
    return a_groups, g_groups


def kronecker_factors(
    model: nn.Module, layer: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """A = mean_{i,t} a aᵀ ``[groups, d, d]`` and G = mean_i sum_t g gᵀ ``[groups, o, o]`` under the expand setting."""
    xs, gs = layer_flow(model, layer, loss, inputs, targets)
    a_sum: list[Tensor] = []
    g_sum: list[Tensor] = []
    count = 0
    for index, (x, g) in enumerate(zip(xs, gs, strict=True)):
        a_groups, g_groups = positions(layer, x, g)
        a_now = [sum(torch.outer(a, a) for a in group) for group in a_groups]
        g_now = [sum(torch.outer(v, v) for v in group) for group in g_groups]
        a_sum = a_now if index == 0 else [s + n for s, n in zip(a_sum, a_now, strict=True)]
        g_sum = g_now if index == 0 else [s + n for s, n in zip(g_sum, g_now, strict=True)]
        count += len(a_groups[0])
    return torch.stack(a_sum) / count, torch.stack(g_sum) / len(xs)
