"""Factors over training: the numbers of every layer at every point, and the matrices of a few layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from analysis.factors import matrices, noise
from analysis.factors.fit import Fit
from analysis.factors.kept import Kept
from analysis.factors.observing import LABELS, LayerFactors, Observation, View, halves, observe
from analysis.factors.seen import Seen, image
from optimizers import Likelihood
from optimizers.curvature import linalg

#: What the numbers of a row are; ``_A`` and ``_G`` stand for the factor of inputs and that of output gradients.
MEANINGS: dict[str, str] = {
    "mean_A, mean_G": "mean eigenvalue: trace over dimension",
    "largest_A, largest_G, smallest_A, smallest_G": "extreme eigenvalues",
    "rank_A, rank_G": "eigenvalues that can be told from zero in the precision of the computation",
    "condition_A, condition_G": "largest over smallest eigenvalue; null: the smallest cannot be told from zero",
    "participation_A, participation_G": "(sum of eigenvalues)² / sum of squares: how many directions count, 1 to d",
    "dominance_A, dominance_G": "median over rows of |m_ii| / sum of |m_ij|",
    "dominant_A, dominant_G": "share of rows in which |m_ii| is more than the sum of the others",
    "diagonal_A, diagonal_G": "the diagonal's share of the squared Frobenius norm",
    "gershgorin_low_A, ..., gershgorin_high_G": "Gershgorin's bounds on the eigenvalues",
    "contained_A, contained_G": "share of the eigenvalues that lie in some disc (1, or a fault)",
    "ridge_A, ridge_G": "share of the Fourier field's energy at the frequencies (k, -k)",
    "snr_A, snr_G": "the study's signal-to-noise ratio without any noise, dB",
    "drift_A, drift_G": "|now - before| / |now| since the point before, whose step is drift_from",
    "mean": "mean eigenvalue of G (x) A",
    "condition": "of G (x) A, the product of the factors'; null: infinite",
    "condition_damped": "of G (x) A + damping",
    "dimension": "effective dimension of G (x) A at the damping, as a share of its directions",
    "above": "share of the directions of G (x) A whose curvature is above the damping",
    "zero": "share of its directions whose curvature cannot be told from zero",
    "gradient_above": "share of the gradient's squared norm in directions above the damping",
    "amplified": "|d| / |g| of K-FAC's direction d = (G (x) A + damping)^-1 g, times the damping: 1 is SGD's",
    "relative_step": "|d| / |W|: how far a step of rate 1 along that direction would go, in the weights' own length",
    "fit_cosine, ..., fit_shared": "see analysis.factors.fit.Fit: how near the block is to G (x) A",
    "kept_...": "see analysis.factors.kept.Kept: what AdaFisher keeps",
}


@dataclass(frozen=True)
class Plan:
    """What is asked of each point.

    Attributes:
        damping: lambda of K-FAC, absolute, that directions are compared with.
        lower: Lambda of AdaFisher.
        noise: standard deviations of the perturbation, in units of the diagonal's root mean square.
        seed: of the perturbation.
        pictured: how many layers have pictures of their matrices, spread evenly over the model; or a regular expression
            that is found in their names.
    """

    damping: float = 3e-3
    lower: float = 1e-3
    noise: tuple[float, ...] = (0.01, 0.03, 0.1)
    seed: int = 0
    pictured: int | str = 4

    def __post_init__(self) -> None:
        for name, values in (("damping", [self.damping]), ("Lambda", [self.lower]), ("noise", self.noise)):
            for value in values:
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} must be above 0, got {value!r}")
        if isinstance(self.pictured, str):
            try:
                re.compile(self.pictured)
            except re.error as error:
                raise ValueError(f"pictured must be a regular expression, got {self.pictured!r} ({error})") from error


@dataclass(frozen=True)
class Spectra:
    """Eigenvalues of a layer's factors, the largest first, ``[groups, columns]`` and ``[groups, d_out]``."""

    A: Tensor
    G: Tensor

    @property
    def product(self) -> Tensor:
        """Those of ``G (x) A``, ``[groups, d_out, columns]``, none below zero."""
        return self.G.clamp(min=0).unsqueeze(-1) * self.A.clamp(min=0).unsqueeze(-2)


