"""A model for evaluation alone, in fewer passes over memory: what follows a convolution is done where it is written."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

#: Largest difference of outputs to the model's own, as a share of the largest of these, in float32.
ROUNDING = 1e-4
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")  # functions, and methods of a tensor
_ADD = (operator.add, operator.iadd, torch.add)


class Fused:
    """A model's evaluation mode with convolutions that take batch norms, sums and rectifiers after them along.

    Weights and running statistics stay the model's: `refresh` takes them over after they have changed. Layers without
    such a convolution are the model's own.

    Args:
        model: in evaluation mode, on the CPU.
        inputs: a batch, on which its outputs must be those of the model.
        dtype: float32 or bfloat16, which convolutions compute in; the caller's autocast sees to the rest.

    Raises:
        ValueError: there is nothing to fuse, or it cannot be done: the model has hooks, decides by values, or its
            outputs would be others.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, dtype: torch.dtype = torch.float32) -> None:
        if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
            raise ValueError("hooks see single layers")
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # whatever a model does with what is no tensor
            raise ValueError(f"torch.fx cannot follow it: {error}") from error
        self._convolutions = _fuse(graph, model)
        if not self._convolutions:
            raise ValueError("no convolution is followed by a batch norm or a rectifier")
        names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        own = {name: operator.attrgetter(name)(model) for name in names - self._convolutions.keys()}
        self.model = fx.GraphModule(own | self._convolutions, graph).eval()
        try:
            self._check(model, inputs)
        except (RuntimeError, AttributeError, TypeError) as error:  # of a build of torch without these operations, too
            raise ValueError(f"it cannot be called: {error}") from error
        for convolution in self._convolutions.values():
            convolution.dtype = dtype
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights and running statistics as they are now."""
        for convolution in self._convolutions.values():
            convolution.refresh()

    @torch.no_grad()
    def _check(self, model: nn.Module, inputs: Tensor) -> None:
        self.refresh()
        wanted, found = model(inputs), self.model(inputs)
        if not (isinstance(wanted, Tensor) and isinstance(found, Tensor) and wanted.shape == found.shape):
            raise ValueError("outputs must be one tensor")
        scale = wanted.abs().max()
        if not bool((wanted - found).abs().max() <= ROUNDING * scale):  # nor if they are no numbers
            raise ValueError("outputs would be others")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is computed of a buffer is computed anew at each call


class _Convolution(nn.Module):
    """A convolution, a batch norm on its running statistics, something to add, a rectifier: in one pass, by oneDNN."""

    def __init__(self, layer: nn.Conv2d, norm: nn.BatchNorm2d | None, rectified: bool, spent: bool) -> None:
        super().__init__()
        self.parts = (layer, norm)  # in a tuple: they are the model's, no modules of this one
        self.after = "relu" if rectified else "none"
        self.spent = spent  # whether what is added may be written over
        self.dtype = torch.float32
        self.refresh()

    def refresh(self) -> None:
        layer, norm = self.parts
        weight, bias = layer.weight, layer.bias
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean if bias is None else bias - norm.running_mean
            weight, bias = weight * scale[:, None, None, None], shift * scale + (0 if norm.bias is None else norm.bias)
        weight = weight.detach().to(self.dtype, memory_format=torch.channels_last)
        self.taken = weight, bias if bias is None else bias.detach().to(self.dtype)

    def forward(self, inputs: Tensor, other: Tensor | None = None) -> Tensor:
        layer = self.parts[0]
        inputs = inputs.to(self.dtype).contiguous(memory_format=torch.channels_last)
        rest = (*self.taken, layer.padding, layer.stride, layer.dilation, layer.groups)
        call = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return call(inputs, *rest, self.after, [], "")
        other = other.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if other.shape != self._shape(inputs):  # which oneDNN would take for what is not there
            total = call(inputs, *rest, "none", [], "") + other
            return total.relu_() if self.after == "relu" else total
        if self.spent:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other, inputs, *rest, "add", 1.0, self.after, [], "")
        return call.binary(inputs, other, *rest, "add", 1.0, self.after, [], "")

    def _shape(self, inputs: Tensor) -> tuple[int, ...]:
        """Of what the convolution returns."""
        layer = self.parts[0]
        each = zip(
            inputs.shape[2:], map(int, layer.padding), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
        return len(inputs), layer.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in each)


def _fuse(graph: fx.Graph, model: nn.Module) -> dict[str, _Convolution]:
    """Put fused convolutions into a graph; returns them by name."""
    found: dict[str, _Convolution] = {}
    modules = dict(model.named_modules())

    def module(node: fx.Node | None) -> nn.Module | None:
        return modules[str(node.target)] if node is not None and node.op == "call_module" else None

    def rectifies(node: fx.Node | None) -> bool:
        return node is not None and (type(module(node)) is nn.ReLU or node.target in _RELU)

    for node in list(graph.nodes):
        layer = module(node)
        if type(layer) is not nn.Conv2d or not _usual(layer):
            continue
        chain, inputs = [node], [node.args[0]]
        norm = module(_only_user(node))
        if type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
            chain.append(_only_user(node))
        else:
            norm = None
        total = _only_user(chain[-1])
        if total is not None and total.target in _ADD and rectifies(_only_user(total)):
            others = [a for a in total.args if isinstance(a, fx.Node) and a is not chain[-1]]
            if len(others) == 1 and len(total.args) == 2 and not total.kwargs:
                chain.append(total)
                inputs += others
        rectified = rectifies(_only_user(chain[-1]))
        if rectified:
            chain.append(_only_user(chain[-1]))
        if len(chain) == 1:
            continue
        name = f"fused_{len(found)}"
        # What a fused one returns has no views; it may be written over if all that read it have, and are not reading.
        spent = inputs[-1].target in found and inputs[0] is not inputs[-1]
        spent = spent and all(user in chain or user.target in found for user in inputs[-1].users)
        found[name] = _Convolution(layer, norm, rectified, spent)
        with graph.inserting_before(chain[-1]):
            chain[-1].replace_all_uses_with(graph.call_module(name, tuple(inputs)))
        for gone in reversed(chain):
            graph.erase_node(gone)
    return found


def _usual(layer: nn.Conv2d) -> bool:
    return (
        layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
