"""Pictures of loss surfaces: lines, contours with a view of the surface, and the ways of runs over contours."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LightSource, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from analysis.compare.figures import PALETTE
from analysis.landscape.surface import Surface
from training.show.curves import GREY, log_axis

COLOURS = "viridis"
# Under ways, colours end at so many times the largest value that these have met.
BEYOND = 3
# A logarithmic scale from this ratio of the largest to the smallest value on.
LOG_RANGE = 10


def plot(surfaces: Sequence[Surface], metric: str = "loss") -> Figure:
    """The picture of some surfaces of one kind.

    Lines share one panel. Of a surface without ways there are contours and a view, a row each, in the same colours. Of
    one with ways there are contours with the ways over them, and beside them what snapshots lose and what the plane
    does where they are projected to.

    Args:
        surfaces: all lines, or all planes.
        metric: of those that were measured.

    Raises:
        ValueError: there is no such metric.
    """
    for surface in surfaces:
        surface.metric(metric)
    if not len(surfaces[0].y):
        return _lines(surfaces, metric)
    rows = len(surfaces)
    figure = Figure(figsize=(12, 4.9 * rows + 0.2), layout="constrained")
    norm = _norm(np.concatenate([_shown(s, metric) for s in surfaces]))
    for row, surface in enumerate(surfaces):
        left = figure.add_subplot(rows, 2, 2 * row + 1)
        _contours(left, surface, metric, norm)
        if surface.tracks:
            _draw_tracks(left, surface)
            _along(figure.add_subplot(rows, 2, 2 * row + 2), surface, metric)
        else:
            _view(figure.add_subplot(rows, 2, 2 * row + 2, projection="3d"), surface, metric, norm)
        left.set_title(_title(surface, metric), fontsize=9, loc="left")
    return figure


def _title(surface: Surface, metric: str) -> str:
    lines = [f"{metric} {surface.title}", *surface.notes]
    return "\n".join(line for text in (lines[0], "; ".join(lines[1:])) for line in textwrap.wrap(text, 84))


def _shown(surface: Surface, metric: str) -> np.ndarray:
    """The values that colours are for; under ways, none that is far above all that these have met."""
    values = surface.metric(metric).ravel()
    met = [v for track in surface.tracks for v in (*track.true[metric], *track.projected[metric]) if np.isfinite(v)]
    return values[values <= BEYOND * max(met)] if met and max(met) > 0 else values


def _norm(values: np.ndarray) -> Normalize:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Normalize(0, 1)
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high / low > LOG_RANGE:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1)


def _levels(norm: Normalize, count: int) -> np.ndarray:
    assert norm.vmin is not None and norm.vmax is not None
    if isinstance(norm, LogNorm):
        return np.geomspace(norm.vmin, norm.vmax, count)
    return np.linspace(norm.vmin, norm.vmax, count)


def _lines(surfaces: Sequence[Surface], metric: str) -> Figure:
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for surface, colour in zip(surfaces, _cycled(len(surfaces)), strict=True):
        axes.plot(surface.x, surface.metric(metric), color=colour, linewidth=1.8, label=surface.title)
    values = np.concatenate([surface.metric(metric) for surface in surfaces])
    if isinstance(_norm(values), LogNorm):
        log_axis(axes)
    _dress(axes, surfaces[0].axes[0], metric)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize="small")
    axes.set_title("\n".join(textwrap.wrap("; ".join(surfaces[0].notes), 100)), fontsize=9, loc="left")
    return figure


def _contours(axes: Axes, surface: Surface, metric: str, norm: Normalize) -> None:
    assert norm.vmax is not None
    values = np.ma.masked_invalid(surface.metric(metric))
    beyond: Literal["max", "neither"] = "max" if values.max() > norm.vmax else "neither"
    levels = _levels(norm, 33)
    filled = axes.contourf(surface.x, surface.y, values, levels=levels, norm=norm, cmap=COLOURS, extend=beyond)
    filled.set_edgecolor("face")
    axes.contour(surface.x, surface.y, values, levels=_levels(norm, 17), colors="white", linewidths=0.4, alpha=0.55)
    ticks = MaxNLocator(6) if not isinstance(norm, LogNorm) else LogLocator(subs=(1, 2, 5) if _few(norm) else (1,))
    bar = axes.figure.colorbar(filled, ax=axes, pad=0.02, shrink=0.9, ticks=ticks, format=FuncFormatter(_short))
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.set_label(metric)
    axes.set_xlabel(surface.axes[0])
    axes.set_ylabel(surface.axes[1])
    axes.set_aspect("equal" if not surface.tracks else "auto")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _few(norm: Normalize) -> bool:
    assert norm.vmin is not None and norm.vmax is not None
    return norm.vmax / norm.vmin < 1000


def _short(value: float, _: Any) -> str:
    return f"{value:g}"


def _view(axes: Any, surface: Surface, metric: str, norm: Normalize) -> None:
    """The surface from aside, in the colours of its contours, with light on it."""
    assert norm.vmin is not None and norm.vmax is not None
    finite = np.nan_to_num(surface.metric(metric), nan=norm.vmax, posinf=norm.vmax, neginf=norm.vmin)
    height = np.log10(finite) if isinstance(norm, LogNorm) else finite
    x, y = np.meshgrid(surface.x, surface.y)
    light = LightSource(azdeg=315, altdeg=50)
    scaled = Normalize(height.min(), height.max() if height.max() > height.min() else height.min() + 1)
    colours = light.shade_rgb(
        matplotlib.colormaps[COLOURS](norm(finite))[..., :3], scaled(height).data, blend_mode="soft", vert_exag=12
    )
    axes.plot_surface(x, y, height, facecolors=colours, rcount=len(surface.y), ccount=len(surface.x),
                      linewidth=0, antialiased=False, shade=False)  # fmt: skip
    axes.set(xlabel=surface.axes[0], ylabel=surface.axes[1])
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    if isinstance(norm, LogNorm):
        axes.zaxis.set_major_locator(MaxNLocator(5))
        axes.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.2g}"))
    axes.set_zlabel(metric, fontsize=8)
    axes.view_init(elev=32, azim=-58)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0.96, 0.96, 0.96, 1.0))


def _draw_tracks(axes: Axes, surface: Surface) -> None:
    handles = []
    for track, colour in zip(surface.tracks, _cycled(len(surface.tracks)), strict=True):
        x, y = track.coordinates.T
        axes.plot(x, y, color="white", linewidth=3.2, alpha=0.8, zorder=3)
        axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3.2, mec="white", mew=0.4, zorder=4)
        axes.plot(x[-1], y[-1], "D", mfc=colour, mec="white", mew=1.0, markersize=8, zorder=6)
        handles.append(Line2D([], [], color=colour, marker="D", markersize=5, label=track.label))
    for track in surface.tracks:
        axes.plot(*track.coordinates[0], "o", mfc="white", mec="black", markersize=6, zorder=5)
    handles.append(Line2D([], [], color="none", marker="o", mfc="white", mec="black", markersize=6, label="start"))
    axes.legend(handles=handles, loc="best", fontsize="small", framealpha=0.85, edgecolor="none")


def _along(axes: Axes, surface: Surface, metric: str) -> None:
    """What snapshots lose, and what the plane does at their projections, by step."""
    drawn = []
    for track, colour in zip(surface.tracks, _cycled(len(surface.tracks)), strict=True):
        axes.plot(track.steps, track.true[metric], color=colour, linewidth=1.8)
        axes.plot(track.steps, track.projected[metric], color=colour, linewidth=1.1, linestyle=(0, (3, 2)))
        drawn += [track.true[metric], track.projected[metric]]
    if isinstance(_norm(np.concatenate(drawn)), LogNorm):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
    _dress(axes, "step", metric)
    axes.set_xlim(left=0)
    marks = [
        Line2D([], [], color=GREY, linewidth=1.8, label="the snapshot itself"),
        Line2D([], [], color=GREY, linewidth=1.1, linestyle=(0, (3, 2)), label="the plane, where it is projected to"),
    ]
    axes.legend(handles=marks, fontsize="small", framealpha=0.9, edgecolor="none")
    ends = ", ".join(f"{track.label} {track.cosine[-1]:.2f}" for track in surface.tracks)
    text = f"cosine with the plane, of the way from its origin to the last snapshot: {ends}"
    axes.set_title("\n".join(textwrap.wrap(text, 68)), fontsize=9, loc="left")


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _cycled(count: int) -> list[str]:
    return [PALETTE[k % len(PALETTE)] for k in range(count)]


