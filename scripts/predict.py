"""What a trained run says of images, or how it goes on with a text. Its data set need not be here.

    python scripts/predict.py RUN photo.jpg other.png        # classes with probabilities, the likeliest first
    python scripts/predict.py RUN photo.jpg --out pictures   # an auto-encoder: what becomes of it, as a picture
    python scripts/predict.py RUN "The cat" --tokens 50      # a language model: what it writes after that

Images are brought to the model's size and normalised as in training. Of a folder from elsewhere nothing is called but
Curvlab's own parts and its packages'; a model of your own is named again (--own mine.Net) and found in this folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from data import DataError, Vocabulary
from data.text import END, tokenise
from scripts import Parser
from training.errors import UserError
from training.runs.folder import atomic_file
from training.settings.loading import LoadedRun, Weights, load_run
from training.settings.own import reachable
from training.show import heart
from training.show.sample_text import continued


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        options = parser().parse_args(argv)
        with reachable():
            run = load_run(options.run, weights_of(options.weights), device=options.device, own=options.own)
            if run.task.name == "classification":
                classify(run, options)
            elif run.task.name == "language_modelling":
                write(run, options)
            elif run.task.name == "reconstruction":
                reproduce(run, options)
            elif run.task.name == "generation":
                raise UserError(f"{run.folder} is a GAN's, which takes no images: samples.png shows what it makes")
            else:
                outputs = zip(options.inputs, run.predict(options.inputs).tolist(), strict=True)
                say(options, [{"input": one, "outputs": row} for one, row in outputs])
    except OSError as error:
        sys.stderr.write(f"error: {options.out} cannot be written ({error.strerror}): give another --out\n")
        return 1
    except (UserError, DataError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def classify(run: LoadedRun, options: argparse.Namespace) -> None:
    """The likeliest classes of each image."""
    if not options.inputs:
        raise UserError("which images? Give their files after the run")
    found = run.predict(options.inputs).topk(min(options.top, len(run.class_names)))
    answers = [
        {"input": one, "classes": {run.class_names[k]: p for k, p in zip(which.tolist(), values.tolist(), strict=True)}}
        for one, values, which in zip(options.inputs, *found, strict=True)
    ]
    say(options, answers)


def write(run: LoadedRun, options: argparse.Namespace) -> None:
    """Each prompt and what the model adds to it."""
    facts = run.data.facts
    vocabulary = Vocabulary(facts["words"], facts["level"])
    answers = []
    for prompt in options.inputs or [""]:
        # A line begins where one has ended; unlike a prompt, that end is not shown.
        start = tokenise(prompt, facts["level"]) or [END if facts["level"] == "word" else "\n"]
        seen = vocabulary.encode(start).long().to(run.device)
        written = continued(run.model, seen, options.tokens, facts["sequence"], options.temperature, options.seed)
        answers.append({"input": prompt, "text": vocabulary.decode(written[0 if prompt else 1 :].tolist())})
    say(options, answers)


def reproduce(run: LoadedRun, options: argparse.Namespace) -> None:
    """What becomes of each image, as a picture."""
    from PIL import Image

    inputs = run.prepare(options.inputs)
    made = run.task.pixels(run.outputs(inputs)).view_as(inputs)  # type: ignore[attr-defined]  # a Reconstruction
    assert run.preparation is not None
    answers = []
    for one, before, after in zip(options.inputs, inputs, made, strict=True):
        path = Path(options.out) / f"{Path(one).stem}_reconstruction.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = run.preparation.back(after).cpu().permute(1, 2, 0).squeeze(-1).numpy()
        with atomic_file(path) as file:
            Image.fromarray(pixels).save(file, format="png")
        answers.append({"input": one, "mse": float((after - before).square().mean()), "picture": str(path)})
    say(options, answers)


def say(options: argparse.Namespace, answers: Sequence[dict[str, Any]]) -> None:
    """Print answers, a line each or as JSON."""
    if options.json:
        print(json.dumps(answers, indent=1, ensure_ascii=False))
        return
    width = max((len(str(answer["input"])) for answer in answers), default=0)
    for answer in answers:
        if "text" in answer:
            print(answer["text"])
        elif "classes" in answer:
            classes = "  ".join(f"{name} {100 * p:.1f} %" for name, p in answer["classes"].items())
            print(f"{answer['input']:<{width}}  {classes}")
        else:
            print(*(f"{key} {value}" if key != "input" else value for key, value in answer.items()), sep="  ")


def weights_of(text: str) -> Weights:
    """Which weights: best, last, a step or a file."""
    if text in ("best", "last"):
        return text  # type: ignore[return-value]
    return int(text) if text.isdigit() else Path(text)


def add_run(to: argparse.ArgumentParser) -> None:
    """What any command on a run is asked."""
    to.add_argument("run", metavar="RUN", help="the run folder, or a checkpoint in one")
    to.add_argument("--weights", default="best", help="best (default), last, a step, or a checkpoint's file")
    to.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    to.add_argument("--own", action="append", default=[], metavar="NAME", help="a callable of yours that may be called")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(__doc__)
    add_run(made)
    made.add_argument("inputs", metavar="IMAGE", nargs="*", help="files; of a language model, texts to go on with")
    made.add_argument("--top", type=_count, default=3, help="how many classes (3)")
    made.add_argument("--tokens", type=_count, default=100, help="how many a language model writes (100)")
    made.add_argument("--temperature", type=_warmth, default=0.8, help="0: the most probable token (0.8)")
    made.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    made.add_argument("--out", default=".", metavar="FOLDER", help="for pictures (.)")
    made.add_argument("--json", action="store_true", help="for machines")
    return made


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _warmth(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


if __name__ == "__main__":
    with heart.working("predicting"):
        sys.exit(main())
