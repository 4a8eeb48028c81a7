"""The script on default values: a cell is a run of train.py, a second call goes on, and the tables say what is so."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizers.table import present
from scripts import problems
from scripts.studies import defaults
from scripts.studies.defaults import Outcome
from tests.conftest import ROOT
from training.settings.composition import compose
from training.settings.schema import build

TINY = replace(problems.PROBLEMS["digits_mlp"], steps=20, least=0.1)
LINEAR = replace(problems.PROBLEMS["ill_conditioned"], steps=20)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two problems of twenty steps in place of the twelve, the first to choose by, the second held out."""
    defaults.problem_config.cache_clear()
    small = {"digits_mlp": TINY, "ill_conditioned": replace(LINEAR, tuning=False)}
    monkeypatch.setattr(problems.catalogue, "PROBLEMS", small)
    yield
    defaults.problem_config.cache_clear()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(results: Path, *choices: str) -> int:
    return defaults.main([f"results={results}", "rates=false", "seeds=[0]", *choices])


# -- what is run -------------------------------------------------------------------------------------------------------


def test_twelve_problems_half_of_them_held_out() -> None:
    known = problems.PROBLEMS.values()
    assert len(known) == 12 and sum(it.tuning for it in known) == 6 and sum(it.rates for it in known) == 6
    for it in known:
        assert (it.least > 0) == (it.metric == "accuracy"), it.name
        values = defaults.problem_config(it.name).values
        assert values["trainer"]["max_steps"] == it.steps
        assert values["scheduler"]["_target_"] == "training.schedules.cosine"


def test_all_optimizers_of_the_table_at_the_values_of_their_files() -> None:
    choices = defaults.chosen(["rates=false"])
    assert choices.optimizers == [name for name, _, _ in present()]
    assert len(set(choices.optimizers)) * 12 * 3 == len({what.key for what in defaults.cells(choices)})
    for name in ("sgd", "kfac", "muon", "torch"):
        assert defaults.optimizer_node(name) == compose([f"optimizer={name}"]).values["optimizer"]


def test_five_rates_of_which_one_is_the_default() -> None:
    one = ["optimizers=[kfac]", "seeds=[0]"]
    plain = [what.key for what in defaults.cells(defaults.chosen([*one, "rates=false"]))]
    cells = list(defaults.cells(defaults.chosen(one)))
    assert len({what.key for what in cells}) == 12 + 6 * 4 and {what.key for what in cells} > set(plain)
    rates = {what.config.values["optimizer"]["lr"] for what in cells if what.problem.name == "curves"}
    assert rates == {0.01, 0.03, 0.1, 0.3, 1.0}


