"""The one place where the checks look into an optimizer: what it recorded of each layer in a pass.

Everything that depends on how the optimizers of this project keep their statistics is here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..base import CurvatureOptimizer
from ..curvature.approximations import Diagonal
from ..curvature.layers import Flow, Layer
from ..curvature.samples import Samples

#: Hyper-parameters under which a step's curvature is the empirical Fisher of its very batch, where an optimizer has
#: them.
PLAIN: dict[str, Any] = {
    "fisher": "empirical",
    "batch_fraction": 1.0,
    "update_every": 1,
    "ema": "average",
    "normalize": "none",
}


class Recording:
    """What an optimizer was shown of each layer in one pass.

    Attributes:
        layers: the adapters by layer name, of all layers that the optimizer has a block for.
        shown: what each backward pass left of a layer, by its name.
        examples: of the pass.
        scale: what turns a recorded gradient into one of the per-example loss.
    """

    def __init__(self, layers: dict[str, Layer], examples: int) -> None:
        self.layers = layers
        self.shown: dict[str, list[Flow]] = {name: [] for name in layers}
        self.examples = examples
        self.scale = 1.0

    def gradients(self, name: str, example: int) -> list[Tensor]:
        """One example's gradient by the parameters of a layer, in their shapes: the sum over the layer's calls.

        Raises:
            IndexError: nothing was recorded of this example.
        """
        layer = self.layers[name]
        alone = [
            Flow(layer, [(x[example : example + 1], g[example : example + 1]) for x, g in flow.calls]).rows()[0]
            for flow in self.shown[name]
        ]
        total = torch.stack(alone).sum(0) * self.scale
        return layer.tensors(total)

    def names(self, name: str) -> list[str]:
        """Names of a layer's parameters in the model, in the order of ``gradients``."""
        own = {id(p): key for key, p in self.layers[name].module.named_parameters(recurse=False)}
        return [f"{name}.{own[id(p)]}".lstrip(".") for p in self.layers[name].parameters]


def recorded_gradients(
    optimizer: CurvatureOptimizer,
    call: Callable[[Any], Tensor],
    loss: Callable[[Tensor], Tensor],
    inputs: Any,
    other: Any,
    examples: int,
) -> Recording:
    """What an optimizer records of a batch, through the passes that it records with in training.

    One that sends gradients of its own choice back (sampled targets) is given those of the loss.

    Args:
        optimizer: fresh; its next step must gather curvature.
        call: the model's outputs of inputs.
        loss: of outputs, a scalar.
        inputs: of the pass.
        other: of a pass before, whose traces must not show: the same examples in another order.
        examples: how many there are.
    """
    recording = Recording({name: block.layer for name, block in optimizer.blocks.items()}, examples)
    recorder = optimizer._recorder
    assert recorder is not None
    recorder.fraction = 1.0
    for name, block in optimizer.blocks.items():
        shown = recording.shown[name]

        def accumulate(
            flow: Flow, shown: list[Flow] = shown, own: Callable[[Flow], None] = block.accumulate
        ) -> None:
            shown.append(Flow(flow.layer, [(x.clone(), g.clone()) for x, g in flow.calls], flow.when))
            own(flow)

        setattr(block, "accumulate", accumulate)  # noqa: B010 - of this object alone
    for batch in (other, inputs):
        optimizer.zero_grad()
        for shown in recording.shown.values():
            shown.clear()
        outputs = call(batch)
        value = loss(outputs)
        if recorder.deferred:
            (seed,) = torch.autograd.grad(value, outputs, retain_graph=True)
            unit = examples if optimizer.loss_reduction == "mean" else 1
            seen = recorder.settle(optimizer._as_observations(outputs, None))
            seed = recorder.arrange(optimizer._as_observations(seed, None))
            recorder.differentiate(seen, [unit * seed])
        else:
            optimizer.backward(value, outputs)
    recorder.finish()
    recording.scale, _ = optimizer._scaling()
    return recording


def small_blocks(optimizer: CurvatureOptimizer, names: Collection[str]) -> dict[str, Tensor]:
    """``curvature_matrices()`` of some layers alone: those of large ones fit into no memory.

    Nothing where they are not meant to be the empirical Fisher of the last step's batch.
    """
    if not _comparable(optimizer):
        return {}
    blocks = optimizer.blocks
    try:
        optimizer.blocks = {name: block for name, block in blocks.items() if name in names}
        return optimizer.curvature_matrices()
    finally:
        optimizer.blocks = blocks


def _comparable(optimizer: CurvatureOptimizer) -> bool:
    return all(getattr(optimizer, key, value) == value for key, value in PLAIN.items() if key != "update_every")


def exact(optimizer: CurvatureOptimizer, name: str) -> str | None:
    """``"diagonal"`` or ``"block"`` if that of a layer's Fisher is kept as it is, None for an approximation."""
    block = optimizer.blocks[name]
    return "block" if isinstance(block, Samples) else "diagonal" if isinstance(block, Diagonal) else None


def records(optimizer: CurvatureOptimizer) -> bool:
    """Whether backward passes leave something in the optimizer's blocks."""
    return any(isinstance(getattr(type(block), "observed", None), property) for block in optimizer.blocks.values())
