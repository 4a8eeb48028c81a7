"""What the checks share: building an optimizer from whatever was given, a training step, and comparisons."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base import CurvatureOptimizer, Params, build_optimizer
from ..likelihoods import Categorical, Likelihood
from ..wrapper import innermost

Batch = tuple[Tensor, Tensor]


class Maker:
    """Builds an optimizer for a model: ``make(model)``, ``make(model, params=groups)``, ``make(model, lr=0.1)``.

    Args:
        target: an optimizer class, a ``functools.partial`` of one, or a function ``(model, params=None, **overrides)``
            that returns an optimizer. Classes of this project take the model, others its parameters; so does a
            function whose first argument is called ``params``.
        likelihood: for optimizers that ask for one.
        options: hyper-parameters, which overrides replace.
    """

    def __init__(
        self, target: Callable[..., Optimizer], *, likelihood: Likelihood | None = None, **options: Any
    ) -> None:
        inner: Any = target
        if isinstance(inner, Maker):
            likelihood = inner.likelihood if likelihood is None else likelihood
            inner, options = inner.target, inner.options | options
        if isinstance(inner, functools.partial) and not inner.args:
            inner, options = inner.func, inner.keywords | options
        own = options.pop("likelihood", None)  # a partial's
        self.likelihood: Likelihood | None = own if likelihood is None else likelihood
        self.target: Any = inner
        self.options: dict[str, Any] = options
        self._names, self._open = _arguments(inner)
        self._plain = not isinstance(inner, type) and next(iter(self._names), "") not in ("params", "parameters")

    def __str__(self) -> str:
        return str(getattr(self.target, "__name__", None) or type(self.target).__name__)

    def accepts(self, name: str) -> bool:
        """Whether the class or function names an argument so."""
        return name in self._names

    def __call__(self, model: nn.Module, params: Params | None = None, **overrides: Any) -> Optimizer:
        """Build the optimizer.

        Args:
            model: to train.
            params: parameters or groups of it; None: all.
            overrides: hyper-parameters that replace those given at first.

        Raises:
            ValueError: for groups where the optimizer takes none, or whatever it refuses.
        """
        options: dict[str, Any] = {"likelihood": self.likelihood or Categorical()} | self.options | overrides
        if not self.accepts("likelihood"):
            options.pop("likelihood")
        if isinstance(self.target, type) and issubclass(self.target, CurvatureOptimizer):
            if params is None:
                return self.target(model, **options)
            return self.target(model=model, params=params, **options)  # in whichever order it takes them
        if not self._plain:
            return build_optimizer(self.target, model, params=params, **options)
        if params is None:
            return self.target(model, **options)
        if not (self.accepts("params") or self._open):
            raise ValueError(f"params cannot be given to {self}, which takes the whole model")
        return self.target(model, params=params, **options)


def _arguments(target: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of a function's arguments, and whether it takes others; a class hands those on to its bases."""
    names: list[str] = []
    kinds = target.__mro__ if isinstance(target, type) else ()
    makers = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)]
    for function in makers or [target]:
        parameters = list(inspect.signature(function).parameters.values())[len(makers) > 0 :]
        names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        open_ended = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        if open_ended == ["flags"]:  # of this project's optimizers: torch's flags, and nothing else
            return [*names, "maximize"], False
        if not open_ended:
            return names, False
    return names, True


def differentiate(optimizer: Optimizer, loss: Tensor, outputs: Tensor, scale: float = 1.0) -> None:
    """The backward pass of a training step: the optimizer's own where it has one.

    Args:
        optimizer: of either kind.
        loss: scalar.
        outputs: of the model.
        scale: a factor inside ``loss``.
    """
    own = getattr(optimizer, "backward", None)
    if callable(own):
        own(loss, outputs, **({} if scale == 1.0 else {"scale": scale}))
    else:
        loss.backward()


def train_step(optimizer: Optimizer, model: nn.Module, batch: Batch, micro: int = 1) -> float:
    """One step on the mean cross-entropy of a batch.

    Args:
        optimizer: of the model.
        model: with logits as outputs.
        batch: inputs and classes.
        micro: how many equal parts the batch goes through in.

    Returns:
        The loss.
    """
    optimizer.zero_grad()
    total = 0.0
    for inputs, targets in zip(batch[0].chunk(micro), batch[1].chunk(micro), strict=True):
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets) / micro
        differentiate(optimizer, loss, outputs)
        total += loss.item()
    optimizer.step()
    return total


def weights(model: nn.Module) -> Tensor:
    """A copy of all parameters, one after the other."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def named(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_state(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit (NaN equals nothing)."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def ours(optimizer: Optimizer) -> bool:
    """Whether an optimizer promises what this project's do beyond torch's contract."""
    return isinstance(innermost(optimizer), CurvatureOptimizer)
