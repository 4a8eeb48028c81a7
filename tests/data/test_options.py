"""Options written once: callers, configurations and help see all that a builder's groups stand for."""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import data
from data import DataModule, digits
from data.options import Kind, Loading, Options, served

BUILDERS = [name for name in data.__all__ if inspect.isfunction(getattr(data, name))]


@dataclass(frozen=True)
class Place(Options):
    """Where it lies.

    Args:
        root: the folder,
            whatever it is called.
        download: fetch it.
    """

    root: str
    download: bool = True


@dataclass(frozen=True)
class Reading(Loading):
    """How it is read.

    Args:
        augment: nothing.
        sequence: at once.
    """

    sequence: int = 8
    augment: typing.Literal["none"] = "none"


def build() -> typing.Any:
    def family(level: int, *, place: Place, loading: Reading) -> DataModule:
        """A family.

        Args:
            level: its own.
            place: where.
            loading: how.

        Raises:
            ValueError: for an option out of its range.
        """
        return place, loading, level  # type: ignore[return-value]

    return family


def test_a_builder_gets_groups_and_callers_see_options() -> None:
    made = served(without=("test_fraction",), batch_size=7, root="here")(build())
    parameters = inspect.signature(made).parameters
    assert list(parameters) == [
        "level", "root", "download", "sequence", "batch_size", "eval_batch_size", "augment", "val_fraction",
        "split_seed", "limit_train", "limit_val", "limit_test", "seed", "device", "rank", "world_size",
    ]  # fmt: skip
    assert parameters["batch_size"].default == 7 and parameters["augment"].default == "none"
    assert [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY] == ["seed", "device", "rank", "world_size"]
    hints = typing.get_type_hints(made)
    assert hints["augment"] == typing.Literal["none"] and hints["device"] == torch.device | str
    assert made(2, download=False, limit_val=0.5) == (
        Place("here", False), Reading(batch_size=7, limit_val=0.5, sequence=8), 2
    )  # fmt: skip


def test_a_required_option_is_missed_and_an_unknown_one_refused() -> None:
    def family(*, place: Place) -> DataModule:
        """A family.

        Args:
            place: where.
        """
        return place  # type: ignore[return-value]

    made = served()(family)
    assert inspect.signature(made).parameters["root"].default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="root"):
        made()
    with pytest.raises(TypeError, match="rooot"):
        made(root="here", rooot="there")


def test_ranges_are_checked_before_the_builder_runs() -> None:
    with pytest.raises(ValueError, match=r"^limit_train must be above 0 and at most 1, got 2$"):
        served()(build())(1, "nowhere", limit_train=2)


def test_the_help_of_a_group_takes_the_place_of_its_line() -> None:
    doc = served()(build()).__doc__
    assert "    level: its own.\n    root: the folder,\n        whatever it is called.\n    download: fetch it." in doc
    assert "    sequence: at once.\n    batch_size: of all ranks together.\n" in doc
    assert "    augment: nothing.\n" in doc
    assert "place:" not in doc and "loading:" not in doc
    assert doc.endswith("Raises:\n    ValueError: for an option out of its range.")


@pytest.mark.parametrize("name", BUILDERS)
def test_every_option_of_every_set_has_a_type_and_a_line_of_help(name: str) -> None:
    made = getattr(data, name)
    assert made.__name__ == name
    hints = typing.get_type_hints(made)
    for option in inspect.signature(made).parameters:
        assert option in hints
        assert re.search(rf"^ +{option}: \S", made.__doc__, re.MULTILINE), option


def test_what_is_known_of_a_set_before_it_is_there(tmp_path: Path) -> None:
    """Every set has a kind; facts are those of the groups, of which there is one set each that needs no files."""
    kinds = {name: getattr(data, name).kind for name in BUILDERS if name != "wrap"}
    assert None not in kinds.values()
    (tmp_path / "text").write_text("one word after another, " * 40)
    text = data.text_file(str(tmp_path / "text"), sequence=4, batch_size=2)
    made = [data.digits(), data.digits_autoencoder(), data.digits_generation(), text]
    for one in made:
        assert kinds[one.name] == Kind(one.task, tuple(one.facts)), one.name
    assert {*kinds.values()} == {kinds[one.name] for one in made}


def test_a_default_of_one_set_is_not_that_of_another() -> None:
    assert digits().train.batch_size == 64 and Loading().batch_size == 128
