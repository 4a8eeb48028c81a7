"""Everything about the optimizers that a GPU may change, by one command: is it right, does it wait, what does it cost.

    python scripts/gpu_check.py
    python scripts/gpu_check.py device=cpu size=toy only=kfac json=toy.json markdown=toy.md

It needs no data and no network. Checks go from the most to the least valuable, each one goes on after the failure of
another, and those that would begin after ``seconds`` are listed as not run. Both files are written after every check,
so that an interrupted run leaves what it found. The exit code is 1 if a check failed.

- ``contract``: training moves every tensor and lowers the loss, a saved state goes on bit for bit, micro-batches equal
  one batch; in float32 and under autocast to bfloat16 and float16.
- ``oracle``: curvature and steps on the device equal those of the CPU in float64.
- ``sync``: steps without curvature never wait for the device.
- ``table``: times and memory of real models, and what each phase of the curvature costs.
- ``trainer``: the trainer's own tests on a GPU.
- ``linalg``: decompositions by size.
- ``compile``: a step of a compiled model equals that of the plain one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what repeats itself on CUDA needs it before CUDA starts

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scripts import benchmark
from scripts.gpu.contract import check_compile, check_continues, check_micro, check_trainer, check_trains
from scripts.gpu.costs import measure, time_linalg
from scripts.gpu.nets import FISHERS, OPTIMIZERS, Draws
from scripts.gpu.oracle import check_adahessian_oracle, check_oracle
from scripts.gpu.report import machine, page
from scripts.gpu.running import Check, Result, run_check
from scripts.gpu.waiting import check_sync, our_frame, waits
from training.show import heart

__all__ = ["OPTIMIZERS", "Check", "Draws", "Result", "main", "our_frame", "run_check", "waits"]


@dataclass
class Options:
    """Command-line options, ``key=value``.

    Attributes:
        device: cuda or cpu; on a CPU, checks of CUDA itself are skipped.
        size: full, or toy: fewer steps and models that a CPU has done in seconds.
        seconds: no check begins later than this.
        only: run the checks in whose name this is found.
        json: where everything is written.
        markdown: where the page is written.
    """

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    size: str = "full"
    seconds: float = 480.0
    only: str = ""
    json: str = "gpu.json"
    markdown: str = str(ROOT / "docs" / "results" / "gpu.md")


def table_settings(options: Options) -> dict[str, tuple[benchmark.Options, list[str]]]:
    """Models of the tables, and the optimizers on them."""
    make = partial(benchmark.Options, device=options.device)
    if options.size == "toy":
        small = ["sgd", "adamw", "adafisher", "kfac"]
        return {
            "toynet": (make(model="toynet", batch_size=4), ["sgd", "adamw", *OPTIMIZERS]),
            "gpt": (
                make(model="gpt1_mini:layers=1:width=16:heads=2", batch_size=4, sequence=6, vocabulary=20), small
            ),
        }  # fmt: skip
    every = ["sgd", "adamw", *OPTIMIZERS]
    return {
        "resnet18": (make(model="resnet18:stem=cifar", batch_size=128, image_size=32), every),
        "gpt1_mini": (make(model="gpt1_mini", batch_size=32, sequence=64), every),
        "resnet50": (make(model="resnet50", batch_size=32, image_size=128), every),
    }


def all_checks(options: Options, seconds: Callable[[], float]) -> list[Check]:
    """The checks in the order of their value.

    Args:
        options: of the command line.
        seconds: how many are left.
    """
    device = torch.device(options.device)
    full = options.size == "full"
    nets = ["conv", "vit_fused"]
    steps = 20 if full else 8

    def contract(precision: str) -> list[Check]:
        found = []
        mine = nets if full or precision == "fp32" else ["vit_fused"]
        for name in OPTIMIZERS:
            label = f"contract {precision} {name}"
            found.append(
                Check(f"{label} trains", partial(check_trains, name, precision, device, mine, max(steps, 16)))
            )
            found.append(
                Check(f"{label} continues", partial(check_continues, name, precision, device, mine, steps // 2))
            )
            micro = ["groupnorm", "embedding"] if full else ["embedding"]
            for exactness in ("fp64", "fp32") if precision == "fp32" else (precision,):
                if full or exactness != "fp64":
                    run = partial(check_micro, name, exactness, device, micro, 4)
                    found.append(Check(f"contract {exactness} {name} micro-batches", run))
        return found

    oracles = []
    judged = ["mlp", "groupnorm", "conv", "vit_fused", "embedding"] if full else ["groupnorm"]
    for name in OPTIMIZERS:
        for precision in ("fp64", "fp32") if full or device.type == "cuda" else ("fp32",):
            label = f"oracle {precision} {name}"
            if name == "adahessian":
                oracles.append(Check(label, partial(check_adahessian_oracle, precision, device, "groupnorm")))
                continue
            for fisher in ("exact", "empirical", "sampled") if name in FISHERS else ("",):
                run = partial(check_oracle, name, precision, fisher, device, judged, 4)
                oracles.append(Check(f"{label} {fisher}".rstrip(), run))
    sync = [
        Check(f"sync {name}", partial(check_sync, name, device, [*nets, "embedding"]), cuda=True)
        for name in ("sgd", *OPTIMIZERS)
    ]
    budget = 1.2 if full else 0.05
    tables = [
        Check(f"table {model} {entry}", partial(measure, entry, settings, device, budget), limit=40.0, exact=False)
        for model, (settings, entries) in table_settings(options).items()
        for entry in entries
    ]
    # Toy runs go without the compiler proper, which would take longer than all the rest.
    compiled = [
        Check(
            f"compile {name}",
            partial(check_compile, name, device, "groupnorm", "inductor" if full else "eager", 4),
            limit=45.0,
        )
        for name in OPTIMIZERS
    ]
    sizes = {33: 64, 128: 32, 512: 8, 1024: 4, 2048: 1} if full else {33: 4}
    decompositions = [
        Check(f"linalg {size}", partial(time_linalg, size, batch, device, 2.0 if full else 0.05))
        for size, batch in sizes.items()
    ]
    trainer = [Check("trainer tests/training/test_cuda.py", partial(check_trainer, seconds), limit=150.0, cuda=True)]
    return [
        *contract("fp32"), *oracles, *sync, *tables, *contract("bf16"), *contract("fp16"), *trainer,
        *decompositions, *compiled,
    ]  # fmt: skip


def parse(arguments: list[str]) -> Options:
    """The options of a command line.

    Raises:
        SystemExit: for one that does not exist or a value out of its range.
    """
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_cli(arguments)))
    except OmegaConfBaseException as error:
        raise SystemExit(f"error: {str(error).splitlines()[0]} (options: {', '.join(Options().__dict__)})") from error
    assert isinstance(options, Options)
    for name, choices in (("device", ("cuda", "cpu")), ("size", ("full", "toy"))):
        if getattr(options, name) not in choices:
            raise SystemExit(f"error: {name} must be {' or '.join(choices)}, got {getattr(options, name)!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: device=cuda needs a CUDA GPU, and torch finds none here: use device=cpu")
    return options


def main(arguments: list[str]) -> int:
    """Run the checks and write what they found; returns the exit code."""
    options = parse(arguments)
    start = time.perf_counter()
    elapsed = lambda: time.perf_counter() - start  # noqa: E731
    checks = [
        check
        for check in all_checks(options, lambda: options.seconds - elapsed())
        if options.only in check.name
    ]  # fmt: skip
    if not checks:
        raise SystemExit(f"error: only={options.only!r} is in the name of no check")
    report: dict[str, Any] = {"machine": machine(options.device), "options": asdict(options)}
    results: list[Result] = []

    def write() -> None:
        waiting = [Result(check.name, "not run", message="out of time") for check in checks[len(results) :]]
        report["seconds"] = elapsed()
        report["checks"] = [asdict(result) for result in [*results, *waiting]]
        for path, text in ((options.json, json.dumps(report, indent=2) + "\n"), (options.markdown, page(report))):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)

    device = torch.device(options.device)
    for index, check in enumerate(checks):
        left = options.seconds - elapsed()
        if left <= 0:
            break
        with heart.working(f"{index + 1}/{len(checks)}, {check.name}"):
            result = run_check(check, device, left)
        results.append(result)
        told = result.message or (f"{result.data['ordinary']['ms']:.2f} ms" if "ordinary" in result.data else "")
        line = f"{elapsed():6.1f} s  {index + 1:3d}/{len(checks)}  {result.status:7s}  {check.name}"
        print(f"{line}  ({result.seconds:.1f} s)  {told}", flush=True)
        write()
    write()
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(f"\nfailed: {result.name}\n" + "\n".join(f"  {line}" for line in result.trace))
    missing = checks[len(results) :]
    if missing:
        print(f"\nnot run, out of time: {', '.join(check.name for check in missing)}")
    print(f"\n{len(failed)} of {len(results)} checks failed; see {options.json} and {options.markdown}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
