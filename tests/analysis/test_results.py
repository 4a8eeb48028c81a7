"""Pages of results come of the logs that are kept beside them."""

from __future__ import annotations

import json
import random
import tarfile
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from analysis import compare, report
from analysis.report import tables
from scripts.studies import results
from tests.analysis.test_report import LAST, verdict

__all__ = ["verdict"]  # the fixture

ARCHIVES = sorted((results.RESULTS / "verdicts").glob("*.tar.xz"))


def test_what_is_kept_gives_the_same_page(verdict: Path, tmp_path: Path) -> None:
    summary = verdict / "final" / "adam_0" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"hardware": {"cpu": "one", "system": "mine"}}))
    home = tmp_path / "results"
    path = results.keep(verdict, "three", home)
    before = path.read_bytes()
    assert results.keep(verdict, "three", home).read_bytes() == before and b"mine" not in before
    with tarfile.open(path) as archive:
        names = archive.getnames()
        kept = json.loads((archive.extractfile("final/adam_0/summary.json") or pytest.fail("gone")).read())
    assert kept["hardware"] == {"cpu": "one"} and not [name for name in names if name.startswith("trials/")]
    page = results.verdicts(home)
    text = page.read_text()
    found = report.read(verdict)
    assert tables.to_markdown(found, report.sentences(found)) in text
    assert str(found.material.verdict["command"]) in text
    alone = (home / "verdicts" / "three.html").read_text()
    assert '<a href="#' in alone or "<a href" not in alone or "final/" not in alone, (
        "nothing leads to what is not there"
    )
    assert (home / "verdicts" / "three_final.png").stat().st_size > 1000
    page.write_text(text + "\n## Notes\n\nWhat a person says of it.\n")
    assert results.verdicts(home).read_text().endswith("## Notes\n\nWhat a person says of it.\n")
    assert len(LAST) == 3


def test_of_training_events_means_are_kept_of_all_others_each() -> None:
    events = [{"event": "train", "step": step, "train/loss": float(step), "time/step": 0.1} for step in range(1, 1001)]
    events[500:500] = [{"event": "eval", "step": 500, "val/loss": 2.0}]
    kept = [json.loads(line) for line in results._thinned("\n".join(map(json.dumps, events))).splitlines()]
    training = [event for event in kept if event["event"] == "train"]
    assert [event["step"] for event in training] == [*range(10, 1001, 10)]
    assert [event["train/loss"] for event in training] == pytest.approx([step - 4.5 for step in range(10, 1001, 10)])
    assert kept[50] == {"event": "eval", "step": 500, "val/loss": 2.0} and len(kept) == 101
    assert not any("time/step" in event for event in kept)


@pytest.mark.parametrize("epochs", [3, 60, 150.5])
def test_what_is_kept_has_the_means_of_all_epochs(epochs: float, tmp_path: Path) -> None:
    generator, length = random.Random(0), 60
    end = int(epochs * length)
    steps = [*range(10 if epochs > 3 else 1, end, 10 if epochs > 3 else 1), end]
    events: list[dict[str, Any]] = [
        {"event": "train", "step": step, "epoch": round(step / length, 6), "seconds": 0.1 * step,
         "train/loss": generator.random(), "lr": 0.1} for step in steps
    ]  # fmt: skip
    events += [{"event": "eval", "step": end, "epoch": round(end / length, 6), "seconds": 0.1 * end, "val/loss": 1.0}]
    kept = [json.loads(line) for line in results._thinned("\n".join(map(json.dumps, events))).splitlines()]
    assert len(kept) < len(events) and len(kept) <= epochs + results.EVENTS
    curves = [compare.LoadedRun(tmp_path, {}, {}, some, {}).curve("train/loss") for some in (events, kept)]
    for one, other in zip(*map(astuple, curves), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.name)
def test_the_page_says_what_the_logs_do(path: Path, tmp_path: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    found = report.read(tmp_path)
    text = (results.RESULTS / "verdict.md").read_text()
    assert tables.to_markdown(found, report.sentences(found)) in text, "make results"
    page = results.RESULTS / "verdicts" / f"{path.name.partition('.')[0]}.html"
    assert page.stat().st_size < 3_000_000 and report.sentences(found)[0][:20] in page.read_text().replace("\xa0", " ")


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["keep", str(tmp_path), "name"]) == 1
    assert "holds no run that has begun to train; give folders that train.py wrote" in capsys.readouterr().err
    assert results.main(["keep"]) == 1 and "keep FOLDER NAME" in capsys.readouterr().err
