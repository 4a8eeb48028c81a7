"""Bring data sets and published weights to this machine before a run needs them, as on a login node with internet.

    python -m data.fetch --list
    python -m data.fetch cifar10 wikitext2 resnet18 timm:convnext_atto

Names are those of ``dataset=`` and ``model=`` (``timm:NAME`` and ``torchvision:NAME`` of those packages' models). Data
sets go to ``$CURVLAB_DATA`` or ``datasets/`` and are read once, so that what is damaged is found here. ``SHA256SUMS``
in each folder says what arrived (``sha256sum -c`` on the other side). Weights go where torch and Hugging Face keep
them: ``$TORCH_HOME`` and ``$HF_HOME``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from data.base import DataError
from data.sources.downloads import digest_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SUMS = "SHA256SUMS"
#: Bytes that are downloaded for a set.
SIZES = {
    "cifar10": 170_498_071, "cifar100": 169_001_437, "fashion_mnist": 30_878_645, "mnist": 11_594_722,
    "svhn": 246_316_178, "tiny_imagenet": 248_100_043, "wikitext103": 190_229_076, "wikitext2": 4_475_746,
}  # fmt: skip
#: What a model of each group is told of the data, for its head; published weights are for images of this kind.
FACTS = {"in_channels": 3, "num_classes": 1000, "image_size": 224}
PACKAGES = ("timm", "torchvision")
#: Seconds between two lines about what has arrived.
PACE = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 if a name could not be brought."""
    parser = argparse.ArgumentParser(prog="python -m data.fetch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a data set or a model; see --list")
    parser.add_argument("--list", action="store_true", help="what there is, what of it is here, and where it belongs")
    args = parser.parse_args(argv)
    if args.list or not args.names:
        print_list()
        return 0
    failed = 0
    for name in args.names:
        try:
            say(fetch(name))
        except (DataError, ValueError) as error:
            failed += 1
            sys.stderr.write(f"error: {name}: {error}\n")
    return int(failed > 0)


def fetch(name: str) -> str:
    """Bring one data set, or one model's weights.

    Args:
        name: see the module.

    Returns:
        A line on what is there now.

    Raises:
        DataError: there is no such name, or it cannot be had.
        ValueError: the weights cannot be had.
    """
    package, _, model = name.partition(":")
    if model and package in PACKAGES:
        return _weights(package, {"name": model})
    if name in choices("dataset"):
        return _data(name)
    if name in choices("model"):
        return _weights(name, {})
    known = [*choices("dataset"), *choices("model")]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise DataError(f"there is no data set and no model of that name{hint}; python -m data.fetch --list shows them")


def choices(group: str) -> list[str]:
    """The names that a group of configs/ has."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def options(group: str, name: str) -> dict[str, Any]:
    """The values of a file of configs/, with its paths filled in; keys whose value refers to others are left out."""
    content = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    place = os.environ.get("CURVLAB_DATA", "datasets")
    filled = {key: str(value).replace("${paths.data}", place) if isinstance(value, str) else value
              for key, value in content.items()}  # fmt: skip
    return {key: value for key, value in filled.items() if not (isinstance(value, str) and "${" in value)}


def own(values: Mapping[str, Any]) -> bool:
    """Whether a data set is the user's: there is nothing to bring."""
    return "download" not in values and bool({"root", "path"} & set(values))


def folders(values: Mapping[str, Any]) -> list[Path]:
    """Where a data set lies; nowhere if it comes with a package."""
    found = [Path(str(values[key])).expanduser() for key in ("root", "cache") if values.get(key) not in (None, "???")]
    return found


def _data(name: str) -> str:
    values = options("dataset", name)
    target = values.pop("_target_")
    if own(values):
        raise DataError("this is for data of yours: put it where dataset.root or dataset.path will say")
    places = folders(values)
    if "download" in values and name != "curves":  # whose images are made unless the original is there
        values["download"] = True
    with progress(name, places):
        _located(target)(**values, seed=0)
    total = sum(size(place) for place in places)
    for place in places if "download" in values else []:
        write_sums(place)
    where = " and ".join(str(place.absolute()) for place in places)
    return f"{name}: {_words(total)} in {where}" if where else f"{name}: comes with a package, nothing to bring"


def _weights(name: str, further: Mapping[str, Any]) -> str:
    values = options("model", name) | dict(further)
    target = values.pop("_target_")
    if "pretrained" not in values:
        raise DataError("no weights of this model are published")
    factory = _located(target)
    build = importlib.import_module("models").build_model  # beside this package, which does not know it otherwise
    torch_home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    with progress(name, [torch_home, hub]):
        model = build(factory, FACTS, **(values | {"pretrained": True}))
    return f"{further.get('name', name)}: {getattr(model, 'loaded', 'weights')}, kept in {torch_home} or {hub}"


def _located(target: str) -> Any:
    module, _, attribute = target.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@contextmanager
def progress(name: str, places: Sequence[Path]) -> Iterator[None]:
    """Within it, a line says every few seconds how much has arrived in some folders."""
    before = sum(size(place) for place in places)
    over = threading.Event()
    published = _published(name)
    total = f" of {_words(published)}" if published else ""

    def watch() -> None:
        while not over.wait(PACE):
            sys.stderr.write(f"{name}: {_words(max(0, sum(size(p) for p in places) - before))}{total}\n")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def size(place: Path) -> int:
    """Bytes of the files below a folder."""
    total = 0
    for path in place.rglob("*") if place.is_dir() else []:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # a partial download that has just become whole
            continue
    return total


def write_sums(place: Path) -> None:
    """Write `SHA256SUMS` of a folder's files, as `sha256sum -c` reads it."""
    lines = []
    for path in sorted(place.rglob("*")):
        if path.is_file() and path.name != SUMS and not path.name.startswith("."):
            digest = digest_of(path, like="sha256").partition(":")[2]
            lines.append(f"{digest}  {path.relative_to(place)}\n")
    if lines:
        (place / SUMS).write_text("".join(lines))


def print_list() -> None:
    """A line for each data set and each model that there are weights of."""
    for name in choices("dataset"):
        values = options("dataset", name)
        places = folders(values)
        here = sum(size(place) for place in places)
        kind = "yours" if own(values) else "download" if "download" in values else "with a package"
        if published := _published(name):
            kind += f" {_words(published)}"
        state = f"{_words(here)} here" if here else ("here" if kind == "with a package" else "absent")
        say(f"{name:26} {kind:18} {state:14} {', '.join(map(str, places))}".rstrip())
    weights = [name for name in choices("model") if "pretrained" in options("model", name) and name not in PACKAGES]
    say(f"weights: {', '.join(weights)}; timm:NAME, torchvision:NAME")


def _published(name: str) -> int:
    """Bytes of what is downloaded for a set, which several tasks may share; 0 where it is not known."""
    return SIZES.get(name.removesuffix("_autoencoder").removesuffix("_generation"), 0)


def _words(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def say(text: str) -> None:
    """A line on the terminal."""
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
