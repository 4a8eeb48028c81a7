"""torch's compiler: not waited for before a run has begun, and heard as ever once somebody has imported it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from tests.conftest import ROOT


def _run(script: str, *arguments: str) -> str:
    """What a script prints, in an interpreter of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_is_in_its_folder_before_the_compiler_and_torchvision_are_imported(tmp_path: Path) -> None:
    script = """
        import sys

        import train
        from training.runs import resume

        enter = resume.enter

        def entered(*args):
            folder = enter(*args)
            print("entered", [name for name in ("torch._dynamo", "torchvision", "sympy") if name in sys.modules])
            return folder

        resume.enter = entered
        sys.exit(train.main(sys.argv[1:]))
    """
    said = _run(script, "model=mlp", "optimizer=sgd", "trainer.max_steps=2", "logger=quiet", f"paths.runs={tmp_path}")
    assert "entered []\n" in said
    assert len(list(tmp_path.rglob("summary.json"))) == 1


def test_optimizers_tell_a_compiler_to_look_away_once_there_is_one() -> None:
    script = """
        import torch

        from training.loop import compiler

        compiler.leave_out()
        compiler.leave_out()  # twice is once
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        assert not compiler.imported()

        weight.sum().backward()
        optimizer.step()  # imports it
        assert compiler.imported()
        before = weight.detach().clone()

        @torch.compile(backend="eager")
        def step():
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()

        for _ in range(2):
            step()
        first = before - 0.1 * (0.9 + 2 * before)
        assert torch.allclose(weight, first - 0.1 * (0.9 * (0.9 + 2 * before) + 2 * first)), weight
        print("fine")
    """
    assert _run(script) == "fine\n"


def test_determinism_is_asked_for_and_given_back_with_a_compiler_and_without() -> None:
    script = """
        import torch

        from training.loop import compiler
        from training.loop import rng

        def now():
            return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

        for mode in (0, 1, 2):
            torch.set_deterministic_debug_mode(mode)
            before = now()
            with rng.deterministic(True):
                assert now() == (True, True)
            assert now() == before
        assert not compiler.imported()

        torch.set_deterministic_debug_mode(0)
        import torch._dynamo
        import torch._inductor.config as config
        with rng.deterministic(True):
            assert now() == (True, True) and config.deterministic
        assert now() == (False, False) and not config.deterministic
        print("fine")
    """
    assert _run(script) == "fine\n"
