"""A trained model as a file for other programs. Its data set need not be here.

    python scripts/export.py RUN --to onnx          # for onnxruntime and others
    python scripts/export.py RUN --to torch.export  # for torch.export.load, without Curvlab
    python scripts/export.py RUN --to safetensors   # the weights alone

Of a model of images, onnx and torch.export hold the normalisation too: they take bytes as image files have them, uint8
[batch, channels, height, width] of the model's size, and give what the model gives (logits). With --inputs they take
what the run's loaders serve. Beside the file, NAME.json says which classes there are, and how images become inputs.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from torch import Tensor, nn

from data import DataError
from data.kept import Preparation
from scripts import Parser
from scripts.predict import add_run, weights_of
from training.errors import UserError
from training.runs.folder import atomic_file
from training.settings.loading import LoadedRun, load_run
from training.settings.own import reachable
from training.show import heart

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch.export": ".pt2"}


class OfBytes(nn.Module):
    """A model behind the normalisation of its inputs: from bytes ``[b, C, H, W]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, prepared: Preparation) -> None:
        super().__init__()
        self.model = model
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.tensor(getattr(prepared, name)))

    def forward(self, pixels: Tensor) -> Tensor:
        """The model's outputs."""
        return self.model(pixels.to(torch.float32) * self.scale + self.shift)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        options = parser().parse_args(argv)
        with reachable():
            run = load_run(options.run, weights_of(options.weights), own=options.own)
            out = Path(options.out or run.folder / f"model{SUFFIXES[options.to]}")
            if out.suffix == ".json":
                raise UserError(f"--out {out}: a file of that name says what goes in and what comes out: give another")
            told = export(run, options.to, out, options.inputs)
    except OSError as error:
        sys.stderr.write(f"error: {out} cannot be written ({error.strerror}): give another --out\n")
        return 1
    except (UserError, DataError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{out}: {told}; {out.with_suffix('.json').name} says what goes in and what comes out")
    return 0


def export(run: LoadedRun, to: str, out: Path, inputs: bool = False) -> str:
    """Write a run's model.

    Args:
        run: whose.
        to: safetensors, onnx or torch.export.
        out: the file.
        inputs: whether it is to take inputs even where bytes could be taken.

    Returns:
        What it takes, in words.

    Raises:
        UserError: this model cannot be exported so, or a package is missing.
    """
    if run.task.name == "generation" and to != "safetensors":
        raise UserError(f"{run.folder} is a GAN's, two models in one: export its weights, by --to safetensors")
    example, prepared = _example(run) if to != "safetensors" else (torch.empty(0), run.preparation)
    model: nn.Module = run.model.eval()
    if to != "safetensors" and prepared is not None and not inputs:
        model, example = OfBytes(model, prepared).eval(), prepared.back(example)
    out.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "run": run.folder.name, "step": run.step, "task": run.task.name, "takes": "weights",
        "class_names": run.class_names, "preparation": None if prepared is None else asdict(prepared),
    }  # fmt: skip
    if to == "safetensors":
        content = _safetensors(model, run)
    else:
        about["takes"] = f"{str(example.dtype).removeprefix('torch.')} {['batch', *example.shape[1:]]}"
        about["gives"] = "logits of the classes" if run.task.name == "classification" else "the model's outputs"
        if isinstance(model, OfBytes):  # whoever is told of it would normalise once more
            about["preparation"] = {name: about["preparation"][name] for name in ("channels", "size", "resize")}
        content = _graph(model, example, to)
    with atomic_file(out) as file:
        file.write(content)
    with atomic_file(out.with_suffix(".json")) as file:
        file.write((json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
    return f"takes {about['takes']}" if to != "safetensors" else f"{sum(p.numel() for p in model.parameters())} weights"


def _example(run: LoadedRun) -> tuple[Tensor, Preparation | None]:
    """Two inputs of the model, and how images become such."""
    if run.preparation is not None:
        grey = torch.full((2, run.preparation.channels, *run.preparation.size), 127, dtype=torch.uint8)
        return run.preparation(grey), run.preparation
    facts = run.data.facts
    if run.task.name == "language_modelling":
        return torch.zeros(2, facts["sequence"], dtype=torch.long), None
    if shape := facts.get("input_shape"):
        return torch.zeros(2, *shape), None
    return next(iter(run.data.val.epoch(0)))[0][:2], None


def _safetensors(model: nn.Module, run: LoadedRun) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError("safetensors is not installed: pip install safetensors") from error
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, {"format": "pt", "run": run.folder.name, "step": str(run.step)})


def _graph(model: nn.Module, example: Tensor, to: str) -> bytes:
    """The model with its operations, for any number of examples."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    buffer = io.BytesIO()
    if to == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"{error.name} is not installed: pip install onnx onnxscript") from error
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            if to == "onnx":
                made = torch.onnx.export(
                    model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False,
                    input_names=["inputs"], output_names=["outputs"],
                )  # fmt: skip
                assert made is not None
                buffer.write(made.model_proto.SerializeToString())
            else:
                torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), buffer)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"this model cannot be exported to {to} ({type(error).__name__}: {why})") from error
    finally:
        logging.disable(logging.NOTSET)
    return buffer.getvalue()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(__doc__)
    add_run(made)
    made.add_argument("--to", choices=SUFFIXES, default="onnx", help="which kind of file (onnx)")
    made.add_argument("--out", metavar="FILE", help="(model.onnx, ... in the run folder)")
    made.add_argument("--inputs", action="store_true", help="take what loaders serve, not bytes")
    return made


if __name__ == "__main__":
    with heart.working("exporting"):
        sys.exit(main())
