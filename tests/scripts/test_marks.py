"""Marked places of pages hold what committed records say; runs and measurements that are kept are read as written."""

from __future__ import annotations

import json
import lzma
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from analysis import factors, fisher, records, toy
from optimizers import Categorical
from scripts import benchmark, fisher_quality
from scripts.studies import makers, marks, results
from tests.analysis.test_report import write_run
from tests.conftest import ROOT
from tests.pages.reading import name

MARKED = [page for page in marks.PAGES if marks.marks(page)]
FOLDER = ROOT / "docs" / "results"


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(marks, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.mark.parametrize("page", MARKED, ids=name)
def test_a_page_says_what_its_records_do(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert marks.renewed(text) == text, "make results"
    for mark in marks.marks(page):
        assert mark.maker in (makers.PICTURES if mark.picture else makers.TABLES), mark
        if mark.picture and mark.record:
            assert marks.drawn_from(mark.picture) == mark.digest, f"make results: {mark.picture}"
    assert not re.search(r"^ *<!-- table: [^>]*-->[^\n]", text, re.MULTILINE), "a line that begins so is no text"


def test_the_index_says_which_figures_come_of_records() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = text[text.index("## Where") :]
    said = dict(re.findall(r"^\| \[[^]]+\]\((\w+)\.md\) \|.*\| ([^|]+) \|$", rows, re.MULTILINE))
    marked = {page.stem for page in MARKED if page.parent == FOLDER}
    assert len(marked) > 10 and marked <= set(said) <= {page.stem for page in FOLDER.glob("*.md")}
    for page in MARKED:
        if page.parent == FOLDER:
            kept = {mark.record is not None for mark in marks.marks(page)}
            expected = {True: ("records", "records in part"), False: ("not kept",)}
            assert said[page.stem] in (expected[kept.pop()] if len(kept) == 1 else ("records in part",)), page.stem


def test_no_record_says_where_it_was_made() -> None:
    for path in (path for path in marks.LOGS.rglob("*") if path.is_file()):
        contents = [path.read_bytes()]
        if path.name.endswith(".tar.xz"):
            with tarfile.open(path) as archive:
                texts = [entry for entry in archive if not entry.name.endswith(".png")]
                contents = [file.read() for entry in texts if (file := archive.extractfile(entry))]
        elif path.suffix == ".xz":
            contents = [lzma.decompress(contents[0])]
        assert path.stat().st_size < 400_000
        assert not [found for text in contents for found in re.findall(rb"[ \"'=]/\w+/[^\n]*", text)]


def test_runs_are_kept_and_become_a_table_and_a_picture(logs: Path, tmp_path: Path) -> None:
    for optimizer, lasts in (("sgd", (0.8, 0.9)), ("adam", (0.95, 0.97))):
        for seed, last in enumerate(lasts):
            run = write_run(tmp_path / "sweep" / f"{optimizer}_{seed}", last, optimizer, seed)
            config = yaml.safe_load((run / "config.yaml").read_text())
            config["paths"] |= {"data": str(tmp_path / "mine"), "sweeps": str(tmp_path / "ours" / "multirun")}
            (run / "config.yaml").write_text(yaml.safe_dump(config))
            Image.new("RGB", (30, 20), "white").save(run / "samples.png")
    columns = "runs, epoch 2, final val/accuracy, final test/loss, s/step"
    page = f"<!-- table: runs two val/accuracy: {columns} -->\nold\n<!-- end -->\n"
    assert marks.renewed(page) == page, "without a record the old table stays"
    path = results.keep(tmp_path / "sweep", "two", tmp_path)
    with tarfile.open(path) as archive:
        texts = [(archive.extractfile(entry) or pytest.fail("gone")).read() for entry in archive]
        assert not [text for text in texts if b"mine" in text or b"ours" in text]
        assert sum(b"sweeps: multirun" in text for text in texts) == 4
    _, title, rule, *rows, _ = marks.renewed(page).splitlines()
    assert title == f"| group | {columns.replace(', ', ' | ')} |" and rule.count("---:") == 5
    assert rows[0] == "| optimizer=adam | 2 | 76 ± 1.4 % | 96 ± 1.4 % | – | 0.25 ± 0 |"
    assert rows[1].startswith("| optimizer=sgd |")
    picture = tmp_path / "two.png"
    mark = marks.Mark("runs", "two", "val/accuracy", picture)
    assert mark.record == path and marks.drawn_from(picture) is None
    marks.save(makers.PICTURES["runs"](path, mark.words), picture, mark.digest)
    assert marks.drawn_from(picture) == mark.digest != marks.Mark("runs", "two", "val/loss", picture).digest
    assert [axes.get_xlabel() for axes in makers.PICTURES["runs"](path, "val/accuracy by step").axes] == ["step"]
    panels = makers.PICTURES["samples"](path, "val/accuracy").axes[:2]
    titles = [panel.get_title() for panel in panels]
    assert titles == ["optimizer=adam\nval/accuracy 0.96", "optimizer=sgd\nval/accuracy 0.85"]
    assert [panel.get_images()[0].get_size() for panel in panels] == [(20, 30)] * 2
    published = {"optimizer=adam": {"val/accuracy": [0.5, 0.75]}}
    path.with_name("two_published.json").write_text(json.dumps(published))
    columns = "published epoch 2, final val/accuracy / baseline, reached"
    words = f"val/accuracy of optimizer to optimizer=sgd until 0.9: {columns}"
    *_, adam, sgd = makers.TABLES["runs"](path, words).splitlines()
    assert (adam, sgd) == ("| optimizer=adam | 75 % | 1.129 | 2 |", "| optimizer=sgd | – | 1 | 1 |")
    with pytest.raises(results.UserError, match="not 'val/accuracy until it is'"):
        makers.TABLES["runs"](path, "val/accuracy until it is")
    with pytest.raises(results.UserError, match="several groups chose the same model; leave 'of model' out"):
        makers.TABLES["runs"](path, "val/accuracy of model: reached")
    with pytest.raises(ValueError, match="there is no 'last'"):
        makers.TABLES["runs"](path, "val/accuracy: last")


def test_what_was_tried_becomes_a_table(logs: Path, tmp_path: Path) -> None:
    for number, (optimizer, lr, last, status) in enumerate((
        ("sgd", 0.1, 0.8, "finished"), ("sgd", 0.2, 0.9, "finished"), ("adam", 0.1, 0.7, "finished"),
        ("adam", 0.2, 0.9, "diverged"),
    )):  # fmt: skip
        write_run(tmp_path / "sweep" / str(number), last, optimizer, status=status, lr=lr)
    path = results.keep(tmp_path / "sweep", "tried", tmp_path)
    table = makers.TABLES["rates"](path, "val/accuracy by optimizer: optimizer.lr")
    assert table.splitlines() == [
        "| optimizer | lr: val/accuracy |",
        "| --- | --- |",
        "| sgd | 0.1: 0.8, **0.2: 0.9** |",
        "| adam | **0.1: 0.7**, 0.2: diverged |",
    ]


def test_measurements_are_kept_and_become_tables(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["model=mlp:hidden=[4]", "batch_size=4", "image_size=4", "rounds=2", "block=2", "threads=1", "clock=cpu"]
    file = logs / "small.jsonl"
    words = [*options, "optimizers=[kfac:damping=1,soap]", "memory=false", f"json={file}"]
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", *words])
    rows = benchmark.main(words)
    first, kept = records.read(file)
    assert kept == json.loads(json.dumps(rows)) and first["options"]["rounds"] == 2 and first["threads"] == 1
    text = marks.renewed("<!-- table: benchmark small -->\n<!-- end -->\n")
    assert first["command"].endswith(" json=small.jsonl") and str(logs) not in text
    assert "\n    python scripts/benchmark.py " in text and f"torch {first['torch']}.\n" in text
    assert f"| `kfac`, `damping=1` | {rows[1]['ms']:.1f} | {rows[1]['ratio']:.2f} |" in text and "| peak" not in text
    inline = marks.renewed("It takes <!-- table: ratio small soap / kfac:damping=1 -->?<!-- end --> of it.")
    assert inline.endswith(f"-->{rows[2]['ratio'] / rows[1]['ratio']:.2f}<!-- end --> of it.")
    (logs / "small.jsonl").write_text("{}\n")
    with pytest.raises(results.UserError, match="no record of a measurement"):
        marks.renewed(text)


def test_what_a_script_has_measured_is_kept_and_becomes_tables_and_a_picture(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--nets", "mlp", "--methods", "kfac,kpsvd,deflation", "--examples", "12", "--out", str(tmp_path)]
    assert fisher_quality.main([*common, "--steps", "0,2", "--damping", "1,0.1", "--profile"]) == 0
    for record in ("fisher_quality", "profiles"):
        path = results.keep(tmp_path / f"{record}.jsonl", record, tmp_path)
        assert path == marks.Mark("rows", record, "").record
        assert results.keep(tmp_path / f"{record}.jsonl", record, tmp_path).read_bytes() == path.read_bytes()
    rows = fisher.kept(logs / "fisher_quality.jsonl.xz")
    whole = fisher.kept(tmp_path / "fisher_quality.jsonl")
    assert [row.fisher_frobenius for row in rows] == pytest.approx([row.fisher_frobenius for row in whole], nan_ok=True)
    asked = "fisher_quality decrease_full by damping of mlp: kpsvd, kfac"
    _, title, _, *lines, _ = marks.renewed(f"<!-- table: fisher_by {asked} -->\n<!-- end -->\n").splitlines()
    assert title == "| λ | KPSVD | K-FAC (expand) |" and [line[:6] for line in lines] == ["| 1 | ", "| 0.1 "]
    at = {(row.damping, row.method): row.decrease_full for row in rows if row.step == 2 and not row.layer}
    assert lines[0] == f"| 1 | {at[1.0, 'kpsvd']:.2f} | {at[1.0, 'kfac']:.2f} |"
    asked = "fisher_quality fisher_operator by layer, step: kfac"
    lines = marks.renewed(f"<!-- table: fisher_by {asked} -->\n<!-- end -->\n").splitlines()[3:-1]
    assert [line.split(" | ")[:2] for line in lines] == [["| 1", "0"], ["| 1", "2"], ["| 3", "0"], ["| 3", "2"]]
    orders = marks.renewed("<!-- table: fisher_orders fisher_quality -->\n<!-- end -->\n")
    assert "| Deflation before KPSVD | 8 of 8 | " in orders  # two layers at two steps and dampings
    drawn = makers.PICTURES["fisher_profile"](logs / "profiles.jsonl.xz", "mlp")
    assert len(drawn.axes) == 4 and len(drawn.axes[0].get_lines()) == 4  # three methods, and a line at 1
    with pytest.raises(ValueError, match="a file of JSON"):
        results.keep(tmp_path / "fisher_quality.csv", "table", tmp_path)


def test_what_is_ok_is_counted(logs: Path) -> None:
    found = {
        "one": {"verdicts": {"kfac": "ok", "sgd": "ok"}, "layers": 1.0},
        "two": {"verdicts": {"kfac": "no"}, "layers": 0.9},
        "three": {"verdicts": {}, "layers": None},
    }
    (logs / "some.json").write_text(json.dumps(found))
    text = "Of <!-- table: count some -->?<!-- end --> are <!-- table: count some ok -->?<!-- end -->, "
    text = marks.renewed(text + "covered <!-- table: count some layers 0.99 -->?<!-- end -->.")
    assert re.sub("<!-- .*? -->", "", text) == "Of 3 are 1, covered 1."
    for entry, count in (({"verdict": "ok"}, "1"), ({"failed": "", "wrong": {"a": "b"}}, "0")):
        (logs / "some.json").write_text(json.dumps({"one": entry}))
        assert makers.TABLES["count"](logs / "some.json", "ok") == count


def test_studies_of_factors_are_kept_and_become_tables_and_pictures(logs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batch = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    studies = [factors.Study(name, plan=factors.Plan(pictured=1)) for name in ("one", "two")]
    for study in studies:
        for step in (0, 5):
            study.look(step, model, Categorical(), batch, fit=batch)
    (tmp_path / "study.json").write_text(factors.to_record(studies[0]))
    (tmp_path / "runs.jsonl").write_text("".join(factors.to_record(study, drawn=False) for study in studies))
    path, several = (results.keep(tmp_path / file, file[:4], tmp_path) for file in ("study.json", "runs.jsonl"))
    first = studies[0].points[0].rows[0]
    asked = "factors stud 0,5: d_out, mean_A"
    _, title, _, *lines, _ = marks.renewed(f"<!-- table: {asked} -->\n<!-- end -->\n").splitlines()
    assert title == "| layer | step | d(G) | mean of A |"
    assert lines[1] == f"| 0 | 5 | 6 | {first['mean_A']:.2g} |" and len(lines) == 4
    asked = "factors_runs runs 5: d_out of 2"
    _, title, _, *lines, _ = marks.renewed(f"<!-- table: {asked} -->\n<!-- end -->\n").splitlines()
    assert title == "| run | perplexity | d(G), `2` |"
    assert [line.split(" | ")[0] for line in lines] == ["| untrained", "| `one`", "| `two`"]
    assert len(makers.PICTURES["factors"](path, "heat_maps").axes) == 8  # A and G at two steps, and their scales
    assert makers.PICTURES["factors_runs"](several, "0").axes[0].get_lines()[0].get_xdata().tolist() == [0, 5]


def test_of_another_packages_method_whole_rounds_are_measured() -> None:
    options = benchmark.Options(model="mlp:hidden=[4]", batch_size=4, image_size=4)
    model, likelihood, batches = benchmark.make_model(options)
    optimizer = benchmark.make_optimizer("soap:precondition_frequency=5", model, likelihood)
    arm = benchmark.Arm("soap", model, optimizer, likelihood, batches)
    arm.block(7)
    assert len(arm.ordinary) == 2 and arm.count == 10 and not arm.due


def test_a_path_of_a_record_is_the_path_that_was_taken() -> None:
    def sgd(tensors: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(tensors, lr=lr)

    path, lost = (toy.run("torch:SGD", sgd, toy.SURFACES[0], lr, 20) for lr in (1e-4, 10.0))
    again, lost_again = (toy.from_dict(json.loads(json.dumps(toy.as_dict(it)))) for it in (path, lost))
    assert again.points == pytest.approx(path.points, rel=1e-4) and again.value == path.value
    assert toy.to_markdown([again]) == toy.to_markdown([path]) and "| `torch` SGD |" in toy.to_markdown([path])
    assert lost_again.value == lost.value == float("inf") and len(lost_again.points) == len(lost.points) < 20
