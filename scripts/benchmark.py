"""What a step costs: every optimizer on the same model and batches, interleaved in one run, as ratios to SGD.

    python scripts/benchmark.py model=resnet18 optimizers=[sgd,adam,adafisher,adahessian,pytorch_optimizer.AdaHessian]
    python scripts/benchmark.py model=autoencoder batch_size=256 optimizers=[adam,adafisher:update_every=10]

An entry of ``optimizers`` is a file of configs/optimizer or a class by its dotted path (a peer), with options behind
colons. Blocks of steps alternate between the optimizers, so what else the machine does hits all of them alike. The step
time is the median of ordinary steps plus, for methods with an interval, the median surplus of a due step divided by the
interval (of updates and of refreshes each by its own, where they differ): what a step costs over a whole run. Of other
packages' methods it is the median over whole rounds of their intervals, of the mean step of each. Curvature seconds are
read off a profiler, which knows the wall's clock alone, in steps of their own; peak memory off a process of its own.
"""

from __future__ import annotations

import importlib
import inspect
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import models
from analysis import pages, records
from optimizers import Bernoulli, Categorical, CurvatureOptimizer, Likelihood, build_optimizer
from optimizers.base import CURVATURE
from optimizers.forecast import round_of
from training.errors import UserError
from training.loop.distributed import choose
from training.loop.heap import keep_freed
from training.loop.launch import Place
from training.show import heart

T = TypeVar("T")


@dataclass
class Options:
    """Command-line options, ``key=value``.

    Attributes:
        model: a configs/model name, with options behind colons (``gpt1_mini:layers=2``); ``autoencoder`` is short for
            autoencoder_curves.
        optimizers: what to compare; SGD is added where it is missing, as the unit.
        batch_size: examples a step.
        image_size: side of the images (models but ``autoencoder_*``, which have published sizes).
        sequence: tokens an example (models of text).
        vocabulary: different tokens (models of text).
        rounds: how many times the blocks alternate.
        block: steps a block.
        threads: CPU threads.
        device: cpu or cuda.
        clock: wall, or cpu: this process's own time, on a machine that does other things, too (with threads=1).
        quantile: of a step's times that stands for them; a low one where other things disturb most steps.
        memory: measure peak memory, one process an optimizer.
        only: (internal) run this one optimizer and print its peak memory.
        json: also write the rows to this file, JSON Lines, behind a line on how they were made.
    """

    model: str = "resnet18"
    optimizers: list[str] = field(
        default_factory=lambda: ["sgd", "adam", "adafisher", "adafisher:update_every=10", "adahessian"]
    )
    batch_size: int = 32
    image_size: int = 32
    sequence: int = 64
    vocabulary: int = 10_000
    rounds: int = 8
    block: int = 3
    threads: int = torch.get_num_threads()
    device: str = "cpu"
    clock: str = "wall"
    quantile: float = 0.5
    memory: bool = True
    only: str | None = None
    json: str | None = None


