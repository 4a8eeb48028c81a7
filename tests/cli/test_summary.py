"""``debug=summary`` and ``python -m models``: tables that fit, sentences for what is wrong, and nothing left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from models.__main__ import main
from tests.cli.conftest import Outcome


@pytest.fixture
def ask(work: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``python -m models`` in this process."""

    def give(*argv: str) -> Outcome:
        capfd.readouterr()
        return Outcome(main(argv), *capfd.readouterr())

    return give


def test_debug_summary_prints_layers_coverage_and_a_forecast(command: Callable[..., Outcome], work: Path) -> None:
    done = command("debug=summary", "model=mlp", "model.hidden=[16]", "optimizer=kfac", "averaging=ema")
    assert done.code == 0, done.err
    assert list(work.iterdir()) == [], "no run"
    assert max(map(len, done.out.splitlines())) <= 80
    assert "A 65² G 16²" in done.out and "100.0% of the trained parameters are under curvature" in done.out
    assert re.search(r"an average step +[\d.]+ m?s +[\d.]+ times SGD's", done.out)
    # Two factors and inverses each of (65, 16) and (17, 10), and momentum and the average: all in float32.
    factors = 4 * (65**2 + 16**2 + 17**2 + 10**2)
    weights = 4 * (65 * 16 + 17 * 10)
    assert f"factors {factors / 1e3:.3g} kB" in done.out and f"momentum_buffer {weights / 1e3:.3g} kB" in done.out


def test_models_lists_what_there_is_and_shows_one(ask: Callable[..., Outcome], work: Path) -> None:
    listed = ask()
    assert listed.code == 0 and re.search(r"^resnet18 +\w", listed.out, re.M) and "gpt1_mini" in listed.out
    shown = ask("resnet20")
    assert shown.code == 0, shown.err
    assert "269,722 parameters; 40.6 M multiply-adds" in shown.out  # He et al. (2016): 0.27 M; 40.6 M without shortcuts
    assert max(map(len, (listed.out + shown.out).splitlines())) <= 80
    forecast = ask("gpt1_mini", "model.layers=1", "model.width=16", "model.heads=2", "vocabulary=11", "sequence=5",
                   "batch_size=4", "optimizer=adafisherw")  # fmt: skip
    assert forecast.code == 0, forecast.err
    assert "fallback [1]" in forecast.out and "tied to" in forecast.out and "state of AdaFisherW" in forecast.out
    assert list(work.iterdir()) == []


def test_an_optimizer_that_looks_at_numbers_has_no_forecast(
    command: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = "self.param_groups[0]['params'][0].grad.masked_select(torch.tensor(True)); return super().step(closure)"
    own = f"import torch\nclass Picky(torch.optim.SGD):\n    def step(self, closure=None):\n        {step}\n"
    (work / "picky.py").write_text(own)
    monkeypatch.syspath_prepend(work)
    done = command("debug=summary", "model=mlp", "model.hidden=[16]", "optimizer=sgd", "optimizer._target_=picky.Picky")
    assert done.code == 1 and "no forecast for Picky, which looks at numbers in its step" in done.sentence()
    assert "1,210 parameters" in done.out


def test_two_players_are_shown_without_a_forecast(ask: Callable[..., Outcome]) -> None:
    shown = ask("dcgan", "model.width=4", "image_size=8", "optimizer=adam")
    assert shown.code == 0, shown.err
    assert "generator" in shown.out and "critic" in shown.out and "no forecast" in shown.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["resnt18"], "there is no model 'resnt18' (did you mean 'resnet18'?)"),
        (["resnet18", "optimizer=kfak"], "optimizer has no choice 'kfak' (did you mean 'kfac'?)"),
        (["resnet18", "batchsize=3"], "there is no such key (did you mean 'batch_size'?)"),
        (["resnet18", "batch_size=0"], "batch_size must be a whole number of at least 1, got 0"),
        (["resnet18", "dataset=digits"], "ask python train.py debug=summary model=resnet18 dataset=digits"),
        (["optimizer=kfac"], "a model's name comes first"),
        (["resnet18", "model.dept=3"], "depth"),
    ],
)
def test_what_is_wrong_is_a_sentence(words: list[str], sentence: str, ask: Callable[..., Outcome]) -> None:
    refused = ask(*words)
    assert refused.code == 1 and sentence in refused.sentence() and refused.out == ""
