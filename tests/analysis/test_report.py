"""The page of a verdict and of any sweep: its numbers, what it does with what is missing, and what it costs."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from analysis import report, statistics
from analysis.compare import read_run
from analysis.report import reading, words
from scripts.compare import main

CONFIG: dict[str, Any] = {
    "paths": {"data": "datasets", "runs": "runs", "sweeps": "multirun"},
    "dataset": {"_target_": "data.digits", "batch_size": 64},
    "model": {"_target_": "models.mlp", "hidden": [16]},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "scheduler": {"_target_": "training.schedules.none"},
    "trainer": {"max_epochs": 4, "max_steps": None, "device": "auto"},
    "callbacks": {},
    "seed": 0,
}
CHOICES = {"dataset": "digits", "model": "mlp", "optimizer": "sgd", "scheduler": "none", "trainer": "default"}
#: Last validation accuracies over seeds 0, 1, 2: kfac is ahead beyond doubt, adam and sgd are alike.
LAST = {"sgd": (0.91, 0.93, 0.92), "adam": (0.92, 0.915, 0.93), "kfac": (0.97, 0.985, 0.978)}


def write_run(
    folder: Path, last: float, optimizer: str = "sgd", seed: int = 0, status: str | None = "finished", **changes: Any
) -> Path:
    """A run of four evaluations that ends with an accuracy; a quarter of a second a step of four an epoch."""
    config = CONFIG | {"choices": CHOICES | {"optimizer": optimizer}, "seed": seed}
    config["optimizer"] = {"_target_": f"torch.optim.{optimizer}", "lr": changes.get("lr", 0.1)}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"# python train.py optimizer={optimizer} seed={seed}\n{yaml.safe_dump(config)}"
    )
    lines = []
    for epoch in range(1, 5):
        at = {"step": 4 * epoch, "epoch": float(epoch), "seconds": float(epoch), "wall": float(epoch)}
        lines.append({"event": "train", **at, "train/loss": 1 / epoch})
        value = last - 0.1 * (4 - epoch)
        lines.append({"event": "eval", **at, "val/loss": 1 - value, "val/accuracy": value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status:
        final = {"val/loss": 1 - last, "val/accuracy": last, "test/accuracy": last - 0.01}
        summary = {
            "status": status,
            "final": final,
            "monitor": "val/accuracy",
            "steps": 16,
            "seconds": {"training": 4.0},
        }
        (folder / "summary.json").write_text(json.dumps(summary | {"error": changes.get("error")}))
    return folder


@pytest.fixture
def verdict(tmp_path: Path) -> Path:
    """A folder as scripts/verdict.py leaves it behind, without a final run of seed 2 of kfac."""
    home = tmp_path / "verdict"
    for name, values in LAST.items():
        for seed, value in enumerate(values):
            if (name, seed) != ("kfac", 2):
                write_run(home / "final" / f"{name}_{seed}", value, name, seed)
    lines = []
    for name in LAST:
        for number, lr in enumerate((0.01, 0.02, 0.04, 0.08)):
            value = None if number == 3 else 0.9 + 0.005 * number
            where = f"trials/{name}_{number}"
            status = "failed" if value is None else "finished"
            write_run(home / where, value or 0.1, name, 7, status, lr=lr, error="it broke" if value is None else None)
            lines.append(
                {"arm": name, "rung": 0, "trial": number, "values": {"lr": lr}, "folder": where,
                 "status": status, "value": value, "charged": 2.5, "error": None if value else "it <b>broke</b>"}
            )  # fmt: skip
    (home / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {
        "version": 1, "command": "python scripts/verdict.py optimizers=[sgd,adam,kfac] budget=1m",
        "optimizers": list(LAST), "budget": 60, "metric": "val/accuracy", "higher": True,
        "test_metric": "test/accuracy", "seeds": [0, 1, 2], "threads": 1,
        "tuning": {"seconds": 10, "rungs": []}, "final": {"seconds": 4},
        "pace": {name: {"seconds": 0.25, "low": 0.1, "high": 0.9, "ratio": float(k), "memory": 1000 * k}
                 for k, name in enumerate(LAST, 1)},
        "choices": {name: {"values": {"lr": 0.04}, "at_edge": ["lr high"], "value": 0.91}
                    for name in LAST},
    }  # fmt: skip
    (home / "verdict.json").write_text(json.dumps(about))
    return home


class Outline(HTMLParser):
    """Addresses and identities of a page, and whether its tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_numbers_are_those_of_the_statistics(verdict: Path) -> None:
    write_run(verdict / "final" / "kfac_2", LAST["kfac"][2], "kfac", 2)
    page = report.write(verdict)
    scores = {name: dict(enumerate(values)) for name, values in LAST.items()}
    interval = statistics.t_interval(LAST["kfac"])
    adjusted = statistics.holm({n: statistics.paired_t(scores["kfac"], scores[n]).p for n in ("sgd", "adam")})
    likely = statistics.probability_best(scores, True)
    lines = list(csv.DictReader(io.StringIO((page.parent / "table.csv").read_text())))
    assert [line["arm"] for line in lines] == ["kfac", "adam", "sgd"]  # the best first
    assert float(lines[0]["val/accuracy"]) == interval.middle
    assert float(lines[0]["val/accuracy low"]) == interval.low
    assert [float(line["p adjusted"]) for line in lines[1:]] == [adjusted["adam"], adjusted["sgd"]]
    assert [float(line["probability best"]) for line in lines] == [likely[line["arm"]] for line in lines]
    text = page.read_text().replace(chr(160), " ")
    assert f"Use kfac: 97.8 % validation accuracy (95 % interval {100 * interval.low:.1f} to" in text
    assert "at equal training time (4 s a run), 5.6 points above the next, adam" in text
    assert words.p_value(adjusted["adam"]).replace("< ", "&lt; ") in text
    # 0.978 - 0.1 a second: the target, the median of the means, is passed at the end by kfac alone in all runs
    assert [line["reached"] for line in lines] == ["3", "1", "1"]
    assert float(lines[0]["tuning seconds"]) == 10.0


