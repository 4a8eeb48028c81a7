"""docs/optimizers: every optimizer has its page, and each page the options of its file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from optimizers.table.catalogue import CATALOGUE
from scripts.pages import options
from tests.conftest import ROOT
from tests.pages.reading import name

FOLDER = ROOT / "docs" / "optimizers"
PAGES = [path for path in sorted(FOLDER.glob("*.md")) if options.names(path.read_text())]


def test_every_optimizer_has_one_page() -> None:
    listed = [entry for path in PAGES for entry in options.names(path.read_text())]
    assert sorted(listed) == sorted(CATALOGUE)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_tables_of_options_are_those_of_the_files(path: Path) -> None:
    text = path.read_text()
    assert options.renewed(text) == text, "run: python scripts/pages/options.py"


@pytest.mark.parametrize("entry", CATALOGUE)
def test_no_option_of_a_file_is_left_out(entry: str) -> None:
    values = yaml.safe_load((ROOT / "configs" / "optimizer" / f"{entry}.yaml").read_text())
    assert [key for key, _, _ in options.options(entry)] == [key for key in values if key != "_target_"]


def test_the_state_that_pages_tell_is_that_of_the_table() -> None:
    """Bytes a parameter, which a test compares with what is measured."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    states = {row[0].strip(" `"): row[5].strip() for row in rows if len(row) == 9 and row[5].strip()}
    assert len(states) > 20
    for path in PAGES:
        text = path.read_text()
        for entry in set(options.names(text)) & set(states):
            told = rf"\b{float(states[entry]):g}(\.0)? bytes\s+a\s+parameter"
            assert re.search(told, text), (path.stem, states[entry])


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_says_what_a_reader_looks_for(path: Path) -> None:
    text = path.read_text()
    assert "```math" in text or path.stem == "packages"
    for words in ("What was changed", "Cost", "When", "When not"):
        assert re.search(rf"^(## |\*\*).*{words}|\*\*{words}", text, re.MULTILINE | re.IGNORECASE), words
    assert re.search(r"^    python train\.py .*optimizer=", text, re.MULTILINE), "no command"