def load(path: str) -> Callable[..., Any]:
    """A class or function by its dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def group_file(group: str, name: str) -> dict[str, Any]:
    """A file of configs/, as a dictionary."""
    path = ROOT / "configs" / group / f"{name}.yaml"
    if not path.exists():
        choices = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise SystemExit(f"error: {group} has no choice {name!r}; it has {choices}")
    return cast("dict[str, Any]", OmegaConf.to_object(OmegaConf.load(path)))


def make_model(options: Options) -> tuple[nn.Module, Likelihood, list[tuple[Tensor, Tensor]]]:
    """The model, its likelihood and a few random batches to cycle through."""
    torch.manual_seed(0)
    name, *changes = options.model.split(":")
    name = {"autoencoder": "autoencoder_curves"}.get(name, name)
    overrides = OmegaConf.to_object(OmegaConf.from_dotlist(changes))
    config = group_file("model", name) | cast("dict[str, Any]", overrides)
    factory = load(config.pop("_target_"))
    device = torch.device(options.device)
    if "vocabulary" in inspect.signature(factory).parameters:
        words = [str(token) for token in range(options.vocabulary)]
        text = {"vocabulary": options.vocabulary, "sequence": options.sequence, "words": words}
        tokens = torch.randint(0, options.vocabulary, (8, options.batch_size, options.sequence + 1)).to(device)
        reader = models.build_model(factory, text, **config)
        return reader.to(device), Categorical(), [(window[:, :-1], window[:, 1:]) for window in tokens]
    # The sizes that the auto-encoders are published for; any other model takes colour images of the size asked for.
    published = {
        "autoencoder_curves": (1, 28),
        "autoencoder_mnist": (1, 28),
        "autoencoder_faces": (1, 25),
        "autoencoder_cifar10": (3, 32),
    }
    channels, size = published.get(name, (3, options.image_size))
    facts = {"in_channels": channels, "num_classes": 10, "image_size": size}
    model = models.build_model(factory, facts, **config)
    # A model that does not ask how many classes there are gives its images back.
    rebuilds = "num_classes" not in inspect.signature(factory).parameters
    likelihood: Likelihood = Bernoulli() if rebuilds else Categorical()
    batches: list[tuple[Tensor, Tensor]] = []
    for _ in range(8):
        if rebuilds:
            images = torch.rand(options.batch_size, channels, size, size)
            batches.append((images, images.flatten(1)))
        else:
            images = torch.randn(options.batch_size, channels, size, size)
            batches.append((images, torch.randint(0, 10, (options.batch_size,))))
    return model.to(device), likelihood, [(x.to(device), y.to(device)) for x, y in batches]


def make_optimizer(entry: str, model: nn.Module, likelihood: Likelihood) -> torch.optim.Optimizer:
    """``adafisher:update_every=10`` or ``package.Class:option=value`` as an optimizer."""
    name, *changes = entry.split(":")
    overrides = OmegaConf.to_object(OmegaConf.from_dotlist(changes))
    # A tiny step: the cost of one does not depend on its length, but diverging or vanishing activations are slow.
    config = {"_target_": name} if "." in name else group_file("optimizer", name)
    config |= {"lr": 1e-5} | cast("dict[str, Any]", overrides)
    return build_optimizer(load(config.pop("_target_")), model, likelihood=likelihood, **config)


@dataclass
class Arm:
    """One optimizer with a model of its own and the times of its steps, by phase."""

    entry: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    likelihood: Likelihood
    batches: list[tuple[Tensor, Tensor]]
    clock: str = "wall"
    quantile: float = 0.5
    ordinary: list[tuple[float, float, float]] = field(default_factory=list)
    due: list[tuple[float, float, float]] = field(default_factory=list)
    updates: list[tuple[float, float, float]] = field(default_factory=list)  # due ones without a refresh
    count: int = 0

    @property
    def interval(self) -> int:
        """Steps between curvature updates; 1 where every step is alike."""
        return self.optimizer.update_every if isinstance(self.optimizer, CurvatureOptimizer) else 1

    @property
    def refresh_interval(self) -> int:
        """Steps between refreshes of what is worked out from curvature."""
        return max(self.interval, getattr(self.optimizer, "refresh_every", 1))

    def run(self, mark: Callable[[], object]) -> None:
        """One training step; ``mark`` is called before it and after forward, backward and update."""
        inputs, targets = self.batches[self.count % len(self.batches)]
        self.count += 1
        mark()
        self.optimizer.zero_grad()
        outputs = self.model(inputs)
        loss = self.likelihood.nll(outputs, targets)
        mark()
        if isinstance(self.optimizer, CurvatureOptimizer):
            self.optimizer.backward(loss, outputs)
        else:
            loss.backward(create_graph=type(self.optimizer).__name__ == "AdaHessian")  # the peers' recipe
        mark()
        self.optimizer.step()
        mark()

    def step(self) -> tuple[float, float, float]:
        """One training step: seconds of forward, backward and update."""
        marks: list[float] = []
        self.run(lambda: marks.append(now(self.batches[0][0], self.clock)))
        return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]

    def block(self, steps: int) -> None:
        """A block of timed steps; where curvature has an interval, its first step is a due one.

        Where refreshes have a longer one, every other block begins with an update that brings none. A method of another
        package that has an interval takes whole rounds of it, each of which counts as its mean step.
        """
        length = 1 if isinstance(self.optimizer, CurvatureOptimizer) else round_of(self.optimizer)
        if length > 1:
            for _ in range(-(-steps // length)):
                forward, backward, update = (
                    statistics.fmean(phase) for phase in zip(*(self.step() for _ in range(length)), strict=True)
                )
                self.ordinary.append((forward, backward, update))
            return
        apart = self.refresh_interval > self.interval and len(self.updates) < len(self.due)
        if isinstance(self.optimizer, CurvatureOptimizer):
            (CurvatureOptimizer.renew if apart else type(self.optimizer).renew)(self.optimizer)
        for index in range(steps):
            is_due = self.interval > 1 and index == 0
            kind = (self.updates if apart else self.due) if is_due else self.ordinary
            kind.append(self.step())

    def typical(self, seconds: Iterable[float]) -> float:
        """The quantile that stands for many steps' times."""
        found = sorted(seconds)
        return statistics.median(found) if self.quantile == 0.5 else found[int(self.quantile * (len(found) - 1))]

    def phases(self) -> list[float]:
        """Amortised seconds of forward, backward, update."""
        usual = [self.typical(column) for column in zip(*self.ordinary, strict=True)]
        columns = [list(zip(*kind, strict=True)) or [()] * 3 for kind in (self.due, self.updates)]
        return [self._amortised(u, *pair) for u, *pair in zip(usual, *columns, strict=True)]

    def seconds(self) -> float:
        """Amortised seconds of a whole step."""
        usual = self.typical(map(sum, self.ordinary))
        return self._amortised(usual, [sum(t) for t in self.due], [sum(t) for t in self.updates])

    def _amortised(self, usual: float, due: Sequence[float], updates: Sequence[float]) -> float:
        """Seconds of an ordinary step, and a step's share of what the due ones take beyond it."""
        if not due:
            return usual
        refresh = self.typical(due)
        update = self.typical(updates) if updates else refresh
        return usual + (update - usual) / self.interval + (refresh - update) / self.refresh_interval

    def curvature_seconds(self) -> float:
        """Amortised seconds of curvature work, from two profiled due steps."""
        if not isinstance(self.optimizer, CurvatureOptimizer):
            return 0.0
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(2):
                self.optimizer.renew()
                self.step()
        total = sum(event.cpu_time_total for event in profiler.key_averages() if event.key == CURVATURE)
        return total / 1e6 / 2 / self.interval  # of refreshes as often as of updates


