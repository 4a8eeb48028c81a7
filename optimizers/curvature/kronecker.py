"""Kronecker approximations of a layer's Fisher block: how they are estimated, averaged, damped and inverted.

With ``V_i = sum_t g_it a_itᵀ`` the gradient of example i's loss by the ``[d_out, d_in (+ 1)]`` parameter matrix, a
block is ``F = mean_i vec(V_i) vec(V_i)ᵀ``. Each class keeps another sum of Kronecker products ``G (x) A`` of it.
Solves work on *stacks*: blocks of equal shapes lie side by side in one leading dimension ``n`` (and so do the groups of
a grouped convolution), whatever the number of layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import communication, linalg
from .approximations import Approximation, Diagonal, statistics_dtype
from .layers import AffineLayer, Flow, Layer
from .linalg import product as _product
from .rearranged import Pairs, Terms, compress_many, leading_pairs_many, location_mask

Factors = dict[str, Tensor]

#: From this width on a processor keeps Cholesky factors: two triangular solves a step cost little more than a product
#: with the inverse, which itself costs several products.
WIDE = 4096

#: A basis is made anew where more than this share of ``|M Q|²`` has come off the diagonal of ``Qᵀ M Q``.
DRIFTED = 0.5


@dataclass(frozen=True)
class Options:
    """What all blocks of an optimizer share.

    Attributes:
        damping_mode: ``factored``: ``(G + sqrt(lambda) / pi I) (x) (A + pi sqrt(lambda) I)``; ``tikhonov``:
            ``G (x) A + lambda I``.
        pi: split the factored damping by the factors' mean eigenvalues (Martens & Grosse 2015, 6.3); else evenly.
        sharing: positions of a shared weight are ``expand``: examples of their own, or ``reduce``: averaged (inputs)
            and summed (gradients) first (Eschenhagen et al. 2023).
        max_factor_dim: a factor wider than this is kept as its diagonal.
        solve_dtype: of the products with the inverse; None: the statistics'.
        solver: how leading pairs are found, see ``rearranged``.
        radius: farthest positions, along either axis, whose products count; None: all pairs.
        rank: eigenvalues of the second term that its inverse keeps on either side, the largest, or eigenvectors that a
            wide factor's basis has; None: all.
        floor: least value of ``1 + s t`` in a two-term inverse.
        basis: eigenbases follow their factors by one step of orthogonal iteration a refresh, or are made anew.
    """

    damping_mode: Literal["factored", "tikhonov"] = "factored"
    pi: bool = True
    sharing: Literal["expand", "reduce"] = "expand"
    max_factor_dim: int | None = None
    solve_dtype: torch.dtype | None = None
    solver: Literal["gram", "power", "lanczos"] = "gram"
    radius: int | None = None
    rank: int | None = None
    floor: float = 0.1
    basis: Literal["iterate", "eigh"] = "eigh"


@dataclass
class Counts:
    """What went wrong and was mended: matrices repaired, eigenvalues floored (a tensor: reading it would wait)."""

    repaired: int = 0
    floored: Tensor | int = 0


class Invertible:
    """What a block offers on top of an Approximation: an average over steps and a damped solve on stacks."""

    factors: Factors
    options: Options

    #: Whether the inverse follows every update of the factors rather than every refresh.
    inverts_on_update: bool = False

    @classmethod
    def average_all(cls, blocks: Sequence[Invertible], new: Sequence[Factors], keep: Sequence[float]) -> None:
        """``factors = keep * factors + (1 - keep) * new`` of several blocks of this kind, as the approximation has it.

        Args:
            blocks: to be changed.
            new: this step's factors, one a block.
            keep: weight of the past, one a block.
        """
        for block, estimate, share in zip(blocks, new, keep, strict=True):
            for key, value in estimate.items():
                if key in block.factors:
                    block.factors[key].lerp_(value, 1 - share)
                else:
                    block.factors[key] = value

    def rebase(self) -> int:
        """On a refresh, before inverting: renew what the factors are expressed in. Returns how many were repaired."""
        return 0

    def moments(self, gradient_scale: float, examples: int) -> Factors:
        """Factors that could only be estimated once the basis was known; arguments as of ``estimate``."""
        return {}

    @abstractmethod
    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """What ``solve`` needs.

        Args:
            factors: stacked.
            damping: one a stacked matrix ``[n]``.
            counts: where repairs are counted.
            last: what the last refresh returned for the same blocks, for iterations to start from.
        """

    @abstractmethod
    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """The damped inverse times a stacked gradient ``[n, d_out, columns]``, in the gradient's shape and dtype."""

    @abstractmethod
    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """``xᵀ (F + damping) x`` of a stacked ``x [n, d_out, columns]``: ``[n]``.

        Args:
            factors: stacked, of which the cache was made.
            cache: see ``invert``.
            damping: as of ``invert``.
            matrix: x.
        """

    @abstractmethod
    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """Of each stacked matrix's F, ``[n]``."""

    @abstractmethod
    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the cache of this one block."""

    @abstractmethod
    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the layer's parameters, as this block's share of a stack."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of ``to_matrix``."""


