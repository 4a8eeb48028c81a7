"""Less memory for more time: what blocks of a model need of themselves in the backward pass is computed again there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from optimizers.curvature.second_order import NoSecondDerivatives
from training.errors import UserError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Again:
    """The forward of a block whose activations are dropped after it, and computed again when they are needed.

    Copied with its block, it is the copy's.

    Args:
        block: any module.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block, self.forward = block, block.forward

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the block's forward returns."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **options)
        before = self._versions()
        try:  # random numbers are those of the first time
            outputs = checkpoint(
                partial(self.forward, **options), *args, use_reentrant=False, context_fn=self._contexts
            )
        except NoSecondDerivatives as error:
            raise UserError(
                f"trainer.recompute must be false for this model and optimizer: {str(error).partition(':')[0]}"
            ) from error
        if self._versions() != before:
            raise UserError(
                f"trainer.recompute: {type(self.block).__name__} changes buffers of its own in each pass, and a second "
                "pass would not be the first: name other modules, trainer.recompute=REGEX, or leave it out"
            )
        return outputs

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Uncounted([m for m in self.block.modules() if isinstance(m, _BatchNorm)])

    def _versions(self) -> list[int]:
        """How often each buffer was changed, but for BatchNorm's."""
        others = (module for module in self.block.modules() if not isinstance(module, _BatchNorm))
        return [buffer._version for module in others for buffer in module.buffers(recurse=False)]


class _Uncounted(AbstractContextManager[None]):
    """Within it, however often, BatchNorm counts to no end: of this batch it did."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self._kept: list[list[tuple[nn.Module, str, Tensor]]] = []

    def __enter__(self) -> None:
        kept = [(layer, name, buffer) for layer in self.layers for name, buffer in layer.named_buffers(recurse=False)]
        self._kept.append(kept)
        for layer, name, buffer in kept:
            setattr(layer, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for layer, name, buffer in self._kept.pop():
            setattr(layer, name, buffer)


def blocks_of(model: nn.Module, wanted: bool | str) -> dict[str, nn.Module]:
    """The modules that are computed again, by name, none inside another.

    Args:
        model: any.
        wanted: true: entries of its lists (``Sequential``, ``ModuleList``) that are made of modules themselves: blocks
            of transformers and residual nets, the innermost; or a regular expression of names, the outermost; false:
            none.

    Raises:
        UserError: it has none.
        ValueError: for what is no regular expression.
    """
    if wanted is False:
        return {}
    named = {name: module for name, module in model.named_modules() if name}
    if wanted is True:
        lists = [module for module in model.modules() if isinstance(module, CONTAINERS)]
        entries = {id(child) for one in lists for child in one.children() if not isinstance(child, CONTAINERS)}
        found = {
            name: module
            for name, module in named.items()
            if id(module) in entries and any(module.children()) and any(True for _ in module.parameters())
        }
        found = {name: module for name, module in found.items() if not _inside(name, found, reverse=True)}
        advice = "blocks in a Sequential or a ModuleList: name modules by trainer.recompute=REGEX, or leave it out"
    else:
        check_wanted(wanted, compiled=False)
        pattern = re.compile(wanted)
        found = {name: module for name, module in named.items() if pattern.search(name)}
        found = {name: module for name, module in found.items() if not _inside(name, found)}
        lists_alone = [name for name, module in found.items() if isinstance(module, (nn.ModuleList, nn.ModuleDict))]
        if lists_alone:
            raise UserError(f"trainer.recompute={wanted}: {lists_alone[0]} is a list of modules, which runs nothing")
        top = ", ".join(name for name, _ in model.named_children())
        advice = f"modules in whose names {wanted!r} is found; at its top there are {top or 'none'}"
    if not found:
        raise UserError(f"trainer.recompute: the model has no {advice}")
    return found


def check_wanted(wanted: bool | str, compiled: bool) -> None:
    """Refuse what no model can do.

    Args:
        wanted: see ``blocks_of``.
        compiled: whether the model is.

    Raises:
        ValueError: it is no regular expression, or the model is compiled.
    """
    if wanted and compiled:
        raise ValueError("recompute must be false where compile is true, which decides itself what is kept")
    try:
        re.compile(wanted if isinstance(wanted, str) else "")
    except re.error as error:
        raise ValueError(f"recompute must be true, false or a regular expression, got {wanted!r} ({error})") from error


@contextmanager
def recomputing(model: nn.Module, wanted: bool | str) -> Iterator[None]:
    """Within it, blocks of the model are computed again in backward passes.

    Gradients, curvature, statistics and random numbers are as without it.

    Args:
        model: changed for as long.
        wanted: see ``blocks_of``.

    Raises:
        UserError: the model has no such blocks.
        ValueError: for what is no regular expression.
    """
    before: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    for block in dict.fromkeys(blocks_of(model, wanted).values()):
        before.append((block, vars(block).get("forward")))
        block.forward = Again(block)
    try:
        yield
    finally:
        for block, own in before:
            del block.forward
            if own is not None:
                block.forward = own


def _inside(name: str, found: dict[str, nn.Module], reverse: bool = False) -> bool:
    """Whether a module lies in one of the others, or, reversed, one of the others in it."""
    pairs = ((name, other) if reverse else (other, name) for other in found if other != name)
    return any(inner.startswith(outer + ".") for outer, inner in pairs)