def test_a_cell_is_a_run_of_the_command_line(tmp_path: Path) -> None:
    found = defaults.run(defaults.cell(TINY, "adam", 3), tmp_path)
    config = defaults.problem_config("digits_mlp")
    overrides = [text for text in config.command if not text.startswith("hydra")]
    command = [sys.executable, "train.py", *overrides, "optimizer=adam", "seed=3", f"paths.runs={tmp_path / 'runs'}"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    (summary,) = (tmp_path / "runs").rglob("summary.json")
    its = json.loads(summary.read_text())
    assert found.status == "finished" and found.steps == its["steps"] == config.values["trainer"]["max_steps"]
    assert found.value == pytest.approx(its["final"]["test/accuracy"], abs=1e-6)
    assert found.val == pytest.approx(its["final"]["val/accuracy"], abs=1e-6)


def test_a_changed_default_is_a_new_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    before = defaults.cell(TINY, "kfac", 0).key
    assert defaults.cell(TINY, "kfac", 0).key == before
    others = [defaults.cell(TINY, "kfac", 1), defaults.cell(TINY, "kfac", 0, options=["momentum=0"])]
    assert len({before, *(what.key for what in others)}) == 3
    assert defaults.cell(TINY, "kfac", 0, options=["ekfac.momentum=0"]).key == before
    assert others[1].config.values["optimizer"]["momentum"] == 0


# -- running it --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_two_optimizers_and_what_is_done_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "try.jsonl"
    assert run(results, "optimizers=[sgd,kfac]") == 0
    first = lines(results)
    assert [(it["problem"], it["optimizer"]) for it in first] == [
        (problem, name) for problem in ("digits_mlp", "ill_conditioned") for name in ("sgd", "kfac")
    ]
    assert all(it["status"] == "finished" and it["steps"] > 0 and math.isfinite(it["value"]) for it in first)
    assert run(results, "optimizers=[sgd,kfac,adam]", "set=tuning") == 0
    assert lines(results)[:4] == first and [it["optimizer"] for it in lines(results)[4:]] == ["adam"]
    assert "1 of 3 cells are to be run" in capsys.readouterr().out
    table = results.with_suffix(".md").read_text()
    assert "| optimizer | digits_mlp | ill_conditioned * |" in table and "\n| kfac | " in table
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.usefixtures("tiny")
def test_a_search_has_values_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "try.jsonl"
    both = ["optimizers=[sgd,adam]", "problems=[digits_mlp]"]
    assert run(results, *both) == 0
    assert run(results, *both, "options=[momentum=0.5,adam.lr=0.01]") == 0
    found = lines(results)
    assert [it["options"] for it in found] == [[], [], ["momentum=0.5"], ["lr=0.01"]]
    assert [it["lr"] for it in found] == [0.1, 0.001, 0.1, 0.01] and len({it["value"] for it in found}) == 4
    table = results.with_suffix(".md").read_text()
    assert "With `momentum=0.5 adam.lr=0.01`" in table
    assert f"| adam | {100 * found[3]['value']:.1f} |" in table


@pytest.mark.usefixtures("tiny")
def test_divergence_is_a_result_and_other_errors_are_tried_again(tmp_path: Path) -> None:
    results = tmp_path / "try.jsonl"
    chosen = ["optimizers=[sgd]", "problems=[ill_conditioned]", "options=[lr=1e6]"]
    assert run(results, *chosen) == 0
    (line,) = lines(results)
    assert line["status"] == "diverged" and line["value"] is None and "loss is" in line["error"]
    assert "**diverged**" in results.with_suffix(".md").read_text()
    assert run(results, *chosen) == 0 and len(lines(results)) == 1
    results.write_text(json.dumps(line | {"status": "failed", "error": "a bug"}) + "\n")
    assert run(results, *chosen) == 0
    assert [it["status"] for it in lines(results)] == ["failed", "diverged"]


def test_a_run_that_takes_too_long_is_broken_off(tmp_path: Path) -> None:
    found = defaults.run(defaults.cell(TINY, "sgd", 0), tmp_path, limit=1e-9)
    assert found.status == "broken off" and found.steps == 1 and found.value is None
    assert found.error == "1e-09 seconds have passed"


def test_an_error_of_a_run_is_a_line(tmp_path: Path) -> None:
    faulty = defaults.cell(TINY, "sgd", 0)
    faulty.config.values["dataset"]["batch_size"] = 10**6
    found = defaults.run(faulty, tmp_path)
    faulty.config.values["dataset"]["batch_size"] = 64
    assert found.status == "failed" and "batch_size must be at most" in str(found.error)


def test_a_kill_loses_the_cell_under_way_alone(tmp_path: Path) -> None:
    results = tmp_path / "try.jsonl"
    chosen = ["optimizers=[sgd,adam,adamw,lion,lamb]", "problems=[digits_mlp]", "seeds=[0]", "rates=false"]
    command = [sys.executable, str(ROOT / "scripts" / "studies" / "defaults.py"), *chosen, f"results={results}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 120
        while not (results.exists() and results.read_text().count("\n")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = lines(results)
    assert 1 <= len(kept) < 5
    with results.open("a") as file:
        file.write('{"key": "cut sho')
    assert defaults.main([*chosen, f"results={results}"]) == 0
    found = [json.loads(text) for text in results.read_text().splitlines() if text.endswith("}")]
    assert found[: len(kept)] == kept and [it["optimizer"] for it in found] == ["sgd", "adam", "adamw", "lion", "lamb"]


def test_absent_data_are_said_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "try.jsonl"
    assert run(results, "problems=[mnist_mlp]", "optimizers=[sgd]", f"data={tmp_path}") == 0
    assert f"mnist_mlp: no data: there is no folder mnist in {tmp_path} (give data=FOLDER)" in capsys.readouterr().out
    assert not results.exists()


@pytest.mark.parametrize(
    "choice, sentence",
    [
        ("problems=[digits_mpl]", "problems has no 'digits_mpl' (did you mean 'digits_mlp'?)"),
        ("optimizers=[kfak]", "optimizers has no 'kfak' (did you mean 'kfac'?)"),
        ("set=held", "set must be tuning, held_out or all, got 'held'"),
        ("problem=[curves]", "choices are set, problems"),
        ("options=[momentum=0]", "options need results=FILE of their own"),
        ("limit=0", "limit must be above 0"),
        ("split=train", "split must be test or val, got 'train'"),
        ("split=val", "split=val needs results=FILE of its own"),
    ],
)
def test_what_there_is_none_of_ends_in_a_line(choice: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert defaults.main([choice]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize("options", ["[momentun=0]", "[adam.lr=1]", "[lr]", "[lr=-1]"])
def test_options_that_nobody_has_are_refused(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "try.jsonl", "optimizers=[sgd]", "problems=[digits_mlp]", f"options={options}") == 1
    assert capsys.readouterr().err.startswith("error: ") and not any(tmp_path.iterdir())


# -- the tables --------------------------------------------------------------------------------------------------------


def outcomes(table: dict[tuple[str, str, int, float], float | str]) -> dict[str, Outcome]:
    """Results made up: a value, or how it ended."""
    made = {}
    for (name, problem, seed, factor), value in table.items():
        what = defaults.cell(problems.PROBLEMS[problem], name, seed, factor)
        ended = {"status": value} if isinstance(value, str) else {"status": "finished", "value": value, "plateau": 1.0}
        made[what.key] = Outcome(what.key, problem, name, seed, factor, 0.1, [], seconds=2.0, **ended)
    return made


def rows(page: str, section: str) -> dict[str, list[str]]:
    (text,) = [part for part in page.split("\n## ") if part.startswith(section)]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in found}


def test_means_and_what_does_not_learn() -> None:
    table = {
        ("adam", "digits_mlp", 0, 1.0): 0.9, ("adam", "digits_mlp", 1, 1.0): 0.92, ("adam", "curves", 0, 1.0): 0.5,
        ("kfac", "digits_mlp", 0, 1.0): 0.9, ("kfac", "digits_mlp", 1, 1.0): 0.79, ("kfac", "curves", 0, 1.0): 0.96,
        ("ekfac", "digits_mlp", 0, 1.0): 0.97, ("ekfac", "digits_mlp", 1, 1.0): "diverged",
    }  # fmt: skip
    page = defaults.page(defaults.Results(outcomes(table)))
    assert rows(page, "At default") == {
        "optimizer": ["digits_mlp", "curves"], "---": ["---:", "---:"], "adam": ["91.0", "0.5"],
        "kfac": ["**84.5**", "**0.96**"], "ekfac": ["**diverged** 1/2", ""],
    }  # fmt: skip
    assert "3 of 5 cells do not learn." in page
    beside = rows(page, "Beside Adam")
    assert beside["kfac"] == ["0 of 2", "0 of 0", "0 of 2", "digits_mlp, curves"]
    assert beside["ekfac"] == ["0 of 1", "0 of 0", "0 of 1", "digits_mlp"]


def test_equal_to_adam_is_enough_and_held_out_counts_apart() -> None:
    table = {
        (name, problem, 0, 1.0): value
        for problem, value in (("digits_mlp", 0.9), ("mnist_mlp", 0.9), ("curves", 0.3))
        for name in ("adam", "kfac")
    }
    table["kfac", "mnist_mlp", 0, 1.0] = 0.95
    page = defaults.page(defaults.Results(outcomes(table)))
    assert rows(page, "Beside Adam")["kfac"] == ["2 of 2", "1 of 1", "3 of 3", ""]
    assert rows(page, "At default")["optimizer"] == ["digits_mlp", "curves", "mnist_mlp *"]


def test_the_distance_to_the_best_rate() -> None:
    def tried(name: str, problem: str, values: Sequence[float | str]) -> dict[Any, float | str]:
        return {(name, problem, 0, factor): value for factor, value in zip(defaults.FACTORS, values, strict=True)}

    table = {
        **tried("sgd", "digits_mlp", [0.9, 0.9, 0.94, 0.96, 0.96]), **tried("sgd", "curves", [0.3, 0.2, 0.2101, 1, 1]),
        **tried("kfac", "digits_mlp", [0.9, 0.95, 0.92, 0.9, "diverged"]),
        **tried("adam", "digits_mlp", [0.5, 0.9, 0.95, 0.9, 0.1]), **tried("adam", "curves", ["diverged"] * 5),
    }  # fmt: skip
    table |= {("lion", "digits_mlp", 0, 1.0): 0.9, ("lion", "digits_mlp", 0, 3.0): 0.99}
    table["lamb", "digits_mlp", 0, 1.0] = "diverged"
    page = defaults.page(defaults.Results(outcomes(table)))
    near = rows(page, "Beside their own")
    assert near["sgd"] == ["-2.0 x3", "**+5.0 % x0.3**"]
    assert near["kfac"] == ["**-3.0 x0.3**", ""] and near["adam"] == ["0 x1", "**none**"]
    assert "lion" not in near and "lamb" not in near  # not all of the five were tried
    assert "2 of 5 are near their best." in page


def test_the_page_is_of_todays_defaults_and_keeps_its_notes(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    for outcome in outcomes({("adam", "digits_mlp", 0, 1.0): 0.9}).values():
        defaults.append(path, outcome)
        defaults.append(path, replace(outcome, key="digits_mlp adam 00000000", value=0.1))
    target = defaults.write_page(path)
    assert rows(target.read_text(), "At default")["adam"] == ["90.0"]
    target.write_text(target.read_text() + "\n## Notes\n\nWhy.\n")
    assert defaults.main(["report=true", f"results={path}"]) == 0
    assert target.read_text().endswith("\n## Notes\n\nWhy.\n") and target.read_text().count("Why.") == 1


def test_tables_of_the_validation_sets_are_of_those_alone() -> None:
    made = outcomes({("adam", "digits_mlp", 0, 1.0): 0.9, ("adam", "curves", 0, 1.0): "diverged"})
    made = {key: replace(it, val=None if it.value is None else 0.8) for key, it in made.items()}
    page = defaults.page(defaults.Results(made, split="val"))
    assert rows(page, "At default")["adam"] == ["80.0", "**diverged**"] and "of the validation sets" in page
    page = defaults.page(defaults.Results(made))
    assert rows(page, "At default")["adam"] == ["90.0", "**diverged**"] and "of the test sets" in page


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_the_regression_is_as_ill_conditioned_as_it_says() -> None:
    data = problems.ill_conditioned(condition=1e4, noise=0.1, examples=20_000, batch_size=50)
    inputs, targets = (torch.cat(parts).double() for parts in zip(*data.train.epoch(0), strict=True))
    inputs = inputs.flatten(1)
    values = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    assert float(values[-1] / values[0]) == pytest.approx(1e4, rel=0.1)
    left = (targets - inputs @ torch.linalg.lstsq(inputs, targets).solution).square().mean()
    assert float(left) == pytest.approx(0.01, rel=0.05) and data.plateau == pytest.approx(1.01, rel=0.05)


def test_the_regressions_batches() -> None:
    data = problems.ill_conditioned(examples=100, batch_size=30, seed=1)
    epochs = [torch.cat([x for x, _ in data.train.epoch(k)]) for k in (0, 0, 1)]
    assert len(data.train) == 3 and len(epochs[0]) == 90
    assert epochs[0].equal(epochs[1]) and not epochs[0].equal(epochs[2])
    other = problems.ill_conditioned(examples=100, batch_size=30, seed=0)
    assert not epochs[0].equal(torch.cat([x for x, _ in other.train.epoch(0)]))
    later = [x for x, _ in data.train.epoch(0, start=2)]
    assert len(later) == 1 and later[0].equal(epochs[0][60:])
    halves = [problems.ill_conditioned(examples=100, batch_size=30, seed=1, rank=r, world_size=2) for r in (0, 1)]
    assert torch.cat([next(iter(half.train.epoch(0)))[0] for half in halves]).equal(epochs[0][:30])
    assert sum(len(x) for x, _ in data.val.epoch(0)) == 50


def test_the_slim_nets_have_the_shape_of_the_wide_ones() -> None:
    net = problems.slim_resnet18(width=4, in_channels=1, num_classes=7)
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convs if m.kernel_size == (3, 3)] == [64] + [4] * 4 + [8] * 4 + [16] * 4 + [32] * 4
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    vit = problems.slim_vit(width=12, layers=2, in_channels=3, num_classes=7, image_size=16)
    assert vit(torch.zeros(2, 3, 16, 16)).shape == (2, 7) and len(vit.blocks) == 2
    with pytest.raises(ValueError, match="width must be divisible by the 3 heads, got 10"):
        problems.slim_vit(width=10, in_channels=3, num_classes=7, image_size=16)
    with pytest.raises(ValueError, match="patch_size must divide"):
        problems.slim_vit(patch_size=5, in_channels=3, num_classes=7, image_size=16)


def test_photos_are_read_once_and_served_by_the_seed(shared_data: Callable[[str], Path]) -> None:
    root = str(shared_data("tiny-imagenet-200") / "train")
    problems._photos.cache_clear()
    first, second = (problems.small_photos(root, 8, 32, seed=seed) for seed in (0, 1))
    again = problems.small_photos(root, 8, 32, seed=0)
    assert first.train.store is second.train.store and problems._photos.cache_info().misses == 1
    batches = [next(iter(data.train.epoch(0)))[0] for data in (first, second, again)]
    assert batches[0].equal(batches[2]) and not batches[0].equal(batches[1])


def test_the_characters_frequencies_alone(shared_data: Callable[[str], Path]) -> None:
    shared_data("wikitext-2")
    what = defaults.cell(problems.PROBLEMS["wikitext2_gpt_mini"], "adam", 0)
    placed = defaults._placed(what.config, what.problem, shared_data("wikitext-2").parent, Path("runs"), math.inf)
    data = build(placed.values["dataset"], "dataset", seed=0, device=torch.device("cpu"))
    size = data.facts["vocabulary"]
    counts = sum(targets.flatten().bincount(minlength=size) for _, targets in data.train.epoch(0))
    shares = (counts / counts.sum()).clamp_min(1e-6)
    targets = torch.cat([targets.flatten() for _, targets in data.test.epoch(0)])
    assert float(-shares[targets[targets >= 0]].log().mean()) == pytest.approx(problems.UNIGRAM, abs=0.02)