@dataclass
class Point:
    """One model's factors in numbers.

    Attributes:
        step: of training.
        loss: the mean over the examples.
        rows: the numbers, one dictionary a layer, with ``step`` and ``layer``.
        noise: what the perturbation does to pictured layers, one dictionary a factor and strength.
        factors: of pictured layers; none, where the study was read from a record.
        spectra: of all layers with whole factors.
        images: of pictured layers' factors, by layer and ``"A"`` or ``"G"``, as far as they were asked for.
        seen: what else pictures show of them, likewise.
    """

    step: int
    loss: float
    rows: list[dict[str, Any]]
    noise: list[dict[str, Any]] = field(default_factory=list)
    factors: dict[str, LayerFactors] = field(default_factory=dict)
    spectra: dict[str, Spectra] = field(default_factory=dict)
    images: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    seen: dict[tuple[str, str], Seen] = field(default_factory=dict)


@dataclass
class Study:
    """A run's factors over training.

    Attributes:
        name: of the run, for titles.
        view: how models are looked at.
        plan: what is measured.
        examples: that each point is measured on.
        pictured: names of the layers whose matrices are kept for pictures, once there is a point.
        left_out: why trainable parameters have no factors, by name.
        points: by step.
    """

    name: str
    view: View = field(default_factory=View)
    plan: Plan = field(default_factory=Plan)
    examples: int = 0
    pictured: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    _last: tuple[int, dict[str, LayerFactors]] = field(default_factory=lambda: (0, {}))

    @property
    def title(self) -> str:
        """Whose factors, of which labels and examples: no figure without it."""
        how = {"train": "training", "eval": "evaluation"}[self.view.mode]
        labels, examples = LABELS[self.view.labels], f"{self.examples} examples"
        return f"{self.name}: {labels}, {self.view.sharing}, {examples}, norms and dropout as in {how}"

    @property
    def layers(self) -> list[str]:
        """Layers that have numbers, in the model's order."""
        return list(dict.fromkeys(row["layer"] for point in self.points for row in point.rows))

    def look(
        self,
        step: int,
        model: nn.Module,
        likelihood: Likelihood,
        batches: Sequence[tuple[Tensor, Tensor]],
        fit: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Point:
        """Observe a model and measure it: the next point of training.

        Args:
            step: of training.
            model: as it is there; it is not changed.
            likelihood: of its outputs.
            batches: the examples, the same at every point.
            fit: examples on which blocks are compared with products; none: they are not.
        """
        seen = observe(model, likelihood, batches, **vars(self.view))
        if not fit:
            return self.add(step, seen)
        one, other = (observe(model, likelihood, half, samples=True, **vars(self.view)) for half in halves(fit))
        return self.add(step, seen, (one, other))

    def add(
        self, step: int, observation: Observation, parts: tuple[Observation, Observation] | None = None
    ) -> Point:
        """Measure a point of training; points come in the order of their steps.

        Args:
            step: of training.
            observation: of the model there.
            parts: with samples, of two disjoint halves of the examples: asked for how near blocks are to products.
        """
        at, before = self._last
        if not self.points:
            self.pictured = self._chosen(observation)
            self.examples = observation.examples
        point = Point(step, observation.loss, [])
        for name, factors in observation.layers.items():
            row: dict[str, Any] = {"step": step, "layer": name}
            pair = (parts[0].layers[name], parts[1].layers[name]) if parts and factors.full else None
            numbers, spectra = measure(factors, self.plan, before.get(name), pair)
            point.rows.append(row | numbers | ({"drift_from": at} if name in before else {}))
            if spectra is not None:
                point.spectra[name] = spectra
            if name in self.pictured:
                point.factors[name] = factors
        for name, factors in point.factors.items():
            if factors.full:
                point.noise += [{"step": step, "layer": name} | n for n in perturbations(factors, self.plan)]
        self._last = (step, observation.layers)
        self.left_out |= observation.left_out
        self.points.append(point)
        return point

    def _chosen(self, observation: Observation) -> list[str]:
        """The layers to picture."""
        whole = [name for name, factors in observation.layers.items() if factors.full]
        asked = self.plan.pictured
        return spread(whole, asked) if isinstance(asked, int) else [name for name in whole if re.search(asked, name)]

    def shown(self, most: int = 3) -> list[Point]:
        """The points of which matrices are pictured: the first and the last among them.

        Args:
            most: so many.
        """
        steps = spread([str(point.step) for point in self.points], most)
        return [point for point in self.points if str(point.step) in steps]

    def seeable(self, point: Point) -> list[tuple[str, str]]:
        """Which pictured layers' factors can be seen at a point, by name and ``"A"`` or ``"G"``.

        Args:
            point: of the study.
        """
        full = [name for name, factors in point.factors.items() if factors.full]
        known = {name for name, _ in (*point.images, *point.seen)}
        return [(name, key) for name in self.pictured if name in full or name in known for key in "AG"]

    def image(self, point: Point, layer: str, key: str) -> Tensor:
        """An image of a pictured layer's factor.

        Args:
            point: where.
            layer: its name.
            key: ``"A"`` or ``"G"``.
        """
        if (layer, key) not in point.images:
            point.images[layer, key] = image(getattr(point.factors[layer], key))
        return point.images[layer, key]

    def seen(self, point: Point, layer: str, key: str) -> Seen:
        """What else pictures show of it, worked out when it is first asked for.

        Args:
            point: where.
            layer: its name.
            key: ``"A"`` or ``"G"``.
        """
        if (layer, key) not in point.seen:
            matrix = getattr(point.factors[layer], key)
            point.seen[layer, key] = Seen.of(matrix, self.plan.noise, self.plan.seed)
        return point.seen[layer, key]

    def series(self, layer: str, key: str) -> tuple[list[int], list[float]]:
        """A number of one layer over training: steps and values, those left out that are not finite.

        Args:
            layer: its name.
            key: of the number.
        """
        rows = [row for point in self.points for row in point.rows if row["layer"] == layer]
        given = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        given = [(step, float(value)) for step, value in given if math.isfinite(value)]
        return [step for step, _ in given], [value for _, value in given]


def measure(
    factors: LayerFactors,
    plan: Plan,
    before: LayerFactors | None = None,
    pair: tuple[LayerFactors, LayerFactors] | None = None,
) -> tuple[dict[str, Any], Spectra | None]:
    """The numbers of one layer, as ``MEANINGS`` has them.

    Args:
        factors: of the layer.
        plan: what is asked for.
        before: its factors at the point before.
        pair: with samples, of two disjoint halves of the examples.

    Returns:
        Numbers, and the spectra; of a layer with a factor kept as its diagonal, sizes and means alone, and None.
    """
    numbers: dict[str, Any] = {
        "kind": factors.kind,
        "groups": len(factors.A),
        "columns": factors.A.shape[-1],
        "d_out": factors.G.shape[-1],
        "whole": factors.full,
    }
    means = {}
    for key, matrix in (("A", factors.A), ("G", factors.G)):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1) if matrix.dim() == 3 else matrix
        means[key] = diagonal.double().mean(-1)
        numbers[f"mean_{key}"] = float(means[key].mean())
    numbers["mean"] = float((means["A"] * means["G"]).mean())
    if not factors.full:
        return numbers, None
    bases = {}
    values = {}
    for key, matrix in (("A", factors.A), ("G", factors.G)):
        ascending, bases[key] = linalg.eigh(matrix.double())
        values[key] = ascending.flip(-1)
        numbers |= {f"{name}_{key}": number for name, number in _of_factor(matrix, values[key]).items()}
        previous = None if before is None or not before.full else getattr(before, key)
        if previous is not None and previous.shape == matrix.shape:
            numbers[f"drift_{key}"] = matrices.drift(previous, matrix)
    spectra = Spectra(values["A"], values["G"])
    numbers |= _of_product(factors, spectra, bases, plan.damping)
    numbers |= {f"kept_{k}": v for k, v in asdict(Kept.of(factors, (values["A"], values["G"]), plan.lower)).items()}
    if pair is not None:
        numbers |= {f"fit_{key}": value for key, value in asdict(Fit.between(*pair)).items()}
    return numbers, spectra


