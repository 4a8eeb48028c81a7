"""The leading Kronecker pairs against the dense singular values of the rearranged Fisher block, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optimizers.curvature import rearranged as module
from optimizers.curvature.rearranged import (
    FORMS,
    Pairs,
    cheapest_form,
    compress,
    compress_many,
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
# Every solver in every form it has.
ROUTES = [("gram", None), ("gram", "closed"), ("gram", "coefficients"), ("lanczos", "gradients")]
ROUTES += [("lanczos", "locations"), ("power", "coefficients"), ("power", "gradients"), ("power", "locations")]
# The errors that are asserted are ten times the tolerance: that is what an estimate of an error may be wrong by.
TIGHT = {"tolerance": 1e-7, "max_iterations": 5000}


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
    """Z of a block, entry by entry: ``Z[(p, q), (r, s)] = block[(r, p), (s, q)]``."""
    return block.view(o, d, o, d).permute(1, 3, 0, 2).reshape(d * d, o * o)


def masked_rearranged(a: Tensor, g: Tensor, width: int, radius: int) -> Tensor:
    """Z of one group with only the pairs of positions within a radius, pair by pair on the grid."""
    (m, positions, d), o = a.shape, g.shape[-1]
    z = torch.zeros(d * d, o * o, dtype=a.dtype)
    for t in range(positions):
        for s in range(positions):
            if abs(t // width - s // width) <= radius and abs(t % width - s % width) <= radius:
                for i in range(m):
                    z += torch.outer(torch.outer(a[i, t], a[i, s]).flatten(), torch.outer(g[i, t], g[i, s]).flatten())
    return z / m


def kfac(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return rows.T @ rows / len(rows), columns.T @ columns / len(g)


def best(z: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(z, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def total(pairs: Pairs, group: int) -> Tensor:
    """The pairs' sum, rearranged."""
    return sum(torch.outer(left[group].flatten(), right[group].flatten()) for left, right in pairs).double()


def assert_best(pairs: Pairs, group: int, z: Tensor, tolerance: float = 1e-6) -> None:
    wanted = best(z, len(pairs))
    assert (total(pairs, group) - wanted).norm() <= tolerance * wanted.norm()


def kind_of(matrix: Tensor) -> int:
    """1 for an exactly symmetric matrix, -1 for an exactly antisymmetric one, 0 for any other."""
    return 1 if torch.equal(matrix, matrix.mT) else -1 if torch.equal(matrix, -matrix.mT) else 0


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
        assert (values[:, 0] >= -1e-6 * values[:, -1]).all() and (values[:, -1] > 0).all()
    for left, right in (first, second):
        torch.testing.assert_close(left.norm(dim=(1, 2)), right.norm(dim=(1, 2)), rtol=1e-6, atol=0)
        for x, y in zip(left, right, strict=True):
            kind = kind_of(x)
            assert kind == kind_of(y) != 0
            largest = x.triu(1).flatten()[x.triu(1).abs().argmax()]
            assert x.diagonal().sum() >= 0 if kind > 0 else largest > 0


def rotations(squeeze: float) -> tuple[Tensor, Tensor]:
    """Six plane rotations of an ellipse: ``Z v = tr(v) D^2 / 2`` of symmetric v, and ``det(D) v`` of antisymmetric."""
    angles = torch.arange(6, dtype=torch.float64) * (torch.pi / 3)
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    v = turns @ torch.diag(torch.tensor([1.0, squeeze], dtype=torch.float64))
    a = torch.eye(2, dtype=torch.float64).expand(1, 6, 2, 2)
    return a, v.mT.unsqueeze(0)  # two positions whose inputs are the unit vectors


@pytest.mark.parametrize("solver, form", [route for route in ROUTES if route[1] != "closed"])
def test_the_second_pair_may_be_antisymmetric(solver: str, form: str | None) -> None:
    squeeze = 0.8
    a, g = rotations(squeeze)
    first, second = leading_pairs(a, g, 2, solver=solver, form=form, **TIGHT)
    assert [kind_of(factor[0]) for factor in (*first, *second)] == [1, 1, -1, -1]
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    for factor in second:
        torch.testing.assert_close(factor[0], turn * (squeeze / 2) ** 0.5, rtol=1e-6, atol=1e-8)
    assert_best([first, second], 0, rearranged(fisher(a[0], g[0]), 2, 2))
    # In a group beside it, whose second pair is symmetric, nothing changes.
    other = torch.randn(1, 6, 2, 2, dtype=torch.float64), torch.diag_embed(torch.rand(1, 6, 2, dtype=torch.float64))
    both = leading_pairs(*(torch.cat(pair) for pair in zip((a, g), other, strict=True)), 2, solver=solver, form=form)
    assert kind_of(both[1][0][0]) == -1
    assert_best(both, 0, rearranged(fisher(a[0], g[0]), 2, 2), 1e-5)
    assert_best(both, 1, rearranged(fisher(other[0][0], other[1][0]), 2, 2), 1e-5)


