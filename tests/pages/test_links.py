"""Links between pages: none is dead, anchors included, and every page is found from the first one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages.reading import PAGES, anchors, name, targets

INDEX = ROOT / "docs" / "README.md"

every_page = pytest.mark.parametrize("path", PAGES, ids=name)


@every_page
def test_no_link_is_dead(path: Path) -> None:
    for target in targets(path):
        place, _, anchor = target.partition("#")
        there = (path.parent / place).resolve() if place else path
        assert there.exists(), f"{target}: there is no {there}"
        assert there.is_relative_to(ROOT), f"{target} is outside of the project"
        assert there.is_file(), f"{target} is a folder: link a page in it"
        if anchor:
            assert anchor in anchors(there), f"{target}: {name(there)} has {sorted(anchors(there))}"


@pytest.mark.parametrize("first", [INDEX, ROOT / "README.md"], ids=name)
def test_every_page_is_found(first: Path) -> None:
    seen, todo = set(), [first]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        linked = [(path.parent / target.partition("#")[0]).resolve() for target in targets(path)]
        todo += [page for page in linked if page.suffix == ".md" and page.is_file()]
    assert not {name(page) for page in PAGES} - {name(page) for page in seen}


@every_page
def test_a_page_has_one_title_and_begins_with_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")


def test_pictures_are_shown_and_small() -> None:
    """What lies in docs/ is what a page shows."""
    shown = {(path.parent / target).resolve() for path in PAGES for target in targets(path)}
    pictures = [path for path in (ROOT / "docs").rglob("*.png") if "_build" not in path.parts]
    assert not {name(path) for path in pictures} - {name(path) for path in shown if path.is_relative_to(ROOT)}
    large = {name(path): path.stat().st_size for path in pictures if path.stat().st_size > 150 * 1024}
    assert set(large) <= {"docs/results/toy.png"}, large  # of 24 panels
