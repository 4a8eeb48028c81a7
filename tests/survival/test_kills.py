"""Killed at random moments and taken up again, a run leaves what an uninterrupted one leaves: weights, state, files.

The moments are uniform over the time that the whole command takes, from composing to the last picture, so they fall
into building, evaluating, writing and the end as well. `CURVLAB_KILLS_SEED=n` draws others.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.survival.conftest import places
from tests.survival.forks import Ended, Forks
from tests.training.small_run import differences, events

SEED = os.environ.get("CURVLAB_KILLS_SEED", "0")
KILLS = 4  # of each family: half of them of a single run, half of a sweep's job
PER_CHAIN = 2  # kills between a run's beginning and its end
RUN = (
    "trainer.max_epochs=null", "trainer.max_steps=12", "trainer.log_every_steps=2", "trainer.eval_every_epochs=null",
    "trainer.eval_every_steps=4", "trainer.checkpoint_every_epochs=null", "trainer.checkpoint_every_steps=3",
)  # fmt: skip
DIGITS = ("model=mlp", "model.hidden=[16]", "dataset.limit_train=0.2", "dataset.batch_size=32")
GAN = (
    "model=dcgan", "model.width=4", "model.latent=8", "dataset=digits_generation", "dataset.limit_train=0.2",
    "dataset.batch_size=16", "dataset.eval_images=40", "trainer.max_steps=8",
)  # fmt: skip
TEXT = (
    "model=gpt1_mini", "model.layers=1", "model.width=16", "model.heads=2", "dataset=text_file",
    "dataset.path=../text.txt", "dataset.sequence=16", "dataset.batch_size=4",
)  # fmt: skip
OFTEN = ("optimizer.update_every=2", "optimizer.refresh_every=4")  # so that kills fall between two refreshes
FAMILIES: dict[str, tuple[str, ...]] = {
    "sgd": ("optimizer=sgd", *DIGITS),
    "adam": ("optimizer=adam", *DIGITS),
    "adafisher": ("optimizer=adafisher", "optimizer.update_every=3", *DIGITS),
    "adahessian": ("optimizer=adahessian", "optimizer.hessian_every=2", *DIGITS),
    "kfac": ("optimizer=kfac", *OFTEN, *DIGITS),
    "ekfac": ("optimizer=ekfac", *OFTEN, *DIGITS),
    "kpsvd": ("optimizer=kpsvd", *OFTEN, *DIGITS),
    "twolevel": ("optimizer=twolevel_kfac", *OFTEN, *DIGITS),
    "exact": ("optimizer=exact_ng", *DIGITS),
    "fishleg": ("optimizer=fishleg", *DIGITS),
    "shampoo": ("optimizer=shampoo", *DIGITS),
    "soap": ("optimizer=soap", *DIGITS),
    "newton_muon": ("optimizer=newton_muon", *DIGITS),
    "graft": ("optimizer=kfac", "step_length=graft", *DIGITS),
    "ema": ("optimizer=adamw", "averaging=ema", *DIGITS),
    "gan": ("optimizer=adam", *GAN),
    "text": ("optimizer=adamw", *TEXT),
    "two": ("optimizer=kfac", *OFTEN, *DIGITS),
}
TIMES = re.compile(r"^(seconds|time/.*|peak_memory_bytes|git_commit|clocks|loggers)$")  # and file offsets


def timeless(value: Any) -> Any:
    """Without what differs between two runs of the same."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not TIMES.match(str(k))}
    return value


def left_by(work: Path, pattern: str) -> dict[str, Any]:
    """What is in the one run folder, and the names of all files beside it."""
    (run,) = {path.parent for path in work.glob(f"{pattern}/config.yaml")}
    found = {re.sub(r"tfevents.*", "tfevents", str(path.relative_to(run))) for path in run.rglob("*")}
    left: dict[str, Any] = {
        "folders": [path.name for path in run.parent.iterdir() if path.is_dir() and path != run],
        "files": dict.fromkeys(found),
        "events": events(run),
        "summary": timeless(json.loads((run / "summary.json").read_text())),
    }
    for path in (run / "checkpoints").glob("*.pt"):
        left[path.name] = timeless(torch.load(path, weights_only=True))
    for name in ("sample.txt", "samples.png"):
        if (run / name).exists():
            left[name] = (run / name).read_bytes()
    return left


def ranks(family: str) -> list[dict[str, str]]:
    """What a launcher would set for each process of a family."""
    return places() if family == "two" else [{}]


FORMS = {
    "single": (("resume=auto",), "runs/*/*"),
    "sweep": (("-m", "seed=0", "hydra.sweep.dir=sweep"), "sweep/*"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_is_an_uninterrupted_one(forks: Forks, tmp_path: Path, family: str) -> None:
    command = (*RUN, *FAMILIES[family])
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 37} the" for i in range(1500)))
    (tmp_path / "whole").mkdir()
    whole = forks.run(*command, cwd=tmp_path / "whole", ranks=ranks(family))
    assert set(whole.codes) == {0}, whole.output
    wanted = left_by(tmp_path / "whole", "runs/*/*")
    chance, kills, chain = random.Random(f"{SEED} {family}"), 0, 0
    while kills < KILLS:
        form = [*FORMS][chain % len(FORMS)]
        words, pattern = FORMS[form]
        (work := tmp_path / f"chain{chain}").mkdir()
        story = [f"seed {SEED}, {family}, {form}, {whole.seconds:.2f} s"]
        ended: Ended | None = None
        for _ in range(PER_CHAIN):
            moment = chance.uniform(0, whole.seconds)
            victims = chance.choice([None, [0], [1]]) if family == "two" else None
            ended = forks.run(
                *words, *command, cwd=work, after=moment, ranks=ranks(family), victims=victims, launched=True
            )
            story.append(f"killed {victims or 'all'} after {moment:.3f} s: {ended.codes}")
            if not any(ended.codes):
                break
            kills += 1
        if ended is not None and any(ended.codes):
            ended = forks.run(*words, *command, cwd=work, ranks=ranks(family))
            story.append(f"finished: {ended.codes} {ended.output}")
            assert not any(ended.codes), story
        found = list(differences(left_by(work, pattern), wanted))
        assert found == [], "\n".join([*found, *story])
        chain += 1
