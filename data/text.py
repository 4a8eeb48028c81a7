"""Text, of which each token is to be told from those before it: WikiText, and any file of one's own.

Each builder only reads its texts; `_module` makes the vocabulary, cuts the windows and builds the loaders, the same way
for all. The vocabulary is that of the training text; elsewhere, what it lacks is ``<unk>``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from data.base import DataError, DataModule
from data.memory import ImageStore, InMemoryLoader
from data.options import Kind, Loading, served
from data.sources.downloads import UNREACHABLE, alone, reason, retrieve_archive
from data.sources.reading import read_lines
from data.splits import limited

Level = Literal["word", "character"]

UNKNOWN, END = "<unk>", "<eos>"
IGNORED = -100  # the target of a position that does not count
MIRRORS = ("https://wikitext.smerity.com/", "https://s3.amazonaws.com/research.metamind.io/wikitext/")
SPLITS = ("train", "val", "test")
NAMES = {"train": "train", "val": "valid", "test": "test"}  # as the published files have them
INT_BYTES = 4  # of a stored token


@dataclass(frozen=True)
class Reading(Loading):
    """How a text is cut and served: what all sets share, and what there is to say of text.

    Args:
        sequence: tokens that are seen at once.
        max_vocabulary: keep so many of the most frequent tokens, the others become ``<unk>``; None: keep all.
        batch_size: windows, of all ranks together.
        augment: none.
        val_fraction: share of the tokens to validate on.
        test_fraction: share of the tokens for the test.
        limit_train: share of the training windows that is used.
        limit_val: share of the validation windows that is used.
        limit_test: share of the test windows that is used.
        seed: of the order of windows.

    Raises:
        ValueError: for an option out of its range.
    """

    kind: ClassVar[Kind | None] = Kind("language_modelling", ("vocabulary", "sequence", "words", "level"))
    sequence: int = 256
    max_vocabulary: int | None = None
    batch_size: int = 16
    eval_batch_size: int = 16
    augment: Literal["none"] = "none"
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment != "none":
            raise ValueError(f"augment must be none for a text, got {self.augment!r}")
        if self.sequence < 1:
            raise ValueError(f"sequence must be at least 1, got {self.sequence}")
        if self.max_vocabulary is not None and self.max_vocabulary < 2:
            raise ValueError(f"max_vocabulary must be at least 2 or null, got {self.max_vocabulary}")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction and test_fraction must leave some text to train on, got {self.val_fraction} and "
                f"{self.test_fraction}"
            )


class Vocabulary:
    """Tokens and their numbers.

    Args:
        words: the tokens in the order of their numbers; ``<unk>``, one of them, stands for all others.
        level: ``word``: what stands between spaces, and ``<eos>`` at the end of a line; ``character``: every character.

    Attributes:
        words: the tokens in the order of their numbers.
    """

    def __init__(self, words: Sequence[str], level: Level) -> None:
        self.words, self.level = list(words), level
        self._numbers = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, tokens: Iterable[str], level: Level, size: int | None = None) -> Vocabulary:
        """The vocabulary of a text: its ``size`` most frequent tokens (None: all), the most frequent ones first."""
        counts = Counter(tokens)
        counts.setdefault(UNKNOWN, 0)
        by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
        kept = by_frequency[:size]
        return cls(kept if UNKNOWN in kept else [*kept[:-1], UNKNOWN], level)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Sequence[str]) -> Tensor:
        """Numbers of tokens (see ``tokenise``), int32 ``[len(tokens)]``."""
        unknown = self._numbers[UNKNOWN]
        numbers = (self._numbers.get(token, unknown) for token in tokens)
        return torch.from_numpy(np.fromiter(numbers, np.int32, len(tokens)))

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of some tokens."""
        words = [self.words[number] for number in numbers]
        if self.level == "character":
            return "".join(words)
        return "\n".join(line.strip() for line in " ".join(words).split(END))


def tokenise(text: str, level: Level) -> list[str]:
    """The tokens of a text; see Vocabulary. Equal ones are one object: a hundred million would not fit otherwise."""
    return list(text) if level == "character" else [*map(sys.intern, text.replace("\n", f" {END} ").split())]


