"""Fewest steps to a loss: what is run to find them, what a run takes, and the page that is kept."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from analysis import pages
from scripts.studies import ladder, results, speedrun
from scripts.studies.ladder import Book, Job, Line
from tests.conftest import ROOT

Loss = Callable[[Job], float | None]


def line(job: Job, value: float | None, rest: float | None = None) -> Line:
    """A run that was made up."""
    lr = 1e-3 * ladder.FACTOR**job.power
    status = "finished" if value is not None else "diverged"
    return Line(job.optimizer, job.power, job.steps, job.seed, lr, rest, "p", "c", status, value, 0.01, 1.0, 1.0)


def played(loss: Loss, *names: str, most: int = 100) -> tuple[Book, list[Line]]:
    """All runs that are asked for until nothing is, by a loss that is known."""
    lines: list[Line] = []
    while jobs := Book(lines).due(names):
        rest = Book(lines).rest if jobs[0].optimizer == "kfac" else None
        lines.append(line(jobs[0], loss(jobs[0]), rest))
        assert len(lines) <= most
    return Book(lines), lines


def noise(job: Job) -> float:
    """Of a standard deviation of .01, the same for a run whenever it is asked for."""
    return random.Random(str(job)).gauss(0, 0.01)


def steep(rate: int, reach: float) -> Loss:
    """A loss that falls with the steps to 4 at so many, best at a power of the rate."""

    def loss(job: Job) -> float | None:
        if job.optimizer == ladder.REFERENCE:
            return 4 + (200 - job.steps) / 200 + 0.2 * abs(job.power) + noise(job)
        return 4 + (reach - job.steps) / 200 + 0.2 * abs(job.power - rate) + noise(job)

    return loss


@pytest.mark.parametrize("reach", [40, 90, 130, 222, 310, 390, 600])
def test_the_fewest_steps_are_found_with_few_runs(reach: float) -> None:
    loss = steep(-2, reach)
    book, lines = played(loss, "kfac")
    goal = book.goal()
    assert goal is not None and goal.margin == pytest.approx(3.1 * goal.deviation, abs=1e-3)
    assert goal.mean + goal.margin <= goal.target < goal.mean + goal.margin + 0.01
    assert book.power("kfac") == -2 and len(book.rates("kfac")) == 5, "to either side of the best"
    found = book.found("kfac")
    assert found is not None

    def enough(steps: int) -> bool:
        values = [loss(Job("kfac", -2, steps, seed)) for seed in ladder.SEEDS]
        return (goal.target - sum(value or 0 for value in values) / 3) * 3**0.5 >= goal.margin

    assert found.steps == next((steps for steps in ladder.STEPS if enough(steps)), None)
    if found.steps is None:
        assert len(found.runs) == 1 and found.runs[0].steps == ladder.STEPS[-1], "the first speaks for all"
    else:
        assert [run.seed for run in found.runs] == [1, 2, 3] and found.verdict is not None and found.verdict.accepted
    assert len(lines) <= 3 + 8 + 5 + 12


def test_divergence_counts_as_too_much_and_what_trains_nowhere_is_left() -> None:
    def loss(job: Job) -> float | None:
        if job.optimizer == "kfac" and (job.power > -2 or job.steps > 200):
            return None
        if job.optimizer == "sgd":
            return None
        return steep(-2, 250)(job)

    book, _ = played(loss, "kfac", "sgd")
    assert book.power("kfac") == -2 and book.power("sgd") is None
    assert [it.power for it in book.rates("sgd")] == [-3, -2, -1, 0, 1]
    found = book.found("kfac")
    assert found is not None and found.steps is None and found.verdict is None and found.runs[0].status == "diverged"
    assert book.found("sgd") is None and not book.due(["kfac", "sgd"])
    page = speedrun.page(book, ["adamw", "kfac", "sgd"])
    assert "| not in 400 | diverged |" in page and "| sgd | diverged | diverged | diverged |" in page
    assert "At none of its rates trains: sgd." in page


def test_another_rate_of_the_rest_other_values_or_another_problem_are_other_runs() -> None:
    book, lines = played(steep(0, 200), "kfac")
    assert not book.due(["kfac"]) and book.found("kfac") is not None
    better = [line(Job("adamw", power, 200, 0), value) for power, value in ((-1, 3.0), (-2, 3.1))]
    assert Book([*lines, *better]).found("kfac") is None and Book([*lines, *better]).due(["kfac"])
    assert Book(lines, "p", {"adamw": "c", "kfac": "d"}).due(["kfac"])[0].optimizer == "kfac"
    assert Book(lines, "q", {"adamw": "c", "kfac": "c"}).due(["kfac"])[0].optimizer == "adamw"
    changed = [replace(one, config="d") if one.optimizer == "kfac" else one for one in lines]
    assert len(Book([*lines, changed[-1]]).rates("kfac")) < 3, "of two of its values, the last run's count"
    failed = replace(lines[0], status="failed", value=None, error="a bug")
    assert Book([failed]).due(["kfac"])[0] == failed.job and Book([failed]).failures("adamw") == [failed]


def test_the_ranking_is_by_steps_then_by_loss(tmp_path: Path) -> None:
    def loss(job: Job) -> float | None:
        return steep(0, {"kfac": 90, "muon": 80, "lion": 2000, "sgd": 290}.get(job.optimizer, 200))(job)

    names = ["adamw", "kfac", "muon", "lion", "sgd"]
    book, lines = played(loss, *names)
    ranking = speedrun.rows(book, names)
    assert [row.name for row in ranking] == ["muon", "kfac", "adamw", "sgd", "lion"]
    assert [row.steps for row in ranking] == [*sorted(row.steps for row in ranking[:-1] if row.steps), None]
    path = tmp_path / "try.jsonl"
    for one in lines:
        speedrun.append(path, one)
    assert speedrun.main(["report=true", f"results={path}"]) == 0
    text = path.with_suffix(".md").read_text()
    assert "| 1 | muon | **" in text and "|  | lion | not in 400 |" in text
    assert "Not run yet, or not to the end: adam, adafisher," in text
    assert path.with_suffix(".png").stat().st_size > 5000
    path.with_suffix(".md").write_text(text + "\n## Notes\n\nWhy.\n")
    assert speedrun.main(["report=true", f"results={path}"]) == 0
    assert path.with_suffix(".md").read_text() == text + "\n## Notes\n\nWhy.\n"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of data with a few words in it."""
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    draw = random.Random(0)
    (folder / "valid.txt").write_text("".join(draw.choice("abcdefgh ") for _ in range(20_000)) + "\n")
    return tmp_path


