"""AdaHessian: Adam with a Hutchinson estimate of the Hessian's diagonal in place of the gradient's second moment.

Source: Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning", AAAI 2021 (arXiv 2006.00719),
Algorithm 1. With Rademacher z, ``D = |z * (H z)|`` is averaged over blocks of each parameter (section 3.2), then
``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) D^2`` and ``theta -= lr (m_hat / (v_hat^(k/2) + eps) + wd theta)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..base import CURVATURE, Coverage, CurvatureOptimizer, Params, descend_scaled, rate, real
from ..checks import check_range
from ..curvature import communication, spectra
from ..curvature.recorder import TwiceDifferentiable, set_aside
from ..curvature.spectra import Spectrum
from .graphs import UNSEEN, differ, graph, may_hide, owned
from .hutchinson import block_expand, block_mean, hutchinson


class AdaHessian(CurvatureOptimizer):
    """AdaHessian.

    On due steps ``backward`` differentiates the gradient once more (at about the cost of two more backward passes),
    through ``autograd.grad``: nothing is left in ``.grad`` that keeps the graph alive. A script that calls
    ``loss.backward(create_graph=True)`` itself works too; with ``before_backward``, a due step takes one more backward
    pass. Probes depend on (seed, step) alone, so a resumed run and
    every rank draw the same; across ranks the estimate is averaged *before* the absolute value, as on the joint batch.

    Given a module, fused attention (which has no second derivative) is switched to the plain kernel on due steps.

    Args:
        params: parameters, groups, or a whole module. ``lr, betas, eps, weight_decay, hessian_power`` may differ
            between groups.
        model: the module that the parameters are of, where they are given in place of it.
        lr: learning rate (eta).
        betas: decay of the gradient's and of the squared curvature's averages (beta_1, beta_2).
        eps: added to the denominator.
        max_update: largest root mean square over a tensor of the update ``m / (D + eps)``, which is shortened to it:
            where there is almost no curvature, a Newton step has no end. None: none, as published.
        weight_decay: decoupled, as in AdamW.
        hessian_power: k in [0, 1]; 1 is a Newton-like step, 0 is momentum.
        hessian_every: steps between curvature estimates; in between the last average stands.
        samples: probes a due step, averaged.
        block_size: length of the blocks that curvature of matrices is averaged over (32 in the paper's translation
            runs); None: no averaging for matrices. Convolution kernels always average over their positions.
        seed: of the probes.
        flags: torch's; see CurvatureOptimizer.
    """

    needs_graph = True
    _bound = CurvatureOptimizer._bound | {"_passes"}

    def __init__(
        self,
        params: nn.Module | Params,
        *,
        model: nn.Module | None = None,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        max_update: float | None = 0.1,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        hessian_every: int = 1,
        samples: int = 1,
        block_size: int | None = None,
        seed: int = 0,
        **flags: Any,
    ) -> None:
        check_range("lr", lr, 0)
        for i, beta in enumerate(betas):
            check_range(f"betas[{i}]", beta, 0, 1, open_high=True)
        check_range("eps", eps, 0, open_low=True)
        check_range("weight_decay", weight_decay, 0)
        check_range("hessian_power", hessian_power, 0, 1)
        check_range("hessian_every", hessian_every, 1)
        check_range("samples", samples, 1)
        if block_size is not None:
            check_range("block_size", block_size, 1)
        model = params if isinstance(params, nn.Module) else model
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "max_update": max_update,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
        }
        given = None if isinstance(params, nn.Module) else params
        super().__init__(model, given, defaults, update_every=hessian_every, flags=flags)
        self.samples, self.block_size, self.seed = samples, block_size, seed
        # z * (H z) of this step, summed over micro-batches, which have the same z: of one sample without z's signs.
        self._pending: dict[Tensor, Tensor] = {}
        self._complete_losses: set[Any] = set()  # kinds of losses that hide no parameter
        self._denominators: dict[Tensor, tuple[Tensor, float]] = {}
        self._spare: dict[Tensor, Tensor] = {}  # room for new ones
        self._attach()

    def _attach(self) -> None:
        super()._attach()
        self._passes = None if self.model is None else TwiceDifferentiable(self.model, self._due)

    @property
    def hessian_every(self) -> int:
        """Steps between curvature estimates; another name of ``update_every``."""
        return self.update_every

    @hessian_every.setter
    def hessian_every(self, value: int) -> None:
        self.update_every = value

    def _trainable(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def backward(
        self,
        loss: Tensor,
        outputs: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float = 1.0,
        retain_graph: bool = False,
    ) -> None:
        """See CurvatureOptimizer. Where ranks train together, the gradients of a due step are averaged here.

        Other optimizers' parameters and inputs have theirs, too, as ``loss.backward()`` would leave them.

        The loss says all: outputs, targets and mask have no meaning here.

        Raises:
            RuntimeError: an operation of the model has no second derivative, or hides parameters.
        """
        self._drop_skipped()
        if not self._due():
            loss.backward(retain_graph=retain_graph)
            return
        self._note(outputs)
        found = self._differentiate(loss, float(scale), retain_graph)
        for tensor in self._awake():
            if tensor.retains_grad and tensor.grad is not None:
                tensor.grad = tensor.grad.detach()  # else it keeps the graph
        gradients = owned([g.detach().resolve_conj() for _, g in found])
        pairs = [(p, g) for (p, _), g in zip(found, gradients, strict=True)]
        communication.average_(real(g for p, g in pairs if isinstance(p, nn.Parameter)))
        for p, g in pairs:
            p.grad = g if p.grad is None else p.grad + g
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):  # which no backward pass will call
                hook(p)
        self._remember(float(scale))

    def _begin_pass(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, scale: float, retain_graph: bool
    ) -> None:
        """See AnnouncedLosses. A pass of its own, through a graph that the other's is to go through yet."""
        if self._due():
            self._note(outputs)
            with set_aside([*self._awake(), *self._trainable()]):
                self._differentiate(loss, scale, True)

    def _differentiate(self, loss: Tensor, scale: float, retain_graph: bool) -> list[tuple[Tensor, Tensor]]:
        """Gather curvature; the leaves of the loss and their gradients, also of those that are another optimizer's."""
        params = self._trainable()
        nodes, leaves = graph(loss)
        mine = {id(p) for p in params}
        others = [leaf for leaf in leaves if id(leaf) not in mine]
        try:
            with set_aside([*self._awake(), *params]) if others else nullcontext():
                grads = self._checked(loss, nodes, leaves, params)
            if grads is None or others:
                grads = torch.autograd.grad(loss, [*params, *others], create_graph=True, allow_unused=True)
            found = [(p, g) for p, g in zip([*params, *others], grads, strict=True) if g is not None]
            own = [(p, g) for p, g in found if id(p) in mine]
            self._refuse_sparse([g for _, g in own])
            del grads
            self._collect([p for p, _ in own], [g for _, g in own], scale, retain_graph)
        except RuntimeError as error:
            if "use_reentrant" in str(error):  # torch's own guard, with more advice than applies
                raise RuntimeError(UNSEEN.format("some parameters")) from error
            if "is not implemented" not in str(error):
                raise
            raise RuntimeError(
                "AdaHessian needs second derivatives and an operation of this model has none (fused attention is the "
                f"usual one: give AdaHessian the whole module, not its parameters). PyTorch says: {error}"
            ) from error
        return found

    def _checked(
        self, loss: Tensor, nodes: list[Any], leaves: list[Tensor], params: list[Tensor]
    ) -> tuple[Tensor | None, ...] | None:
        """See to it that ``loss.backward()`` reaches no parameters that differentiating by them does not.

        Only a function written in Python can hide parameters, in a backward pass of its own. Where the loss has any,
        a plain backward pass tells; once for the same functions and the same parameters found.

        Returns:
            The gradients by the parameters, with their graph, where it took them; else None.

        Raises:
            RuntimeError: it does.
        """
        hiding = [type(node).__name__ for node in nodes if may_hide(node)]
        if not hiding:
            return None
        reached = {id(leaf) for leaf in leaves}
        key = (tuple(sorted(set(hiding))), tuple(id(p) in reached for p in params))
        if key in self._complete_losses:
            return None
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        inside = [] if self.model is None else list(self.model.parameters())
        touched = list({id(p): p for p in (*params, *leaves, *inside)}.values())
        buffers = [] if self.model is None else list(self.model.buffers())
        saved, kept = [p.grad for p in touched], [b.clone() for b in buffers]
        try:
            for p in touched:
                p.grad = None
            with set_aside([*self._awake(), *params]):
                loss.backward(retain_graph=True)
            plain = [p.grad for p in params]
        finally:
            for p, g in zip(touched, saved, strict=True):
                p.grad = g
            with torch.no_grad():
                for b, value in zip(buffers, kept, strict=True):
                    b.copy_(value)
        for p, g, full in zip(params, grads, plain, strict=True):
            if full is not None and (g is None or differ(g.detach(), full)):
                raise RuntimeError(UNSEEN.format(self._name_of(p)))
        self._complete_losses.add(key)
        return grads

    def _name_of(self, p: Tensor) -> str:
        named = {} if self.model is None else dict(self.model.named_parameters())
        found = next((name for name, q in named.items() if q is p), None)
        return f"a parameter of shape {list(p.shape)}" if found is None else f"the parameter {found!r}"

    def _collect(self, params: list[Tensor], grads: list[Tensor], scale: float, retain_graph: bool = False) -> None:
        with record_function(CURVATURE), set_aside([*self._awake(), *params]):
            terms = hutchinson(grads, params, self._probe_seed(), self.samples, retain_graph, signed=False)
        zeros = (torch.zeros_like(*real([p.detach()])) if t is None else t for p, t in zip(params, terms, strict=True))
        for p, term in zip(params, owned(list(zeros)), strict=True):
            term = term if scale == 1.0 else term / scale
            self._pending[p] = self._pending[p] + term if p in self._pending else term

    def _note(self, outputs: Any) -> None:
        """Take note of outputs, which may have been made of what the model returned."""
        if self._passes is not None and isinstance(outputs, Tensor):
            self._passes.note(outputs)

    def _awake(self) -> list[Tensor]:
        """Tensors of the graph that would tell of a backward pass."""
        return [] if self._passes is None else self._passes.awake()

    def _probe_seed(self) -> int:
        return (self.seed * 1_000_003 + self.steps) * 4096  # room for `samples` draws a step

    def _update_curvature(self) -> bool:
        if not self._pending:
            self._from_graph()
        communication.average_(list(self._pending.values()))
        for group in self.param_groups:
            params = [p for p in group["params"] if p in self._pending]
            if not params:
                continue
            means = [block_mean(self._pending[p], self.block_size) for p in params]
            for p, mean in zip(params, means, strict=True):
                if "exp_hessian_sq" not in self.state[p]:
                    self.state[p].update(hessian_step=0, exp_hessian_sq=torch.zeros_like(mean))
                self.state[p]["hessian_step"] += 1
            squares = [self.state[p]["exp_hessian_sq"] for p in params]
            beta = group["betas"][1]
            torch._foreach_mul_(squares, beta)
            torch._foreach_addcmul_(squares, means, means, value=1 - beta)
        self._spare = {p: denominator for p, (denominator, _) in self._denominators.items()}
        self._denominators.clear()
        return True

    def _from_graph(self) -> None:
        """Curvature from the gradients of ``loss.backward(create_graph=True)``; breaks their reference cycle."""
        params = [p for p in self._trainable() if p.grad is not None]
        if params and not any(p.grad.requires_grad for p in params):  # type: ignore[union-attr]
            raise RuntimeError(
                "AdaHessian has no second derivatives for this step: call optimizer.backward(loss) in place of "
                "loss.backward(), or, where a loop calls that itself, loss = optimizer.before_backward(loss) before it "
                "(or loss.backward(create_graph=True)); a checkpoint in the model must have use_reentrant=False."
            )
        self._refuse_sparse([p.grad for p in params])  # type: ignore[misc]
        bare = [p for p in params if not p.grad.requires_grad]  # type: ignore[union-attr]
        nodes, _ = graph(*(p.grad for p in params))  # type: ignore[arg-type]
        hiding = [type(node)._forward_cls.__module__ for node in nodes if may_hide(node)]
        if (bare and hiding) or torch.utils.checkpoint.__name__ in hiding:  # which may hide a part of a gradient, too
            raise RuntimeError(UNSEEN.format(self._name_of(bare[0]) if bare else "some parameters"))
        with torch.enable_grad():
            self._collect(params, [p.grad for p in params], 1.0)  # type: ignore[misc]
        for p in params:
            p.grad = p.grad.detach()  # type: ignore[union-attr]

    def _denominator(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        """``(d, c)`` with ``v_hat^(k/2) + eps = d / c``: the bias correction c costs no pass over the parameter."""
        if p not in self._denominators:
            state, power = self.state[p], group["hessian_power"]
            if not state.get("hessian_step"):  # never in a differentiated loss
                return torch.ones_like(*real([p])), 1.0
            correction = (1 - group["betas"][1] ** state["hessian_step"]) ** (power / 2)
            square = state["exp_hessian_sq"]
            room = self._spare.pop(p, None)
            if room is None or room.shape != square.shape or room.dtype != square.dtype or room.device != square.device:
                room = torch.empty_like(square)
            root = torch.sqrt(square, out=room) if power == 1 else torch.pow(square, power / 2, out=room)
            root.add_(group["eps"] * correction)
            self._denominators[p] = block_expand(root, real([p])[0].shape, self.block_size).contiguous(), correction
        return self._denominators[p]

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, (beta, _), decay = rate(group), group["betas"], group["weight_decay"]
        moments, corrections = self._moments(params, grads, beta)
        denominators = [self._denominator(p, group) for p in params]
        params = real(params)
        sizes = [scale / c for (_, scale), c in zip(denominators, corrections, strict=True)]
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        descend_scaled(params, moments, [d for d, _ in denominators], sizes, lr, group["max_update"])

    def _reset(self) -> None:
        super()._reset()
        self._pending.clear()
        if self._passes is not None:
            self._passes.reset()

    def _initial(self, p: Tensor) -> dict[str, Any]:
        """See CurvatureOptimizer."""
        square = torch.zeros_like(block_mean(real([p.detach()])[0], self.block_size))
        return {"step": 0, "exp_avg": torch.zeros_like(p), "hessian_step": 0, "exp_hessian_sq": square}

    def coverage(self) -> Coverage:
        """See CurvatureOptimizer; a line a parameter, whose factor is its averages over blocks.

        One that no differentiated loss has had yet takes a step along its averaged gradient.
        """
        table = Coverage()
        names = {} if self.model is None else {p: name for name, p in self.model.named_parameters()}
        for index, group in enumerate(self.param_groups):
            for place, p in enumerate(q for q in group["params"] if q.requires_grad):
                square = block_mean(real([p.detach()])[0], self.block_size)
                seen = not self.steps or self.state.get(p, {}).get("hessian_step", 0)
                kind = "HessianDiagonal" if seen else "fallback: no loss that was differentiated has had it yet"
                size = square.numel() * square.element_size() if seen else 0
                factor = f"D{list(square.shape)}" if seen else ""
                table.rows.append((names.get(p, f"group {index}, {place}"), kind, factor, p.numel(), size))
        return table

    def layer_diagnostics(self) -> dict[str, dict[str, float]]:
        """See CurvatureOptimizer: of the denominators, a layer being a module; eps is their damping."""
        rows = []
        for name, module in [] if self.model is None else self.model.named_modules():
            known = [(p, g) for p in module.parameters(recurse=False) if (g := self._group_of(p)) is not None]
            known = [(p, g) for p, g in known if p in self._denominators]
            if known:
                damped = [(d / scale).flatten() for d, scale in (self._denominators[p] for p, _ in known)]
                shifts = [t.new_full((len(t),), g["eps"]) for t, (_, g) in zip(damped, known, strict=True)]
                values, shift = torch.cat(damped) - torch.cat(shifts), torch.cat(shifts)
                rows.append((name, spectra.numbers(Spectrum(values, shift), None, spectra.row(values))))
        return spectra.told(rows)

    def quadratic(self, steps: Mapping[Tensor, Tensor]) -> float | None:
        """See CurvatureOptimizer. Denominators of power one are absolute values of the Hessian's diagonal."""
        if not self._denominators or any(group["hessian_power"] != 1 for group in self.param_groups):
            return None
        known = [(steps[p], d, scale) for p, (d, scale) in self._denominators.items() if p in steps]
        return float(sum((real([step])[0].square() * d).sum() / scale for step, d, scale in known))

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._denominators.clear()
        self._spare.clear()

    def close(self) -> None:
        """See CurvatureOptimizer."""
        super().close()
        if self._passes is not None:
            self._passes.close()