class TextLoader(InMemoryLoader):
    """Serves windows of a text: int64 ``[b, sequence]`` inputs and, as targets, the same moved on by one token.

    Order, ranks and resuming are those of the images: a window is kept as the bytes of its numbers, a token a row.

    Args:
        store: of the windows, see ``window_store``.
        rows: see InMemoryLoader.
        options: see InMemoryLoader.
    """

    def __init__(self, store: ImageStore, rows: Tensor, **options: Any) -> None:
        super().__init__(store, rows, mean=[0.0], std=[1.0], **options)

    def preparation(self) -> None:
        """See InMemoryLoader; a text has no images."""

    def _batch(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        found = self.store.windows(plan[1].to(self.store.device)).to(self.device, non_blocking=True)
        tokens = found.view(torch.int32).flatten(1).long()
        # What stands in the place of a missing input is seen by no position that counts: attention looks back.
        return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def windows(tokens: Tensor, sequence: int) -> Tensor:
    """A text in windows of ``sequence + 1`` tokens, each of which begins with the last one of the window before.

    So every token but the first is a target once. The last window is filled up with ``IGNORED``.

    Args:
        tokens: int32 ``[n]``, at least two.
        sequence: targets a window.

    Returns:
        int32 ``[windows, sequence + 1]``.
    """
    count = -(-(len(tokens) - 1) // sequence)
    filled = torch.full((count * sequence + 1,), IGNORED, dtype=torch.int32)
    filled[: len(tokens)] = tokens
    return filled.unfold(0, sequence + 1, sequence)


def window_store(found: Tensor, device: torch.device | str = "cpu") -> ImageStore:
    """Windows as the bytes of their numbers, which is what an ImageStore keeps."""
    count, length = found.shape
    as_bytes = found.contiguous().view(torch.uint8).view(count, 1, length, INT_BYTES)
    return ImageStore(as_bytes, torch.zeros(count), device=device)


@served(without=("split_seed",))
def text_file(path: str, level: Level = "word", *, loading: Reading) -> DataModule:
    """Any text in one file: its beginning is trained on, its end is the test set, what lies between validates.

    Args:
        path: the file, in UTF-8.
        level: what a token is: ``word``, whatever stands between spaces, with ``<eos>`` at the end of a line; or
            ``character``.
        loading: how it is cut and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: the file cannot be read, or is too short.
    """
    if level not in ("word", "character"):
        raise ValueError(f"level must be word or character, got {level!r}")
    tokens = _read(Path(path).expanduser(), level, "dataset.path")
    before_val, before_test = 1 - loading.val_fraction - loading.test_fraction, 1 - loading.test_fraction
    ends = [round(share * len(tokens)) for share in (before_val, before_test)]
    texts = {"train": tokens[: ends[0]], "val": tokens[ends[0] : ends[1]], "test": tokens[ends[1] :]}
    return _module("text_file", texts, level, loading)


def _wikitext(name: str, archive: str, md5: str, summary: str) -> Callable[..., DataModule]:
    """A builder for one of the WikiText sets."""

    def build(
        root: str, download: bool = True, files: dict[str, str] | None = None, *, loading: Reading
    ) -> DataModule:
        for split in files or {}:
            if split not in SPLITS:
                raise ValueError(f"files must name files for train, val and test, got one for {split!r}")
        paths = _obtain(name, Path(root).expanduser(), files or {}, archive, md5, download)
        texts = {split: _read(path, "word", "dataset.files") for split, path in paths.items()}
        return _module(name, texts, "word", loading)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{summary}

    Args:
        root: folder of the text: ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens`` as published,
            or ``train.txt``, ``valid.txt`` and ``test.txt``.
        download: fetch the set if it is not there.
        files: other files of the folder, by split: ``train``, ``val``, ``test``.
        loading: how it is cut and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: the files are not there and cannot be fetched, or cannot be read.
    """
    return served(without=("split_seed", "val_fraction", "test_fraction"))(build)


wikitext2 = _wikitext(
    "wikitext2", "wikitext-2", "542ccefacc6c27f945fb54453812b3cd",
    "WikiText-2 (Merity et al., 2017): articles of Wikipedia in 2,088,628 + 217,646 + 245,569 words and ends of line.",
)  # fmt: skip
wikitext103 = _wikitext(
    "wikitext103", "wikitext-103", "9ddaacaf6af0710eda8c456decff7832",
    "WikiText-103 (Merity et al., 2017): articles of Wikipedia, 103 million words to train on.",
)  # fmt: skip


# -- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path, level: Level, option: str) -> list[str]:
    """The tokens of a file."""
    try:
        return [token for line in read_lines(path) for token in tokenise(line, level)]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path.absolute()} cannot be read as text ({reason(error)}): name a UTF-8 file with {option}"
        ) from error


def _find(root: Path, archive: str, files: dict[str, str]) -> dict[str, Path | None]:
    """Each split's file, in the folder or where the archive puts it."""
    found: dict[str, Path | None] = {}
    for split, name in NAMES.items():
        names = [files[split]] if split in files else [f"wiki.{name}.tokens", f"{name}.txt"]
        places = (folder / file for folder in (root, root / archive) for file in names)
        found[split] = next((place for place in places if place.is_file()), None)
    return found


def _obtain(name: str, root: Path, files: dict[str, str], archive: str, md5: str, download: bool) -> dict[str, Path]:
    """The files of the three splits, downloaded if they are not there (by one process at a time)."""
    found = _find(root, archive, files)
    reasons = ""
    if None in found.values() and download:
        try:
            with alone(root):
                if None in _find(root, archive, files).values():  # no other rank or run has fetched it meanwhile
                    retrieve_archive(root, [f"{mirror}{archive}-v1.zip" for mirror in MIRRORS], f"md5:{md5}")
        except UNREACHABLE as error:
            reasons = reason(error)
        found = _find(root, archive, files)
    paths = {split: path for split, path in found.items() if path is not None}
    if missing := [split for split in SPLITS if split not in paths]:
        wanted = files.get(missing[0], f"wiki.{NAMES[missing[0]]}.tokens")
        cannot = f" and cannot be downloaded ({reasons})" if reasons else ""
        fetch = "" if download else "set dataset.download=true, "
        raise DataError(
            f"{wanted}, the {missing[0]} text of {name}, is absent from {root.absolute()}{cannot}: {fetch}put it "
            "there, name another folder with dataset.root or other files with dataset.files, or use a text of your "
            "own, dataset=text_file"
        )
    return paths


# -- splits ----------------------------------------------------------------------------------------------------------


def _module(name: str, texts: dict[str, list[str]], level: Level, loading: Reading) -> DataModule:
    """Number what was read, cut it into windows, and make the loaders."""
    sequence = loading.sequence
    for split, text in texts.items():
        if len(text) < 2:
            raise DataError(f"the {split} text of {name} has {len(text)} tokens and at least 2 are needed: choose more")
    vocabulary = Vocabulary.of(texts["train"], level, loading.max_vocabulary)

    def loader(split: str, limit: str, training: bool = False) -> TextLoader:
        found = windows(vocabulary.encode(texts[split]), sequence)
        # In training, the last window is dropped if it is not full, as the last batch is: so all positions of all
        # batches count, and a mean over them is the same for any number of ranks.
        count = (len(texts[split]) - 1) // sequence if training else len(found)
        if not count:
            raise ValueError(
                f"sequence must be less than the {len(texts[split])} tokens of the {split} text, got {sequence}"
            )
        rows = torch.arange(count)
        return TextLoader(
            window_store(found, loading.device),
            limited(rows, limit, getattr(loading, limit)),
            **loading.serving(training),
        )

    return DataModule(
        name=name,
        task="language_modelling",
        facts={"vocabulary": len(vocabulary), "sequence": sequence, "words": vocabulary.words, "level": level},
        train=loader("train", "limit_train", training=True),
        val=loader("val", "limit_val"),
        test=loader("test", "limit_test"),
        class_names=vocabulary.words,
    )