def now(like: Tensor, clock: str = "wall") -> float:
    """Seconds, after the device has finished what it was given."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.process_time() if clock == "cpu" else time.perf_counter()


def peak_memory(options: Options, entry: str) -> float:
    """MiB that training with one optimizer adds to a process that has the libraries loaded."""
    arguments = [f"model={options.model}", f"batch_size={options.batch_size}", f"image_size={options.image_size}"]
    arguments += [f"sequence={options.sequence}", f"vocabulary={options.vocabulary}"]
    arguments += [f"device={options.device}", f"threads={options.threads}", f"only={entry}"]
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_rss() -> float:
    """Peak resident MiB of this process. Linux tells it apart from the parent's, which getrusage inherits."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_peak_memory(options: Options) -> None:
    """The process behind ``peak_memory``: a few steps, then MiB on standard output."""
    before = peak_rss()
    model, likelihood, batches = make_model(options)
    arm = Arm(str(options.only), model, make_optimizer(str(options.only), model, likelihood), likelihood, batches)
    for _ in range(3):
        arm.step()
    if options.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(peak_rss() - before)


def parsed(kind: type[T], arguments: list[str]) -> T:
    """Options of a kind from ``key=value`` arguments; those that are none are an error in a sentence."""
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_cli(arguments)))
    except OmegaConfBaseException as error:
        raise SystemExit(f"error: {str(error).splitlines()[0]} (options: {', '.join(kind().__dict__)})") from error
    return cast("T", options)


