"""The leading Kronecker pairs against the dense singular values of the rearranged Fisher block, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizers.curvature.rearranged import (
    FORMS,
    Pairs,
    cheapest_form,
    compress,
    leading_pairs,
    leading_pairs_many,
    location_mask,
)

# (groups, m, grid of positions, d, o)
SAMPLES = {
    "one position": (1, 8, (1, 1), 5, 6),
    "one position, more outputs than examples reach": (2, 5, (1, 1), 7, 3),
    "four positions": (2, 6, (2, 2), 4, 5),
    "nine positions": (1, 5, (3, 3), 6, 3),
    "twelve positions": (2, 5, (3, 4), 3, 4),
}
# Every solver in every form it has; the tolerance is tight so that the comparison tells right from nearly right.
ROUTES = [("gram", None), ("gram", "closed"), ("gram", "coefficients"), ("lanczos", "gradients")]
ROUTES += [("lanczos", "locations"), ("power", "coefficients"), ("power", "gradients"), ("power", "locations")]
TIGHT = {"tolerance": 1e-10, "max_iterations": 5000}


def sample(name: str) -> tuple[Tensor, Tensor]:
    groups, m, (height, width), d, o = SAMPLES[name]
    generator = torch.Generator().manual_seed(3)
    shape = (groups, m, height * width)
    a = torch.randn(*shape, d, generator=generator, dtype=torch.float64) + 0.5
    return a, torch.randn(*shape, o, generator=generator, dtype=torch.float64)


def fisher(a: Tensor, g: Tensor) -> Tensor:
    """The block of one group, row-major: ``(1/m) sum_i vec(V_i) vec(V_i)^T``."""
    vectors = [sum(torch.outer(g[i, t], a[i, t]) for t in range(a.shape[1])).flatten() for i in range(len(a))]
    return sum(torch.outer(v, v) for v in vectors) / len(a)


def rearranged(block: Tensor, d: int, o: int) -> Tensor:
    """Z of a block, entry by entry: ``Z[(p, q), (r, s)] = block[(r, p), (s, q)]``, brought to symmetric factors."""
    z = block.view(o, d, o, d).permute(1, 3, 0, 2)
    z = (z + z.transpose(0, 1)) / 2
    return ((z + z.transpose(2, 3)) / 2).reshape(d * d, o * o)


def masked_rearranged(a: Tensor, g: Tensor, width: int, radius: int) -> Tensor:
    """Z of one group with only the pairs of positions within a radius, pair by pair on the grid."""
    (m, positions, d), o = a.shape, g.shape[-1]
    z = torch.zeros(d * d, o * o, dtype=a.dtype)
    for t in range(positions):
        for s in range(positions):
            if abs(t // width - s // width) <= radius and abs(t % width - s % width) <= radius:
                for i in range(m):
                    left, right = torch.outer(a[i, t], a[i, s]), torch.outer(g[i, t], g[i, s])
                    z += torch.outer((left + left.T).flatten(), (right + right.T).flatten()) / (4 * m)
    return z


def kfac(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return rows.T @ rows / len(rows), columns.T @ columns / len(g)


def best(z: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(z)
    return u[:, :rank] * s[:rank] @ v[:rank]


def total(pairs: Pairs, group: int) -> Tensor:
    """The pairs' sum, rearranged."""
    return sum(torch.outer(left[group].flatten(), right[group].flatten()) for left, right in pairs).double()


def assert_best(pairs: Pairs, group: int, z: Tensor, tolerance: float = 1e-6) -> None:
    wanted = best(z, len(pairs))
    assert (total(pairs, group) - wanted).norm() <= tolerance * wanted.norm()


def possible(solver: str, form: str | None, positions: int, masked: bool = False) -> bool:
    return not (form == "closed" and positions > 1) and not (form == "gradients" and masked)


@pytest.mark.parametrize("solver, form", ROUTES)
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("name", SAMPLES)
def test_pairs_are_the_dense_singular_pairs(name: str, corrected: bool, solver: str, form: str | None) -> None:
    a, g = sample(name)
    if not possible(solver, form, a.shape[2]):
        pytest.skip(f"the form {form} is for one position")
    for rank in (1, 2):
        pairs = leading_pairs(a, g, rank, solver=solver, form=form, corrected=corrected, **TIGHT)
        assert len(pairs) == rank
        for group in range(len(a)):
            block = fisher(a[group], g[group])
            if corrected:
                left, right = kfac(a[group], g[group])
                block = block - torch.kron(right, left)
            assert_best(pairs, group, rearranged(block, a.shape[-1], g.shape[-1]))


