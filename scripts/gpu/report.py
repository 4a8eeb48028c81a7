"""The report of a run of checks: the machine, and the page."""

from __future__ import annotations

import platform
from typing import Any

import torch

from analysis import pages
from scripts.gpu.running import Result


def machine(device: str) -> dict[str, Any]:
    """What the numbers were found on."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def cost_tables(model: str, rows: list[dict[str, Any]]) -> list[str]:
    """A model's two tables: costs as ratios, and milliseconds by phase."""
    by_name = {row["optimizer"]: row for row in rows}
    units = [by_name[name] for name in ("sgd", "adamw") if name in by_name]
    if not units:
        return []
    costs, phases = [], []
    for row in rows:
        cells = [row["optimizer"], f"{row['ordinary']['ms']:.2f}"]
        cells += [" / ".join(f"{row['ordinary']['ms'] / unit['ordinary']['ms']:.2f}" for unit in units)]
        for key in ("update", "refresh", "both"):
            cells.append(f"{row[key]['ms'] / units[0]['ordinary']['ms']:.2f}" if key in row else "")
        cells += [" / ".join(f"{row['amortised'] / unit['ordinary']['ms']:.2f}" for unit in units)]
        memory = row["memory"]
        cells += ["" if memory is None else f"{memory / 2**20:.0f}"]
        cells += ["" if memory is None else " / ".join(f"{memory / max(unit['memory'], 1):.2f}" for unit in units)]
        costs.append(cells)
        if "update" in row:
            plain = row["ordinary"]
            surplus = [f"{row[key]['ms'] - plain['ms']:.2f}" if key in row else "" for key in ("update", "refresh")]
            intervals = f"{row['update_every']}" + (f", {row['refresh_every']}" if row["refresh_every"] else "")
            rest = [f"{plain['step'] - units[0]['ordinary']['step']:.2f}"]
            parts = [f"{plain[key]:.2f}" for key in ("forward", "backward", "step")]
            phases.append([row["optimizer"], intervals, *surplus, *rest, *parts])
    names = " / ".join(unit["optimizer"] for unit in units)
    first = ["optimizer", "ordinary ms", f"ordinary ÷ {names}", "update ÷ sgd", "refresh ÷ sgd", "both ÷ sgd"]
    first += [f"amortised ÷ {names}", "peak MiB", f"memory ÷ {names}"]
    second = ["optimizer", "intervals", "statistics", "inverses or bases", "products", "forward", "backward", "step"]
    lines = [f"## {model}, {rows[0]['parameters']:,} parameters", "", pages.table(first, costs)]
    return [*lines, *([pages.table(second, phases)] if phases else [])]


def page(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    checks = [Result(**check) for check in report["checks"]]
    counts = {status: sum(c.status == status for c in checks) for status in ("ok", "failed", "skipped", "not run")}
    facts = report["machine"]
    where = f"{facts['device']}, torch {facts['torch']}" + (f", CUDA {facts['cuda']}" if facts["cuda"] else "")
    lines = ["# Checks and costs on a GPU" if report["options"]["device"] == "cuda" else "# Checks and costs on a CPU"]
    lines += ["", "    python scripts/gpu_check.py", "", f"{where}, Python {facts['python']}. "]
    lines[-1] += f"{report['seconds']:.0f} seconds: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + "."
    lines += [""]
    tables: dict[str, list[dict[str, Any]]] = {}
    for check in checks:
        if check.name.startswith("table ") and check.data:
            tables.setdefault(check.name.split()[1], []).append(check.data)
    if tables:
        lines += [
            "Times are medians on the device's own clock, of steps that nothing waits between. *Ordinary* steps do no",
            "work on curvature, *update* steps renew its statistics, *refresh* steps its inverses, eigenbases or",
            "decompositions alone, *both* do both; *amortised* spreads the surplus over the intervals of",
            "`configs/optimizer`. By phase, in ms: statistics = update - ordinary; inverses or bases = refresh -",
            "ordinary; products = what an ordinary `step()` takes beyond SGD's; then the parts of an ordinary step.",
            "",
        ]
        for model, rows in tables.items():
            lines += cost_tables(model, rows)
    rows = [check.data for check in checks if check.name.startswith("linalg ") and check.data]
    if rows:
        keys = ["product", "cholesky", "cholesky_inverse", "eigh", "pencil"]
        lines += ["## Decompositions, ms a batch in float32 without TF32", ""]
        cells = [[f"{row['size']} ({row['batch']} matrices)", *(f"{row[key]:.2f}" for key in keys)] for row in rows]
        lines += [pages.table(["size", *keys], cells)]
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        lines += ["## Failures", ""]
        for check in failed:
            lines += [f"### {check.name}", "", check.message, "", *(f"    {line}" for line in check.trace), ""]
    lines += ["## Checks", ""]
    others = [c for c in checks if c.name.split()[0] not in ("table", "linalg") or c.status != "ok"]
    cells = [[c.name, c.status, f"{c.seconds:.1f}", c.message] for c in others]
    lines += [pages.table(["check", "result", "seconds", "found"], cells)]
    return "\n".join(lines).rstrip() + "\n"