def test_a_run_is_the_experiments_and_what_went_through_the_net_is_counted(texts: Path) -> None:
    found = {}
    for name in ("sgd", "adahessian", "kfac", "fishleg"):
        found[name] = speedrun.run(Job(name, -1, 12, 3), 0.004, texts, 100.0)
        assert found[name].status == "finished", found[name].error
        assert found[name].wall > found[name].cpu > 0
    assert (found["sgd"].forward, found["sgd"].backward) == (1, 1)
    assert found["adahessian"].backward == pytest.approx(2, abs=0.1), "one more, through the gradient"
    assert found["kfac"].forward == 1 and 1.1 < found["kfac"].backward < 1.7, "sampled targets, now and then"
    assert found["fishleg"].forward > 1.1, "two at shifted weights at the tenth step"
    assert (found["sgd"].rest, found["kfac"].rest, found["kfac"].lr) == (None, 0.004, 0.025)
    config = speedrun.config_of(Job("muon", 0, 10, 3), 0.004).values
    assert config["optimizer"]["adamw_lr"] == 0.004 and config["trainer"]["max_steps"] == 10 and config["seed"] == 3
    assert config["name"] == "speedrun_gpt_small"


def test_it_runs_what_is_missing_until_all_is_known(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("STEPS", (2, 3)), ("SHORT", 3), ("SPREAD", (10, 11)), ("SEEDS", (1,)), ("WIDEST", 1)):
        monkeypatch.setattr(ladder, name, value)
    path = tmp_path / "try.jsonl"
    chosen = ["optimizers=[adamw,torch]", f"results={path}", f"data={texts}"]
    assert speedrun.main(chosen) == 0
    kept = path.read_text()
    lines = [json.loads(text) for text in kept.splitlines()]
    assert [it["optimizer"] for it in lines[:5]] == ["adamw"] * 5 and {it["status"] for it in lines} == {"finished"}
    assert "torch (NAdam)" in path.with_suffix(".md").read_text()
    path.write_text("".join(kept.splitlines(keepends=True)[:-1]) + '{"optimizer": "cut sho')
    assert speedrun.main(chosen) == 0
    assert json.loads(path.read_text().splitlines()[-1])["value"] == lines[-1]["value"], "the last one alone, again"
    assert capsys.readouterr().out.count("[run 1,") == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("optimizers=[kfax]", "optimizers has no 'kfax' (did you mean 'kfac'?)"),
        ("rates=true", "choices are optimizers, results, data, limit, report; see --help"),
        ("limit=0", "limit must be above 0, got 0"),
        ("data=nowhere", "no data: there is no file wikitext-2/valid.txt in nowhere (give data=FOLDER)"),
    ],
)
def test_a_wrong_choice_ends_in_a_sentence(
    given: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speedrun.main([f"results={tmp_path / 'try.jsonl'}", given]) == 1
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_page_says_what_the_results_do() -> None:
    path = ROOT / "docs" / "results" / "speedrun.jsonl"
    book = Book(speedrun.records(path, Line))
    kept = path.with_suffix(".md").read_text()
    made = speedrun.page(book, speedrun.Choices().optimizers, kept[kept.index(pages.NOTES) :], "speedrun.png")
    assert made == kept, "make results"
    assert path == results.RESULTS / "speedrun.jsonl"
