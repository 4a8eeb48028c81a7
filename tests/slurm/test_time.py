"""A job whose time is up goes on in another attempt. What takes longest is looked at last."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import LONG, Slurm, ends

pytestmark = pytest.mark.slow


def test_out_of_time(slurm: Slurm, jobs: dict[str, str]) -> None:
    ends(slurm, jobs["limit"], LONG, restarts=1)


def test_nothing_is_left_beside_the_runs(slurm: Slurm, jobs: dict[str, str]) -> None:
    kept = {path.name for path in slurm.work.glob(".stopped*")}
    assert kept <= {f".stopped_{jobs['gone']}"}, "scancel ends the script before it has tidied up"
