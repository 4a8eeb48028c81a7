"""The table of a model's layers, and what training it is forecast to hold and take, in eighty columns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from models.summary import LayerSummary, amount
from optimizers.base import Coverage
from optimizers.forecast import Forecast

#: Of the whole table; and the widths that names and kinds are cut to.
WIDTH = 80
NAME, KIND, SHORTEST = 40, 24, 12

#: What parts of a step are called: what they do, every so many steps.
PARTS = {
    "step": "in every step",
    "update": "statistics",
    "refresh": "inverses",
}


def layer_table(layers: Sequence[LayerSummary], coverage: Coverage | None = None) -> str:
    """A line a layer: its name, class, output, parameters, multiply-adds, and its curvature where there is a choice.

    Args:
        layers: of the model.
        coverage: of the optimizer; None: it keeps no curvature.
    """
    covers = {} if coverage is None else covering(layers, coverage)
    titles = ["layer", "type", "output", "parameters", "mult-adds", *(["curvature"] if covers else [])]
    reasons: list[str] = []
    lines = []
    for layer in layers:
        output = "×".join(map(str, layer.output[1:])) or ("1" if layer.output else "-")
        line = [
            _cut(layer.name or "(root)", NAME), _cut(layer.kind, KIND), output,
            f"{layer.parameters:,}", amount(layer.multiply_adds) if layer.multiply_adds else "-",
        ]  # fmt: skip
        if covers:
            line.append(_curvature(covers.get(layer.name, []), reasons))
        lines.append(line)
    aligned = "<<>>><" if covers else "<<>>>"
    excess = max(map(len, columns([titles, *lines], aligned))) - WIDTH
    if excess > 0:  # at the cost of names, then of types
        room = max(SHORTEST, max(len(line[0]) for line in lines) - excess)
        lines = [[_cut(line[0], room), *line[1:]] for line in lines]
        excess = max(map(len, columns([titles, *lines], aligned))) - WIDTH
    if excess > 0:
        room = max(SHORTEST, max(len(line[1]) for line in lines) - excess)
        lines = [[line[0], line[1][:room], *line[2:]] for line in lines]
    table = columns([titles, *lines], aligned)
    table.insert(1, "-" * min(max(map(len, table)), WIDTH))
    notes = [_wrapped(f"  [{i}] fallback: {reason}", "      ") for i, reason in enumerate(reasons, 1)]
    return "\n".join([*table, *notes])


def covering(layers: Sequence[LayerSummary], coverage: Coverage) -> dict[str, list[tuple[str, str]]]:
    """Lines of a coverage, method and factors, by the layer that they are of.

    Args:
        layers: of the model.
        coverage: of modules, and of single parameters.
    """
    names = {layer.name for layer in layers}
    found: dict[str, list[tuple[str, str]]] = {}
    for module, method, factors, _, _ in coverage.rows:
        name = "" if module == "(root)" else module
        while name not in names and name:
            name = name.rpartition(".")[0]
        found.setdefault(name, []).append((method, factors))
    return found


def _curvature(rows: Sequence[tuple[str, str]], reasons: list[str]) -> str:
    """What a layer has, with its factors' sizes; a fallback's reason by its number."""
    words: list[str] = []
    for method, factors in rows:
        if method.startswith("fallback"):
            reason = method.partition(": ")[2] or "none"
            if reason not in reasons:
                reasons.append(reason)
            words.append(f"fallback [{reasons.index(reason) + 1}]")
        else:
            words.append(short_factors(factors) or method)
    return ", ".join(dict.fromkeys(words)) or "-"


def short_factors(factors: str) -> str:
    """Shapes of factors as a table has room for, alike ones together: ``A,C 577² G,D 64²``.

    Bases and moments, which follow from these, are left out.

    Args:
        factors: as ``coverage`` has them, such as ``A[1, 577, 577] G[1, 64, 64]``.
    """
    keys: dict[str, list[str]] = {}
    for key, shape in re.findall(r"(\w+)\[([\d, ]*)\]", factors):
        sizes = [int(n) for n in shape.split(",") if n.strip()]
        if key.startswith("U_") or (key == "S" and keys):
            continue
        groups = f"{sizes[0]}·" if len(sizes) > 1 and sizes[0] > 1 else ""
        own = sizes[1:] if len(sizes) > 1 else sizes
        square = len(own) == 2 and own[0] == own[1]
        size = f"{groups}{own[0]}²" if square else f"{groups}{'×'.join(map(str, own))}"
        keys.setdefault(size, []).append(key)
    return " ".join(f"{','.join(names)} {size}" for size, names in keys.items())


def totals(layers: Sequence[LayerSummary], coverage: Coverage | None = None) -> str:
    """The sums of a table.

    Args:
        layers: of the model.
        coverage: of the optimizer; None: it keeps no curvature.
    """
    parameters = sum(layer.parameters for layer in layers)
    frozen = parameters - sum(layer.trained for layer in layers)
    still = f", {frozen:,} of them not trained" if frozen else ""
    made = amount(sum(layer.multiply_adds for layer in layers))
    lines = [
        f"{parameters:,} parameters{still}; {made} multiply-adds an example, forward: those of products, convolutions "
        "and attention's two products."
    ]
    if coverage is not None:
        lines.append(f"{coverage.fraction:.1%} of the trained parameters are under curvature.")
    return "\n".join(_wrapped(line) for line in lines)


def forecast_text(found: Forecast, name: str, batch_size: int) -> str:
    """What training is forecast to hold and take.

    Args:
        found: the forecast.
        name: of the optimizer.
        batch_size: examples a step.
    """
    state = ", ".join(f"{kind} {amount(size, 'B')}" for kind, size in found.state.items())
    memory = [
        ["parameters", amount(found.parameters, "B"), ""],
        ["buffers", amount(found.buffers, "B"), ""],
        ["gradients", amount(found.gradients, "B"), ""],
        [f"state of {name}", amount(found.held, "B"), f"{found.held:,} bytes" + (f": {state}" if state else "")],
        *([["", "", f"and at most {found.optional:,} more, where numbers ask for it"]] if found.optional else []),
        ["kept for the backward pass", amount(found.saved, "B"), f"batch of {batch_size}"],
    ]
    lines = ["memory", *columns(memory, "<><", indent="  "), ""]
    if found.passes is None:
        lines.append("step: seconds are forecast on processors alone (trainer.device=cpu)")
        return "\n".join([_wrapped(line, "    ") for line in lines] + [_wrapped(note) for note in found.notes])
    cost = [["forward and backward pass", _seconds(found.passes), "measured"]]
    for part, seconds in found.parts.items():
        every = found.intervals.get(part)
        words = PARTS.get(part, part) if every is None else f"{PARTS.get(part, part)}, every {every} steps"
        told = "of an average step" if every else "by steps of a copy" if found.tried else "by its operations"
        cost.append([f"{name}: {words}", _seconds(seconds), told])
    unit = _seconds(found.passes + found.sgd)
    cost.append(["an average step", _seconds(found.step), f"{found.ratio:.2f} times SGD's, {unit}"])
    lines += ["step", *columns(cost, "<><", indent="  ")]
    return "\n".join([_wrapped(line, "    ") for line in lines] + [_wrapped(note) for note in found.notes])


def columns(lines: Sequence[Sequence[str]], aligned: str, indent: str = "") -> list[str]:
    """Lines of cells below each other.

    Args:
        lines: of as many cells each.
        aligned: ``<`` or ``>`` for each column.
        indent: before each line.
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    made = []
    for line in lines:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)]
        made.append((indent + "  ".join(cells)).rstrip())
    return made


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _cut(text: str, width: int) -> str:
    """The end of a long name, which tells it from its neighbours."""
    return text if len(text) <= width else "…" + text[-(width - 1) :]


def _wrapped(line: str, indent: str = "") -> str:
    """A long line in several."""
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True)
