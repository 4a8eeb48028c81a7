"""No file and no room has outgrown what a reader takes in; which file may know which, `make check` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("optimizers", "models", "data", "training", "analysis", "scripts")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
FOLDERS = sorted({path.parent for path in FILES})


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 200 and len(FOLDERS) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_read_in_one_go(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_is_seen_at_a_glance(folder: Path) -> None:
    names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    # A command's address is what people have written down: of those there may be two more than of files that can move.
    assert len(names) <= (14 if folder.name == "scripts" else 12), names


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_says_what_it_is(folder: Path) -> None:
    assert (folder / "__init__.py").read_text().lstrip().startswith('"""')
