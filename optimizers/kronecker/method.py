"""What methods that approximate each affine layer's block by Kronecker products have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..base import Params
from ..checks import check_choice, check_range
from ..natural_gradient import Assign, NaturalGradient

SOLVE_DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


class KroneckerMethod(NaturalGradient):
    """A natural gradient with Kronecker products for blocks.

    Args:
        damping_mode: ``factored``: ``(A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)``, two matrix products a
            solve; ``tikhonov``: ``A (x) G + lambda I`` in the eigenbasis, four.
        pi: split the factored damping by ``pi² = (tr A / dim A) / (tr G / dim G)``; false: evenly.
        sharing: ``expand`` (each position of a shared weight an example of its own; for convolutions K-FAC's own
            spatial homogeneity) or ``reduce``.
        max_factor_dim: a wider factor is kept as its diagonal; None: none is. 8192 leaves those of ResNets (4608) and
            Swin-L (6145) whole, and is where one alone takes 256 MiB and seconds a refresh; a vocabulary is wider.
        solve_dtype: of the products with the inverses; ``bfloat16`` where the processor multiplies it faster.
        assign: where several processes train together, ``balanced``: each block has an owner among them, who alone
            keeps its factors, fits, decomposes and inverts them, and sends the inverses round (see
            ``natural_gradient.owners``); ``state_dict()`` then asks for ``consolidate()`` on every process first.
            ``owned``: inverses stay with owners, too, who precondition their layers' gradients: less memory, and
            directions travel in every step. ``replicated``: every process does and keeps everything.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        damping_mode: Literal["factored", "tikhonov"] = "factored",
        pi: bool = True,
        sharing: Literal["expand", "reduce"] = "expand",
        max_factor_dim: int | None = 8192,
        solve_dtype: Literal["float32", "bfloat16"] = "float32",
        assign: Assign = "replicated",
        **shared: Any,
    ) -> None:
        check_choice("damping_mode", damping_mode, ("factored", "tikhonov"))
        check_choice("sharing", sharing, ("expand", "reduce"))
        check_choice("solve_dtype", solve_dtype, tuple(SOLVE_DTYPES))
        check_choice("assign", assign, ("balanced", "owned", "replicated"))
        self.assign = assign
        if max_factor_dim is not None:
            check_range("max_factor_dim", max_factor_dim, 1)
        self.options = replace(
            self.options,
            damping_mode=damping_mode,
            pi=pi,
            sharing=sharing,
            max_factor_dim=max_factor_dim,
            solve_dtype=SOLVE_DTYPES[solve_dtype],
        )
        self._check_options()
        super().__init__(model, params, **shared)

    def _check_options(self) -> None:
        """Raise ValueError with a sentence where options do not go together."""