def test_alike_is_said_and_the_cheaper_taken(tmp_path: Path) -> None:
    for name in ("sgd", "adam"):
        for seed, value in enumerate(LAST[name]):
            write_run(tmp_path / "runs" / f"{name}_{seed}", value, name, seed)
    said = report.verdict_sentences(tmp_path / "runs")
    p = statistics.paired_t(*({s: v for s, v in enumerate(LAST[name])} for name in ("adam", "sgd"))).p
    assert said[0].startswith("No difference is shown between adam (92.2 %) and sgd (92.0 %) in validation accuracy")
    assert f"over 3 common seeds (paired t, Holm-adjusted p {words.p_value(p)})" in said[0]
    assert said[1].startswith("They cost alike: take adam, the likeliest to be best")


def test_what_is_missing_is_said(verdict: Path) -> None:
    """An unfinished run, one that diverged, one that failed before it began, half a line, and no trials yet."""
    write_run(verdict / "final" / "kfac_2", 0.5, "kfac", 2, status=None)
    (verdict / "final" / "sgd_2" / "summary.json").write_text(
        json.dumps({"status": "diverged", "error": "loss is nan"})
    )
    lost = write_run(verdict / "final" / "soap_0", 0.5, "soap", 0, status="failed", error="no such layer")
    (lost / "metrics.jsonl").unlink()
    with (verdict / "trials.jsonl").open("a") as file:
        file.write('{"arm": "kfa')
    found = report.read(verdict)
    assert words.sentences(found)[0] == "Not finished: 8 of 9 runs have ended so far."
    assert found.row("kfac").scores == {0: 0.97, 1: 0.985} and found.row("sgd").value.middle == pytest.approx(0.92)
    assert any("sgd: of 3 runs 1 diverged; its mean is over the 2 that came to an end" in w for w in found.warnings)
    assert any(w.startswith("Numbers of seeds are unequal") for w in found.warnings)
    text = report.write(found).read_text()
    assert "loss is nan" in text and "no such layer" in text
    (verdict / "trials.jsonl").unlink()
    assert "Sensitivity" not in report.write(verdict).read_text()
    (verdict / "final").rename(verdict / "elsewhere")
    assert "Nothing can be said yet" in report.write(verdict).read_text()


