"""Kronecker products over an affine layer, and the damped solve of one.

With ``V_i = sum_t g_it a_itᵀ`` the gradient of example i's loss by the ``[d_out, d_in (+ 1)]`` parameter matrix, a
block is ``F = mean_i vec(V_i) vec(V_i)ᵀ``. Each approximation keeps another sum of Kronecker products ``G (x) A`` of
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import linalg
from ..approximations import Approximation, statistics_dtype
from ..layers import AffineLayer, Flow
from ..linalg import product as _product
from ..packing import Form
from ..spectra import Spectrum, spectrum_of
from .invertible import Invertible
from .options import Counts, Factors, Options

#: From this width on a processor keeps Cholesky factors: two triangular solves a step cost little more than a product
#: with the inverse, which itself costs several products.
WIDE = 4096

#: Operations of an eigendecomposition of a d x d matrix, in d^3, and of what goes over its entries, in d^2.
DECOMPOSED, PASSES = 9.0, 60.0


class Kronecker(Invertible, Approximation):
    """Kronecker products over an affine layer, of ``A [groups, columns, columns]`` and ``G [groups, d_out, d_out]``.

    A factor that is too wide (``max_factor_dim``) is its diagonal alone, ``[groups, columns]`` or ``[groups, d_out]``.
    """

    layer: AffineLayer

    def __init__(self, layer: AffineLayer, options: Options) -> None:
        super().__init__(layer)
        self.options = options
        limit = options.max_factor_dim or float("inf")
        self.dims = {"A": layer.columns, "G": layer.d_out}
        self.full = {key: dim <= limit for key, dim in self.dims.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        groups = self.layer.groups
        return {k: (groups, d, d) if self.full[k] else (groups, d) for k, d in self.dims.items()}

    def diagonal(self, factors: Factors) -> list[Tensor]:
        """See Approximation."""
        return self.from_matrix(torch.stack([block.diagonal() for block in self._blocks(factors)]).view(self._matrix))

    def to_dense(self) -> Tensor:
        """See Approximation."""
        return torch.block_diag(*self._blocks(self.factors))

    @property
    def _matrix(self) -> tuple[int, int, int]:
        return self.layer.groups, self.dims["G"], self.dims["A"]

    def _blocks(self, factors: Factors) -> list[Tensor]:
        """Dense Fisher blocks, one a group."""
        full = {k: v if v.dim() == 3 else torch.diag_embed(v) for k, v in factors.items()}
        return [torch.kron(g, a) for g, a in zip(full["G"], full["A"], strict=True)]

    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """See Invertible."""
        return self.layer.to_matrix(tensors[0], tensors[1] if len(tensors) > 1 else None)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See Invertible."""
        return self.layer.from_matrix(matrix)

    def _samples(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """What the layer saw as ``a [groups, batch, shared, columns]`` and ``g [groups, batch, shared, d_out]``."""
        a, g = flow.inputs(), flow.gradients()
        if self.options.sharing == "reduce":
            a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
        return a, g

    @property
    def _dtype(self) -> torch.dtype:
        return statistics_dtype(self.layer.parameters[0])

    # -- the solve of one damped product, which most approximations share ---------------------------------------------

    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """See Invertible."""
        if self.options.damping_mode == "tikhonov":
            values = {}
            cache = {}
            for key in ("A", "G"):
                if self.full[key]:
                    values[key], cache[f"U_{key}"] = linalg.eigh(factors[key])
                else:
                    values[key] = factors[key]
            product = values["G"].clamp(min=0).unsqueeze(-1) * values["A"].clamp(min=0).unsqueeze(-2)
            return self._in_solve_dtype(cache | {"W": 1 / (product + damping.view(-1, 1, 1))})
        shares = self._shares(factors, damping)
        cache = {}
        for key in ("A", "G"):
            if not self.full[key]:
                cache[key] = 1 / (factors[key] + shares[key].unsqueeze(-1))
                continue
            lower, repaired = linalg.cholesky(factors[key], shares[key])
            counts.repaired += repaired
            cache |= self._inverse(key, lower)
        return self._in_solve_dtype(cache)

    def _inverse(self, key: str, lower: Tensor) -> Factors:
        """What ``_sandwich`` takes of a full factor with this Cholesky factor."""
        return {f"L_{key}": lower} if self._solves_triangles(key) else {key: torch.cholesky_inverse(lower)}

    def _solves_triangles(self, key: str) -> bool:
        """Whether a full factor is kept as its Cholesky factor rather than as its inverse."""
        on_processor = self.layer.parameters[0].device.type == "cpu"  # elsewhere triangular solves are slow
        return self.full[key] and self.dims[key] >= WIDE and self.options.solve_dtype is None and on_processor

    def _shares(self, factors: Factors, damping: Tensor) -> dict[str, Tensor]:
        """How the factored damping falls on A and G: ``pi sqrt(lambda)`` and ``sqrt(lambda) / pi``."""
        root = damping.sqrt()
        if not self.options.pi:
            return {"A": root, "G": root}
        pi = (self._mean(factors, "A") / self._mean(factors, "G")).sqrt()
        pi = torch.where(pi.isfinite() & (pi > 0), pi, torch.ones_like(pi))  # zero statistics have no scale
        return {"A": root * pi, "G": root / pi}

    def _in_solve_dtype(self, cache: Factors) -> Factors:
        dtype = self.options.solve_dtype
        return cache if dtype is None else {k: v if k[0] == "W" else v.to(dtype) for k, v in cache.items()}

    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """See Invertible."""
        if "W" in cache:
            rotated = self._rotate(matrix, cache.get("U_A"), cache.get("U_G"), forward=True)
            return self._rotate(rotated * cache["W"], cache.get("U_A"), cache.get("U_G"), forward=False).to(matrix)
        return self._sandwich(cache, matrix).to(matrix.dtype)

    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """See Invertible."""
        matrix = matrix.to(self._dtype)
        if "W" in cache:
            rotated = self._rotate(matrix, cache.get("U_A"), cache.get("U_G"), forward=True)
            return (rotated.square() / cache["W"]).flatten(1).sum(1)
        shares = self._shares(factors, damping)
        left, right = (self._times(factors[key], matrix, key, shares[key]) for key in ("G", "A"))
        return (left * right).flatten(1).sum(1)

    @staticmethod
    def _times(factor: Tensor, matrix: Tensor, key: str, damping: Tensor) -> Tensor:
        """``(G + damping) V`` or ``V (A + damping)``."""
        shift = damping.view(-1, 1, 1) * matrix
        if factor.dim() == 2:  # a diagonal
            return factor.unsqueeze(-1 if key == "G" else -2) * matrix + shift
        return (_product(factor, matrix) if key == "G" else _product(matrix, factor)) + shift

    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """See Invertible."""
        return self._mean(factors, "A") * self._mean(factors, "G")

    def spectrum(self, factors: Factors, cache: Factors, damping: Tensor) -> Spectrum | None:
        """See Approximation. Of wide factors that are not decomposed, a quadrature: see ``spectra``."""
        shift = damping.view(-1, 1, 1)
        if "W" in cache:  # which was made of the eigenvalues
            return Spectrum(1 / cache["W"] - shift, shift)
        found = {}
        for key in ("A", "G"):
            factor = factors[key]
            found[key] = spectrum_of(factor) if factor.dim() == 3 else (factor, torch.ones_like(factor))
        shares = self._shares(factors, damping)

        def outer(g: Tensor, a: Tensor) -> Tensor:
            return g.unsqueeze(-1) * a.unsqueeze(-2)

        (a, many_a), (g, many_g) = found["A"], found["G"]
        damped = outer(g + shares["G"].unsqueeze(-1), a + shares["A"].unsqueeze(-1))
        return Spectrum(outer(g, a), shift, damped, outer(many_g, many_a))

    def _mean(self, factors: Factors, key: str) -> Tensor:
        """Mean eigenvalue of a factor, ``[n]``."""
        factor = factors[key]
        full = factor.dim() == 3
        return factor.diagonal(dim1=-2, dim2=-1).mean(-1) if full else factor.mean(-1)

    def _sandwich(self, cache: Factors, matrix: Tensor) -> Tensor:
        """``G^-1 V A^-1``, in the dtype of the inverses."""
        result = matrix.to(next(t.dtype for key, t in cache.items() if key in ("A", "G", "L_A", "L_G")))
        for key, left in (("G", True), ("A", False)):
            if (lower := cache.get(f"L_{key}")) is not None:
                first, second = (lower, lower.mT) if left else (lower.mT, lower)
                result = torch.linalg.solve_triangular(first, result, upper=not left, left=left)
                result = torch.linalg.solve_triangular(second, result, upper=left, left=left)
            elif not self.full[key]:
                result = cache[key].unsqueeze(-1 if left else -2) * result
            else:
                result = _product(cache[key], result) if left else _product(result, cache[key])
        return result

    @staticmethod
    def _rotate(matrix: Tensor, right: Tensor | None, left: Tensor | None, forward: bool) -> Tensor:
        """Into the eigenbasis, ``U_Gᵀ V U_A``, or back, ``U_G V U_Aᵀ``."""
        if left is not None:
            matrix = _product(left.mT if forward else left, matrix.to(left.dtype))
        if right is not None:
            matrix = _product(matrix.to(right.dtype), right if forward else right.mT)
        return matrix

    def form(self, key: str) -> Form:
        """See Approximation."""
        if key.startswith("L_"):
            return "lower"
        return "symmetric" if key in ("A", "G") and self.full[key] else "full"

    def cost(self) -> float:
        """See Approximation."""
        return self.layer.groups * sum(self._factor_cost(key) for key in self.dims if self.full[key])

    def _factor_cost(self, key: str) -> float:
        """Operations that invert a full factor: a decomposition, or a Cholesky factor and the inverse made of it."""
        d = self.dims[key]
        if self.options.damping_mode == "tikhonov":
            return DECOMPOSED * d**3 + PASSES * d * d
        return (1 / 3 if self._solves_triangles(key) else 1) * d**3 + PASSES * d * d

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        dtype = self.options.solve_dtype or self._dtype
        square = {k: (shape, dtype) for k, shape in self.shapes().items() if k in ("A", "G")}
        if self.options.damping_mode == "factored":
            return {f"L_{k}" if self._solves_triangles(k) else k: v for k, v in square.items()}
        return {f"U_{k}": v for k, v in square.items() if self.full[k]} | {"W": (self._matrix, self._dtype)}
