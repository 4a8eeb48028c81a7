"""Dense float64 references, assembled by autograd and plain loops, of everything the optimizers approximate.

Nothing here imports from ``optimizers``: the oracle must not share code with what it judges. Small nets only.
"""

from __future__ import annotations

import math
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
    if isinstance(layer, nn.ConvTranspose2d):
        return transposed_positions(layer, x, g)
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


def transposed_positions(
    layer: nn.ConvTranspose2d, x: Tensor, g: Tensor
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """``positions`` of a transposed convolution: which input pixel each kernel tap carries to output (row, col)."""
    channels_in, channels_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    a_groups, g_groups = [], []
    for group in range(layer.groups):
        a_group, g_group = [], []
        for row in range(g.shape[1]):
            for col in range(g.shape[2]):
                entries = []
                for c in range(channels_in):
                    for i in range(layer.kernel_size[0]):
                        for j in range(layer.kernel_size[1]):
                            r = row + layer.padding[0] - i * layer.dilation[0]
                            s = col + layer.padding[1] - j * layer.dilation[1]
                            inside = r % layer.stride[0] == 0 and s % layer.stride[1] == 0
                            r, s = r // layer.stride[0], s // layer.stride[1]
                            inside = inside and 0 <= r < x.shape[1] and 0 <= s < x.shape[2]
                            entries.append(x[group * channels_in + c, r, s] if inside else x.new_zeros(()))
                vector = torch.stack(entries)
                a_group.append(torch.cat([vector, vector.new_ones(1)]) if layer.bias is not None else vector)
                g_group.append(g[group * channels_out : (group + 1) * channels_out, row, col])
        a_groups.append(a_group)
        g_groups.append(g_group)
    return a_groups, g_groups


def kronecker_factors(
    model: nn.Module, layer: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, sharing: str = "expand"
) -> tuple[Tensor, Tensor]:
    """A ``[groups, d, d]`` and G ``[groups, o, o]``: mean_{i,t} a aᵀ and mean_i sum_t g gᵀ under the expand setting,
    mean_i ā āᵀ and mean_i ḡ ḡᵀ with ā = mean_t a and ḡ = sum_t g under the reduce setting."""
    xs, gs = layer_flow(model, layer, loss, inputs, targets)
    a_sum: list[Tensor] = []
    g_sum: list[Tensor] = []
    count = 0
    for index, (x, g) in enumerate(zip(xs, gs, strict=True)):
        a_groups, g_groups = positions(layer, x, g)
        if sharing == "reduce":
            a_groups = [[torch.stack(group).mean(0)] for group in a_groups]
            g_groups = [[torch.stack(group).sum(0)] for group in g_groups]
        a_now = [sum(torch.outer(a, a) for a in group) for group in a_groups]
        g_now = [sum(torch.outer(v, v) for v in group) for group in g_groups]
        a_sum = a_now if index == 0 else [s + n for s, n in zip(a_sum, a_now, strict=True)]
        g_sum = g_now if index == 0 else [s + n for s, n in zip(g_sum, g_now, strict=True)]
        count += len(a_groups[0])
    return torch.stack(a_sum) / count, torch.stack(g_sum) / len(xs)


def layer_blocks(
    model: nn.Module, layer: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """A layer's Fisher block by group, two ways at once.

    Returns:
        The empirical Fisher ``mean_i vec(V_i) vec(V_i)ᵀ`` over [d_out, d_in (+ 1)] matrices, row-major, and their
        rearrangements Z(F) = mean_i sum_{t,t'} vec(a_t a_t'ᵀ) vec(g_t g_t'ᵀ)ᵀ, ``[d_in², d_out²]``.
    """
    xs, gs = layer_flow(model, layer, loss, inputs, targets)
    fishers: list[Tensor] = []
    rearranged: list[Tensor] = []
    for x, g in zip(xs, gs, strict=True):
        for group, (a_t, g_t) in enumerate(zip(*positions(layer, x, g), strict=True)):
            v = sum(torch.outer(v, u) for u, v in zip(a_t, g_t, strict=True)).flatten()
            z = sum(
                torch.outer(torch.outer(a, b).flatten(), torch.outer(p, q).flatten())
                for a, p in zip(a_t, g_t, strict=True)
                for b, q in zip(a_t, g_t, strict=True)
            )
            if group == len(fishers):
                fishers.append(torch.zeros(len(v), len(v)))
                rearranged.append(torch.zeros_like(z))
            fishers[group] += torch.outer(v, v) / len(xs)
            rearranged[group] += z / len(xs)
    return fishers, rearranged


def nearest_kronecker_sum(rearranged: Tensor, rank: int) -> Tensor:
    """sum_k S_k (x) R_k nearest to F, from the dense singular value decomposition of Z(F)."""
    u, sigma, vh = torch.linalg.svd(rearranged)
    d, o = math.isqrt(rearranged.shape[0]), math.isqrt(rearranged.shape[1])
    return sum(
        sigma[k] * torch.kron(vh[k].view(o, o), u[:, k].contiguous().view(d, d)) for k in range(min(rank, len(sigma)))
    )


def gauss_newton(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, params: list[Tensor]) -> Tensor:
    """Jᵀ (Hessian of the batch's loss by the outputs) J: for our likelihoods, the exact Fisher of the loss."""
    outputs = model(inputs)
    rows = [flatten(list(torch.autograd.grad(entry, params, retain_graph=True))) for entry in outputs.flatten()]
    jacobian = torch.stack(rows)
    curvature = torch.autograd.functional.hessian(lambda flat: loss(flat.view_as(outputs), targets), outputs.flatten())
    return jacobian.T @ curvature @ jacobian


def as_matrix_order(layer: nn.Module) -> Tensor:
    """Index that brings (weight, bias), flattened one after the other, to the row-major [d_out, d_in + 1] order."""
    weight = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    if isinstance(layer, nn.ConvTranspose2d):
        per_group = layer.in_channels // layer.groups
        weight = weight.view(layer.groups, per_group, layer.out_channels // layer.groups, -1).transpose(1, 2)
        weight = weight.reshape(layer.out_channels, -1)
    weight = weight.reshape(weight.shape[0], -1)
    if layer.bias is None:
        return weight.flatten()
    bias = layer.weight.numel() + torch.arange(len(layer.bias))
    return torch.cat([weight, bias.unsqueeze(1)], dim=1).flatten()


def learned_inverse(factors: dict[str, Tensor]) -> Tensor:
    """FishLeg's Q of a layer from its factors: diag(vec A) (RᵀR (x) LLᵀ) diag(vec A) by group, an absent L or R being
    the identity, or diag(D)². Differentiable."""
    if "D" in factors:
        return torch.diag(factors["D"] ** 2)
    blocks = []
    for group, a in enumerate(factors["A"]):
        right = factors["R"][group] if "R" in factors else torch.eye(a.shape[0])
        left = factors["L"][group] if "L" in factors else torch.eye(a.shape[1])
        outer = torch.diag(a.flatten())
        blocks.append(outer @ torch.kron(right.T @ right, left @ left.T) @ outer)
    return torch.block_diag(*blocks)


def auxiliary_loss(factors: dict[str, Tensor], fisher: Tensor, damping: Tensor, u: Tensor) -> Tensor:
    """½ vᵀ(F + diag(damping))v - uᵀv at v = Q u, as a function of Q's factors."""
    v = learned_inverse(factors) @ u
    return 0.5 * v @ (fisher + torch.diag(damping)) @ v - u @ v


def damped_solve(fisher: Tensor, gradient: Tensor, damping: float | Tensor) -> Tensor:
    """(F + diag(damping))^-1 g."""
    return torch.linalg.solve(fisher + damping * torch.eye(len(fisher)), gradient)


def two_level_direction(
    fisher: Tensor, damping: float, gradient: Tensor, fine: Tensor, coarse: Tensor, additive: bool = False
) -> Tensor:
    """d0 + R0ᵀ (R0 (F + damping I) R0ᵀ)^-1 R0 r, r the residual of d0 or, if additive, the gradient. R0 by rows."""
    damped = fisher + damping * torch.eye(len(fisher))
    right = gradient if additive else gradient - damped @ fine
    return fine + coarse.T @ (torch.linalg.pinv(coarse @ damped @ coarse.T, hermitian=True) @ (coarse @ right))
