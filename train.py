"""Train one model, or sweep over many: compose, validate, build, fit, summarise.

Examples: `python train.py optimizer=adafisher model=resnet18 dataset=digits`, `python train.py --help`.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, Ctrl-C ends the process without a trace
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from training.command import cli, questions
from training.runs.record import RunConfig
from training.settings.composition import BEHAVIOUR, CONFIG_FOLDER, CONFIG_NAME, current


def train(run: RunConfig) -> tuple[dict[str, Any], Path]:
    """Train what a checked configuration describes, in this process or as one of those that torchrun started.

    Everything is built before the run folder exists: a value that is refused leaves nothing behind.

    Returns:
        The summary (as in `summary.json`) and the run folder.
    """
    # All this brings torch, for which --help and --cfg job do not wait.
    from training import seed_everything
    from training.loop import distributed
    from training.runs import resume
    from training.runs.warm_start import warm_start
    from training.settings.loading import build_parts
    from training.settings.schema import build, build_named, build_optimizers, build_scalars, build_schedule, refusals

    config = run.values
    with ExitStack() as stack:
        with refusals("trainer", config["trainer"]):
            world = stack.enter_context(distributed.session(config["trainer"]["device"]))
        start = cli.on_main(world, partial(resume.plan, run, distributed.recall("folder")))
        cli.say(start.note)
        if start.summary is not None:
            return start.summary, start.folder

        seed_everything(config["seed"])
        trainer = build(config["trainer"], "trainer")
        data, task, model = build_parts(config, world)
        cli.say(str(getattr(model, "loaded", "")))  # what became of pretrained weights
        if config["init_from"] and start.checkpoint is None:
            cli.say(warm_start(model, config["init_from"]))
        optimizer = build_optimizers(config, model, likelihood=task.likelihood, seed=config["seed"])
        schedule = build_schedule(config["scheduler"])
        scalars = build_scalars(config["schedules"])
        callbacks, loggers = build_named(config["callbacks"], "callbacks"), build_named(config["logger"], "logger")
        with refusals("trainer", config["trainer"]):
            trainer.check(
                data, task, world, callbacks, model=model, optimizer=optimizer, schedule=schedule, scalars=scalars
            )
        if answer := questions.asked(config):  # debug=verify, debug=summary: no run
            return answer(config, model, optimizer, data, task, world), Path(config["paths"]["runs"])
        state = resume.load_state(start)
        folder = cli.on_main(world, partial(resume.enter, start, run, world))
        distributed.remember("folder", str(folder.path))
        summary = trainer.fit(
            model, optimizer, data, task, folder=folder, schedule=schedule, scalars=scalars, world=world,
            callbacks=callbacks, loggers=loggers, resume=state, config=run.record(), config_id=run.id,
        )  # fmt: skip
    return summary, folder.path


@hydra.main(**BEHAVIOUR, config_path=str(CONFIG_FOLDER), config_name=CONFIG_NAME)
def job(cfg: DictConfig) -> float:
    """One job of this command; the monitored metric is what a sweeper may optimize."""
    return cli.run_job(train, current(cfg))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    return cli.main(train, job, argv)


if __name__ == "__main__":
    sys.exit(main())
