"""A study as files: its numbers as JSON and as a table, its pictures as PNG."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from analysis import pages
from analysis.factors import fields, figures
from analysis.factors.recording import numbers, to_record
from analysis.factors.study import Study
from training.runs.folder import atomic_file, plain

#: Columns of the table: key and heading.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("layer", "layer"), ("columns", "d(A)"), ("d_out", "d(G)"), ("mean_A", "mean A"), ("mean_G", "mean G"),
    ("participation_A", "count A"), ("participation_G", "count G"), ("condition_damped", "condition + λ"),
    ("dimension", "dimension"), ("above", "above λ"), ("zero", "zero"), ("diagonal_A", "diag A"),
    ("diagonal_G", "diag G"), ("dominance_A", "dom. A"), ("dominance_G", "dom. G"), ("kept_frobenius", "kept"),
    ("kept_cosine", "cos SGD"), ("fit_cosine", "cos F"), ("fit_shared", "shift"), ("drift_G", "drift G"),
)  # fmt: skip
#: Those that a terminal has room for.
SHORT = (
    "layer", "columns", "d_out", "mean_A", "mean_G", "participation_A", "participation_G", "dimension", "zero",
    "diagonal_A", "diagonal_G", "kept_frobenius", "kept_cosine", "fit_cosine",
)  # fmt: skip


def to_json(study: Study) -> str:
    """All numbers, with what they mean; numbers that are infinite or undefined are null.

    Args:
        study: of one run.
    """
    return json.dumps(plain(numbers(study)), indent=1, ensure_ascii=False) + "\n"


def table(
    study: Study, step: int | None = None, keys: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the numbers at one point, a line a layer, without columns that nothing was measured of.

    Args:
        study: of one run.
        step: of the point; None: the last.
        keys: of the columns; None: all that are in ``factors.md``.
    """
    point = study.points[-1] if step is None else next(point for point in study.points if point.step == step)
    asked = [(key, head) for key, head in COLUMNS if keys is None or key in keys]
    shown = [(key, head) for key, head in asked if any(row.get(key) is not None for row in point.rows)]
    return [head for _, head in shown], [[cell(row.get(key)) for key, _ in shown] for row in point.rows]


def cell(value: Any) -> str:
    """A number in three digits."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if math.isfinite(value) else {math.inf: "∞", -math.inf: "-∞"}.get(value, "–")


def to_markdown(study: Study) -> str:
    """The numbers of the first and the last point as tables, and what is left out.

    Args:
        study: of one run.
    """
    lines = [f"# Kronecker factors of {study.name}", "", f"{study.title}.", ""]
    for point in dict.fromkeys((study.points[0].step, study.points[-1].step)):
        header, rows = table(study, point)
        lines += [f"After {point} steps:", "", pages.table(header, rows)]
    heads = {
        "mean": "mean eigenvalue", "count": "(sum of eigenvalues)² / sum of squares", "diag":
        "the diagonal's share of the squared Frobenius norm", "dom.": "median of |m_ii| / sum of |m_ij|",
        "dimension": f"effective dimension at λ = {study.plan.damping:g} over the number of directions",
        "zero": "directions whose curvature cannot be told from zero", "kept":
        "AdaFisher's diagonal's share of |G ⊗ A|²", "cos SGD": "of AdaFisher's direction and the gradient", "cos F":
        "of the Fisher block and G ⊗ A", "shift":
        "true curvature of a shift of all positions over K-FAC's", "drift": "|now - before| / |now|",
    }  # fmt: skip
    lines += ["; ".join(f"*{head}*: {text}" for head, text in heads.items()) + ". All of them: factors.json.", ""]
    for name, why in study.left_out.items():
        lines.append(f"- without factors: {name or '(root)'} ({why})")
    return "\n".join(lines).rstrip() + "\n"


def pictures(study: Study) -> Iterator[tuple[str, Figure]]:
    """The pictures of a study, one after the other.

    Args:
        study: of one run.

    Yields:
        A name, and the figure.
    """
    yield "over_training", figures.over_training(study, study.pictured)
    yield "curvature", figures.curvature(study)
    yield "spectra", figures.spectra(study)
    yield "heat_maps", fields.heat_maps(study)
    yield "gershgorin", fields.gershgorin(study)
    yield "noise", fields.noise_spectra(study)
    yield "fourier", fields.fourier_fields(study)
    yield "adafisher", fields.adafisher(study)


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: any.
        path: of the file.
        dpi: dots an inch.

    Raises:
        WriteError: it cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the bytes
    with atomic_file(path) as file:
        picture.save(file, format="png", optimize=True)


def save(study: Study, folder: Path, dpi: int = 100) -> list[str]:
    """Write ``factors.json``, ``factors.md``, ``study.json``, which pictures can be drawn from again, and the pictures.

    Args:
        study: of one run.
        folder: that is there.
        dpi: of the pictures.

    Returns:
        Names of the files.

    Raises:
        WriteError: something cannot be written.
    """
    texts = {"factors.json": to_json(study), "factors.md": to_markdown(study), "study.json": to_record(study)}
    for name, text in texts.items():
        with atomic_file(folder / name) as file:
            file.write(text.encode())
    names = list(texts)
    for name, figure in pictures(study):
        save_figure(figure, folder / f"{name}.png", dpi)
        names.append(f"{name}.png")
    return names