def _of_factor(matrix: Tensor, eigenvalues: Tensor) -> dict[str, Any]:
    discs = matrices.Discs.of(matrix)
    low, high = discs.bounds
    ratios = matrices.dominance(matrix)
    return {
        "largest": float(eigenvalues.max()),
        "smallest": float(eigenvalues.min()),
        "rank": matrices.rank(eigenvalues, matrix.dtype),
        "condition": matrices.condition(eigenvalues, precision=matrix.dtype),
        "participation": matrices.participation(eigenvalues),
        "dominance": float(ratios.nanmedian()),
        "dominant": float((ratios > 1).double().mean()),
        "diagonal": matrices.diagonal_share(matrix),
        "gershgorin_low": low,
        "gershgorin_high": high,
        "contained": float(discs.contain(eigenvalues.flatten()).double().mean()),
        "ridge": matrices.ridge_share(matrix),
        "snr": noise.snr(matrix, matrix),
    }


def _of_product(
    factors: LayerFactors, spectra: Spectra, bases: Mapping[str, Tensor], damping: float
) -> dict[str, float]:
    """What damping meets in ``G (x) A``, and in the gradient seen in its eigenbasis."""
    product = spectra.product
    within = [s.clamp(min=0) for s in (spectra.A, spectra.G)]
    resolved = [v > matrices.resolution(v, factors.A.dtype) for v in within]
    seen = (resolved[1].unsqueeze(-1) & resolved[0].unsqueeze(-2)).double().mean()
    curvature = product.flip(-1, -2)  # in the order of the bases
    rotated = bases["G"].mT @ factors.gradient.double() @ bases["A"]
    energy = rotated.square()
    direction = rotated / (curvature + damping)
    length, whole = float(direction.norm()), float(rotated.norm())
    conditions = [matrices.condition(v, precision=factors.A.dtype) for v in (spectra.A, spectra.G)]
    return {
        "condition": conditions[0] * conditions[1],
        "condition_damped": (float(product.max()) + damping) / (float(product.min()) + damping),
        "dimension": matrices.dimension(product, damping) / product.numel(),
        "above": float((product > damping).double().mean()),
        "zero": 1 - float(seen),
        "gradient_above": float(energy[curvature > damping].sum() / energy.sum()) if whole > 0 else math.nan,
        "amplified": damping * length / whole if whole > 0 else math.nan,
        "relative_step": length / factors.size if factors.size > 0 else math.nan,
    }


def perturbations(factors: LayerFactors, plan: Plan) -> list[dict[str, Any]]:
    """What the study's noise does to both factors of a layer, a dictionary a factor and strength.

    Args:
        factors: whole ones.
        plan: its noise and seed.
    """
    rows = []
    for key, matrix in (("A", factors.A), ("G", factors.G)):
        for strength in plan.noise:
            found = noise.Perturbation.of(matrix, strength * noise.unit(matrix), plan.seed)
            low, high = matrices.Discs.of(found.matrix).bounds
            rows.append({
                "factor": key, "relative_sigma": strength, "sigma": found.sigma, "snr": found.snr,
                "change": found.change, "reach": found.reach, "negative": found.negative,
                "largest": float(found.eigenvalues.max()), "smallest": float(found.eigenvalues.min()),
                "gershgorin_low": low, "gershgorin_high": high,
            })  # fmt: skip
    return rows


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many names, the first and the last among them and the others evenly between.

    Args:
        names: in order.
        most: at least 1.
    """
    if len(names) <= most:
        return list(names)
    if most == 1:
        return [names[-1]]
    at = torch.linspace(0, len(names) - 1, most).round().long().tolist()
    return [names[i] for i in at]