@pytest.mark.parametrize("solver, form", ROUTES)
@pytest.mark.parametrize("radius", [0, 1])
@pytest.mark.parametrize("name", SAMPLES)
def test_masked_pairs_are_those_of_the_pairs_of_near_positions(
    name: str, radius: int, solver: str, form: str | None
) -> None:
    a, g = sample(name)
    if not possible(solver, form, a.shape[2], masked=True):
        pytest.skip(f"the form {form} takes no mask or one position only")
    height, width = SAMPLES[name][2]
    mask = location_mask(height, width, radius)
    for corrected in (False, True):
        pairs = leading_pairs(a, g, 2, solver=solver, form=form, mask=mask, corrected=corrected, **TIGHT)
        for group in range(len(a)):
            z = masked_rearranged(a[group], g[group], width, radius)
            if corrected:
                left, right = kfac(a[group], g[group])
                z = z - torch.outer(left.flatten(), right.flatten())
            assert_best(pairs, group, z)


def test_location_mask_is_the_distance_on_the_grid() -> None:
    """In particular, the end of a row and the beginning of the next are not neighbours."""
    mask = location_mask(3, 4, 1)
    assert mask.dtype == torch.bool and mask.shape == (12, 12)
    for t in range(12):
        for s in range(12):
            assert bool(mask[t, s]) == (abs(t // 4 - s // 4) <= 1 and abs(t % 4 - s % 4) <= 1)
    assert not mask[3, 4]
    assert bool(location_mask(3, 4, 3).all())


@pytest.mark.parametrize("solver, form", ROUTES)
@pytest.mark.parametrize("name", SAMPLES)
def test_the_first_pair_is_positive_semi_definite_and_the_scale_is_shared(
    name: str, solver: str, form: str | None
) -> None:
    a, g = sample(name)
    if not possible(solver, form, a.shape[2]):
        pytest.skip(f"the form {form} is for one position")
    first, second = leading_pairs(a, g, 2, solver=solver, form=form, **TIGHT)
    for factor in first:
        values = torch.linalg.eigvalsh(factor)
        assert (values[:, 0] >= -1e-8 * values[:, -1]).all() and (values[:, -1] > 0).all()
    for left, right in (first, second):
        torch.testing.assert_close(left.norm(dim=(1, 2)), right.norm(dim=(1, 2)), rtol=1e-6, atol=0)
        assert (left.diagonal(dim1=1, dim2=2).sum(1) >= 0).all()


@pytest.mark.parametrize("name", SAMPLES)
def test_rank_two_is_no_worse_than_rank_one_than_kfac(name: str) -> None:
    a, g = sample(name)
    one, two = leading_pairs(a, g, 1), leading_pairs(a, g, 2)
    correction = leading_pairs(a, g, 1, corrected=True)
    for group in range(len(a)):
        z = rearranged(fisher(a[group], g[group]), a.shape[-1], g.shape[-1])
        left, right = kfac(a[group], g[group])
        product = torch.outer(left.flatten(), right.flatten())
        error = {
            "kfac": (z - product).norm(),
            "corrected": (z - product - total(correction, group)).norm(),
            "one": (z - total(one, group)).norm(),
            "two": (z - total(two, group)).norm(),
        }
        assert error["two"] < error["one"] < error["kfac"]
        assert error["two"] <= error["corrected"] < error["kfac"]


@pytest.mark.parametrize("solver, form", ROUTES)
@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
def test_a_dead_layer_is_zero_and_its_neighbour_is_not(
    positions: int, corrected: bool, solver: str, form: str | None
) -> None:
    if not possible(solver, form, positions):
        pytest.skip(f"the form {form} is for one position")
    a = torch.randn(2, 6, positions, 4, dtype=torch.float64)
    g = torch.randn(2, 6, positions, 3, dtype=torch.float64)
    g[0] = 0
    pairs = leading_pairs(a, g, 2, solver=solver, form=form, corrected=corrected, **TIGHT)
    alone = leading_pairs(a[1:], g[1:], 2, solver=solver, form=form, corrected=corrected, **TIGHT)
    for factor in (factor for pair in pairs for factor in pair):
        assert (factor[0] == 0).all() and factor[1].isfinite().all()
    torch.testing.assert_close(total(pairs, 1), total(alone, 0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver, form", ROUTES)
def test_a_batch_of_one_has_one_pair(solver: str, form: str | None) -> None:
    a, g = (torch.randn(1, 1, 1, n, dtype=torch.float64) for n in (4, 3))
    first, second = leading_pairs(a, g, 2, solver=solver, form=form)
    z = rearranged(fisher(a[0], g[0]), 4, 3)
    assert_best([first], 0, z, 1e-9)
    assert all(factor.norm() <= 1e-6 * z.norm().sqrt() for factor in second)
    (residual,) = leading_pairs(a, g, 1, solver=solver, form=form, corrected=True)
    assert all(factor.norm() <= 1e-6 * z.norm().sqrt() for factor in residual)


@pytest.mark.parametrize("solver, form", [route for route in ROUTES if route[1] != "closed"])
def test_a_start_that_never_leaves_a_subspace_is_no_trap(solver: str, form: str | None) -> None:
    """One example with several positions: from the identity alone, only pairs that commute with it would be found."""
    a, g = (torch.randn(1, 1, 4, n, dtype=torch.float64) for n in (3, 5))
    # Symmetric pairs of a product V (x) V: squares of singular values, and products of two of them.
    s = torch.linalg.svdvals(g[0, 0].T @ a[0, 0])
    pairs = leading_pairs(a, g, 2, solver=solver, form=form, **TIGHT)
    sigma = torch.stack([left.norm() * right.norm() for left, right in pairs])
    torch.testing.assert_close(sigma, torch.stack([s[0] ** 2, s[0] * s[1]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["closed", "coefficients", "locations", "gradients"])
def test_equal_singular_values_are_found_as_often_as_they_occur(form: str) -> None:
    a = g = torch.diag(torch.tensor([1.0, 1.0, 0.9, 0.9], dtype=torch.float64)).view(1, 4, 1, 4)
    pairs = leading_pairs(a, g, 2, form=form)
    largest = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)).view(4, 1, 4)
    z = rearranged(fisher(largest, largest), 4, 4)
    torch.testing.assert_close(total(pairs, 0), z, rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", ["coefficients", "locations"])
def test_a_restarted_basis_ends_at_the_same_pairs(form: str) -> None:
    a, g = (torch.randn(2, 20, 2, n, dtype=torch.float64) for n in (7, 6))
    small = leading_pairs(a, g, 2, form=form, krylov=4, tolerance=1e-9, max_iterations=3000)
    for group in range(2):
        assert_best(small, group, rearranged(fisher(a[group], g[group]), 7, 6))


@pytest.mark.parametrize("solver", ["power", "lanczos"])
def test_a_good_start_saves_products(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizers.curvature.rearranged import Locations

    counted = 0
    left = Locations._left

    def count(self: Locations, v: Tensor) -> Tensor:
        nonlocal counted
        counted += 1
        return left(self, v)

    monkeypatch.setattr(Locations, "_left", count)
    a, g = sample("four positions")
    ((_, right),) = leading_pairs(a, g, 1, solver=solver, form="locations")
    cold, counted = counted, 0
    leading_pairs(a, g, 1, solver=solver, form="locations", start=right)
    assert counted < cold


@pytest.mark.parametrize("solver, form", ROUTES)
@pytest.mark.parametrize("positions", [1, 6])
def test_single_precision_samples(positions: int, solver: str, form: str | None) -> None:
    if not possible(solver, form, positions):
        pytest.skip(f"the form {form} is for one position")
    a = (torch.randn(1, 12, positions, 30) + 0.3).relu()
    g = torch.randn(1, 12, positions, 20) * torch.linspace(0.2, 2, 20)
    for scale in (1.0, 1e-9):  # gradients of a trained model: their fourth powers do not fit single precision
        pairs = leading_pairs(a, g * scale, 2, solver=solver, form=form, max_iterations=5000)
        assert all(factor.dtype == torch.float32 for pair in pairs for factor in pair)
        pairs = [(left.double() / scale, right.double() / scale) for left, right in pairs]
        assert_best(pairs, 0, rearranged(fisher(a[0].double(), g[0].double()), 30, 20), 1e-4)


@pytest.mark.parametrize("solver, form", ROUTES)
def test_statistics_that_are_not_finite_give_nan(solver: str, form: str | None) -> None:
    a, g = (torch.randn(1, 5, 1, n, dtype=torch.float64) for n in (4, 3))
    g[0, 2, 0, 1] = torch.nan
    for left, right in leading_pairs(a, g, 1, solver=solver, form=form):
        assert left.isnan().any() and right.isnan().any()


def test_layers_together_are_layers_one_by_one() -> None:
    layers = [sample(name) for name in SAMPLES] + [(torch.randn(1, 8, 1, 3), torch.randn(1, 8, 1, 2))]
    masks = [location_mask(*shape[2], 0) for shape in SAMPLES.values()] + [None]
    together = leading_pairs_many(layers, 2, masks=masks)
    for (a, g), mask, pairs in zip(layers, masks, together, strict=True):
        for group in range(len(a)):
            alone = leading_pairs(a, g, 2, mask=mask)
            torch.testing.assert_close(total(pairs, group), total(alone, group), rtol=1e-5, atol=1e-8)


def test_the_cheapest_form_of_layers_of_known_shape() -> None:
    assert cheapest_form(64, 1, 785, 400) == "closed"
    assert cheapest_form(64, 1, 785, 400, matrix_free=True) == "locations"
    assert cheapest_form(1000, 1, 785, 400) == "coefficients"  # a dense decomposition grows with the batch's cube
    assert cheapest_form(8, 1024, 576, 64) == "gradients"
    assert cheapest_form(8, 1024, 576, 64, masked=True) == "locations"
    assert cheapest_form(8, 16, 4608, 512) == "coefficients"


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_compress_is_the_dense_truncation(groups: int, rank: int) -> None:
    lefts, rights = ([torch.randn(groups, n, n, dtype=torch.float64) for _ in range(4)] for n in (5, 3))
    weights = [0.9, 0.9, 0.1, -0.1]
    pairs = compress(lefts, rights, weights, rank)
    for group in range(groups):
        terms = zip(lefts, rights, weights, strict=True)
        z = sum(w * torch.outer(x[group].flatten(), y[group].flatten()) for x, y, w in terms)
        assert_best(pairs, group, z, 1e-9)
    for left, right in pairs:
        torch.testing.assert_close(left.norm(dim=(1, 2)), right.norm(dim=(1, 2)))


def test_an_average_of_positive_semi_definite_products_is_one() -> None:
    halves = [torch.randn(1, 6, 3, dtype=torch.float32) for _ in range(4)]
    lefts, rights = ([h @ h.mT for h in side] for side in (halves[:2], halves[2:]))
    ((left, right),) = compress(lefts, rights, [0.95, 0.05], 1)
    for factor in (left, right):
        values = torch.linalg.eigvalsh(factor)
        assert values[0, 0] >= -1e-6 * values[0, -1] and values[0, -1] > 0


def test_compressing_fewer_terms_than_wanted_adds_zeros() -> None:
    left, right = torch.randn(1, 4, 4, dtype=torch.float64), torch.randn(1, 3, 3, dtype=torch.float64)
    first, second = compress([left], [right], [2.0], 2)
    torch.testing.assert_close(total([first], 0), 2 * torch.outer(left.flatten(), right.flatten()))
    again, nothing = compress([left, left], [right, right], [0.5, 0.5], 2)
    torch.testing.assert_close(total([again], 0), torch.outer(left.flatten(), right.flatten()))
    zeros = compress([left * 0], [right * 0], [1.0], 1)
    for factor in (*second, *zeros[0]):
        assert (factor == 0).all()
    assert all(factor.abs().max() < 1e-6 for factor in nothing)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"solver": "svd"}, "solver must be one of gram, power, lanczos"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"krylov": 3}, "krylov must be at least rank"),
        ({"form": "dense"}, f"form must be one of {', '.join(FORMS)}"),
        ({"form": "closed"}, "form 'closed' is for one position"),
        ({"form": "closed", "solver": "power"}, "form 'closed' is the gram solver's"),
        ({"form": "gradients", "mask": torch.ones(4, 4, dtype=torch.bool)}, "form 'gradients' sums over all"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, "mask must be"),
        ({"start": torch.eye(3)}, "start must end in"),
        ({"a": torch.ones(6, 4, 3)}, "a must be"),
        ({"g": torch.ones(2, 6, 3, 5)}, "g must be"),
    ],
)
def test_settings_out_of_range_say_so(change: dict[str, object], message: str) -> None:
    a, g = sample("four positions")
    arguments = {"a": a, "g": g, "rank": 2, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        leading_pairs(**arguments)


def test_other_functions_check_their_arguments() -> None:
    matrix = torch.eye(2).unsqueeze(0)
    with pytest.raises(ValueError, match=r"^rank must be at least 1"):
        compress([matrix], [matrix], [1.0], 0)
    with pytest.raises(ValueError, match=r"^lefts, rights and weights must be as many"):
        compress([matrix], [matrix], [], 1)
    with pytest.raises(ValueError, match=r"^radius must be at least 0"):
        location_mask(2, 2, -1)