def test_time_is_steps_by_the_measured_pace_whatever_the_clocks_said(verdict: Path) -> None:
    about = json.loads((verdict / "verdict.json").read_text())
    about["pace"] = {name: {"seconds": 0.5, "low": 0.4, "high": 0.6, "ratio": 1.0} for name in LAST}
    (verdict / "verdict.json").write_text(json.dumps(about))
    summary = verdict / "final" / "adam_0" / "summary.json"
    summary.write_text(summary.read_text().replace('"training": 4.0', '"training": 16.0'))
    found = report.read(verdict)
    assert [row.training_seconds for row in found.rows] == [16 * 0.5] * 3
    run = found.material.arms[0].runs[0]
    assert [event["seconds"] for event in run.events] == [0.5 * event["step"] for event in run.events]
    said = [text for text in found.warnings if "own clocks" in text]
    assert len(said) == 1 and "it was 0.50 (sgd) to 1.00 (adam) times that" in said[0]


def test_trial_0_has_the_values_that_its_arm_is_configured_with(verdict: Path) -> None:
    lines = [json.loads(line) for line in (verdict / "trials.jsonl").read_text().splitlines()]
    lines = [line | ({"values": {}} if line["trial"] == 0 else {}) for line in lines]
    (verdict / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = {"arms": {"sgd": {"start": {"lr": "0.3", "nesterov": "False", "betas": "[0.9, 0.99]"}}}}
    (verdict / "tuning.json").write_text(json.dumps({"plan": plan, "paces": {}}))
    found = {arm.name: arm.trials[0].overrides for arm in report.read(verdict).material.arms}
    assert found == {"sgd": {"lr": 0.3, "nesterov": False, "betas": [0.9, 0.99]}, "kfac": {}, "adam": {}}


def test_a_run_made_again_counts_once(verdict: Path) -> None:
    again = write_run(verdict / "final" / "sgd_0-2", 0.5, "sgd", 0)
    later = time.time() + 10
    os.utime(again / "metrics.jsonl", (later, later))
    found = report.read(verdict)
    assert found.row("sgd").scores[0] == 0.5
    assert any("sgd_0 is left out" in warning for warning in found.warnings)


def test_page_loads_nothing_and_leads_to_the_runs(verdict: Path, tmp_path: Path) -> None:
    out = tmp_path / "else where" / "page"
    page = report.write(verdict, out)
    text = page.read_text()
    outline = Outline(text)
    assert not outline.open
    assert len(set(outline.ids)) == len(outline.ids)
    assert not re.search(r"(https?:)?//[a-z]", text.replace("http://www.w3.org", ""))
    files = [link for link in outline.links if not link.startswith("#")]
    assert {(out / unquote(link)).exists() for link in files} == {True}
    assert any((out / unquote(link)).resolve() == (verdict / "final" / "kfac_0").resolve() for link in files)
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)
    for name in ("final", "curves_step", "curves_epoch", "curves_seconds", "tuning", "sensitivity", "cost"):
        assert all((out / f"{name}.{ending}").stat().st_size > 1000 for ending in ("png", "svg", "pdf"))
    assert "python scripts/verdict.py optimizers=[sgd,adam,kfac] budget=1m" in text
    assert "python train.py optimizer=kfac seed=0" in text


def test_names_are_escaped(verdict: Path) -> None:
    path = verdict / "verdict.json"
    about = json.loads(path.read_text())
    about["optimizers"].append("<script>alert(1)</script>&_%")
    path.write_text(json.dumps(about))
    page = report.write(verdict)
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;_%" in text
    assert "it <b>broke</b>" not in text and "it &lt;b&gt;broke&lt;/b&gt;" in text
    assert r"$<$script$>$alert(1)$<$/script$>$\&\_\%" in (page.parent / "table.tex").read_text()


