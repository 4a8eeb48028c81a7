"""What pyproject.toml cannot say by itself: requirements are written once, and train.py becomes curvlab/train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

#: What `hydra/launcher=slurm` needs besides.
SLURM = ["submitit>=1.5"]


class Requirements(MetadataHookInterface):
    """The lines of requirements.txt: torch for the optimizers, all of them for the program."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the dynamic fields of `metadata`."""
        text = (Path(self.root) / "requirements.txt").read_text()
        lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
        metadata["dependencies"] = [line for line in lines if line.startswith("torch>")]
        train = [line for line in lines if not line.startswith("torch>")]
        metadata["optional-dependencies"] = {"train": train, "slurm": SLURM}


class Train(BuildHookInterface[Any]):
    """Folders are given new places by pyproject.toml; a file needs this."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the file to a wheel; one that is editable finds it in the clone (`version` says which it is)."""
        if self.target_name == "wheel" and version != "editable":
            build_data["force_include"][str(Path(self.root) / "train.py")] = "curvlab/train.py"