class ExactDiagonal(Invertible, Diagonal):
    """The exact Fisher diagonal of norms and Embedding, damped by Tikhonov."""

    def __init__(self, layer: Layer, options: Options) -> None:
        super().__init__(layer)
        self.options = options

    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """See Invertible."""
        return {"W": 1 / (factors["D"] + damping.unsqueeze(-1))}

    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """See Invertible."""
        return cache["W"].to(matrix.dtype) * matrix

    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """See Invertible."""
        return (matrix.square() / cache["W"]).sum(1)

    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """See Invertible."""
        return factors["D"].mean(1)

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        return {"W": (self.shapes()["D"], statistics_dtype(self.layer.parameters[0]))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        return {"D": (1, *super().shapes()["D"])}

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        """See Approximation."""
        return {"D": super().estimate(gradient_scale, examples)["D"].unsqueeze(0)}

    def diagonal(self, factors: Factors) -> list[Tensor]:
        """See Approximation."""
        return super().diagonal({"D": factors["D"][0]})

    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """See Invertible."""
        return torch.cat([t.reshape(1, -1) for t in tensors], dim=1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See Invertible."""
        return super().diagonal({"D": matrix[0]})


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

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        dtype = self.options.solve_dtype or self._dtype
        square = {k: (shape, dtype) for k, shape in self.shapes().items() if k in ("A", "G")}
        if self.options.damping_mode == "factored":
            return {f"L_{k}" if self._solves_triangles(k) else k: v for k, v in square.items()}
        return {f"U_{k}": v for k, v in square.items() if self.full[k]} | {"W": (self._matrix, self._dtype)}


class KroneckerFactors(Kronecker):
    """K-FAC (Martens & Grosse 2015; Grosse & Martens 2016): ``A = mean_{i,t} a aᵀ``, ``G = mean_i sum_t g gᵀ``."""

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        expand = self.options.sharing == "expand"
        if expand and not self.full["A"]:  # which needs no patches
            a_sum, count = flow.input_square_sums()
        else:
            a = flow.inputs()
            a = a.flatten(1, 2) if expand else a.mean(2)
            a_sum, count = self._second_moments("A", a), a.shape[1]
        if expand and not self.full["G"]:
            g_sum = flow.gradient_square_sums()
        else:
            g = flow.gradients()
            g_sum = self._second_moments("G", g.flatten(1, 2) if expand else g.sum(2))
        return [("A", a_sum), ("G", g_sum), ("count", a_sum.new_tensor(float(count)))]

    def _second_moments(self, key: str, rows: Tensor) -> Tensor:
        """``sum_i rows_i rows_iᵀ`` of ``[groups, n, d]``, or its diagonal."""
        return _product(rows.mT, rows) if self.full[key] else rows.square().sum(1)

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        """See Approximation."""
        return {  # the sums are this step's alone
            "A": self._sums["A"].div_(self._sums["count"]),
            "G": self._sums["G"].mul_(gradient_scale**2 / examples),
        }


class EigenFactors(KroneckerFactors):
    """EKFAC (George et al. 2018): K-FAC's eigenbases, and in them the exact second moments ``S`` of the gradient.

    ``F ~ (U_G (x) U_A) diag(S) (U_G (x) U_A)ᵀ`` with ``S = mean_i (U_Gᵀ V_i U_A)²``, which no other diagonal betters in
    Frobenius norm, whatever the orthogonal bases. Theirs are those of the eigenvectors, or what one step of orthogonal
    iteration a refresh has made of earlier ones; a factor more than twice as wide as ``rank`` has the eigenvectors of
    its ``rank`` largest eigenvalues and some completion of these. When a refresh moves the basis, the average S moves
    along: the new diagonal of the old approximation is ``(P_G∘P_G) S (P_A∘P_A)ᵀ`` with ``P`` the products of old and
    new bases.

    Attributes:
        decompositions: how often a factor was decomposed in full.
    """

    inverts_on_update = True

    def __init__(self, layer: AffineLayer, options: Options) -> None:
        super().__init__(layer, options)
        self._kept: list[Flow] = []
        self.decompositions = 0
        kept = options.rank
        self._ranks = {key: dim if kept is None or 2 * kept >= dim else kept for key, dim in self.dims.items()}

    def accumulate(self, flow: Flow) -> None:
        """See Approximation."""
        super().accumulate(flow)
        self._kept.append(flow)

    def reset(self) -> None:
        """See Approximation."""
        super().reset()
        self._kept.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        shapes = super().shapes()
        bases = {}
        for key, dim in self.dims.items():
            if self.full[key]:
                width = dim if self._ranks[key] == dim else 2 * self._ranks[key]
                bases[f"U_{key}"] = (self.layer.groups, dim, width)
        return shapes | bases | {"S": self._matrix}

    def zeros(self) -> Factors:
        """See Approximation."""
        return {key: value for key, value in super().zeros().items() if key in ("A", "G")}

    def rebase(self) -> int:
        """See Invertible."""
        for key in ("A", "G"):
            if not self.full[key]:
                continue
            old = self.factors.get(f"U_{key}")
            new = self._renewed(key, old)
            if not bool(new.isfinite().all()):
                return 1  # the old basis will do
            self.factors[f"U_{key}"] = new
            if old is not None and "S" in self.factors:
                mixing = linalg.overlaps(new, old).square_()
                s = self.factors["S"]
                self.factors["S"] = _product(mixing, s) if key == "G" else _product(s, mixing.mT)
        return 0

    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """See Invertible."""
        return factors["S"].mean((1, 2))

    def _renewed(self, key: str, old: Tensor | None) -> Tensor:
        """The basis that follows the last one, or, where there is none or it has lost its factor, a fresh one."""
        factor = self.factors[key]
        if old is not None and self.options.basis == "iterate":
            new, off = linalg.iterated(factor, old)
            if bool((off < DRIFTED).all() & new.isfinite().all()):
                return new
        self.decompositions += 1
        return linalg.eigenbasis(factor, self._ranks[key])

    def basis(self, key: str) -> Tensor:
        """U_A or U_G as a matrix ``[groups, d, d]``."""
        if (basis := self.factors.get(f"U_{key}")) is not None:
            return linalg.as_matrix(basis).contiguous()  # what torch.kron asks of one of its two
        return torch.eye(self.dims[key]).to(self.factors["S"]).expand(self.layer.groups, -1, -1)

    def moments(self, gradient_scale: float, examples: int) -> Factors:
        """See Invertible: this step's S, in the present basis."""
        if any(self.full[key] and f"U_{key}" not in self.factors for key in self.full):
            return {}
        total = torch.zeros(self._matrix, dtype=self._dtype, device=self.layer.parameters[0].device)
        for flow in self._kept:
            a, g = (self._in_basis(key, t) for key, t in zip(("A", "G"), self._samples(flow), strict=True))
            if a.shape[2] == 1:
                total += _product(g.squeeze(2).square().mT, a.squeeze(2).square())
            else:
                for some_a, some_g in zip(a.split(8, dim=1), g.split(8, dim=1), strict=True):
                    total += (some_g.mT @ some_a).square().sum(1)
        return {"S": total * (gradient_scale**2 / examples)}

    def _in_basis(self, key: str, rows: Tensor) -> Tensor:
        """``[groups, batch, shared, d]`` in the present basis."""
        if not self.full[key]:
            return rows
        return linalg.turned(rows.flatten(1, 2), self.factors[f"U_{key}"]).reshape(rows.shape)

    def _blocks(self, factors: Factors) -> list[Tensor]:
        dense = []
        for u_g, u_a, s in zip(self.basis("G"), self.basis("A"), factors["S"], strict=True):
            basis = torch.kron(u_g, u_a)
            dense.append((basis * s.flatten()) @ basis.mT)
        return dense

    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """See Invertible. The damping is Tikhonov's: S is a diagonal."""
        bases = self._in_solve_dtype({k: v for k, v in factors.items() if k.startswith("U_")})
        return bases | {"W": 1 / (factors["S"] + damping.view(-1, 1, 1))}

    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """See Invertible."""
        rotated = self._turned(cache, matrix, back=False)
        return self._turned(cache, rotated * cache["W"], back=True).to(matrix.dtype)

    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """See Invertible."""
        rotated = self._turned(cache, matrix.to(self._dtype), back=False)
        return (rotated.square() / cache["W"]).flatten(1).sum(1)

    @staticmethod
    def _turned(cache: Factors, matrix: Tensor, back: bool) -> Tensor:
        """A stacked gradient in the bases, or back from them."""
        for key, left in (("G", True), ("A", False)):
            if (basis := cache.get(f"U_{key}")) is not None:
                matrix = linalg.turned(matrix.to(basis.dtype), basis, left=left, back=back)
        return matrix

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        moments: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"W": (self._matrix, self._dtype)}
        dtype = self.options.solve_dtype
        if dtype is None:  # the bases serve as they are
            return moments
        return moments | {k: (shape, dtype) for k, shape in self.shapes().items() if k.startswith("U_")}


class KroneckerPairs(Kronecker):
    """The best sum of ``terms`` Kronecker products in Frobenius norm (Koroko et al. 2022): KPSVD, Deflation, Lanczos.

    Factors are ``A, G`` of the first pair and ``C, D`` of the second: ``F ~ G (x) A + D (x) C``. Averages over steps
    are of the sums themselves, brought back to as many terms: averaging factors one by one would be neither linear nor
    blind to the signs of a pair.
    """

    gathers = True
    terms = 2
    corrected = False

    def __init__(self, layer: AffineLayer, options: Options) -> None:
        super().__init__(layer, options)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._grid: tuple[int, int] | None = (1, 1)  # None: of several calls, which lie on no grid together
        self._shared = True  # until a pass has shown otherwise

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Names of the pairs' factors: over inputs, over output gradients."""
        return [("A", "G"), ("C", "D")][: self.terms]

    def accumulate(self, flow: Flow) -> None:
        """See Approximation."""
        self._kept.append(self._samples(flow))
        self._grid = (1, 1) if self.options.sharing == "reduce" else flow.grid()
        self._shared = self._grid != (1, 1)

    @property
    def observed(self) -> bool:
        """See Approximation."""
        return bool(self._kept)

    def reset(self) -> None:
        """See Approximation."""
        self._kept.clear()

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        raise NotImplementedError("pairs are fitted to samples, which no sum stands for")

    @classmethod
    def estimate_all(
        cls, blocks: Sequence[Approximation], gradient_scale: float, examples: int
    ) -> dict[str, dict[str, Tensor]]:
        """See Approximation. All layers in one fit, over the samples of all ranks."""
        assert all(isinstance(block, KroneckerPairs) for block in blocks)
        members: list[KroneckerPairs] = list(blocks)  # type: ignore[arg-type]
        samples = [block._gathered(gradient_scale, examples) for block in members]
        options = members[0].options
        masks = [
            None
            if options.radius is None or block._grid is None
            else location_mask(*block._grid, options.radius).to(a.device)
            for block, (a, _) in zip(members, samples, strict=True)
        ]
        starts = [block.factors.get("G") for block in members]
        fits = leading_pairs_many(
            samples,
            cls.terms - cls.corrected,
            solver=options.solver,
            corrected=cls.corrected,
            masks=masks,
            starts=starts,
        )
        return {
            block.layer.name: block._named(pairs, a, g)
            for block, pairs, (a, g) in zip(members, fits, samples, strict=True)
        }

    def _gathered(self, gradient_scale: float, examples: int) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of this step's examples on all ranks; F is their mean."""
        if self._kept:
            a = torch.cat([a for a, _ in self._kept], dim=1)
            g = torch.cat([g for _, g in self._kept], dim=1) * gradient_scale
            g = g if g.shape[1] == examples else g * (g.shape[1] / examples) ** 0.5
        else:
            weight = self.layer.parameters[0]
            a = torch.zeros(self.layer.groups, 0, 1, self.layer.columns, dtype=self._dtype, device=weight.device)
            g = torch.zeros(self.layer.groups, 0, 1, self.layer.d_out, dtype=self._dtype, device=weight.device)
        self._kept.clear()
        a, g = communication.gather([a, g])
        return a, g

    def _named(self, pairs: Pairs, a: Tensor, g: Tensor) -> Factors:
        return {
            key: t for names, pair in zip(self.keys, pairs, strict=True) for key, t in zip(names, pair, strict=True)
        }

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        """See Approximation."""
        return self.estimate_all([self], gradient_scale, examples)[self.layer.name]

    @classmethod
    def average_all(cls, blocks: Sequence[Invertible], new: Sequence[Factors], keep: Sequence[float]) -> None:
        """See Invertible. The averages of all layers are recompressed in one go."""
        averaged: list[tuple[KroneckerPairs, Terms]] = []
        for block, estimate, share in zip(blocks, new, keep, strict=True):
            assert isinstance(block, KroneckerPairs)
            if block.factors and share > 0:
                averaged.append((block, block._averaged_terms(estimate, share)))
            else:
                block.factors = estimate
        for (block, terms), pairs in zip(
            averaged, compress_many([terms for _, terms in averaged], cls.terms - cls.corrected), strict=True
        ):
            block.factors = block._recompressed(pairs, terms)

    def _averaged_terms(self, new: Factors, keep: float) -> Terms:
        """Lefts, rights and weights of ``keep * factors + (1 - keep) * new``."""
        both = ((self.factors, keep), (new, 1 - keep))
        lefts = [factors[a] for factors, _ in both for a, _ in self.keys]
        rights = [factors[g] for factors, _ in both for _, g in self.keys]
        return lefts, rights, [weight for _, weight in both for _ in self.keys]

    def _recompressed(self, pairs: Pairs, terms: Terms) -> Factors:
        return self._named(pairs, terms[0][0], terms[1][0])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        shapes = super().shapes()
        return shapes if self.terms == 1 else shapes | {"C": shapes["A"], "D": shapes["G"]}

    def _blocks(self, factors: Factors) -> list[Tensor]:
        terms = [
            torch.stack([torch.kron(right, left) for right, left in zip(factors[g], factors[a], strict=True)])
            for a, g in self.keys
        ]
        return list(torch.stack(terms).sum(0))

    # -- the two-term inverse ------------------------------------------------------------------------------------------

    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """See Invertible.

        With ``A_d = A + pi sqrt(lambda) I = L_A L_Aᵀ``, ``M_A = L_A^-1 C L_A^-ᵀ = Q_A diag(s) Q_Aᵀ`` and
        ``K_A = L_A^-ᵀ Q_A``, and the same with t for D and G:
        ``(G_d (x) A_d + D (x) C)^-1 = (K_G (x) K_A) diag(1 / (1 + t s)) (K_G (x) K_A)ᵀ``. The second term is
        indefinite, so ``1 + t s`` is floored, signs kept.

        Where C and D are antisymmetric, ``X = M_G (x) M_A`` still has a symmetric square, with eigenvalues
        ``(t s)²``, and ``1 / (1 + X)`` is an even function of X plus X times another: two diagonals and one more
        product on either side.

        With ``rank``, wide layers keep the eigenvalues of largest magnitude alone, found by one step of subspace
        iteration from the last refresh's. What they do for the inverse is then a correction of low rank to
        ``G_d^-1 (x) A_d^-1``.
        """
        if self.terms == 1:
            return super().invert(factors, damping, counts)
        shares = self._shares(factors, damping)
        twisted = self._twisted(factors["C"])
        cache: Factors = {}
        values, odd = {}, {}
        for first, second in (("A", "C"), ("G", "D")):
            lower, repaired = linalg.cholesky(factors[first], shares[first])
            counts.repaired += repaired
            if self._truncated:
                cache |= self._inverse(first, lower)
                start = None if last is None else last[f"K_{first}"].to(lower.dtype)
                found = linalg.leading_pencil(factors[second], lower, self._kept_dims[first], twisted, start)
            else:
                found = linalg.pencil(factors[second], lower, twisted)
            values[first], cache[f"K_{first}"], odd[f"J_{first}"] = found
        even, odd["W_odd"] = self._weights(values, twisted, counts)
        cache["W"] = even - 1 if self._truncated else even
        return self._in_solve_dtype(cache | ({} if twisted is None else odd))

    def _weights(self, values: dict[str, Tensor], twisted: Tensor | None, counts: Counts) -> tuple[Tensor, Tensor]:
        """``1 / (1 + x)`` at the eigenvalues x of the second term: its even and its odd part (the latter over x)."""
        floor = self.options.floor
        product = values["G"].unsqueeze(-1) * values["A"].unsqueeze(-2)
        weights = 1 + product
        counts.floored = counts.floored + (weights < floor).sum()
        weights = 1 / weights.clamp(min=floor)
        if twisted is None:
            return weights, weights
        other = 1 - product
        counts.floored = counts.floored + ((other < floor) & twisted).sum()
        other = 1 / other.clamp(min=floor)
        odd = (weights - other) / (2 * product).clamp(min=torch.finfo(product.dtype).tiny)
        return torch.where(twisted, (weights + other) / 2, weights), torch.where(twisted, odd, 0.0)

    @property
    def _truncated(self) -> bool:
        """Whether a correction of low rank costs less than the whole eigenbasis."""
        rank = self.options.rank
        return rank is not None and max(self.dims.values()) > 2 * rank

    @property
    def _kept_dims(self) -> dict[str, int]:
        rank = self.options.rank if self._truncated else None
        return {key: dim if rank is None else min(dim, rank) for key, dim in self.dims.items()}

    def _twisted(self, second: Tensor) -> Tensor | None:
        """Which of the second pairs are antisymmetric, ``[n, 1, 1]``; None: none is. Waits for the device."""
        if not self._shared:  # sums of a aᵀ are symmetric
            return None
        twisted = ((second + second.mT) == 0).all(-1).all(-1) & (second != 0).any(-1).any(-1)
        return twisted.view(-1, 1, 1) if bool(twisted.any()) else None

    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """See Invertible."""
        if self.terms == 1:
            return super().solve(cache, matrix)
        rotated = self._rotate(matrix, cache["K_A"], cache["K_G"], forward=True)
        result = self._rotate(rotated * cache["W"], cache["K_A"], cache["K_G"], forward=False)
        if "W_odd" in cache:
            result = result + self._rotate(rotated * cache["W_odd"], cache["J_A"], cache["J_G"], forward=False)
        if self._truncated:
            result = result + self._sandwich(cache, matrix)
        return result.to(matrix)

    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """See Invertible. The second term is floored, as in the inverse, but as a whole."""
        if self.terms == 1:
            return super().squared(factors, cache, damping, matrix)
        matrix = matrix.to(self._dtype)
        shares = self._shares(factors, damping)
        left, right = (self._times(factors[key], matrix, key, shares[key]) for key in ("G", "A"))
        first = (left * right).flatten(1).sum(1)
        second = (_product(factors["D"], matrix) * _product(matrix, factors["C"])).flatten(1).sum(1)
        return torch.maximum(first + second, self.options.floor * first)

    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """See Invertible."""
        first = super().mean_eigenvalue(factors)
        return first if self.terms == 1 else first + self._mean(factors, "C") * self._mean(factors, "D")

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        shapes = super().cache_shapes()
        if self.terms == 1:
            return shapes
        kept, groups, dtype = self._kept_dims, self.layer.groups, self.options.solve_dtype or self._dtype
        bases = {f"K_{key}": ((groups, self.dims[key], kept[key]), dtype) for key in ("A", "G")}
        weights = {"W": ((groups, kept["G"], kept["A"]), self._dtype)}
        return (shapes if self._truncated else {}) | bases | weights


class BestKronecker(KroneckerPairs):
    """KPSVD: the nearest single Kronecker product."""

    terms = 1


class CorrectedFactors(KroneckerPairs):
    """KFAC-corrected: K-FAC's product and the nearest Kronecker product to what it misses."""

    corrected = True

    def _named(self, pairs: Pairs, a: Tensor, g: Tensor) -> Factors:
        if len(pairs) == self.terms:
            return super()._named(pairs, a, g)
        rows = a.flatten(1, 2)
        columns = g.flatten(1, 2)
        first = (_product(rows.mT, rows) / max(rows.shape[1], 1), _product(columns.mT, columns) / max(g.shape[1], 1))
        return super()._named([first, *pairs], a, g)

    def _averaged_terms(self, new: Factors, keep: float) -> Terms:
        """K-FAC's factors are averaged as in K-FAC; the correction is the best one to their product.

        It is fitted to ``keep (G (x) A + D (x) C) + (1 - keep) (G' (x) A' + D' (x) C') - G'' (x) A''``, where one dash
        marks the new terms and two the averages.
        """
        lefts, rights, weights = super()._averaged_terms(new, keep)
        means = (torch.lerp(self.factors[k], new[k], 1 - keep) for k in ("A", "G"))
        return [*lefts, next(means)], [*rights, next(means)], [*weights, -1.0]

    def _recompressed(self, pairs: Pairs, terms: Terms) -> Factors:
        ((c, d),) = pairs
        return {"A": terms[0][-1], "G": terms[1][-1], "C": c, "D": d}