def test_of_long_runs_a_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training curve of a part is that of the whole, and every evaluation is kept."""
    folder = write_run(tmp_path / "run", 0.9)
    random = np.random.default_rng(0)
    lines = []
    for step in range(1, 1001):
        at = {"step": step, "epoch": step / 100, "seconds": step / 10, "wall": step / 10}
        lines.append({"event": "train", **at, "train/loss": float(random.random()) if step % 7 else None})
        if step % 10 == 0:
            lines.append({"event": "eval", **at, "val/accuracy": float(random.random())})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tr')
    whole = read_run(folder)
    monkeypatch.setattr(reading, "LINES", 500)
    monkeypatch.setattr(reading, "KEPT", 200)
    (part,) = reading.read_runs([folder], "train/loss")
    assert len(part.events) < 320 < len(whole.events) and part.events[-1]["step"] == 1000
    assert part.curve("val/accuracy").value.tolist() == whole.curve("val/accuracy").value.tolist()
    # Blocks of five steps straddle an epoch's end by one step of a hundred.
    assert np.abs(part.curve("train/loss").value - whole.curve("train/loss").value).max() < 0.012
    (folder / "metrics.jsonl").write_text("".join([*(json.dumps(line) + "\n" for line in lines), "damaged\n", "{}\n"]))
    with pytest.raises(ValueError, match=r"line 1101 of .* is not a JSON object"):
        reading.read_runs([folder])


def test_command(verdict: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(verdict / "final"), "--html", "--target", "val/accuracy=0.9", "--baseline", "adam"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("No difference is shown") or said.startswith("Use kfac")
    text = (verdict / "final" / "report" / "index.html").read_text()
    assert "times adam&#x27;s" in text and "time to 90.0 %" in text
    closed = [part for part in re.findall(r"<details[^>]*>", text) if "command" not in part]
    assert closed and "open all closed parts" in text, "which paper does not show, and says so"
    assert main([str(verdict), "--html", "--metric", "val/loss"]) == 1
    assert "which has its own metric" in capsys.readouterr().err
    assert main([str(verdict / "final"), "--html", "--metric", "val/perplexity"]) == 1
    assert "no run has logged 'val/perplexity'; they have train/loss, val/accuracy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.004, "4 ms"), (12.34, "12.3 s"), (1200, "20 min"), (9000, "2.5 h"), (math.inf, "not reached"), (math.nan, "–")],
)
def test_times_are_readable(value: float, text: str) -> None:
    assert words.seconds(value) == text


@pytest.mark.slow
def test_200_runs_of_10000_lines(tmp_path: Path) -> None:
    """Are read and drawn within ten seconds of the processor, into less than three megabytes."""
    random = np.random.default_rng(0)
    noise = random.random(10_000)

    def head(event: str, step: int) -> str:
        seconds = step * 0.037123456
        return f'{{"event": "{event}", "step": {step}, "epoch": {step / 100}, "seconds": {seconds}, "wall": {step}.25'

    timed = '"time/data": 0.0006881882, "time/forward": 0.0006881525, "time/backward": 0.0447440, "time/step": 0.08595'
    train = [
        f'{head("train", i)}, "train/loss": {2 / i + 0.1 * noise[i - 1]}, "train/accuracy": {noise[i - 1]}, {timed}}}\n'
        for i in range(1, 10_001)
    ]
    for arm in range(20):
        for seed in range(10):
            folder = write_run(tmp_path / f"{arm}_{seed}", 0.9, "sgd", seed, lr=0.01 * (arm + 1))
            lines = []
            for i in range(0, 10_000, 100):
                value = 0.9 * i / (i + 300 - arm) + 0.01 * noise[seed]
                lines += train[i : i + 100]
                lines.append(f'{head("eval", i + 100)}, "val/accuracy": {value}, "val/loss": {1 - value}}}\n')
            (folder / "metrics.jsonl").write_text("".join(lines))
    begin = time.process_time()
    page = report.write(tmp_path)
    assert time.process_time() - begin < 10
    assert page.stat().st_size < 3_000_000
