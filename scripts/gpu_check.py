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

import gc
import importlib.util
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what repeats itself on CUDA needs it before CUDA starts

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

import optimizers
from optimizers import Categorical, CurvatureOptimizer, build_optimizer
from optimizers.curvature import linalg
from scripts import benchmark
from tests import dense
from tests.optimizers.problems import PROBLEMS, Problem
from training.loop.rng import deterministic

#: Updates and refreshes fall on different steps, so that inverses are now older than the factors and now not. Sampled
#: curvature of so few examples is noisy: more damping than usual.
KRONECKER: dict[str, Any] = {
    "lr": 0.02, "damping": 0.1, "update_every": 3, "refresh_every": 4, "batch_fraction": 1.0,
}  # fmt: skip

#: Class and options of each optimizer for small nets, by its name in configs/optimizer.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without L2: the fallback's denominator does not see it, and where the gradient is rounding alone (the bias of
    # attention's keys in nn.MultiheadAttention) the weight then grows without bound, on every device.
    "adafisher": ("AdaFisher", {"lr": 1e-3, "update_every": 3}),
    "adafisherw": ("AdaFisherW", {"lr": 1e-3, "update_every": 3, "weight_decay": 1e-2}),
    "kfac": ("KFAC", KRONECKER | {"weight_decay": 5e-4}),
    "ekfac": ("EKFAC", KRONECKER | {"refresh_every": 6}),
    "kpsvd": ("KPSVD", KRONECKER),
    "deflation": ("Deflation", KRONECKER),
    "kfac_corrected": ("KFACCorrected", KRONECKER),
    "lanczos": ("Lanczos", KRONECKER),
    "twolevel_kfac": ("TwoLevelKFAC", KRONECKER | {"damping": 1.0}),
    "exact_ng": ("ExactNaturalGradient", {"lr": 0.05, "damping": 0.1, "update_every": 2}),
    "adahessian": ("AdaHessian", {"lr": 0.05, "hessian_every": 2, "weight_decay": 5e-4}),
    "fishleg": ("FishLeg", {"lr": 0.02, "damping": 0.1, "aux_every": 3, "weight_decay": 5e-4}),
}

#: Those whose Fisher matrix may be the data's or the exact one in place of a sampled one.
FISHERS = tuple(name for name, (_, options) in OPTIMIZERS.items() if name == "exact_ng" or "refresh_every" in options)

#: What an interval is set to where nothing shall be due.
NEVER = 10**9

#: How far weights may be apart, in units of the distance that training moved them.
TOLERANCE = {"fp64": 1e-6, "fp32": 2e-3, "bf16": 0.1, "fp16": 0.1}

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Skipped(Exception):
    """A check does not apply on this machine; the message says why."""


class TimeLimit(BaseException):
    """A check took longer than it may. Not an Exception, so that no library's recovery swallows it."""


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


