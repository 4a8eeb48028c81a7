"""What a checkpoint holds: all that a run needs to go on bit for bit, and whose it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from optimizers import consolidate
from optimizers.wrapper import check_wrappers
from training.loop import rng
from training.loop.distributed import broadcast_object, gather_objects
from training.names import AROUND, PLAYERS, RESTORED, SHARING, TARGET
from training.runs.averaging import leave
from training.runs.checkpoints.files import (
    FORMAT,
    CheckpointError,
    UnreadableError,
    best_file,
    link,
    load,
    put_aside,
    set_aside,
    step_file,
)  # fmt: skip
from training.runs.record import replace_folder
from training.runs.run import Run
from training.tasks.players import members

log = logging.getLogger(__name__)

#: What every checkpoint of a run holds.
PARTS = (
    "model", "optimizer", "scheduler", "scaler", "counters", "last_step", "budget", "ranks", "clocks", "best", "latest",
    "evaluated", "callbacks", "loggers",
)  # fmt: skip

Part = TypeVar("Part")


def capture(run: Run) -> dict[str, Any]:
    """All that ``restore`` needs to go on from here. Every rank must call it; what differs between them is gathered.

    Within ``averaged``, the model is what is evaluated.

    Tensors are the run's own, not copies: save the state before the next step.
    """
    for logger in run.loggers:
        logger.flush()
    consolidate(run.optimizer)
    # Of averaged weights: what is evaluated is the checkpoint's model, and its optimizer has the weights of training.
    aside = {} if run.training_buffers is None else {"training_buffers": run.training_buffers}
    mine = {"rng": rng.get_state(run.world.device), "window": run.window.state_dict()}
    return {
        "format": FORMAT,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "counters": {
            "step": run.step,
            "epoch": run.position[0],
            "batch": run.position[1],
            "tick": run.tick,
            "window_steps": run.window_steps,
        },
        "last_step": {"lr": run.lr, "grad_norm": None if run.grad_norm is None else run.grad_norm.detach()},
        "budget": {"ticks": run.budget.ticks},
        "ranks": gather_objects(mine, run.world),
        "clocks": run.clock.state_dict(),
        "best": run.best,
        "latest": run.latest,
        "evaluated": run.evaluated,
        "callbacks": {name: state for name, callback in named(run.callbacks) if (state := callback.state_dict())},
        "loggers": {name: state for name, logger in named(run.loggers) if (state := logger.state_dict())},
        "config_id": run.config_id,
        "settings": settings(run.config),
        **aside,
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Put a run that was just built back where ``capture`` saw it. Every rank must call it.

    What lies in the folder of later steps is set aside.

    Raises:
        CheckpointError: if it is another run's: its model, its optimizer or its settings are not those of this one.
    """
    try:
        _refuse_another(run, state)
        _restore(run, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint is incomplete ({error!r}): use an earlier one.") from error
    found = None
    if run.world.is_main:
        set_aside(run.folder.checkpoints, run.step)
        found = _recall_best(run, state["best"])
    run.best = broadcast_object(found, run.world)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that a checkpoint belongs to: it cannot be resumed with another one."""
    kept = {key: config[key] for key in RESTORED if config.get(key) is not None}
    for name in ("optimizer", *PLAYERS):  # how processes share its work out changes with their number
        if isinstance(kept.get(name), Mapping):
            kept[name] = {key: value for key, value in kept[name].items() if key != SHARING}
    if target := (config.get("dataset") or {}).get(TARGET):
        kept["dataset"] = {TARGET: target}
    for group, nothing in AROUND.items():  # which runs of earlier versions do not have
        if (kept.get(group) or {}).get(TARGET) == nothing:
            del kept[group]
    folder = (config.get("paths") or {}).get("data")
    kept = kept if folder is None else replace_folder(kept, str(folder), "<paths.data>")
    return json.loads(json.dumps(kept, default=lambda value: type(value).__name__))  # tuples are lists after a round


def _refuse_another(run: Run, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the checkpoint was written with other settings than those of the run."""
    here, there = settings(run.config), state.get("settings")
    if there is None:  # of an earlier version, which kept its name alone
        if state.get("config_id") != run.config_id:
            log.warning("The checkpoint is of configuration %s, not of %s.", state.get("config_id"), run.config_id)
        return
    for key, was, now in _differing(there, here):
        if key in AROUND and "null" in (was, now):
            continue  # of what is around an optimizer, or is not, its own check speaks
        raise CheckpointError(
            f"The checkpoint is of another {key.split('.')[0]} ({key} is {was} in it and {now} here): resume it with "
            "its own settings, or start a new run from its weights with init_from."
        )


def _differing(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted({*there, *here}):
            yield from _differing(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif there != here:
        yield key, "null" if there is None else there, "null" if here is None else here


def _restore(run: Run, state: dict[str, Any]) -> None:
    counters = state["counters"]
    try:
        run.model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint is of another model ({_reason(error)}): resume with the run's own settings."
        ) from error
    stretched = state["budget"]["ticks"] != run.budget.ticks
    if stretched:
        log.warning("The budget is not the checkpoint's: the schedule goes on at its place in the new one.")
        run.budget.replay(run.scheduler, counters["tick"])
    try:
        for name, one in members(run.optimizer).items():
            check_wrappers(one, state["optimizer"][name] if name else state["optimizer"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"The checkpoint is of another optimizer ({error}): resume with the run's own settings."
        ) from error
    if stretched:
        for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
    else:
        run.scheduler.load_state_dict(state["scheduler"])
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.tick, run.window_steps = counters["step"], counters["tick"], counters["window_steps"]
    run.lr, run.grad_norm = state["last_step"]["lr"], state["last_step"]["grad_norm"]
    if run.position != (counters["epoch"], counters["batch"]):
        raise CheckpointError(
            f"The checkpoint is at batch {counters['batch']} of epoch {counters['epoch']}, and with these settings "
            f"step {run.step} is not: resume with the run's own batch size, data limits and accumulation."
        )
    leave(run, state.get("training_buffers", {}))
    run.clock.load_state_dict(state["clocks"])
    run.latest, run.evaluated = state["latest"], state["evaluated"]
    for kind, parts in (("callbacks", named(run.callbacks)), ("loggers", named(run.loggers))):
        for name, part in parts:
            if name in state[kind]:
                part.load_state_dict(state[kind][name])
    _restore_ranks(run, state["ranks"])


def _recall_best(run: Run, recorded: dict[str, Any] | None) -> dict[str, Any] | None:
    """The best evaluation up to where the run is, with ``best.pt`` its weights; what came later is not believed."""
    folder = run.folder.checkpoints
    best = best_file(folder)
    if recorded is not None and recorded["metric"] == run.monitor:
        step = recorded["step"]
        for path in (best, best_file(folder, step), step_file(folder, step)):
            try:
                found = load(path)["best"] if path.exists() else None
            except UnreadableError:  # it may well be whole: nothing is to take its place
                raise
            except CheckpointError as error:
                log.warning("%s Looking for the best weights elsewhere.", error)
                continue
            if found and (found["metric"], found["step"]) == (recorded["metric"], step):
                if path != best:
                    link(path, best)
                return found
        log.warning("The weights of the best evaluation, of step %d, are lost: they are chosen anew.", step)
    if best.exists():
        put_aside(best)
    return _stand_in(run)


def _stand_in(run: Run) -> dict[str, Any] | None:
    """The evaluation that the checkpoint itself ends with, if it does, as the best, and its weights as ``best.pt``."""
    path = step_file(run.folder.checkpoints, run.step)
    if run.evaluated != run.step or run.monitor not in run.latest or not path.exists():
        return None
    link(path, best_file(run.folder.checkpoints))
    values = {name: value for name, value in run.latest.items() if name.startswith("val/")}
    found = {"metric": run.monitor, "value": values[run.monitor], "step": run.step, "epoch": run.epoch}
    return found | values


def _restore_ranks(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Random states and running sums, each rank's own; with another number of ranks, as well as it can be done."""
    rank, size = run.world.rank, run.world.world_size
    rng.set_state(ranks[min(rank, len(ranks) - 1)]["rng"], run.world.device)
    if len(ranks) == size:
        run.window.load_state_dict(ranks[rank]["window"])
        return
    log.warning(
        "The checkpoint is of %d process(es), this run has %d: dropout draws other masks from here on.",
        len(ranks),
        size,
    )
    rng.part_ways(rank, run.step)
    if rank == 0:
        run.window.load_state_dict({key: sum(r["window"][key] for r in ranks) for key in ranks[0]["window"]})


def _reason(error: Exception) -> str:
    """The part of torch's load error that names the tensor."""
    lines = str(error).splitlines()
    return lines[min(1, len(lines) - 1)].strip().rstrip(".")


def named(parts: Iterable[Part]) -> list[tuple[str, Part]]:
    """Callbacks or loggers with the names their state is saved under: the class, numbered from the second on."""
    counts: dict[str, int] = {}
    result = []
    for part in parts:
        kind = type(part).__name__
        counts[kind] = counts.get(kind, 0) + 1
        result.append((kind if counts[kind] == 1 else f"{kind}-{counts[kind]}", part))
    return result
