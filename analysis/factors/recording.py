"""A study as a record: all its numbers and all that its pictures are drawn from, without the matrices themselves."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from analysis.factors import matrices
from analysis.factors.observing import View
from analysis.factors.seen import DECADES, Noisy, Seen
from analysis.factors.study import MEANINGS, Plan, Point, Spectra, Study
from training.errors import UserError
from training.runs.folder import plain

#: Digits of numbers of pictures, and shades of a decade.
DIGITS, SHADES = 4, 32


def numbers(study: Study) -> dict[str, Any]:
    """All numbers of a study, with what they mean.

    Args:
        study: of one run.
    """
    return {
        "run": study.name,
        "labels": study.view.labels,
        "sharing": study.view.sharing,
        "mode": study.view.mode,
        "examples": study.examples,
        "damping": study.plan.damping,
        "Lambda": study.plan.lower,
        "noise": list(study.plan.noise),
        "seed": study.view.seed,
        "precision": str(study.view.dtype or "the model's").removeprefix("torch."),
        "meanings": MEANINGS,
        "left_out": study.left_out,
        "points": [{"step": p.step, "loss": p.loss, "layers": p.rows, "noise": p.noise} for p in study.points],
    }


def to_record(study: Study, drawn: bool = True) -> str:
    """A study as JSON in one line; numbers that are infinite or undefined are null.

    Args:
        study: of one run.
        drawn: with what pictures of matrices and spectra are drawn from, not only the numbers.
    """
    record = numbers(study)
    if drawn:
        record["pictured"] = study.pictured
        shown = {point.step for point in study.shown()}
        for point, entry in zip(study.points, record["points"], strict=True):
            ends = point.step in (study.points[0].step, study.points[-1].step)
            entry["spectra"] = {
                name: {"A": _listed(own.A), "G": _listed(own.G)}
                for name, own in point.spectra.items() if ends or name in study.pictured
            }  # fmt: skip
            entry["images"] = {} if point.step not in shown else _by_layer(
                {(name, key): _shades(study.image(point, name, key)) for name, key in study.seeable(point)}
            )  # fmt: skip
            entry["seen"] = {} if point.step != study.points[-1].step else _by_layer(
                {(name, key): _told(study.seen(point, name, key)) for name, key in study.seeable(point)}
            )  # fmt: skip
    return json.dumps(plain(record), ensure_ascii=False) + "\n"


def from_record(text: str) -> Study:
    """A study whose pictures are those of the one that was written; it has no matrices.

    Args:
        text: of the record.

    Raises:
        UserError: it is none.
    """
    try:
        record = json.loads(text)
        view = View(record["labels"], record["sharing"], None, record["mode"], seed=record["seed"])
        plan = Plan(record["damping"], record["Lambda"], tuple(record["noise"]), record["seed"])
        study = Study(record["run"], view, plan, record["examples"], record.get("pictured", []), record["left_out"])
        study.points += [_point(entry) for entry in record["points"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"this is no record of factors ({error})") from error
    return study


def _point(entry: dict[str, Any]) -> Point:
    point = Point(entry["step"], entry["loss"], entry["layers"], entry["noise"])
    for name, own in entry.get("spectra", {}).items():
        point.spectra[name] = Spectra(_tensor(own["A"]), _tensor(own["G"]))
    for name, own in entry.get("images", {}).items():
        point.images |= {(name, key): -_tensor(shades) / SHADES for key, shades in own.items()}
    for name, own in entry.get("seen", {}).items():
        point.seen |= {(name, key): _read(values) for key, values in own.items()}
    return point


def _told(seen: Seen) -> dict[str, Any]:
    return {
        "centres": _listed(seen.discs.centres), "radii": _listed(seen.discs.radii), "snr": seen.snr,
        "noisy": [[it.strength, it.snr, _listed(it.eigenvalues)] for it in seen.noisy],
        "field": _shades(seen.field), "noisy_field": _shades(seen.noisy_field),
    }  # fmt: skip


def _read(values: dict[str, Any]) -> Seen:
    discs = matrices.Discs(_tensor(values["centres"]), _tensor(values["radii"]))
    noisy = tuple(Noisy(strength, snr, _tensor(eigenvalues)) for strength, snr, eigenvalues in values["noisy"])
    field, noisy_field = (-_tensor(values[key]) / SHADES for key in ("field", "noisy_field"))
    return Seen(discs, values["snr"], noisy, field, noisy_field)


def _by_layer(found: dict[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for (name, key), value in found.items():
        layers.setdefault(name, {})[key] = value
    return layers


def _listed(values: Tensor) -> Any:
    if values.dim() > 1:
        return [_listed(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def _shades(image: Tensor) -> list[list[int]]:
    shades: list[list[int]] = (-image * SHADES).round().clamp(0, DECADES * SHADES).to(torch.int64).tolist()
    return shades


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