@dataclass
class Result:
    """What came of a check.

    Attributes:
        name: of the check.
        status: ok, failed, skipped or not run.
        seconds: that it took.
        message: one line.
        trace: last lines of the traceback of a failure.
        data: numbers for the tables.
    """

    name: str
    status: str
    seconds: float = 0.0
    message: str = ""
    trace: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Check:
    """A named function that returns a message or numbers, and raises what it finds wrong.

    Attributes:
        name: ``kind what optimizer``.
        run: the function.
        limit: seconds it may take.
        cuda: whether it makes sense on CUDA alone.
        exact: matrices are multiplied without TF32.
    """

    name: str
    run: Callable[[], str | dict[str, Any]]
    limit: float = 30.0
    cuda: bool = False
    exact: bool = True


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError unless a condition holds."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit in the block after so many seconds (at the next line of Python)."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimit(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def tf32(off: bool) -> Iterator[None]:
    """Multiply matrices in full float32 in the block."""
    if not off:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# -- small nets --------------------------------------------------------------------------------------------------------


class Draws(Categorical):
    """Categorical whose samples are the same on every device and in every precision."""

    def sample(
        self, outputs: Tensor, generator: torch.Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """See Likelihood; uniform numbers come from a generator of the CPU with the given one's seed."""
        seed = 0 if generator is None else generator.initial_seed()
        uniforms = torch.rand(
            self.noise_shape(outputs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return self.quantile(outputs.detach().double(), uniforms.to(outputs.device))


def build(name: str, model: nn.Module, **changes: Any) -> CurvatureOptimizer:
    """An optimizer of the table above for a small net."""
    target, options = OPTIMIZERS[name]
    options = {"likelihood": Categorical()} | options | changes
    if name in ("adafisher", "adafisherw", "adahessian"):
        del options["likelihood"]
    optimizer = build_optimizer(getattr(optimizers, target), model, **options)
    assert isinstance(optimizer, CurvatureOptimizer)
    return optimizer


def prepare(
    problem: Problem, device: torch.device, dtype: torch.dtype = torch.float32, examples: int = 16
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A net and its batch, the same numbers on every device."""
    factory, data = problem
    torch.manual_seed(0)
    model = factory()
    inputs, targets = data(examples)
    inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    return model.to(device, dtype), (inputs, targets.to(device))


def make_scaler(device: torch.device, precision: str) -> Any:
    """A gradient scaler for float16, else None."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**10) if precision == "fp16" else None


def train_step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    precision: str = "fp32",
    scaler: Any = None,
    micro: int = 1,
) -> Tensor:
    """One training step as a training script writes it. Returns the loss, on the device: nothing waits for it."""
    optimizer.zero_grad()
    losses = []
    kind, mixed = batch[0].device.type, precision in AUTOCAST
    for inputs, targets in zip(batch[0].chunk(micro), batch[1].chunk(micro), strict=True):
        with torch.autocast(kind, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=mixed):
            outputs = model(inputs)
            loss = F.cross_entropy(outputs.float() if mixed else outputs, targets) / micro
        losses.append(loss.detach())
        scaled = loss if scaler is None else scaler.scale(loss)
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.backward(scaled, outputs, scale=1.0 if scaler is None else scaler.get_scale())
        else:
            scaled.backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return torch.stack(losses).sum()


def weights(model: nn.Module) -> Tensor:
    """All parameters in one vector, in float64 on the CPU."""
    return dense.flatten([p.detach().cpu().double() for p in model.parameters()])


def apart(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """Distance of two vectors of weights, in units of how far the second has come from the start."""
    return float((found - expected).norm() / (expected - start).norm().clamp(min=1e-300))


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two states are not the same bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not torch.equal(a, b):
            far = float((a.double() - b.double()).abs().max()) if a.shape == b.shape else float("nan")
            yield f"{path} by {far:.1e}"
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}.{index}")
    elif type(a) is not type(b) or a != b:
        yield path


# -- contract ----------------------------------------------------------------------------------------------------------


def check_trains(name: str, precision: str, device: torch.device, nets: list[str], steps: int) -> str:
    """Every trainable tensor moves, all stay finite, and the loss falls."""
    told = []
    for net in nets:
        model, batch = prepare(PROBLEMS[net], device, examples=32)
        optimizer, scaler = build(name, model), make_scaler(device, precision)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses = torch.stack([train_step(optimizer, model, batch, precision, scaler) for _ in range(steps)]).tolist()
        still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        wild = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
        expect(not wild, f"{net}: not finite: {', '.join(wild)}")
        expect(not still, f"{net}: did not move: {', '.join(still)}")
        expect(losses[-1] < losses[0], f"{net}: the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")
        expect(optimizer.rejected == 0, f"{net}: {optimizer.rejected} statistics were not finite")
        told.append(f"{net} {losses[0]:.3g} to {losses[-1]:.3g}")
    return "loss of " + ", ".join(told)


def check_continues(name: str, precision: str, device: torch.device, nets: list[str], steps: int) -> str:
    """A run that is saved and loaded half-way into fresh objects ends as one that is not, bit for bit."""
    with deterministic(True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for net in nets:
            model, batch = prepare(PROBLEMS[net], device)
            optimizer, scaler = build(name, model), make_scaler(device, precision)
            for _ in range(steps):
                train_step(optimizer, model, batch, precision, scaler)
            file = io.BytesIO()
            parts: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(parts | {"scaler": scaler.state_dict() if scaler else {}}, file)
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
            twin, _ = prepare(PROBLEMS[net], device)
            twin.load_state_dict(saved["model"])
            second, second_scaler = build(name, twin), make_scaler(device, precision)
            second.load_state_dict(saved["optimizer"])
            if second_scaler is not None:
                second_scaler.load_state_dict(saved["scaler"])
            for _ in range(steps):
                train_step(optimizer, model, batch, precision, scaler)
            for _ in range(steps):
                train_step(second, twin, batch, precision, second_scaler)
            found = list(differences(model.state_dict(), twin.state_dict(), "model"))
            found += list(differences(optimizer.state_dict(), second.state_dict(), "optimizer"))
            loose = sorted({str(w.message).split(".")[0] for w in caught if "deterministic" in str(w.message)})
            hint = f" (torch says: {'; '.join(loose)})" if loose else ""
            expect(not found, f"{net}: {len(found)} differences, such as {', '.join(found[:3])}{hint}")
    return f"{', '.join(nets)}: {steps} + {steps} steps"


def check_micro(name: str, precision: str, device: torch.device, nets: list[str], steps: int) -> str:
    """Three micro-batches take the steps of one batch."""
    told = []
    # So many examples that factors have full rank: in a null space no basis is the right one.
    for net in nets:
        ends = []
        for micro in (1, 3):
            dtype = torch.float64 if precision == "fp64" else torch.float32
            model, batch = prepare(PROBLEMS[net], device, dtype, examples=96)
            start = weights(model)
            optimizer, scaler = build(name, model), make_scaler(device, precision)
            for _ in range(steps):
                train_step(optimizer, model, batch, precision, scaler, micro)
            ends.append(weights(model))
        far, limit = apart(ends[1], ends[0], start), TOLERANCE[precision]
        expect(far <= limit, f"{net}: {far:.1e} of the distance apart ({limit:.0e} may be)")
        told.append(f"{net} {far:.1e}")
    return "apart by " + ", ".join(told)


# -- oracle ------------------------------------------------------------------------------------------------------------


def check_oracle(name: str, precision: str, fisher: str, device: torch.device, nets: list[str], steps: int) -> str:
    """Curvature and weights after a few steps are those of the CPU in float64."""
    extra: dict[str, Any] = {"fisher": fisher} if name in FISHERS else {}
    if name in FISHERS or name == "fishleg":
        extra["likelihood"] = Draws()
    if name == "fishleg" and precision == "fp32":
        extra["eps"] = 1e-2  # a central difference in float32: rounding, not curvature, at the default
    told, examples = [], 96  # factors of full rank, but the first one of the MLP
    for net in nets:
        model, batch = prepare(PROBLEMS[net], torch.device("cpu"), torch.float64, examples)
        dtype = torch.float64 if precision == "fp64" else torch.float32
        twin, twins = prepare(PROBLEMS[net], device, dtype, examples)
        start, ends, curvatures = weights(model), [], []
        for net_, data in ((model, batch), (twin, twins)):
            optimizer = build(name, net_, **extra)
            for _ in range(steps):
                train_step(optimizer, net_, data)
            ends.append(weights(net_))
            curvatures.append({layer: m.cpu().double() for layer, m in optimizer.curvature_matrices().items()})
        # Moments in a basis of nearly equal eigenvalues move with the basis, and that with rounding.
        limit = TOLERANCE[precision] * (10 if name == "ekfac" else 1)
        expect(curvatures[0].keys() == curvatures[1].keys(), f"{net}: other layers have curvature")
        gaps = {n: float((curvatures[1][n] - m).norm() / m.norm()) for n, m in curvatures[0].items()}
        worst = max(gaps, key=lambda n: gaps[n], default="")
        far = apart(ends[1], ends[0], start)
        told.append(f"{net} steps {far:.0e} curvature {gaps.get(worst, 0.0):.0e}")
        bad = [f"curvature of {worst} by {gaps[worst]:.1e}"] if gaps.get(worst, 0.0) > limit else []
        bad += [f"steps by {far:.1e}"] if far > limit else []
        expect(not bad, f"{net} ({fisher}): {' and '.join(bad)} apart ({limit:.0e} may be)")
    return ", ".join(told)


class Separable(nn.Module):
    """Logits that are each a function of one weight's own column, so that probes of the Hessian cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 5))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 5]`` to the same."""
        return torch.tanh(self.weight) * x


def check_adahessian_oracle(precision: str, device: torch.device, net: str) -> str:
    """The estimate is ``z * (H z)`` with the dense Hessian, and steps on a diagonal one are those of the CPU."""
    from optimizers.adahessian import hutchinson, rademacher

    dtype = torch.float64 if precision == "fp64" else torch.float32
    model, (inputs, targets) = prepare(PROBLEMS[net], torch.device("cpu"), torch.float64, 24)
    params = list(model.parameters())
    hessian = dense.hessian(F.cross_entropy(model(inputs), targets), list(params))
    twin, (there, labels) = prepare(PROBLEMS[net], device, dtype, 24)
    others = list(twin.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(twin(there), labels), others, create_graph=True)
    probes = dense.flatten([z.cpu().double() for z in rademacher(others, 3)])
    found = hutchinson(gradients, others, 3)
    estimate = dense.flatten(
        [torch.zeros(p.shape).double() if d is None else d.cpu().double() for d, p in zip(found, others, strict=True)]
    )
    expected = probes * (hessian @ probes)
    gap = float((estimate - expected).norm() / expected.norm())
    expect(gap <= TOLERANCE[precision], f"{net}: the estimate is {gap:.1e} from the dense one")
    ends = []
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for place, kind in ((torch.device("cpu"), torch.float64), (device, dtype)):
        small = Separable().to(place, kind)
        start = weights(small)
        optimizer = build("adahessian", small)
        for _ in range(6):
            optimizer.zero_grad()
            outputs = small(x.to(place, kind))
            optimizer.backward((outputs - 1).square().sum(-1).mean(), outputs)
            optimizer.step()
        ends.append(weights(small))
    far = apart(ends[1], ends[0], start)
    expect(far <= TOLERANCE[precision], f"steps on a diagonal Hessian are {far:.1e} of the distance apart")
    return f"{net} estimate {gap:.0e}, steps {far:.0e}"


# -- synchronisation ---------------------------------------------------------------------------------------------------


def our_frame(stack: traceback.StackSummary) -> str:
    """``file:line function`` of the innermost frame of this project in a stack, as a path inside of it."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and frame.name not in ("showwarning", "our_frame"):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "no line of this project"


@contextmanager
def waits() -> Iterator[list[str]]:
    """In the block, collect the lines of this project that make the host wait for the device."""
    found: list[str] = []

    def showwarning(message: Warning | str, *_rest: Any, **_named: Any) -> None:
        if "synchronizing" in str(message):
            found.append(our_frame(traceback.extract_stack()))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = showwarning  # restored by catch_warnings
        yield found


@contextmanager
def sync_warnings(mode: str) -> Iterator[None]:
    """Let torch say when the host waits for the device: ``warn`` or ``error``."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def interval(optimizer: CurvatureOptimizer, update: int, refresh: int) -> None:
    """Set how often curvature is updated and refreshed."""
    optimizer.update_every = update
    if hasattr(optimizer, "refresh_every"):
        optimizer.refresh_every = refresh


def check_sync(name: str, device: torch.device, nets: list[str]) -> str | dict[str, Any]:
    """Forward, backward and step of ordinary steps queue their work and do not wait."""
    offenders: dict[str, list[str]] = {}
    for net in nets:
        model, batch = prepare(PROBLEMS[net], device)
        # SGD is the control: the loop and the model alone.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if name == "sgd" else build(name, model)
        for _ in range(7):  # the last two updates and refreshes are behind, allocations and handles made
            train_step(optimizer, model, batch)
        if isinstance(optimizer, CurvatureOptimizer):
            interval(optimizer, NEVER, NEVER)
        train_step(optimizer, model, batch)
        torch.cuda.synchronize()
        with waits() as control, sync_warnings("warn"):
            batch[0].sum().item()
        expect(bool(control), "torch did not tell of a synchronisation made on purpose: nothing can be concluded")
        with waits() as found, sync_warnings("warn"):
            for _ in range(3):
                train_step(optimizer, model, batch)
        if found:
            offenders[net] = [f"{found.count(line)}x {line}" for line in dict.fromkeys(found)]
            continue
        with sync_warnings("error"):  # what a thread of autograd's says may not reach the collector
            train_step(optimizer, model, batch)
    lines = [f"{net}: {', '.join(found)}" for net, found in offenders.items()]
    expect(not offenders, "waits in three ordinary steps: " + "; ".join(lines))
    return f"{', '.join(nets)}: none in three ordinary steps"


# -- compile -----------------------------------------------------------------------------------------------------------


def check_compile(name: str, device: torch.device, net: str, backend: str, steps: int) -> str:
    """Steps of a compiled model are those of the plain one; a method that cannot must say so."""
    import torch._dynamo

    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model, batch = prepare(PROBLEMS[net], device)
        start = weights(model)
        forward: Any = torch.compile(model, backend=backend) if compiled else model
        optimizer = build(name, forward)
        try:
            for _ in range(steps):
                train_step(optimizer, forward, batch)
        except RuntimeError as error:
            if optimizer.needs_graph and "compile" in str(error):
                return f"refused: {str(error).splitlines()[0][:200]}"
            raise
        ends.append(weights(model))
    far = apart(ends[1], ends[0], start)
    expect(far <= TOLERANCE["fp32"], f"{net}: {far:.1e} of the distance apart")
    return f"{net} ({backend}): apart by {far:.1e} after {steps} steps"


# -- tables ------------------------------------------------------------------------------------------------------------


class Marks:
    """Points in time on the device's own clock, read when all is done, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def __call__(self) -> None:
        """Note the time."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [before.elapsed_time(after) for before, after in pairs]
        return [1e3 * (after - before) for before, after in pairs]


def step_times(arm: benchmark.Arm, device: torch.device, budget: float) -> dict[str, float]:
    """Median milliseconds of a step and of its parts, from as many steps as fit into so many seconds (2 to 20)."""
    start = benchmark.now(arm.batches[0][0])
    arm.run(lambda: None)
    first = benchmark.now(arm.batches[0][0]) - start
    marks = Marks(device)
    repeats = min(max(int(budget / max(first, 1e-6)), 2), 20)
    for _ in range(repeats):
        arm.run(marks)
    times = marks.milliseconds()
    columns = [times[index::4] for index in range(3)]
    whole = [sum(times[4 * index : 4 * index + 3]) for index in range(repeats)]
    forward, backward, update = (statistics.median(column) for column in columns)
    return {"ms": statistics.median(whole), "forward": forward, "backward": backward, "step": update}


def measure(entry: str, settings: benchmark.Options, device: torch.device, budget: float) -> dict[str, Any]:
    """Times by phase and peak memory of one optimizer on one model."""
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    model, likelihood, batches = benchmark.make_model(settings)
    optimizer = benchmark.make_optimizer(entry, model, likelihood)
    arm = benchmark.Arm(entry, model, optimizer, likelihood, batches)
    row: dict[str, Any] = {"optimizer": entry, "parameters": sum(p.numel() for p in model.parameters())}
    ours = isinstance(optimizer, CurvatureOptimizer)
    updates = optimizer.update_every if isinstance(optimizer, CurvatureOptimizer) else 1
    refreshes = getattr(optimizer, "refresh_every", None) if ours else None
    for _ in range(2):  # the first update and refresh, allocations, the choice of kernels
        arm.run(lambda: None)
    phases = {"ordinary": (NEVER, NEVER)}
    if ours:
        phases["update"] = (1, NEVER)
        if refreshes is not None:
            phases |= {"refresh": (NEVER, 1), "both": (1, 1)}
    for phase, (update, refresh) in phases.items():
        if isinstance(optimizer, CurvatureOptimizer):
            interval(optimizer, update, refresh)
        row[phase] = step_times(arm, device, budget / len(phases))
    plain = row["ordinary"]["ms"]
    row |= {"update_every": updates, "refresh_every": refreshes, "amortised": plain}
    if ours:
        row["amortised"] += (row["update"]["ms"] - plain) / updates
        row["curvature_bytes"] = optimizer.coverage().bytes if isinstance(optimizer, CurvatureOptimizer) else 0
    if refreshes is not None:
        row["amortised"] += (row["refresh"]["ms"] - plain) / refreshes
    row["memory"] = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    row["finite"] = all(bool(p.isfinite().all()) for p in model.parameters())
    expect(row["finite"], "weights are no longer finite after random batches at a tiny learning rate")
    return row


def time_linalg(size: int, batch: int, device: torch.device, budget: float) -> dict[str, Any]:
    """Milliseconds of the decompositions of a batch of matrices, and of their product for comparison."""
    generator = torch.Generator().manual_seed(size)
    roots = torch.randn(batch, size, size, generator=generator).to(device)
    matrices = linalg.symmetrize(roots @ roots.mT / size)
    damping = torch.full((batch,), 1e-2, device=device)
    lower, _ = linalg.cholesky(matrices, damping)
    work: dict[str, Callable[[], object]] = {
        "product": lambda: matrices @ matrices,
        "cholesky": lambda: linalg.cholesky(matrices, damping),
        "cholesky_inverse": lambda: torch.cholesky_inverse(linalg.cholesky(matrices, damping)[0]),
        "eigh": lambda: linalg.eigh(matrices),
        "pencil": lambda: linalg.pencil(matrices, lower, None),
    }
    row: dict[str, Any] = {"size": size, "batch": batch}
    for name, function in work.items():
        function()
        start = benchmark.now(matrices)
        function()
        first = benchmark.now(matrices) - start
        marks = Marks(device)
        marks()
        for _ in range(min(max(int(budget / len(work) / max(first, 1e-6)), 1), 20)):
            function()
            marks()
        row[name] = statistics.median(marks.milliseconds())
    return row


# -- the trainer -------------------------------------------------------------------------------------------------------


def check_trainer(seconds: Callable[[], float]) -> str:
    """The trainer's tests that need a GPU, in a process of their own."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/training/test_cuda.py", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds(), 30.0))
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    told = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    expect(done.returncode == 0, "\n".join([lines[-1], *told, *lines[-30:]]))
    return lines[-1]


# -- all of it ---------------------------------------------------------------------------------------------------------


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


def run_check(check: Check, device: torch.device, left: float) -> Result:
    """Run one check; whatever goes wrong in it is its result."""
    result = Result(check.name, "ok")
    start = time.perf_counter()
    try:
        if check.cuda and device.type != "cuda":
            raise Skipped("needs CUDA")
        with tf32(check.exact), time_limit(min(check.limit, max(left, 5.0))), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = check.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what fails late shall fail here
        result.message, result.data = (found, {}) if isinstance(found, str) else ("", found)
    except Skipped as reason:
        result.status, result.message = "skipped", str(reason)
    except (Exception, TimeLimit) as error:  # noqa: BLE001 - the report of whatever failed is the point
        result.status = "failed"
        result.message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:400]}"
        result.trace = traceback.format_exc().strip().splitlines()[-14:]
    result.seconds = time.perf_counter() - start
    return result


def machine(options: Options) -> dict[str, Any]:
    """What the numbers were found on."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def text_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---", *["---:"] * (len(header) - 1)]) + " |"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def cost_tables(model: str, rows: list[dict[str, Any]]) -> list[str]:
    """A model's two tables: costs as ratios, and milliseconds by phase."""
    by_name = {row["optimizer"]: row for row in rows}
    units = [by_name[name] for name in ("sgd", "adamw") if name in by_name]
    if not units:
        return []
    costs, phases = [], []
    for row in rows:
        cells = [row["optimizer"], f"{row['ordinary']['ms']:.2f}"]
        cells += [" / ".join(f"{row['ordinary']['ms'] / unit['ordinary']['ms']:.2f}" for unit in units)]
        for key in ("update", "refresh", "both"):
            cells.append(f"{row[key]['ms'] / units[0]['ordinary']['ms']:.2f}" if key in row else "")
        cells += [" / ".join(f"{row['amortised'] / unit['ordinary']['ms']:.2f}" for unit in units)]
        memory = row["memory"]
        cells += ["" if memory is None else f"{memory / 2**20:.0f}"]
        cells += ["" if memory is None else " / ".join(f"{memory / max(unit['memory'], 1):.2f}" for unit in units)]
        costs.append(cells)
        if "update" in row:
            plain = row["ordinary"]
            surplus = [f"{row[key]['ms'] - plain['ms']:.2f}" if key in row else "" for key in ("update", "refresh")]
            intervals = f"{row['update_every']}" + (f", {row['refresh_every']}" if row["refresh_every"] else "")
            rest = [f"{plain['step'] - units[0]['ordinary']['step']:.2f}"]
            parts = [f"{plain[key]:.2f}" for key in ("forward", "backward", "step")]
            phases.append([row["optimizer"], intervals, *surplus, *rest, *parts])
    names = " / ".join(unit["optimizer"] for unit in units)
    first = ["optimizer", "ordinary ms", f"ordinary ÷ {names}", "update ÷ sgd", "refresh ÷ sgd", "both ÷ sgd"]
    first += [f"amortised ÷ {names}", "peak MiB", f"memory ÷ {names}"]
    second = ["optimizer", "intervals", "statistics", "inverses or bases", "products", "forward", "backward", "step"]
    lines = [f"## {model}, {rows[0]['parameters']:,} parameters", "", *text_table(first, costs)]
    return [*lines, *(text_table(second, phases) if phases else [])]


def page(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    checks = [Result(**check) for check in report["checks"]]
    counts = {status: sum(c.status == status for c in checks) for status in ("ok", "failed", "skipped", "not run")}
    facts = report["machine"]
    where = f"{facts['device']}, torch {facts['torch']}" + (f", CUDA {facts['cuda']}" if facts["cuda"] else "")
    lines = ["# Checks and costs on a GPU" if report["options"]["device"] == "cuda" else "# Checks and costs on a CPU"]
    lines += ["", "    python scripts/gpu_check.py", "", f"{where}, Python {facts['python']}. "]
    lines[-1] += f"{report['seconds']:.0f} seconds: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + "."
    lines += [""]
    tables: dict[str, list[dict[str, Any]]] = {}
    for check in checks:
        if check.name.startswith("table ") and check.data:
            tables.setdefault(check.name.split()[1], []).append(check.data)
    if tables:
        lines += [
            "Times are medians on the device's own clock, of steps that nothing waits between. *Ordinary* steps do no",
            "work on curvature, *update* steps renew its statistics, *refresh* steps its inverses, eigenbases or",
            "decompositions alone, *both* do both; *amortised* spreads the surplus over the intervals of",
            "`configs/optimizer`. By phase, in ms: statistics = update - ordinary; inverses or bases = refresh -",
            "ordinary; products = what an ordinary `step()` takes beyond SGD's; then the parts of an ordinary step.",
            "",
        ]
        for model, rows in tables.items():
            lines += cost_tables(model, rows)
    rows = [check.data for check in checks if check.name.startswith("linalg ") and check.data]
    if rows:
        keys = ["product", "cholesky", "cholesky_inverse", "eigh", "pencil"]
        lines += ["## Decompositions, ms a batch in float32 without TF32", ""]
        cells = [[f"{row['size']} ({row['batch']} matrices)", *(f"{row[key]:.2f}" for key in keys)] for row in rows]
        lines += text_table(["size", *keys], cells)
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        lines += ["## Failures", ""]
        for check in failed:
            lines += [f"### {check.name}", "", check.message, "", *(f"    {line}" for line in check.trace), ""]
    lines += ["## Checks", ""]
    others = [c for c in checks if c.name.split()[0] not in ("table", "linalg") or c.status != "ok"]
    clean = {id(c): c.message.replace("|", "\\|") for c in others}
    lines += text_table(
        ["check", "result", "seconds", "found"], [[c.name, c.status, f"{c.seconds:.1f}", clean[id(c)]] for c in others]
    )
    return "\n".join(lines).rstrip() + "\n"


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
    report: dict[str, Any] = {"machine": machine(options), "options": asdict(options)}
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
