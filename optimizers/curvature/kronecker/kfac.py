"""K-FAC's factors: second moments of a layer's inputs, and of its output gradients."""

from __future__ import annotations

from torch import Tensor

from ..layers import Flow
from ..linalg import product as _product
from .factored import Kronecker
from .options import Factors


class KroneckerFactors(Kronecker):
    """K-FAC (Martens & Grosse 2015; Grosse & Martens 2016): ``A = mean_{i,t} a aᵀ``, ``G = mean_i sum_t g gᵀ``."""

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        return [*self._input_moments(flow), ("G", self._gradient_moments(flow))]

    def _input_moments(self, flow: Flow) -> list[tuple[str, Tensor]]:
        expand = self.options.sharing == "expand"
        if expand and not self.full["A"]:  # which needs no patches
            a_sum, count = flow.input_square_sums()
        else:
            a = flow.inputs()
            a = a.flatten(1, 2) if expand else a.mean(2)
            a_sum, count = self._second_moments("A", a), a.shape[1]
        return [("A", a_sum), ("count", a_sum.new_tensor(float(count)))]

    def _gradient_moments(self, flow: Flow) -> Tensor:
        expand = self.options.sharing == "expand"
        if expand and not self.full["G"]:
            return flow.gradient_square_sums()
        g = flow.gradients()
        return self._second_moments("G", g.flatten(1, 2) if expand else g.sum(2))

    def _second_moments(self, key: str, rows: Tensor) -> Tensor:
        """``sum_i rows_i rows_iᵀ`` of ``[groups, n, d]``, or its diagonal."""
        return _product(rows.mT, rows) if self.full[key] else rows.square().sum(1)

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        """See Approximation."""
        return {  # the sums are this step's alone
            "A": self._sums["A"].div_(self._sums["count"]),
            "G": self._sums["G"].mul_(gradient_scale**2 / examples),
        }
