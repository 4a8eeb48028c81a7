"""Which form of the rearranged block takes the fewest operations, counted rather than measured."""

from __future__ import annotations

from torch import Tensor

from .operators import ExampleGradients, GramCoefficients, Locations, Operator

FORMS = ("closed", "coefficients", "gradients", "locations")

# The cost model of ``cheapest_form``, in floating-point operations.
_PRODUCTS = 24  # products of a typical solve
_CALL = 5e6  # what the tensor calls around one product cost, however small it is
_DENSE = 30  # of a dense decomposition of an n x n matrix, times n^3
_DOUBLE = 2  # double against single precision


def cheapest_form(m: int, positions: int, d: int, o: int, *, masked: bool = False, solver: str = "gram") -> str:
    """The form of Z that solves one layer with the fewest floating-point operations.

    Counted are the set-up and the products of a typical solve (``_PRODUCTS``), each with a fixed price for being called
    at all, which decides between the closed form and an iteration on small problems.

    Args:
        m: examples.
        positions: shared positions T.
        d: inputs of the layer, bias entry included.
        o: outputs of the layer.
        masked: whether pairs of positions are left out, which ``gradients`` cannot do.
        solver: see ``leading_pairs``; ``lanczos`` bars the closed form, ``power`` all that rests on Gram matrices.

    Returns:
        One of ``FORMS``.
    """
    n = m * positions
    gram = _DOUBLE * 2 * n * n * (d + o)
    image = 2 * m * m if positions == 1 else 4 * n * n * positions
    costs = {
        "closed": gram + _DOUBLE * _DENSE * m**3 if positions == 1 else float("inf"),
        "coefficients": gram + _PRODUCTS * (_CALL + _DOUBLE * image),
        "gradients": 2 * n * d * o + _PRODUCTS * (_CALL + 2 * m * d * o * (d + o)),
        "locations": _PRODUCTS * (_CALL + 2 * n * (d * d + o * o + positions * (d + o))),
    }
    barred = {"gram": (), "lanczos": FORMS[:1], "power": FORMS[:2]}[solver]
    allowed = [f for f in FORMS if not (masked and f == "gradients") and f not in barred]
    return min(allowed, key=costs.__getitem__)


def operator_of(form: str, layers: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> Operator:
    """Z in a form that is iterated on, of one layer, or of several alike in ``coefficients``."""
    if form == "coefficients":
        return GramCoefficients(layers, mask)
    ((a, g),) = layers
    return ExampleGradients(a, g) if form == "gradients" else Locations(a, g, mask)
