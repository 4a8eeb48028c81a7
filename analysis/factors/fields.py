"""Pictures of the matrices themselves: heat maps, Gershgorin's discs, noise, Fourier fields, AdaFisher's diagonals."""

from __future__ import annotations

import math

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.factors import matrices
from analysis.factors.figures import below, colours, layer_grid, plain, point_of
from analysis.factors.seen import DECADES
from analysis.factors.study import Study
from training.show.curves import GREY

#: Of a decade, how many steps heat maps tell apart.
STEPS = 4
#: What the axis of spectra beside diagonals ends at.
LEAST = 1e-7
BLUE, RED, GREEN = "#4477aa", "#cc6677", "#228833"


def _pictured(study: Study) -> list[str]:
    return [name for name in study.pictured if point_of(study, name) is not None]


def _image(axes: Axes, shown: Tensor, title: str, colormap: str) -> None:
    """An image of a matrix's entries, in decades below the largest."""
    # "auto": means, where there are fewer pixels than entries
    levels = matplotlib.colormaps[colormap].resampled(int(DECADES * STEPS))
    picture = axes.imshow(
        shown.numpy(), cmap=levels, vmin=-DECADES, vmax=0, interpolation="auto", interpolation_stage="data"
    )
    axes.set_title(title, fontsize="small", loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    bar = axes.figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.02)
    bar.ax.tick_params(labelsize="x-small")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))


def heat_maps(study: Study, most: int = 3) -> Figure:
    """``|A|`` and ``|G|`` of the pictured layers as they change, a row a factor, in decades below the largest entry.

    Args:
        study: of one run.
        most: points of training, at most.
    """
    names = _pictured(study)
    points = study.shown(most)
    rows = [f"{key} {name}" for name in names for key in "AG"]
    title = f"{study.title}; log10 of |entry| over the largest"
    figure, grid = layer_grid(rows, len(points) or 1, title, width=2.9 * max(len(points), 1), height=2.5)
    for axes_row, label in zip(grid, rows, strict=True):
        key, _, name = label.partition(" ")
        for axes, point in zip(axes_row, points, strict=True):
            if (name, key) in study.seeable(point):
                said = f"{key} of {name}, step {point.step}" if axes is axes_row[0] else f"step {point.step}"
                _image(axes, study.image(point, name, key), said, "magma")
            else:
                axes.set_axis_off()
    return figure


def gershgorin(study: Study) -> Figure:
    """Discs in the complex plane and true eigenvalues, of the pictured layers at the last point."""
    names = _pictured(study)
    figure, grid = layer_grid(names, 2, f"{study.title}; Gershgorin's discs", width=9, height=2.7)
    for axes_row, name in zip(grid, names, strict=True):
        point = point_of(study, name)
        assert point is not None
        for axes, key in zip(axes_row, "AG", strict=True):
            discs, values = study.seen(point, name, key).discs, getattr(point.spectra[name], key).flatten()
            _discs(axes, discs)
            axes.plot(values.tolist(), [0.0] * len(values), "|", color=RED, markersize=9, mew=1)
            low, high = discs.bounds
            for bound in (low, high):
                axes.axvline(bound, color=GREY, linestyle="--", linewidth=1)
            axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
            reach = float(discs.radii.max()) or 1.0
            axes.set_ylim(-1.1 * reach, 1.1 * reach)
            plain(axes, "", f"{key} of {name}, step {point.step}: largest {float(values.max()):.2g}, bound {high:.2g}")
    handles = [
        Line2D([], [], color=BLUE, marker="o", mfc="none", linestyle="", label="discs"),
        Line2D([], [], color=RED, marker="|", linestyle="", label="eigenvalues"),
        Line2D([], [], color=GREY, linestyle="--", label="bounds"),
    ]
    below(figure, handles, 3)
    return figure


def _discs(axes: Axes, discs: matrices.Discs) -> None:
    centres = torch.stack([discs.centres, torch.zeros_like(discs.centres)], dim=1)
    sizes = (2 * discs.radii).numpy()
    alpha = max(0.08, min(0.6, 20 / len(sizes)))
    circles = EllipseCollection(
        sizes, sizes, torch.zeros(len(sizes)).numpy(), units="xy", offsets=centres.numpy(),
        offset_transform=axes.transData, facecolors="none", edgecolors=BLUE, linewidths=0.8, alpha=alpha,
    )  # fmt: skip
    axes.add_collection(circles)
    axes.plot(discs.centres.tolist(), [0.0] * len(sizes), ".", color=BLUE, markersize=2)


