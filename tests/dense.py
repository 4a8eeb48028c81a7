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


# --- models of any layout: who owns which row is told by the loss of single examples alone ---------------------------


class Uses:
    """What a pass does with each layer's weight: ``(x, y, first)`` a time, by the layer's name.

    ``x`` are the inputs, ``y`` the outputs with their graph, ``first`` the row of the weight that the first output
    belongs to, where a slice of the weight was used. Modules are seen by forward hooks; a model that uses a weight by
    itself tells by calling its attribute ``told(module, x, y)``, where it has one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, {}
        self.names = {module: name for name, module in model.named_modules()}

    def add(self, module: nn.Module, x: Tensor, y: Tensor, first: int = 0) -> None:
        self.found.setdefault(self.names[module], []).append((x.detach(), y, first))

    def run(self, *args: object, **kwargs: object) -> object:
        """The model's output; attention of torch is replaced by ``attend``."""

        def hook(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
            if y.requires_grad:
                self.add(module, args[0] if args else kwargs["input"], y)

        plain = (nn.Linear, nn.Conv1d, nn.Conv2d)
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self.names if isinstance(m, plain)]
        attention = [m for m in self.names if isinstance(m, nn.MultiheadAttention)]
        for module in attention:
            module.forward = lambda *a, module=module, **k: attend(self, module, *a, **k)
        self.model.told = self.add
        try:
            return self.model(*args, **kwargs)
        finally:
            del self.model.told
            for handle in handles:
                handle.remove()
            for module in attention:
                del module.forward


