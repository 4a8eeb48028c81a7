"""Two names for one module: ``curvlab.training.errors`` for a user's script, ``training.errors`` for the program.

The program's files import each other by short names, in the clone and installed. As names of their own in an
environment, ``data`` or ``models`` would collide with other people's, so that they are nobody's until the command takes
them for its process, ahead of whatever lies in the working directory. Where both names of a module are in use, both are
the same object: a second copy of a class would make ``isinstance`` wrong without a word.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

#: The folders that have short names; the first one needs none of the others and no short name.
PARTS = ("optimizers", "models", "data", "training", "analysis")
PREFIX = "curvlab."


class Names(MetaPathFinder):
    """Finds modules of the parts by either name.

    Args:
        folders: where the parts lie.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        self.folders = [Path(folder).resolve() for folder in folders]
        self.taken = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``; None for what is to be found in the usual way.

        Raises:
            ImportError: a part of the program is imported where its short names lead elsewhere.
        """
        short = fullname.removeprefix(PREFIX)
        part = short.partition(".")[0]
        if part not in PARTS:
            return None
        if fullname == short:
            if not self._is_ours(part):
                return None
            if PREFIX + short in sys.modules:
                return ModuleSpec(fullname, _SameModule(PREFIX + short))
            return PathFinder.find_spec(fullname, [str(folder) for folder in self.folders] if path is None else path)
        if self.taken or (short in sys.modules and self._is_ours(part)):
            return ModuleSpec(fullname, _SameModule(short))
        if part != PARTS[0] and not all(map(self._is_ours, PARTS)):
            raise ImportError(
                f"{fullname} is a part of the program, whose files import each other by short names "
                f"({', '.join(PARTS)}): import curvlab.command first, which takes these names for this process",
                name=fullname,
            )
        return None

    def take(self) -> None:
        """Make the short names Curvlab's in this process.

        Raises:
            ImportError: one of them is in use by another module.
        """
        for part in PARTS:
            if part in sys.modules and not self._is_ours(part):
                theirs = _place(sys.modules[part].__spec__)
                raise ImportError(
                    f"the program needs the name {part!r} for its own modules, and {theirs} has been imported by that "
                    "name: run curvlab in a process of its own",
                    name=part,
                )
        self.taken = True

    def _is_ours(self, part: str) -> bool:
        """Whether a short name leads here: taken, or with a clone on ``sys.path`` in the usual way."""
        module = sys.modules.get(part)
        if module is None and self.taken:
            return True
        place = _place(PathFinder.find_spec(part) if module is None else module.__spec__)
        return place is not None and place.parent in self.folders


class _SameModule(Loader):
    """Loads a module by giving the one that has another name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # it is what it was, whatever the import system has written there


def _place(spec: ModuleSpec | None) -> Path | None:
    """The folder of a package, the file of a module."""
    if spec is None:
        return None
    found = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]
    return Path(found[0]).resolve() if found else None


_names: list[Names] = []


def install(folders: Iterable[str]) -> None:
    """Let every module have one object, whatever it is called. `folders`: where the parts lie."""
    if not _names:
        _names.append(Names(folders))
        sys.meta_path.insert(0, _names[0])


def take() -> None:
    """Make the short names Curvlab's in this process; ImportError where one of them is another module's already."""
    _names[0].take()
