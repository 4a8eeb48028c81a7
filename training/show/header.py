"""What a run says of itself before its first step."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch

from optimizers.wrapper import innermost
from training.names import AROUND, PLAYERS, TARGET
from training.runs.run import Run

#: Of an optimizer's values, those that are said, in this order.
TOLD = (
    "name", "lr", "momentum", "betas", "weight_decay", "damping", "update_every", "refresh_every", "hessian_every",
    "kl_clip",
)  # fmt: skip
WIDTH = 80


def header(run: Run) -> str:
    """Optimizer and its main values, model, data, device, budget and folder, a line or two each.

    Args:
        run: before its first step.
    """
    choices = run.config.get("choices") or {}
    parameters = [p for p in run.model.parameters()]
    count, trained = (sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad]))
    model = f"{choices.get('model', type(run.model).__name__)}, {count:,} parameters"
    lines = {
        "optimizer": "; ".join(_optimizers(run, choices)),
        "model": model if trained == count else f"{model}, {trained:,} of them trained",
        "data": _data(run, choices),
        "on": _place(run),
        "budget": _budget(run),
        **({"tags": ", ".join(run.config["tags"])} if run.config.get("tags") else {}),
        "run folder": shown(run.folder.path),
    }
    return "\n".join(
        text
        if name == "run folder" and len(text) > WIDTH  # a path is to be copied
        else textwrap.fill(text, WIDTH, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False)
        for name, value in lines.items()
        for text in [f"{name:<11} {value}"]
    )


def shown(path: Path) -> str:
    """A path as it is found from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _optimizers(run: Run, choices: Mapping[str, str]) -> list[str]:
    found = []
    for group in ("optimizer", *PLAYERS):
        node = run.config.get(group)
        if not isinstance(node, Mapping) or (group == "optimizer" and all(run.config.get(name) for name in PLAYERS)):
            continue
        values = [f"{key} {node[key]}" for key in TOLD if node.get(key) is not None]
        chosen = choices.get(f"optimizer@{group}") or choices.get(group) or group
        found.append(f"{chosen}: {', '.join(values)}" if values else chosen)
    for group, nothing in AROUND.items():
        node = run.config.get(group)
        if isinstance(node, Mapping) and node.get(TARGET) != nothing:
            found.append(f"{group.replace('_', ' ')} {choices.get(group, node.get(TARGET))}")
    return found or [type(innermost(run.optimizer)).__name__]


def _data(run: Run, choices: Mapping[str, str]) -> str:
    sizes = [getattr(loader, "num_examples", 0) for loader in (run.data.train, run.data.val, run.data.test)]
    name = choices.get("dataset", run.data.name)
    there = len(getattr(run.data.train, "rows", ()))  # the last batch of an epoch is left out if it is no whole one
    part, why = (f" of {there:,}", " (whole batches)") if there > sizes[0] else ("", "")
    text = f"{name}: {sizes[0]:,}{part} to train on{why}, {sizes[1]:,} to validate, {sizes[2]:,} to test"
    if classes := run.data.facts.get("num_classes"):
        return f"{text}; {classes} classes"
    if tokens := run.data.facts.get("vocabulary"):
        return f"{text}; {tokens:,} tokens"
    return text


def _place(run: Run) -> str:
    settings = run.config.get("trainer") or {}
    size, device = run.world.world_size, run.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _threads(torch.get_num_threads())
    compiled = ", compiled" if settings.get("compile") else ""
    return f"{device} ({name}), {settings.get('precision', 'fp32')}{compiled}, {size} process{'es' * (size > 1)}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _budget(run: Run) -> str:
    budget, steps = run.budget, run.budget.total_steps
    if budget.max_time is not None:
        return f"{budget.max_time:g} s of training"
    batch = run.data.train.num_examples // max(len(run.data.train), 1) * run.accumulate
    epochs = f"{budget.max_epochs:g} epoch{'s' * (budget.max_epochs != 1)}, " if budget.max_epochs is not None else ""
    return f"{epochs}{steps:,} steps of {batch}"
