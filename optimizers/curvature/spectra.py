"""What a block's eigenvalues say while training: how many directions it curves, and how badly its inverse is posed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import linalg

#: Matrices up to this width are decomposed; of wider ones a Lanczos process of so many steps tells the spectrum.
NARROW, STEPS = 160, 16

#: What stands for fewer directions than this is an artefact of a process that has ended early.
NOTHING = 1e-6

#: What is said of each layer, where a method can say it: see ``LayerwiseOptimizer.layer_diagnostics``.
SCALARS = ("above_damping", "condition", "floored")


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a block F, and of what is inverted in its place.

    Attributes:
        values: of F.
        damping: lambda, of a shape that goes with ``values``.
        damped: of the damped matrix in the same directions; None: ``values + damping``.
        counts: for how many directions each stands; None: for one.
    """

    values: Tensor
    damping: Tensor | float
    damped: Tensor | None = None
    counts: Tensor | None = None

    def above_damping(self) -> Tensor:
        """Share of directions whose curvature is larger than lambda: where damping does not decide the step."""
        above = self.values > self.damping
        if self.counts is None:
            return above.sum().to(self.values.dtype) / above.numel()
        return (self.counts * above).sum() / self.counts.sum()

    def condition(self) -> Tensor:
        """Largest over smallest eigenvalue of the damped matrix."""
        damped = self.values + self.damping if self.damped is None else self.damped
        if self.counts is None:
            low, high = torch.aminmax(damped)
            return high / low
        there = self.counts > NOTHING
        low = torch.where(there, damped, torch.inf).amin()
        return torch.where(there, damped, -torch.inf).amax() / low


def spectrum_of(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of positive semi-definite matrices, and how many directions each stands for.

    Those of narrow matrices (``NARROW``) are exact and stand for one. Of wide ones, ``STEPS`` of a Lanczos process from
    a vector of random signs, the same every time, give the nodes and weights of a Gauss quadrature (Golub & Welsch,
    1969; Ubaru, Chen & Saad, 2017): its extreme nodes are near the extreme eigenvalues, and its weights, summed, count
    eigenvalues. Of K-FAC's factors in training that has told condition numbers, damped, to a fifth (never too large)
    and shares of directions to seven points.

    Args:
        matrices: ``[n, d, d]``.

    Returns:
        ``[n, k]`` each; the counts of a matrix sum to d.
    """
    n, d, _ = matrices.shape
    if d <= NARROW:
        values = linalg.eigvalsh(matrices).clamp(min=0)
        return values, torch.ones_like(values)
    generator = torch.Generator().manual_seed(d)
    signs = (torch.randint(0, 2, (1, d, 1), generator=generator) * 2 - 1).to(matrices)
    vector = (signs / d**0.5).expand(n, d, 1)
    tiny = torch.finfo(matrices.dtype).eps * matrices.diagonal(dim1=-2, dim2=-1).sum(-1).view(n, 1, 1)
    tiny = tiny.clamp(min=torch.finfo(matrices.dtype).tiny)
    basis, images = matrices.new_zeros(n, d, STEPS), matrices.new_zeros(n, d, STEPS)
    for step in range(STEPS):
        image = linalg.product(matrices, vector)
        basis[..., step : step + 1], images[..., step : step + 1] = vector, image
        known = basis[..., : step + 1]
        for _ in range(2):  # once leaves what rounding brings back
            image = torch.baddbmm(image, known, torch.bmm(known.mT, image), alpha=-1)
        # Of an invariant subspace rounding is left, in a vector far from unit length, which so counts for nothing.
        vector = image / torch.linalg.vector_norm(image, dim=1, keepdim=True).clamp(min=tiny)
    values, vectors = linalg.eigh(linalg.symmetrize(torch.bmm(basis.mT, images)))
    return values.clamp(min=0), d * vectors[:, 0].square()


def row(like: Tensor) -> Tensor:
    """An empty row of ``SCALARS``, in double precision where the device of ``like`` has it."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.zeros(len(SCALARS), dtype=dtype, device=like.device)


def numbers(spectrum: Spectrum | None, floored: Tensor | None, like: Tensor) -> Tensor:
    """One row of ``SCALARS``; NaN for what there is not.

    Args:
        spectrum: of the block.
        floored: share of its directions that are floored.
        like: for dtype and device.
    """
    nothing = like.new_full((), torch.nan)
    found = (None, None) if spectrum is None else (spectrum.above_damping(), spectrum.condition())
    return torch.stack([nothing if t is None else t.to(like).reshape(()) for t in (*found, floored)])


def told(pairs: Sequence[tuple[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Rows of ``SCALARS`` as plain numbers, without what is not finite: one wait for the device.

    Args:
        pairs: a layer's name and its row.
    """
    if not pairs:
        return {}
    table = torch.stack([row for _, row in pairs]).cpu()
    known = table.isfinite().tolist()
    return {
        name: {key: value for key, value, good in zip(SCALARS, row, there, strict=True) if good}
        for (name, _), row, there in zip(pairs, table.tolist(), known, strict=True)
    }