def attend(uses: Uses, module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, **ignored: object) -> tuple:
    """Attention by torch.nn's weights, without dropout and masks, in plain products."""
    dim, heads = module.embed_dim, module.num_heads
    weight, bias = module.in_proj_weight, module.in_proj_bias

    def project(x: Tensor, start: int, stop: int) -> Tensor:
        y = x @ weight[start:stop].T + bias[start:stop]
        uses.add(module, x, y, start)
        return y

    if q is k and k is v:
        parts = project(q, 0, 3 * dim).split(dim, -1)
    elif k is v:
        parts = (project(q, 0, dim), *project(k, dim, 3 * dim).split(dim, -1))
    else:
        parts = (project(q, 0, dim), project(k, dim, 2 * dim), project(v, 2 * dim, 3 * dim))
    batched = [p if module.batch_first else p.transpose(0, 1) for p in parts]
    split = [p.unflatten(-1, (heads, dim // heads)).transpose(1, 2) for p in batched]
    scores = (split[0] @ split[1].mT / (dim // heads) ** 0.5).softmax(-1)
    mixed = (scores @ split[2]).transpose(1, 2).flatten(2)
    return module.out_proj(mixed if module.batch_first else mixed.transpose(0, 1)), None


class LayerReference:
    """A layer's Fisher block and its approximations, of gradients that were sent through the model one by one.

    Attributes:
        rows: gradients of single draws (an example's sampled loss, or a column of an observation's root), ``[k, p]``;
            the block is ``rowsᵀ rows``. Affine layers in the order of their ``[d_out, d_in (+ 1)]`` matrix.
        A: mean over all uses and positions of ``a aᵀ``; None for elementwise layers.
        G: sum over draws, uses and positions of ``g gᵀ``; None likewise.
    """

    def __init__(self, rows: Tensor, a: Tensor | None, g: Tensor | None) -> None:
        self.rows, self.A, self.G = rows, a, g
        self.block = rows.T @ rows

    def rearranged(self) -> Tensor:
        """Z of the block: ``[columns², d_out²]``, so that ``Z(S (x) R) = vec(R) vec(S)ᵀ``."""
        return rearrange(self.block, len(self.G), len(self.A))

    def diagonal(self) -> Tensor:
        """The exact diagonal."""
        return self.block.diagonal().diag()

    def kronecker(self) -> Tensor:
        """K-FAC."""
        return torch.kron(self.G, self.A)

    def kronecker_diagonal(self) -> Tensor:
        """AdaFisher's."""
        return torch.kron(self.G.diagonal(), self.A.diagonal()).diag()

    def eigen_corrected(self) -> Tensor:
        """EKFAC: the block's own diagonal in the eigenbasis of K-FAC."""
        basis = torch.kron(torch.linalg.eigh(self.G)[1], torch.linalg.eigh(self.A)[1])
        return basis @ (basis.T @ self.block @ basis).diagonal().diag() @ basis.T

    def nearest(self, terms: int) -> Tensor:
        """The nearest sum of so many Kronecker products."""
        return nearest_kronecker_sum(self.rearranged(), terms)

    def corrected(self) -> Tensor:
        """K-FAC and the nearest Kronecker product to what it leaves."""
        rest = self.block - self.kronecker()
        return self.kronecker() + nearest_kronecker_sum(rearrange(rest, len(self.G), len(self.A)), 1)


def rearrange(block: Tensor, d_out: int, columns: int) -> Tensor:
    """Van Loan's rearrangement of a block over a row-major ``[d_out, columns]`` matrix."""
    return block.view(d_out, columns, d_out, columns).permute(1, 3, 0, 2).reshape(columns**2, d_out**2)


def vectors(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of an affine layer with a row a position: ``[n, d_in (+ 1)]`` and ``[n, d_out]``."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        flat = isinstance(layer, nn.Conv1d)
        sizes = ((layer.kernel_size, 1), (layer.dilation, 1), (layer.padding, 0), (layer.stride, 1))
        settings = [(lift, *size) if flat else size for size, lift in sizes]
        x = F.unfold(x.unsqueeze(2) if flat else x, *settings).transpose(1, 2)
        y = y.flatten(2).transpose(1, 2)
    a = x.reshape(-1, x.shape[-1])
    if getattr(layer, "bias", getattr(layer, "in_proj_bias", None)) is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
    return a, y.reshape(-1, y.shape[-1])


def hessian_of(loss: Loss, outputs: Tensor, target: Tensor) -> Tensor:
    """Hessian of one observation's loss by its outputs ``[features]``."""
    return torch.autograd.functional.hessian(lambda o: loss(o.unsqueeze(0), target.unsqueeze(0)), outputs.detach())


def draws(
    fisher: str, loss: Loss, outputs: Tensor, targets: Tensor, sampled: Tensor, owners: Tensor, examples: int
) -> list[Tensor]:
    """Gradients by the outputs ``[n, features]`` whose outer products the Fisher matrix of the outputs is the sum of.

    Args:
        fisher: ``empirical``: an example's own gradient of the loss, which averages over observations; ``sampled``: its
            gradient at other targets; ``exact``: an observation's columns of a root of its Hessian.
        loss: sum over observations of their losses.
        outputs: one observation a row.
        targets: of the loss.
        sampled: the other targets.
        owners: which example an observation belongs to.
        examples: how many there are.
    """
    leaf, n = outputs.detach().requires_grad_(), len(outputs)
    if fisher == "exact":
        found = []
        for index in range(n):
            values, basis = torch.linalg.eigh(hessian_of(loss, outputs[index], targets[index]))
            for value, column in zip(values.clamp(min=0), basis.T, strict=True):
                seed = torch.zeros_like(outputs)
                seed[index] = column * (value / n).sqrt()
                found.append(seed)
        return found
    (gradient,) = torch.autograd.grad(loss(leaf, sampled if fisher == "sampled" else targets), leaf)
    scale = n**-0.5 if fisher == "sampled" else examples**0.5 / n
    return [gradient * scale * (owners == example).unsqueeze(1) for example in range(examples)]


def layer_references(model: nn.Module, uses: Uses, outputs: Tensor, seeds: list[Tensor]) -> dict[str, LayerReference]:
    """What layers' curvature is, by their names, of what ``uses`` has seen and ``draws`` returned.

    Args:
        model: as it was run.
        uses: which ran it.
        outputs: the observations, ``[n, features]``, with their graph.
        seeds: gradients by them.
    """
    owners = {name: [p for p in m.parameters(recurse=False)] for name, m in model.named_modules()}
    owners = {name: own for name, own in owners.items() if own}
    params = [p for own in owners.values() for p in own]
    flat = [(name, *use) for name, found in uses.found.items() for use in found]
    rows: dict[str, list[Tensor]] = {name: [] for name in owners}
    inputs: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, x, y, _ in flat:
        a = vectors(modules[name], x, y)[0]
        inputs[name] = torch.cat([inputs[name], a]) if name in inputs else a
    for seed in seeds:
        wanted = [*params, *(y for _, _, y, _ in flat)]
        found = torch.autograd.grad(outputs, wanted, seed, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
        by_param = dict(zip(params, found, strict=False))
        for name, own in owners.items():
            parts = [by_param[p] for p in own]
            if name in inputs:
                parts = [torch.cat([parts[0].flatten(1), *(b.unsqueeze(1) for b in parts[1:])], 1)]
            rows[name].append(flatten(parts))
        for (name, x, _, first), g in zip(flat, found[len(params) :], strict=True):
            g = vectors(modules[name], x, g)[1]
            d_out = len(owners[name][0])
            wide = F.pad(g, (first, d_out - first - g.shape[1]))
            moments[name] = moments.get(name, torch.zeros(d_out, d_out)) + wide.T @ wide
    return {
        name: LayerReference(torch.stack(rows[name]), a if a is None else a.T @ a / len(a), moments.get(name))
        for name in owners
        for a in [inputs.get(name)]
    }
