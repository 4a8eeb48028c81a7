"""scripts/benchmarks/forecast.py: the page of forecasts against measurements is made of what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis import pages
from optimizers.packaged import Package
from optimizers.table import present
from scripts.benchmarks import forecast


def test_the_page_is_that_of_the_results() -> None:
    """No figure in docs/results/forecast.md is typed by hand."""
    committed = forecast.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    notes = committed[committed.index(pages.NOTES) :]
    assert committed == forecast.page(forecast.known(forecast.RESULTS), notes), "make results"


def test_every_optimizer_of_the_table_is_on_the_page() -> None:
    rows = forecast.known(forecast.RESULTS)
    every = {name for name, _, target in present() if not isinstance(target, Package)}
    assert every <= {name for problem, name in rows if problem == "autoencoder"}
    assert all(forecast.same(row) or forecast.allowed(row) for row in rows.values() if row["measured_ratio"])


def row(optimizer: str, predicted: float, measured: float | None) -> dict[str, object]:
    state = {"momentum_buffer": 8}
    return {
        "problem": "gpt", "optimizer": optimizer, "forecast_s": 1.0, "measuring_s": 100.0,
        "predicted_ratio": predicted, "measured_ratio": measured, "predicted_ms": 10.0, "measured_ms": measured,
        "predicted_state": state, "measured_state": state if measured else None,
    }  # fmt: skip


def test_it_says_what_holds_and_what_was_not_measured(tmp_path: Path) -> None:
    lines = [row("kfac", 3.0, 2.0), row("sgd", 1.1, 1.0), row("kpsvd", 50.0, None)]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path.with_suffix(".md").write_text("Stale.\n\n## Notes\n\nWhy.\n", encoding="utf-8")
    text = forecast.write(path).read_text(encoding="utf-8")
    assert "Cost within 15%: 1 of 2 (not: `kfac` +50%)" in text and "State equal to the byte: 2 of 2" in text
    assert "too long: `kpsvd` (100 s)" in text and "| `kpsvd` | 50.00 |  |  |" in text
    assert "**+50%**" in text and "| +10% |" in text and text.endswith("## Notes\n\nWhy.\n") and "Stale" not in text


@pytest.mark.filterwarnings("ignore")
def test_what_would_take_too_long_is_forecast_and_not_measured() -> None:
    found = forecast.row_of("sgd", "autoencoder", rounds=2, longest=0.0)
    assert found["measured_ratio"] is None and found["measuring_s"] > 0 and found["predicted_ratio"] > 0.5
