"""Products with the Fisher matrix, estimated from targets that are sampled from the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..curvature import communication
from ..curvature.approximations import statistics_dtype
from ..curvature.recorder import Call, RootInputs, quieten, set_aside
from ..likelihoods import Likelihood
from .vectors import Vector, dot, norm

#: Of each call of the model, where they are known.
Targets = Sequence[Tensor | None]


class SampledProducts:
    """``F v`` by passes through the model that leave no trace of themselves.

    Args:
        model: the whole module.
        likelihood: of its outputs.
        inputs: what the model was called with, and how it is called apart from training.
        loose: whether targets that do not fit the outputs are left out of account: they may be anything.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, inputs: RootInputs, *, loose: bool) -> None:
        self.model, self.likelihood, self.inputs, self.loose = model, likelihood, inputs, loose

    def antithetic(
        self, v: Vector, calls: list[Call], told: Targets, seed: int, eps: float
    ) -> tuple[list[Tensor], Tensor]:
        """``H v``: the central difference of the gradient at sampled targets.

        Args:
            v: by parameter.
            calls: of the model, as ``placed`` returns them.
            told: the targets of each call, which say what counts and how much; None: all, and equally.
            seed: of the sampled targets.
            eps: distance of the difference from the weights, in Euclidean norm.

        Returns:
            The product in the order of v, and how many targets were sampled, over all ranks.
        """
        params = list(v)
        generator = torch.Generator(params[0].device).manual_seed(seed)
        with self._aside():
            seen = [self._observed(call, own)[0] for call, own in zip(calls, told, strict=False)]
            targets = [self._sample(outputs, generator) for outputs in seen]
        length = norm(v.values())
        offset = [(eps / length * t).to(p.dtype) for p, t in v.items()]
        saved = [p.clone() for p in params]
        try:
            torch._foreach_add_(params, offset)
            ahead, count = self._gradients(params, calls, told, lambda index, seen: targets[index])
            torch._foreach_copy_(params, saved)
            torch._foreach_sub_(params, offset)
            behind, _ = self._gradients(params, calls, told, lambda index, seen: targets[index])
        finally:
            torch._foreach_copy_(params, saved)
        means, total = self._joint([a - b for a, b in zip(ahead, behind, strict=True)], count)
        return [t * (length / (2 * eps)) for t in means], total

    def rank_one(self, v: Vector, calls: list[Call], told: Targets, seed: int) -> tuple[list[Tensor], Tensor]:
        """``m (ḡ·v) ḡ``, with the square root of an observation's weight in ḡ, which comes twice.

        Args:
            v: by parameter.
            calls: see ``antithetic``.
            told: see ``antithetic``.
            seed: of the sampled targets.
        """
        generator = torch.Generator(next(iter(v)).device).manual_seed(seed)
        gradient, count = self._gradients(
            list(v), calls, told, lambda index, seen: self._sample(seen, generator), power=0.5
        )
        means, total = self._joint(gradient, count)
        slope = dot(means, v.values())
        return [t * (total * slope) for t in means], total

    def _gradients(
        self,
        params: list[Tensor],
        calls: list[Call],
        told: Targets,
        targets: Callable[[int, Tensor], Any],
        power: float = 1.0,
    ) -> tuple[list[Tensor], Tensor]:
        """Gradient of the targets' negative log-likelihood, summed over observations, and how many of them count.

        An observation has its weight in the loss, times the number of those that count in its call: 1 in a plain mean.

        Args:
            params: what to differentiate by.
            calls: of the model.
            told: see ``antithetic``.
            targets: of a call, by its index and observations.
            power: of the weights.
        """
        sums = [torch.zeros_like(p, dtype=statistics_dtype(p)) for p in params]
        count = torch.zeros((), device=params[0].device)
        with self._aside():
            for index, call in enumerate(calls):
                with torch.enable_grad():
                    seen, weights = self._observed(call, told[index])
                counted = weights.count_nonzero()
                score = self.likelihood.score(seen, targets(index, seen)) * (weights * counted).pow(power).unsqueeze(-1)
                with set_aside(params):
                    found = torch.autograd.grad(
                        seen, params, score.to(seen.dtype), allow_unused=True, materialize_grads=True
                    )
                torch._foreach_add_(sums, [g.to(s.dtype) for g, s in zip(found, sums, strict=True)])
                count += counted.to(count.device)
        return sums, count

    def _observed(self, call: Call, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """The observations of a call, and their weights in its loss, as far as that is known."""
        outputs = self._outputs(call)
        if targets is not None:
            targets = targets.to(outputs.device)
            if self.loose and not self._fit(outputs, targets):
                targets = None
        return self.likelihood.observations(outputs, targets), self.likelihood.weights(outputs, targets)

    def _fit(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether what comes second in a loader's batch can be targets: it may be anything."""
        try:
            self.likelihood.observations(outputs, targets)
        except ValueError:
            return False
        return True

    def _joint(self, sums: list[Tensor], count: Tensor) -> tuple[list[Tensor], Tensor]:
        """Means over the observations of all ranks, and how many there are."""
        means = [t / count.clamp(min=1).to(t.device) for t in sums]
        total = count.clone()
        if (world := communication.world_size()) > 1:
            weights = torch.tensor([float(count)] * len(means) + [1.0], device=total.device)
            communication.average_([*means, total], weights)
        return means, total * world

    def _sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets from the model's own distribution: this rank's share of what one process would draw."""
        rank, world = communication.rank(), communication.world_size()
        return self.likelihood.sample(outputs, generator, rank=rank, world_size=world)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Forward passes that leave no trace, and all find the same random state, in the weights' precision.

        Also where the model turns autocast on by itself: some packages wrap its ``forward`` so.
        """
        kind = next(self.model.parameters()).device.type

        def plain(module: nn.Module, args: Any) -> None:
            if torch.is_autocast_enabled(kind):
                torch.set_autocast_enabled(kind, False)  # until whoever turned it on leaves

        quieten(self.model)
        handles = [m.register_forward_pre_hook(plain) for m in self.model.modules()]
        try:
            with self.inputs.aside(), torch.autocast(kind, enabled=False):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _outputs(self, call: Call) -> Tensor:
        return self.inputs.outputs_in(self.model(*call[0], **call[1]))

    def placed(self, call: Call) -> Call:
        """A call's tensors where the model is, in its precision (autocast is off in the auxiliary passes)."""
        weight = next(self.model.parameters())

        def place(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(weight.device, weight.dtype.to_real() if x.is_floating_point() else None, non_blocking=True)

        return cast("Call", tree_map(place, call))


def parts(batch: Any) -> tuple[Any, Tensor | None]:
    """The inputs of a loader's batch, and its targets if it has some."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    return batch[0], batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None


def cycle(loader: Iterable[Any]) -> Iterator[Any]:
    """A loader's batches, again and again."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("aux_loader must yield batches each time that it is iterated over, and it yielded none")
