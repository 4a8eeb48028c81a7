"""A model with its data and loss: run on copies, whole and an example at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...base import unwrap
from ...likelihoods import Likelihood


class Case:
    """A model with its data and loss, ready to be run on copies."""

    def __init__(
        self, model: nn.Module, loss: Any, pick: Any, targets: Any, batch_dim: int, output_dim: int,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self._model = unwrap(model)
        self._pick, self._dtype = pick, dtype
        self._batch_dim, self._output_dim = batch_dim, output_dim
        self.notes: list[str] = []
        self.mixed = False
        self._count = 0
        self.inputs: Any = None
        self._quiet = False  # whether all modules but the whole are in evaluation mode
        self.targets = self.cast(targets)
        if isinstance(loss, nn.Module):
            loss = self._to(copy.deepcopy(loss))
        self._loss: Callable[..., Tensor] = loss.nll if isinstance(loss, Likelihood) else loss

    def _to(self, module: nn.Module) -> nn.Module:
        return module if self._dtype is None else module.to(self._dtype)

    def cast(self, values: Any) -> Any:
        """Nested values with floating-point tensors in the dtype of the check, detached."""

        def one(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().to(self._dtype) if self._dtype is not None and x.is_floating_point() else x.detach()

        return tree_map(one, values)

    def copy(self) -> nn.Module:
        """A copy of the model in the dtype of the check, without gradients."""
        twin = self._to(copy.deepcopy(self._model))
        twin.zero_grad()
        twin.train()
        return twin

    def settle_modes(self, twin: nn.Module) -> None:
        """Let nothing mix examples or draw numbers: batch norms and dropout in evaluation mode, or everything."""
        found = set()
        for module in twin.modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
            drop = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            if module is twin or not (norm or drop or self._quiet):
                continue
            module.training = False
            found |= {"batch norms run on their running statistics"} if norm else set()
            found |= {"dropout is off"} if drop else set()
        for module in twin.modules():
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout:
                module.dropout = 0.0
                found.add("dropout is off")
        for said in sorted(found):
            if said not in self.notes:
                self.notes.append(said)

    def run(self, twin: nn.Module, inputs: Any) -> Tensor:
        """The outputs to train on."""
        if isinstance(inputs, Mapping):
            result = twin(**inputs)
        else:
            result = twin(*inputs) if isinstance(inputs, list | tuple) else twin(inputs)
        if self._pick is not None:
            result = self._pick(result)
        elif not isinstance(result, Tensor):
            logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
            result = logits if logits is not None else result[0] if isinstance(result, list | tuple) else result
        if not isinstance(result, Tensor):
            raise ValueError(
                f"outputs must be given: the model returns {type(result).__name__}, and outputs=lambda result: ... "
                "picks the tensor to train on"
            )
        return result

    def caller(self, twin: nn.Module) -> Callable[[Any], Tensor]:
        """``run`` of one model."""
        return lambda inputs: self.run(twin, inputs)

    def loss(self, outputs: Tensor) -> Tensor:
        """The scalar to train on."""
        return self._loss(outputs) if self.targets is None else self._loss(outputs, self.targets)

    def settle(self, inputs: Any, limit: int) -> int:
        """Look at the model once: how many examples there are, whether they mix, whether numbers are drawn.

        Returns:
            The number of examples that are looked at.

        Raises:
            ValueError: the outputs have no examples along ``output_dim``.
        """
        self.inputs = self.cast(inputs)
        probe = self.copy()
        self.settle_modes(probe)
        with torch.no_grad():
            outputs = self.run(probe, self.inputs)
        if outputs.dim() <= self._output_dim or outputs.shape[self._output_dim] == 0:
            raise ValueError(
                f"output_dim must be the dimension of the outputs that the examples lie along: they are "
                f"{list(outputs.shape)}"
            )
        self._count = outputs.shape[self._output_dim]
        if self._count > limit:
            self.inputs = self._take(self.inputs, slice(0, limit), self._batch_dim)
            self.targets = self._take(self.targets, slice(0, limit), self._output_dim)
            self._count = limit
        for self._quiet in (False, True):
            twin = self.copy()
            self.settle_modes(twin)
            drawn, self.mixed = self._behaviour(twin)
            if not (drawn or self.mixed):
                break
        if self._quiet:
            self.notes.append("all modules but the model as a whole are in evaluation mode")
        if drawn:
            raise ValueError("model must not draw random numbers in evaluation mode: two passes differ, none compares")
        if self.mixed:
            self.notes.append(
                "an example's outputs depend on the others of its batch, so examples cannot be told apart and the sums "
                "alone are checked (or batch_dim is another one)"
            )
        return self._count

    def _behaviour(self, twin: nn.Module) -> tuple[bool, bool]:
        """Whether two passes differ, and whether an example alone has other outputs than among the others."""
        with torch.no_grad():
            whole, again = self.run(twin, self.inputs), self.run(twin, self.inputs)
            alone = [self.run(twin, self.one(i)) for i in range(self._count)]
        wanted = whole.narrow(self._output_dim, 0, 1).shape
        if alone[0].shape != wanted:
            raise ValueError(
                f"batch_dim must be the dimension of the inputs along which the {self._count} examples lie: outputs of "
                f"one of them are {list(alone[0].shape)} where {list(wanted)} are expected"
            )
        size = float(whole.abs().max()) or 1.0
        limit = (1e-8 if whole.dtype == torch.float64 else 1e-3) * size
        drawn = bool((whole - again).abs().max() > limit)
        return drawn, bool((torch.cat(alone, self._output_dim) - whole).abs().max() > limit)

    def one(self, index: int) -> Any:
        """The inputs of one example."""
        return self._take(self.inputs, slice(index, index + 1), self._batch_dim)

    def rolled(self) -> Any:
        """The inputs with the examples in another order."""

        def roll(x: Any) -> Any:
            return x.roll(1, self._batch_dim) if self._has_examples(x, self._batch_dim) else x

        return tree_map(roll, self.inputs)

    def _has_examples(self, x: Any, dim: int) -> bool:
        return isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == self._count

    def _take(self, values: Any, part: slice, dim: int) -> Any:
        def cut(x: Any) -> Any:
            return x.narrow(dim, part.start, part.stop - part.start) if self._has_examples(x, dim) else x

        return tree_map(cut, values)

    def references(self, reduction: str) -> Iterator[dict[str, Tensor]]:
        """First the loss's gradient by parameter name, then each example's, alone; nothing but autograd is used."""
        twin = self.copy()
        self.settle_modes(twin)
        # Names of shared parameters, too: a layer may know one by another name.
        named = {n: p for n, p in twin.named_parameters(remove_duplicate=False) if p.requires_grad}

        def gradients(of: Tensor, seed: Tensor | None) -> dict[str, Tensor]:
            if not of.requires_grad:
                return {n: torch.zeros_like(p) for n, p in named.items()}
            found = torch.autograd.grad(of, list(named.values()), seed, allow_unused=True)
            return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}

        outputs = self.run(twin, self.inputs)
        leaf = outputs.detach().requires_grad_()
        (seeds,) = torch.autograd.grad(self.loss(leaf), leaf)
        yield gradients(self.loss(outputs), None)
        del outputs
        seeds = seeds * (self._count if reduction == "mean" else 1)
        for i in range(self._count):
            yield gradients(self.run(twin, self.one(i)), seeds.narrow(self._output_dim, i, 1))
