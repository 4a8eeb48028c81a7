"""The table of which parameters have which curvature."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Coverage:
    """Which parameters have which curvature, as a table (``str(coverage)``).

    Attributes:
        rows: (module or parameter, method, factor shapes, parameters, bytes of curvature) a line.
    """

    rows: list[tuple[str, str, str, int, int]] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        """Share of the trainable parameters that have curvature rather than the fallback."""
        total = sum(row[3] for row in self.rows)
        return sum(row[3] for row in self.rows if not row[1].startswith("fallback")) / max(total, 1)

    @property
    def bytes(self) -> int:
        """Bytes of all curvature."""
        return sum(row[4] for row in self.rows)

    def __str__(self) -> str:
        header = ("module", "curvature", "factors", "parameters", "bytes")
        cells = [header, *((m, k, f, f"{n:,}", f"{b:,}") for m, k, f, n, b in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        template = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<<<>>", widths, strict=True))
        lines = [template.format(*row) for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{self.fraction:.1%} of the trainable parameters under curvature, {self.bytes:,} bytes of it")
        return "\n".join(lines)
