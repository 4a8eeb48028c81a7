"""A model layer by layer: what comes out of each, how many parameters it has, and how many multiply-adds it takes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle


@dataclass
class LayerSummary:
    """One module that has parameters of its own, or does multiply-adds that are no child's.

    Attributes:
        name: in the model; "" for the model itself.
        kind: its class.
        output: shape of what its last call returned; () if it is not called, or returns no tensor.
        parameters: numbers in parameters of its own; what it shares with an earlier layer is counted there.
        multiply_adds: of one example in a forward pass: products, convolutions and attention's two products.
        calls: how often a forward pass goes through it.
        trained: how many of its parameters are trained.
    """

    name: str
    kind: str
    output: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: float = 0.0
    calls: int = 0
    trained: int = 0


class _Counting(TorchDispatchMode):
    """While active, multiply-adds are put down to the module whose forward pass is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[str] = [""]
        self.found: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            made = count(*args, **(kwargs or {}), out_val=result) / 2  # a multiply-add is two operations there
            name = self.under_way[-1]
            self.found[name] = self.found.get(name, 0.0) + made
        return result


def summarize(model: nn.Module, inputs: Tensor) -> list[LayerSummary]:
    """The layers of a model, in the order of ``named_modules``. Nothing is computed: tensors have no data.

    Args:
        model: any; it is left as it is.
        inputs: a batch; multiply-adds are those of one example of it.

    Raises:
        RuntimeError: the model looks at numbers, which there are none of.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        twin = copy.deepcopy(model).train()
    counting = _Counting()
    layers: dict[str, LayerSummary] = {}
    handles: list[RemovableHandle] = []
    seen: set[Tensor] = set()
    for name, module in twin.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        layers[name] = LayerSummary(
            name, type(module).__name__, parameters=sum(p.numel() for p in own),
            trained=sum(p.numel() for p in own if p.requires_grad),
        )  # fmt: skip

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            counting.under_way.append(name)

        def leave(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            counting.under_way.pop()
            layers[name].calls += 1
            if isinstance(output, (tuple, list)) and output:  # attention returns its weights, too
                output = output[0]
            if isinstance(output, Tensor):
                layers[name].output = tuple(output.shape)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.no_grad(), fake, counting, sdpa_kernel(SDPBackend.MATH):  # in products that are counted
            twin(fake.from_tensor(inputs))
    finally:
        for handle in handles:
            handle.remove()
    for name, made in counting.found.items():
        layers[name].multiply_adds = made / max(len(inputs), 1)
    return [layer for layer in layers.values() if layer.parameters or layer.multiply_adds]


def amount(number: float, unit: str = "") -> str:
    """A number in three digits with a letter for its size, such as ``1.81 G``.

    Args:
        number: not negative.
        unit: behind the letter, such as ``B``.
    """
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()
