"""scripts/studies/robustness.py: how far a range of rates goes, and what it says of a wrong name."""

from __future__ import annotations

import pytest

from scripts.problems import PROBLEMS
from scripts.studies import robustness
from scripts.studies.defaults import Outcome, cell


def test_a_mean_is_of_all_seeds() -> None:
    found = {}
    for seed, octave, value in ((0, -8, 0.5), (1, -8, 0.7), (0, -7, 0.9), (0, -6, 0.9), (1, -6, None)):
        key = cell(PROBLEMS["digits_mlp"], "kfac", seed, 2.0**octave).key
        status = "diverged" if value is None else "finished"
        found[key] = Outcome(key, "digits_mlp", "kfac", seed, 2.0**octave, 0.1, [], status, value)
    means = robustness.means(found, "digits_mlp", "kfac", (), [0, 1])
    assert means[0] == pytest.approx(0.6) and means[1:] == [None] * 16  # a seed is missing, or did not end


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("optimizers=[kfax]", "optimizers has no 'kfax' (did you mean 'kfac'?)"),
        ("problems=[digits_mpl]", "problems has no 'digits_mpl' (did you mean 'digits_mlp'?)"),
        ("rates=true", "choices are optimizers, problems, seeds, results, data; see --help"),
    ],
)
def test_a_wrong_choice_ends_in_a_sentence(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert robustness.main([given]) == 1
    assert said in capsys.readouterr().err
