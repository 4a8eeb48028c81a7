"""The table of a page: for programs, for papers and for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from typing import Any

from analysis import pages
from analysis.report import words
from analysis.report.results import Results, Row

#: Characters that TeX would not print.
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "×": r"$\times$", "–": "--",
    "∞": r"$\infty$", "≤": r"$\leq$",
}  # fmt: skip


def columns(found: Results) -> dict[str, Callable[[Row], str]]:
    """Headers of the table's columns and what stands in each; columns of which nothing is known are left out.

    Args:
        found: the results.
    """
    material, metric = found.material, found.material.metric
    target = "–" if found.target is None else words.score(found.target, metric)

    def behind(row: Row) -> str:
        if row.difference is None:
            return "–"
        interval = words.gaps(row.difference.interval, metric, material.higher)
        return f"{interval} (p {words.p_value(row.p)})"

    made: dict[str, Callable[[Row], str]] = {
        words.spoken(metric): lambda row: words.scores(row.value, metric),
        words.spoken(material.test_metric): lambda row: words.scores(row.test, material.test_metric),
        "best with probability": lambda row: words.probability(row.probability),
        "behind the leader": behind,
        f"time to {target}": words.times,
        "step time": lambda row: words.seconds(row.step_seconds),
        f"times {material.baseline}'s": lambda row: "–" if math.isnan(row.ratio) else f"{words.digits(row.ratio)}×",
        "memory": lambda row: words.memory(row.memory),
        "tuning": lambda row: f"{words.seconds(row.tuning_seconds)}, {row.trials} trials" if row.trials else "–",
        "runs": lambda row: ", ".join(f"{n} {status}" for status, n in row.statuses.items()) or "none",
    }
    return {name: cell for name, cell in made.items() if any(cell(row) != "–" for row in found.rows)}


def to_csv(found: Results) -> str:
    """The table with all its digits; empty where there is nothing, "inf" where a target was not reached.

    Args:
        found: the results.
    """

    def ends(name: str, interval: Any) -> dict[str, Any]:
        parts = (interval.middle, interval.low, interval.high) if interval else (math.nan,) * 3
        return dict(zip((name, f"{name} low", f"{name} high"), parts, strict=True))

    lines = [
        {
            "arm": row.name,
            "runs": len(row.scores),
            **ends(found.material.metric, row.value),
            **ends(found.material.test_metric, row.test),
            "probability best": row.probability,
            **ends("leader less this", row.difference.interval if row.difference else None),
            "p adjusted": row.p,
            "target": math.nan if found.target is None else found.target,
            **ends("seconds to target", row.to_target),
            "reached": row.reached,
            "training seconds": row.training_seconds,
            "steps": row.steps,
            "seconds a step": row.step_seconds,
            "step ratio": row.ratio,
            "memory bytes": math.nan if row.memory is None else row.memory,
            "tuning seconds": row.tuning_seconds,
            "trials": row.trials,
        }
        for row in found.ranked
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()})
    return text.getvalue()


def to_markdown(found: Results, said: list[str]) -> str:
    """The verdict, the table and the warnings.

    Args:
        found: the results.
        said: the verdict's sentences.
    """
    made = columns(found)
    rows = [[row.name, *(cell(row) for cell in made.values())] for row in found.ranked]
    lines = [" ".join(said), "", pages.table(["arm", *made], rows), "Means with 95 % intervals.", ""]
    lines += [f"- {warning}" for warning in found.warnings]
    return "\n".join(lines).rstrip() + "\n"


def to_tex(found: Results) -> str:
    """The table for LaTeX, with booktabs.

    Args:
        found: the results.
    """
    made = columns(found)
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * len(made)}}}",
        r"\toprule",
        f"{' & '.join(map(_tex, ['arm', *made]))} \\\\",
        r"\midrule",
        *(f"{' & '.join(map(_tex, [row.name, *(cell(row) for cell in made.values())]))} \\\\" for row in found.ranked),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)
