"""Killed at random moments and taken up again, a run leaves what an uninterrupted one leaves: weights, state, files.

The moments are uniform over the time that the whole command takes, from composing to the last picture, so they fall
into building, evaluating, writing and the end as well. `CURVLAB_KILLS_SEED=n` draws others.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.survival.conftest import places
from tests.survival.forks import Forks
from tests.training.small_run import differences, events

SEED = os.environ.get("CURVLAB_KILLS_SEED", "0")
KILLS = 3  # 66 in all: of each family in each of its forms, between a run's beginning and its end
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
BOTH = ("sgd", "gan", "text", "two")  # others differ in the optimizer alone, which knows of no form: by turns


def forms(family: str) -> list[str]:
    """The forms in which a family is killed."""
    return [*FORMS] if family in BOTH else [[*FORMS][[*FAMILIES].index(family) % len(FORMS)]]


def uninterrupted(forks: Forks, tmp_path: Path, family: str) -> tuple[dict[str, Any], float]:
    """What a run leaves that nothing happens to, and the seconds it takes."""
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 37} the" for i in range(1500)))
    (tmp_path / "whole").mkdir()
    whole = forks.run(*RUN, *FAMILIES[family], cwd=tmp_path / "whole", ranks=ranks(family))
    assert set(whole.codes) == {0}, whole.output
    return left_by(tmp_path / "whole", "runs/*/*"), whole.seconds


def chain(forks: Forks, work: Path, family: str, form: str, blows: Iterable[dict[str, Any]]) -> tuple[int, list[str]]:
    """A run in one of its forms, taken up again after each blow until it has finished; how many hit it, and a story."""
    words, _ = FORMS[form]
    work.mkdir()
    hits, story = 0, [f"seed {SEED}, {family}, {form}"]
    for blow in blows:
        ended = forks.run(*words, *RUN, *FAMILIES[family], cwd=work, ranks=ranks(family), launched=20, **blow)
        story.append(f"{blow}: {ended.codes}")
        if not any(ended.codes):
            return hits, story
        hits += 1
        if blow.get("number") == signal.SIGTERM:
            assert set(ended.codes) <= {0, 75} and "Traceback" not in "".join(ended.output), [*story, *ended.output]
    ended = forks.run(*words, *RUN, *FAMILIES[family], cwd=work, ranks=ranks(family))
    story.append(f"finished: {ended.codes} {ended.output}")
    assert not any(ended.codes), story
    return hits, story


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_is_an_uninterrupted_one(forks: Forks, tmp_path: Path, family: str) -> None:
    wanted, seconds = uninterrupted(forks, tmp_path, family)
    chance, kills, count = random.Random(f"{SEED} {family}"), 0, 0
    while kills < KILLS * len(forms(family)):
        form = forms(family)[count % len(forms(family))]
        victims = (None, [0], [1]) if family == "two" else (None,)
        blows = [{"after": chance.uniform(0, seconds), "victims": chance.choice(victims)} for _ in range(KILLS)]
        hits, story = chain(forks, work := tmp_path / f"chain{count}", family, form, blows)
        found = list(differences(left_by(work, FORMS[form][1]), wanted))
        assert found == [], "\n".join([*found, *story])
        kills, count = kills + hits, count + 1


@pytest.mark.slow
@pytest.mark.parametrize("family, form", [("adam", "single"), ("gan", "sweep"), ("text", "single"), ("two", "sweep")])
def test_a_stopped_run_is_an_uninterrupted_one(forks: Forks, tmp_path: Path, family: str, form: str) -> None:
    """In the build, a step, an evaluation, the test, a plot: SIGTERM is heeded, and a second one does not wait."""
    wanted, seconds = uninterrupted(forks, tmp_path, family)
    chance = random.Random(f"{SEED} {family} stopped")
    early, late, last = (chance.uniform(share, share + 0.3) * seconds for share in (0.1, 0.4, 0.7))
    twice = [(rank, int(signal.SIGTERM), 0.02) for rank in range(len(ranks(family)))]
    blows: list[dict[str, Any]] = [{"after": moment, "number": signal.SIGTERM} for moment in (early, last)]
    blows.insert(1, {"after": late, "number": signal.SIGTERM, "then": twice})
    hits, story = chain(forks, tmp_path / "parts", family, form, blows)
    found = list(differences(left_by(tmp_path / "parts", FORMS[form][1]), wanted))
    assert found == [] and hits, "\n".join([*found, *story])