def noise_spectra(study: Study) -> Figure:
    """Eigenvalues of the pictured layers' factors with noise off the diagonal, at the last point."""
    names = _pictured(study)
    title = f"{study.title}; noise off the diagonal, in units of the diagonal's root mean square"
    figure, grid = layer_grid(names, 2, title, width=9, height=2.8)
    palette = colours(len(study.plan.noise))
    for axes_row, name in zip(grid, names, strict=True):
        point = point_of(study, name)
        assert point is not None
        for axes, key in zip(axes_row, "AG", strict=True):
            own, seen = getattr(point.spectra[name], key), study.seen(point, name, key)
            scale = float(own.max()) or 1.0
            for found, colour in zip(seen.noisy, palette, strict=True):
                _sorted(axes, found.eigenvalues / scale, colour, f"σ {found.strength:g}: {found.snr:.1f} dB")
            _sorted(axes, own / scale, "black", f"none: {seen.snr:.1f} dB")
            axes.set_yscale("symlog", linthresh=1e-4)
            axes.axhline(0, color=GREY, linewidth=0.8)
            foot = "eigenvalue, from the largest" if axes_row is grid[-1] else ""
            plain(axes, foot, f"{key} of {name}, over its largest")
            axes.legend(fontsize="x-small", frameon=False)
    return figure


def _sorted(axes: Axes, values: Tensor, colour: str, label: str, least: float = -math.inf) -> None:
    """Values by their place, the largest first, as far as they are above something."""
    ordered = values.flatten().sort(descending=True).values
    ordered = ordered[ordered > least]
    axes.plot(range(1, len(ordered) + 1), ordered.tolist(), color=colour, linewidth=1.2, label=label)


def fourier_fields(study: Study) -> Figure:
    """Fourier fields of the pictured layers' factors without and with the strongest noise, at the last point."""
    names = _pictured(study)
    strength = max(study.plan.noise)
    title = f"{study.title}; Fourier fields, log10 of |coefficient| over the largest; noise σ {strength:g}"
    figure, grid = layer_grid(names, 4, title, width=11, height=2.5)
    for axes_row, name in zip(grid, names, strict=True):
        point = point_of(study, name)
        assert point is not None
        for (plain_axes, noisy_axes), key in zip((axes_row[:2], axes_row[2:]), "AG", strict=True):
            seen = study.seen(point, name, key)
            said = f"{key} of {name}, step {point.step}" if key == "A" else key
            _image(plain_axes, seen.field, said, "viridis")
            strongest = next(found for found in seen.noisy if found.strength == strength)
            _image(noisy_axes, seen.noisy_field, f"{key}, {strongest.snr:.1f} dB", "viridis")
    return figure


def adafisher(study: Study) -> Figure:
    """What AdaFisher keeps of the pictured layers: diagonals beside spectra, and shares over training."""
    names = _pictured(study)
    title = f"{study.title}; what AdaFisher keeps (Λ {study.plan.lower:g})"
    figure, grid = layer_grid(names, 3, title, width=11, height=2.8)
    shares = {
        "kept_frobenius": ("|G ⊗ A|² on the diagonal", BLUE),
        "kept_damped": ("entries of F̃ that Λ rules", RED),
        "kept_cosine": ("cosine with the gradient", GREEN),
    }
    for axes_row, name in zip(grid, names, strict=True):
        point = point_of(study, name)
        assert point is not None
        for axes, key in zip(axes_row, "AG", strict=False):
            values, diagonal = getattr(point.spectra[name], key), study.seen(point, name, key).discs.centres
            scale = float(values.max()) or 1.0
            _sorted(axes, values / scale, "black", "eigenvalues", LEAST)
            _sorted(axes, diagonal / scale, BLUE, "diagonal", LEAST)
            low, high = torch.aminmax(diagonal)
            scaled = (diagonal - low) / (high - low if high > low else 1.0)
            _sorted(axes, scaled, RED, "diagonal, min-max", LEAST)
            axes.set_yscale("log")
            axes.set_ylim(LEAST, 3)
            foot = "entry, from the largest" if axes_row is grid[-1] else ""
            plain(axes, foot, f"{key} of {name}, step {point.step}")
        for key, (label, colour) in shares.items():
            axes_row[2].plot(*study.series(name, key), "o-", color=colour, linewidth=1.5, markersize=3, label=label)
        axes_row[2].set_ylim(0, 1.03)
        plain(axes_row[2], "step" if axes_row is grid[-1] else "", "shares over training")
        axes_row[2].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if names:
        for axes in (grid[0][0], grid[0][2]):
            axes.legend(fontsize="x-small", frameon=False)
    return figure