@pytest.mark.parametrize("solver, form", [route for route in ROUTES if route[1] != "closed"])
@pytest.mark.parametrize("d, o", [(1, 4), (4, 1), (2, 5), (5, 2)])
def test_narrow_layers_have_few_antisymmetric_pairs(d: int, o: int, solver: str, form: str | None) -> None:
    a, g = (torch.randn(1, 4, 3, n, dtype=torch.float64) for n in (d, o))
    for rank in (2, 3, 5):
        pairs = leading_pairs(a, g, rank, solver=solver, form=form, **TIGHT)
        assert_best(pairs, 0, rearranged(fisher(a[0], g[0]), d, o))


@pytest.mark.parametrize("solver", ["power", "lanczos"])
def test_the_search_for_an_antisymmetric_pair_is_given_up_early(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One position of four dominates: what the others add is nowhere near."""
    a, g = (torch.randn(1, 20, 4, 15, dtype=torch.float64) for _ in range(2))
    a[:, :, 1:] *= 0.1
    counts, left = [0, 0], module.Locations._left

    def count(self: module.Locations, v: Tensor) -> Tensor:
        counts[self.kind < 0] += 1
        return left(self, v)

    monkeypatch.setattr(module.Locations, "_left", count)
    pairs = leading_pairs(a, g, 2, solver=solver, form="locations", **TIGHT)
    assert_best(pairs, 0, rearranged(fisher(a[0], g[0]), 15, 15))
    assert 0 < counts[1] <= counts[0] / 2


def test_factors_of_one_position_are_exactly_symmetric() -> None:
    """Wider than a block of the product that makes them, too."""
    a, g = torch.randn(2, 9, 1, 600), torch.randn(2, 9, 1, 257)
    pairs = leading_pairs(a, g, 2)
    assert all(kind_of(factor) == 1 for pair in pairs for factor in pair)
    for group in range(2):
        rows, columns = a[group, :, 0].double(), g[group, :, 0].double()
        left, right = pairs[0][0][group].double(), pairs[0][1][group].double()
        form = torch.einsum("mo,op,mp->m", columns, right, columns) / 9
        torch.testing.assert_close((rows.T * form) @ rows, left * right.norm() ** 2, rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize("solver", ["gram", "lanczos", "power"])
def test_layers_together_are_layers_one_by_one(solver: str) -> None:
    layers = [sample(name) for name in SAMPLES] + [(torch.randn(1, 8, 1, 3), torch.randn(1, 8, 1, 2))]
    masks = [location_mask(*shape[2], 0) for shape in SAMPLES.values()] + [None]
    layers += [(torch.randn(2, 8, 1, 4), torch.randn(2, 8, 1, 5)), (torch.zeros(1, 8, 1, 2), torch.randn(1, 8, 1, 6))]
    masks += [None, None]
    options = {"solver": solver, "max_iterations": 2000}
    together = leading_pairs_many(layers, 2, masks=masks, **options)
    for (a, g), mask, pairs in zip(layers, masks, together, strict=True):
        for group in range(len(a)):
            alone = leading_pairs(a, g, 2, mask=mask, **options)
            torch.testing.assert_close(total(pairs, group), total(alone, group), rtol=1e-5, atol=1e-8)


def test_the_cheapest_form_of_layers_of_known_shape() -> None:
    assert cheapest_form(64, 1, 785, 400) == "closed"
    assert cheapest_form(64, 1, 785, 400, solver="power") == "locations"
    assert cheapest_form(64, 1, 785, 400, solver="lanczos") == "coefficients"
    assert cheapest_form(1000, 1, 785, 400) == "coefficients"  # a dense decomposition grows with the batch's cube
    assert cheapest_form(8, 1024, 576, 64) == "gradients"
    assert cheapest_form(8, 1024, 576, 64, masked=True) == "locations"
    assert cheapest_form(8, 16, 4608, 512) == "coefficients"


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_compress_is_the_dense_truncation(groups: int, rank: int) -> None:
    for kinds in ((1, 1, 1, 1), (1, -1, 1, 1), (1, -1, 1, -1)):
        lefts, rights = (
            [(x + kind * x.mT) for kind in kinds for x in torch.randn(1, groups, n, n, dtype=torch.float64)]
            for n in (5, 3)
        )
        weights = [0.9, 0.9, 0.1, -0.1]
        pairs = compress(lefts, rights, weights, rank)
        for group in range(groups):
            terms = zip(lefts, rights, weights, strict=True)
            z = sum(w * torch.outer(x[group].flatten(), y[group].flatten()) for x, y, w in terms)
            assert_best(pairs, group, z, 1e-9)
        for left, right in pairs:
            torch.testing.assert_close(left.norm(dim=(1, 2)), right.norm(dim=(1, 2)))
            for x, y in zip(left, right, strict=True):
                assert kind_of(x) == kind_of(y) != 0 or rank > 1


@pytest.mark.parametrize("groups", [1, 2])
def test_compressed_pairs_are_as_exact_as_their_terms(groups: int) -> None:
    """Of every width, so that every remainder of a vector unit's is among them; with a group of another kind beside."""
    for n in (*range(2, 40), 257):
        noise = torch.randn(3, groups, n, n)
        terms = [noise[0] + noise[0].mT, noise[1] - noise[1].mT, (noise[2] - noise[2].mT) / 3]
        terms[2][-1] = noise[2][-1] + noise[2][-1].mT
        first, second = compress(terms, terms, [1.0, 0.6, 0.3], 2)
        kinds = [[kind_of(x) for x in factor] for factor in (*first, *second)]
        assert kinds[0] == kinds[1] and kinds[2] == kinds[3]
        assert {kinds[0][-1], kinds[2][-1]} <= {1, -1}
        assert all(kind != 0 for kind in kinds[0] + kinds[2])
        for x in (second[0] if kinds[2][0] < 0 else first[0])[:1]:
            assert kind_of(x) == 1 or x.triu(1).flatten()[x.triu(1).abs().argmax()] > 0


def test_layers_compressed_together_are_layers_one_by_one() -> None:
    layers: list[tuple[list[Tensor], list[Tensor], list[float]]] = []
    for groups, d, o, k in ((1, 5, 3, 4), (2, 4, 6, 4), (1, 3, 3, 2), (3, 2, 7, 4), (1, 60, 30, 4)):
        halves = [torch.randn(2, k, groups, n, n, dtype=torch.float64) for n in (d, o)]
        lefts, rights = ([x + y.mT + x.mT + y for x, y in zip(*half, strict=True)] for half in halves)
        layers.append((lefts, rights, [0.4 + 0.1 * i for i in range(k)]))
    together = compress_many(layers, 2)
    for (lefts, rights, weights), pairs in zip(layers, together, strict=True):
        for group in range(len(lefts[0])):
            alone = compress(lefts, rights, weights, 2)
            torch.testing.assert_close(total(pairs, group), total(alone, group), rtol=1e-9, atol=1e-9)


def test_inner_products_of_wide_single_precision_terms() -> None:
    """A second term a thousandth of the first is found although their inner products are in single precision."""
    rows = torch.randn(2, 500, 60).abs()
    lefts = [(x @ x.mT).unsqueeze(0) for x in rows]
    rights = [torch.diag(torch.tensor(x)).unsqueeze(0) for x in ([1.0, 0.0], [0.0, 1e-3])]
    pairs = compress(lefts, rights, [1.0, 1.0], 2)
    z = sum(torch.outer(x.flatten(), y.flatten()) for x, y in zip(lefts, rights, strict=True)).double()
    found = total([(x.double(), y.double()) for x, y in pairs], 0)
    assert (found - z).norm() <= 2e-5 * z.norm()


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


@pytest.mark.parametrize("form", ["coefficients", "locations", "gradients"])
@pytest.mark.parametrize("ratio", [1e-3, 5e-5, 5e-6])
def test_a_small_second_pair_is_found_from_the_first_one(ratio: float, form: str) -> None:
    """A start that is the first pair itself leaves the Krylov space at once."""
    a = torch.randn(1, 4, 1, 3, dtype=torch.float64)
    g = torch.zeros(1, 4, 1, 3, dtype=torch.float64)
    g[0, :3, 0, 0] = 1.0
    g[0, 3, 0, 1] = ratio**0.5
    z = rearranged(fisher(a[0], g[0]), 3, 3)
    first = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    pairs = leading_pairs(a, g, 2, solver="lanczos", start=first, form=form)
    difference = total(pairs, 0) - best(z, 2)
    assert difference.norm() <= 1e-6 * best(z, 2).norm()
