"""Estimates of a Hessian's diagonal from products with random signs, and their averages over blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import real


def rademacher(tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Independent ±1 entries in the shapes of ``tensors``: a pure function of ``seed``, whatever the rank.

    Every bit of a random byte string is a sign, looked up eight at a time: one draw an entry would cost more than the
    update itself.
    """
    device = tensors[0].device
    total = sum(t.numel() for t in tensors)
    generator = torch.Generator(device=device).manual_seed(seed)
    words = torch.randint(-(2**63), 2**63 - 1, ((total + 63) // 64,), generator=generator, device=device)
    bits = (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)) & 1
    signs = F.embedding(words.view(torch.uint8).int(), (2 * bits - 1).to(tensors[0].dtype)).flatten()
    pieces = map(Tensor.view_as, signs[:total].split([t.numel() for t in tensors]), tensors)
    return [piece if piece.dtype is t.dtype else piece.to(t.dtype) for piece, t in zip(pieces, tensors, strict=True)]


def hutchinson(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    seed: int,
    samples: int = 1,
    retain_graph: bool = False,
    signed: bool = True,
) -> list[Tensor | None]:
    """``mean_s z_s * (H z_s)``, whose expectation is the Hessian's diagonal: signed, one tensor a parameter.

    Args:
        gradients: gradients of a scalar by ``params``, with a graph (``create_graph=True``); it is freed.
        params: the parameters.
        seed: of the probes; the same seed gives the same probes on every rank and in every micro-batch.
        samples: how many probes are averaged.
        retain_graph: keep the graph for another backward pass.
        signed: false: of a single sample ``H z``, where the magnitude alone is asked for: a pass less.

    Returns:
        None for a parameter that the gradients do not depend on (its Hessian is zero). Complex parameters count as
        real ones of two channels, and so does their diagonal.
    """
    gradients, probed = real(gradients), real(params)
    curved = [g.requires_grad for g in gradients]
    roots = [g for g, c in zip(gradients, curved, strict=True) if c]
    result: list[Tensor | None] = [None] * len(params)
    if not roots:
        return result
    for sample in range(samples):
        probes = rademacher(probed, seed + sample)
        chosen = [z for z, c in zip(probes, curved, strict=True) if c]
        products = torch.autograd.grad(
            roots, params, grad_outputs=chosen, retain_graph=retain_graph or sample + 1 < samples, allow_unused=True
        )
        found: list[Tensor | None] = [None if hz is None else real([hz])[0] for hz in products]
        if samples == 1 and not signed:
            return found
        for i, (z, hz) in enumerate(zip(probes, found, strict=True)):
            if hz is not None:
                # Out of place: what autograd returns may be an expanded view, or shared.
                previous = result[i]
                result[i] = z * hz if previous is None else torch.addcmul(previous, z, hz)
    if samples > 1:
        result = [None if r is None else r / samples for r in result]
    return result


def block_mean(curvature: Tensor, block_size: int | None) -> Tensor:
    """``|D|`` averaged over the blocks of one parameter, as in the published implementations; size 1 where averaged.

    Three or more dimensions: over the kernel positions (dimensions 2 and up). Two dimensions: over blocks of
    ``block_size`` along each row (the last may be shorter), or not at all if it is None. One or none: not at all; the
    sign, which the square will take away, then stays.
    """
    if curvature.dim() >= 3:
        return curvature.abs().mean(dim=list(range(2, curvature.dim())), keepdim=True)
    if curvature.dim() == 2 and block_size is not None:
        means = [part.mean(1, keepdim=True) for part in curvature.abs().split(block_size, dim=1)]
        return torch.cat(means, dim=1)
    return curvature


def block_expand(means: Tensor, shape: torch.Size, block_size: int | None) -> Tensor:
    """Spread the result of ``block_mean`` over the blocks again: a view where that can be."""
    if means.shape == shape:
        return means
    if len(shape) == 2:
        assert block_size is not None
        return means.repeat_interleave(block_size, dim=1)[:, : shape[1]]
    return means.expand(shape)
