"""``python -m models NAME key=value ...``: a model of the tree without a data set."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from training.command.words import complain, is_mendable, say
from training.errors import UserError, did_you_mean
from training.names import TARGET
from training.settings.composing import compose
from training.settings.files import CONFIG_FOLDER
from training.settings.overrides import name_of, parse

#: Of the list of models.
WIDTH = 80

#: What is said of data in place of a data set, and what it is where nothing is said: images as of ImageNet, and texts.
FACTS = {
    "batch_size": 32, "in_channels": 3, "image_size": 224, "num_classes": 1000, "sequence": 64, "vocabulary": 10_000,
}  # fmt: skip
#: Groups and values of train.py that matter here, and may be given beside model.KEY and the like.
GROUPS = ("optimizer", "step_length", "averaging", "seed")
#: What models are published for that are not for such images.
OWN = {
    "autoencoder_curves": {"in_channels": 1, "image_size": 28},
    "autoencoder_mnist": {"in_channels": 1, "image_size": 28},
    "autoencoder_faces": {"in_channels": 1, "image_size": 25},
    "autoencoder_cifar10": {"image_size": 32},
    "conv_autoencoder": {"image_size": 32},
    "dcgan": {"image_size": 32},
    "resnet_gan": {"image_size": 32},
    "mlp": {"in_channels": 1, "image_size": 28, "num_classes": 10},
    "deep_linear": {"in_channels": 1, "image_size": 28, "num_classes": 10},
    "toynet": {"image_size": 32, "num_classes": 10},
    "cuda_convnet": {"image_size": 32, "num_classes": 10},
    "vgg11": {"image_size": 32, "num_classes": 10},
    "cct": {"image_size": 32, "num_classes": 10},
    "resnet20": {"image_size": 32, "num_classes": 10},
    "resnet32": {"image_size": 32, "num_classes": 10},
    "resnet56": {"image_size": 32, "num_classes": 10},
}


def main(argv: Sequence[str], explanation: str) -> int:
    """The command line.

    Args:
        argv: arguments.
        explanation: what ``--help`` prints.

    Returns:
        The exit code.

    Raises:
        Exception: what no user can mend.
    """
    if {"-h", "--help"} & set(argv):
        kept = ", ".join(f"{key}={value}" for key, value in FACTS.items())
        say(f"{explanation}\nOf the data, unless given or published otherwise: {kept}. All other keys are train.py's.")
        return 0
    try:
        show(argv)
    except Exception as error:
        if not is_mendable(error):
            raise
        complain(error)
        return 1
    return 0


def show(argv: Sequence[str]) -> None:
    """Print what there is, or one model.

    Args:
        argv: a name first, then ``key=value``.

    Raises:
        UserError: for whatever is wrong with them.
    """
    if argv:
        present(*read(argv))
    else:
        say(listing(known()))


def known() -> list[str]:
    """The names that there are."""
    return sorted(path.stem for path in (CONFIG_FOLDER / "model").glob("*.yaml"))


def read(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, int], bool]:
    """What is asked for, checked.

    Args:
        argv: a name first, then ``key=value``.

    Returns:
        A configuration, facts of the data, and whether an optimizer is named.

    Raises:
        UserError: for whatever is wrong with them.
    """
    names = known()
    name, *given = argv
    name = name.removeprefix("model=")
    if "=" in name or name.startswith("-"):
        raise UserError(f"a model's name comes first, such as resnet18, and {name!r} is none")
    if name not in names:
        raise UserError(f"there is no model {name!r}{did_you_mean(name, names)}; python -m models lists what there is")
    facts = FACTS | OWN.get(name, {})
    overrides = []
    for text in given:
        if "=" not in text:
            raise UserError(f"{text} is no key=value: one model at a time, and behind its name what it is to have")
        if parse(text).is_sweep_override():
            raise UserError(f"{text} holds several values, and one is to be given here")
        key = name_of(parse(text))
        if key == "dataset" or key.startswith("dataset."):
            raise UserError(f"{text}: with a data set, ask python train.py debug=summary model={name} {text}")
        if key not in FACTS:
            if "." not in key and key not in GROUPS:
                close = did_you_mean(key, [*FACTS, *GROUPS])
                raise UserError(f"{text}: there is no such key{close}; there are {', '.join([*FACTS, *GROUPS])}")
            overrides.append(text)
            continue
        value = parse(text).value()
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a whole number of at least 1, got {text.partition('=')[2]}")
        facts[key] = value
    config = compose([f"model={name}", *overrides]).values
    return config, facts, any(name_of(parse(text)).split(".")[0] == "optimizer" for text in overrides)


def present(config: Mapping[str, Any], facts: Mapping[str, int], asked: bool) -> None:
    """Build a model for data that are made up, and print it.

    Args:
        config: a checked configuration.
        facts: of the data.
        asked: whether an optimizer is named.
    """
    from models import build_model  # with torch, for which a list of names does not wait
    from training.command.summary import describe
    from training.loop.rng import seed_everything
    from training.settings.schema import build, locate
    from training.tasks.stand_ins import stand_in

    seed_everything(config["seed"])
    factory = locate(config["model"][TARGET], "model")
    task, told, inputs, targets = stand_in(inspect.signature(factory).parameters, facts, config["seed"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(config["model"], "model", through=build_model, facts=told)
    describe(config, model, inputs, targets, task, asked)
    shape = "×".join(map(str, inputs.shape[1:]))
    say(f"\nFor examples of {shape}, made up, in batches of {len(inputs)}.")
    if not asked:
        say("With optimizer=NAME, also curvature, and a forecast of memory and step cost.")


def listing(names: Sequence[str]) -> str:
    """What there is: a name and its file's first line a line.

    Args:
        names: of the files.
    """
    lines = []
    width = max(map(len, names))
    for name in names:
        first = (CONFIG_FOLDER / "model" / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        what = textwrap.shorten(first.removeprefix("#"), WIDTH - width - 2, placeholder=" …")
        lines.append(f"{name:{width}}  {what}")
    return "\n".join(lines)