def measured(options: Options, work: heart.Work) -> list[dict[str, Any]]:
    """A row for each optimizer, SGD's first; their steps are taken in turns."""
    entries = list(dict.fromkeys(["sgd", *options.optimizers]))
    arms = []
    for entry in entries:
        model, likelihood, batches = make_model(options)
        arms.append(Arm(entry, model, make_optimizer(entry, model, likelihood), likelihood, batches))
        arms[-1].clock, arms[-1].quantile = options.clock, options.quantile
    for arm in arms:
        arm.step()
        arm.step()
    for index in range(options.rounds):
        work.of(index, options.rounds, "rounds")
        for arm in arms[index % len(arms) :] + arms[: index % len(arms)]:  # nobody always follows the same neighbour
            arm.block(options.block)
    unit = arms[0].seconds()
    rows = []
    work.text = "benchmark: shares of a step, and memory"
    for arm in arms:
        forward, backward, update = arm.phases()
        row: dict[str, Any] = {
            "optimizer": arm.entry,
            "ms": 1e3 * arm.seconds(),
            "ratio": arm.seconds() / unit,
            "forward_ms": 1e3 * forward,
            "backward_ms": 1e3 * backward,
            "update_ms": 1e3 * update,
            "curvature_ms": None if options.clock == "cpu" else 1e3 * arm.curvature_seconds(),
            "memory_mib": peak_memory(options, arm.entry) if options.memory else None,
        }
        rows.append(row)
    return rows


def main(arguments: list[str]) -> list[dict[str, Any]]:
    """Run the benchmark and print its table; returns the rows."""
    if {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n{(Options.__doc__ or '').partition('Attributes:')[2]}")
        return []
    options = parsed(Options, arguments)
    if options.clock not in ("wall", "cpu"):
        raise SystemExit(f"error: clock must be wall or cpu, got {options.clock!r}")
    for name in ("batch_size", "image_size", "sequence", "vocabulary", "rounds", "block", "threads"):
        if getattr(options, name) < 1:
            raise SystemExit(f"error: {name} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.quantile <= 1:
        raise SystemExit(f"error: quantile must be from 0 to 1, got {options.quantile}")
    try:
        choose(options.device, Place())
    except (ValueError, UserError) as error:
        raise SystemExit(f"error: {error}") from error
    if options.json and not Path(options.json).parent.is_dir():
        raise SystemExit(f"error: json={options.json}: there is no folder {Path(options.json).parent}")
    torch.set_num_threads(options.threads)
    keep_freed()
    warnings.filterwarnings("ignore", message=".*create_graph.*")  # what a peer's own recipe does
    if options.only is not None:
        print_peak_memory(options)
        return []
    with heart.working("benchmark: building models and optimizers") as work:
        rows = measured(options, work)
    where = f"{options.device}, {options.threads} threads, torch {torch.__version__}"
    title = f"{options.model}, batch {options.batch_size}, {where}"
    table = Table(title=title, caption="curvature is part of backward and update; steps amortised over the interval")
    for column in ("optimizer", "step ms", "× SGD", "forward", "backward", "update", "curvature", "peak MiB"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        numbers = [row[key] for key in ("forward_ms", "backward_ms", "update_ms", "curvature_ms")]
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}"
        texts = ["" if n is None else f"{n:.1f}" for n in numbers]
        table.add_row(row["optimizer"], f"{row['ms']:.1f}", f"{row['ratio']:.3f}", *texts, memory)
    Console(width=120).print(table)
    return written(options, rows)


def written(options: Options, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, written to a file if one is asked for."""
    if options.json:
        records.write(Path(options.json), rows, options=asdict(options))
    return rows


def called(entry: str) -> str:
    """An entry as a page has it: ``kfac:damping=1`` as its name and its options."""
    return ", ".join(f"`{word}`" for word in entry.split(":"))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of docs/results/benchmark.md; memory where any row has it."""
    columns = {"ms": "step ms", "ratio": "× SGD", "forward_ms": "forward", "backward_ms": "backward",
               "update_ms": "update", "memory_mib": "peak MiB"}  # fmt: skip
    shown = [key for key in columns if any(row[key] for row in rows)]
    digits = {"ratio": 2, "memory_mib": 0}
    lines = [
        [called(row["optimizer"]), *(f"{row[key]:.{digits.get(key, 1)}f}" if row[key] else "" for key in shown)]
        for row in rows
    ]
    return pages.table(["optimizer", *(columns[key] for key in shown)], lines)


if __name__ == "__main__":
    main(sys.argv[1:])
