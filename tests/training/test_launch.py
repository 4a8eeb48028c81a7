"""Who am I among how many: environments as torchrun and SLURM 22.05 and 23.11 leave them."""

from __future__ import annotations

import pytest

from training import UserError
from training.loop.distributed import refuse_sharing
from training.loop.launch import Place, first_host, is_main, place

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
SECOND = {**STEP, "SLURM_PROCID": "1", "SLURM_STEP_ID": "3"}
TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"
}  # fmt: skip
NODES = {**TORCHRUN, "WORLD_SIZE": "4", "RANK": "3", "GROUP_WORLD_SIZE": "2"}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for name in {*SECOND, *TORCHRUN, "SLURM_PTY_PORT", "MASTER_ADDR", "MASTER_PORT"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "expected", "speaks"),
    [
        ({}, Place(), True),
        (JOB, Place(), True),  # the shell of salloc
        (BATCH, Place(), True),
        ({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFB)}, Place(), True),  # a batch script of later versions
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, Place(), True),
        (STEP, Place(0, 2, 0, "n1:20007"), True),
        (SECOND, Place(1, 2, 0, "n1:22998"), False),
        ({**SECOND, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, Place(1, 2, 0, "10.0.0.1:29500"), False),
        ({**SECOND, "MASTER_ADDR": "fe80::1"}, Place(1, 2, 0, "[fe80::1]:22998"), False),
        ({**SECOND, "WORLD_SIZE": "1"}, Place(), True),  # several runs side by side, if that is what is wanted
        (TORCHRUN, Place(1, 2, 1), False),
        ({**BATCH, **TORCHRUN}, Place(1, 2, 1), False),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", **TORCHRUN}, Place(1, 2, 1), False),
        ({**SECOND, **NODES}, Place(3, 4, 1), False),
    ],
    indirect=["given"],
)
def test_who_this_process_is(given: None, expected: Place, speaks: bool) -> None:
    assert (place(), is_main()) == (expected, speaks)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({**STEP, **TORCHRUN}, "srun started 2 torchruns, each of which would train by itself"),
        ({**STEP, "SLURM_PTY_PORT": "34653"}, "--cpus-per-task"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but RANK=None: start several processes"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}, "2 by SLURM but SLURM_LOCALID=None"),
        ({**STEP, "SLURM_STEP_NODELIST": ""}, "MASTER_ADDR"),
    ],
    indirect=["given"],
)
def test_what_is_refused(given: None, says: str) -> None:
    with pytest.raises(UserError) as told:
        place()
    assert says in str(told.value) and "\n" not in str(told.value)
    assert isinstance(is_main(), bool)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("n[03-05,9],m1", "n03"), ("gpu-a01,gpu-b02", "gpu-a01"),
        ("r[1-2]c3", "r1c3"), ("r1c[04,07].site.org", "r1c04.site.org"), ("node[7]", "node7"),
    ],
)  # fmt: skip
def test_the_host_of_rank_0(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_gpu_of_one_s_own() -> None:
    refuse_sharing(["n1 a", "n1 b", "n2 a"])
    with pytest.raises(UserError, match=r"3 processes share 2 GPU\(s\)"):
        refuse_sharing(["n1 a", "n1 b", "n1 a"])
