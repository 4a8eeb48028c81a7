"""What was found of every layer, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..tables import aligned


@dataclass
class LayerCheck:
    """What was found of a layer.

    Attributes:
        module: its name in the model.
        kind: its type.
        curvature: what is kept of it; "" where nothing is.
        reproduced: relative error of the sum over examples against the gradient of its parameters, the worst of them.
        apart: the largest relative error of a single example's gradient.
        distance: of its block from the Fisher block that the examples' gradients make, relative, in the Frobenius norm;
            of a diagonal from the diagonal. Zero for what is kept exactly; an approximation has a distance and that is
            no fault.
        reason: why it has no curvature; "" where it has.
        wrong: what deviates, a sentence; "" where nothing does.
    """

    module: str
    kind: str
    curvature: str = ""
    reproduced: float | None = None
    apart: float | None = None
    distance: float | None = None
    reason: str = ""
    wrong: str = ""


@dataclass
class CurvatureReport:
    """What ``check_curvature`` found; ``str(report)`` is a table, a line a layer.

    Attributes:
        optimizer: its class.
        layers: a line each.
        notes: sentences about how the check was made.
        tolerance: what counts as equal.
        examples: how many were looked at.
    """

    optimizer: str
    layers: list[LayerCheck] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tolerance: float = 0.0
    examples: int = 0

    @property
    def wrong(self) -> list[LayerCheck]:
        """The layers that deviate."""
        return [layer for layer in self.layers if layer.wrong]

    @property
    def ok(self) -> bool:
        """Whether no layer deviates. One that is left without curvature, and said to be, does not."""
        return not self.wrong

    def raise_if_wrong(self) -> None:
        """Raise AssertionError with the table if any layer deviates."""
        if not self.ok:
            names = ", ".join(repr(layer.module) for layer in self.wrong)
            counted = f"{len(self.wrong)} of {len(self.layers)} layers"
            raise AssertionError(f"curvature deviates in {counted}, {names}\n{self}")

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.1e}"

        header = ("module", "kind", "curvature", "reproduced to", "told apart to", "distance", "covered")
        rows = [
            (
                layer.module or "(root)", layer.kind, layer.curvature or "-", number(layer.reproduced),
                number(layer.apart), number(layer.distance),
                f"WRONG: {layer.wrong}" if layer.wrong else f"no: {layer.reason}" if layer.reason else "yes",
            )
            for layer in self.layers
        ]  # fmt: skip
        lines = aligned(header, rows, right=(3, 4, 5)) if rows else []
        lines += [f"note: {note}" for note in self.notes]
        if rows:
            covered = sum(not layer.reason for layer in self.layers)
            verdict = f"{len(self.wrong)} deviate" if self.wrong else "none deviates"
            lines.append(
                f"{self.optimizer}: {covered} of {len(rows)} layers covered, {verdict} by more than "
                f"{self.tolerance:.0e} on {self.examples} examples"
            )
        return "\n".join(lines)
