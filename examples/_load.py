"""How the examples are imported by their names."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType


def load(name: str) -> ModuleType:
    """An example; the folder `datasets` of data here is not taken for Hugging Face's package of that name."""
    if (found := find_spec("datasets")) and found.origin is None:
        sys.modules["datasets"] = None  # type: ignore[assignment]  # for find_spec: it is not there
    return importlib.import_module(f"examples.{name}")
