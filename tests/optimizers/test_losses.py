"""What is read in a loss's graph against what the loss was called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers.curvature.losses import stated

WIDE = 20_000  # more classes than half precision can count


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Outputs with a model behind them."""
    return (torch.randn(shape[-1], requires_grad=True) * torch.randn(shape)).to(dtype)


#: id: shape of the outputs, class dimension, the loss as users write it of outputs and targets [n, ...].
WRITTEN: dict[str, tuple[tuple[int, ...], int, Callable[..., Tensor]]] = {
    "rows": ((6, 4), 1, lambda o, t, **k: F.cross_entropy(o, t, **k)),
    "unbatched": ((4,), 0, lambda o, t, **k: F.cross_entropy(o, t[0], **k)),
    "flattened": ((2, 5, 4), 2, lambda o, t, **k: F.cross_entropy(o.view(-1, 4), t.view(-1), **k)),
    "transposed": ((2, 5, 4), 2, lambda o, t, **k: F.cross_entropy(o.transpose(1, 2), t, **k)),
    "as_many": ((3, 4, 4), 2, lambda o, t, **k: F.cross_entropy(o.transpose(1, 2), t, **k)),
    "as_many_channels": ((3, 4, 4), 1, lambda o, t, **k: F.cross_entropy(o, t, **k)),
    "time_first": (
        (2, 5, 4), 2, lambda o, t, **k: F.cross_entropy(o.transpose(0, 1).flatten(0, 1), t.T.flatten(), **k)
    ),
    "image": ((2, 4, 3, 5), 1, lambda o, t, **k: F.cross_entropy(o, t, **k)),
    "image_rows": (
        (2, 4, 3, 5), 1, lambda o, t, **k: F.cross_entropy(o.movedim(1, -1).reshape(-1, 4), t.flatten(), **k)
    ),
    "volume": ((2, 4, 3, 2, 2), 1, lambda o, t, **k: F.cross_entropy(o, t, **k)),
    "wide": ((2, 3, WIDE), 2, lambda o, t, **k: F.cross_entropy(o.view(-1, WIDE).float(), t.view(-1), **k)),
    "log_softmax": ((6, 4), 1, lambda o, t, **k: F.nll_loss(o.log_softmax(-1), t, **k)),
    "scaled": ((6, 4), 1, lambda o, t, **k: F.cross_entropy(o, t, **k) / 3 * 1024.0),
    "none": ((6, 4), 1, lambda o, t, **k: F.cross_entropy(o, t, **k | {"reduction": "none"}).mean()),
    "smooth": ((6, 4), 1, lambda o, t, **k: F.cross_entropy(o, t, label_smoothing=0.1, **k)),
    "regularised": ((6, 4), 1, lambda o, t, **k: F.cross_entropy(o, t, **k) + 0.1 * o.square().mean()),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ignored", [-100, 1, 255])
@pytest.mark.parametrize("written", WRITTEN)
def test_targets_are_found_where_they_belong(written: str, ignored: int, dtype: torch.dtype) -> None:
    shape, dim, loss = WRITTEN[written]
    outputs = made(*shape, dtype=dtype)
    leading = (*shape[:dim], *shape[dim + 1 :]) or (1,)
    targets = torch.randint(0, shape[dim], leading)
    targets.view(-1)[1:4] = ignored
    # torch itself takes no index out of range that is not the one to ignore.
    expected = targets.masked_fill(targets == ignored, -100)
    (found,) = stated(loss(outputs, targets, ignore_index=ignored), outputs)
    assert found.kind == "cross_entropy" and found.ignore_index == ignored and found.weight is None
    assert found.reduction == ("none" if written == "none" else "mean")
    assert found.dim == dim and found.targets is not None and torch.equal(found.targets, expected)


@pytest.mark.parametrize(
    ("shape", "dim", "loss"),
    [
        ((6, 4), 1, F.nll_loss),
        ((4,), 0, lambda o, t, **k: F.nll_loss(o, t[0], **k)),
        ((2, 5, 4), 2, lambda o, t, **k: F.nll_loss(o.view(-1, 4).float(), t.flatten(), **k)),
        ((2, 4, 5), 1, F.nll_loss),
        ((2, 4, 3, 5), 1, F.nll_loss),
        ((2, 4, 3, 2, 2), 1, F.nll_loss),
        ((6, 4), 1, F.cross_entropy),
    ],
    ids=["rows", "unbatched", "flattened", "sequence", "image", "volume", "again"],
)
def test_outputs_that_are_logarithms_of_probabilities(
    shape: tuple[int, ...], dim: int, loss: Callable[..., Tensor]
) -> None:
    """A model may end in `nn.LogSoftmax`, and its loss be `nn.NLLLoss`."""
    outputs = made(*shape).log_softmax(dim)
    targets = torch.randint(0, shape[dim], (*shape[:dim], *shape[dim + 1 :]) or (1,))
    targets.view(-1)[1:2] = -100
    (found,) = stated(loss(outputs, targets), outputs)
    assert found.dim == dim and found.targets is not None and torch.equal(found.targets, targets)


def test_logarithms_of_probabilities_in_another_order_have_no_targets() -> None:
    outputs, targets = made(2, 5, 4).log_softmax(-1), torch.randint(0, 4, (2, 5))
    (found,) = stated(F.nll_loss(outputs.transpose(1, 2), targets), outputs)
    assert found.targets is None and torch.equal(found.given.view(2, 5), targets)


def test_a_leaf_and_a_graph_that_is_still_there() -> None:
    outputs, weight = torch.randn(6, 4, requires_grad=True), torch.rand(4)
    targets = torch.randint(0, 4, (6,))
    loss = F.cross_entropy(outputs, targets, weight=weight, reduction="sum")
    (found,) = stated(loss, outputs)
    assert found.reduction == "sum" and torch.equal(found.targets, targets) and torch.equal(found.weight, weight)
    loss.backward()
    assert outputs.grad is not None


def test_positions_that_the_loss_does_not_look_at_do_not_count() -> None:
    outputs, labels = made(2, 5, 4), torch.randint(0, 4, (2, 5))
    for loss in (
        F.cross_entropy(outputs[:, :-1].reshape(-1, 4), labels[:, 1:].reshape(-1)),
        F.cross_entropy(outputs[..., :-1, :].contiguous().view(-1, 4).float(), labels[..., 1:].contiguous().view(-1)),
    ):
        (found,) = stated(loss, outputs)
        assert torch.equal(found.targets, F.pad(labels[:, 1:], (0, 1), value=-100))
    mask = torch.rand(2, 5) < 0.5
    mask[0, 0], mask[0, 1] = True, False
    (found,) = stated(F.cross_entropy(outputs[mask], labels[mask]), outputs)
    assert torch.equal(found.targets, labels.masked_fill(~mask, -100)) and found.dim == 2
    (found,) = stated(F.cross_entropy(outputs[..., [0, 2]].flatten(0, 1), labels.clamp(max=1).flatten()), outputs)
    assert found.targets is None and found.dim is None, "not all classes"


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o / 0.7, lambda o: 30 * (o / 30).tanh(), lambda o: torch.cat([o, o]), lambda o: o.flip(-1),
        lambda o: o + o, lambda o: o.T.reshape(-1, 4),
    ],
    ids=["temperature", "cap", "twice", "turned", "doubled", "mixed"],
)  # fmt: skip
def test_outputs_that_are_not_the_logits_have_no_targets(change: Callable[[Tensor], Tensor]) -> None:
    outputs = made(6, 4)
    changed = change(outputs)
    (found,) = stated(F.cross_entropy(changed, torch.arange(len(changed)) % 4), outputs)
    assert found.targets is None and found.dim is None and found.reduction == "mean"


def test_only_the_losses_of_these_outputs() -> None:
    """Not those of another head, nor those inside of the model."""
    hidden = made(6, 8)
    inner = F.mse_loss(hidden, torch.zeros(6, 8))
    one, other = nn.Linear(8, 4)(hidden) * inner, nn.Linear(8, 4)(hidden)
    first, second = torch.randint(0, 4, (6,)), torch.randint(0, 4, (6,))
    loss = F.cross_entropy(one, first) + F.cross_entropy(other, second)
    (found,) = stated(loss, one)
    assert torch.equal(found.targets, first)
    (found,) = stated(loss, other)
    assert torch.equal(found.targets, second)
    halves = nn.Linear(8, 8)(hidden).split(4, dim=1)
    loss = sum(F.cross_entropy(half, t) for half, t in zip(halves, (first, second), strict=True))
    for half, targets in zip(halves, (first, second), strict=True):
        (found,) = stated(loss, half)
        assert torch.equal(found.targets, targets)


def test_squared_errors_and_bits() -> None:
    outputs, targets = made(6, 4), torch.rand(6, 4)
    (found,) = stated(F.mse_loss(outputs, targets), outputs)
    assert (found.kind, found.reduction) == ("mse", "mean") and torch.equal(found.targets, targets)
    options: dict[str, Any] = {"pos_weight": torch.rand(4), "weight": torch.rand(6, 4), "reduction": "sum"}
    (found,) = stated(F.binary_cross_entropy_with_logits(outputs, targets, **options), outputs)
    assert (found.kind, found.reduction) == ("bernoulli", "sum") and torch.equal(found.targets, targets)
    assert torch.equal(found.pos_weight, options["pos_weight"]) and torch.equal(found.weight, options["weight"])
    (found,) = stated(F.binary_cross_entropy(outputs.sigmoid(), targets), outputs)
    probabilities = outputs.sigmoid()
    (other,) = stated(F.binary_cross_entropy(probabilities.flatten(), targets.flatten()), probabilities)
    assert other.kind == "probabilities"
    assert (found.kind, found.reduction) == ("bernoulli", "mean") and torch.equal(found.given, targets)


def test_what_states_nothing() -> None:
    outputs, targets = made(6, 4), torch.rand(6, 4).softmax(-1)
    assert stated(F.cross_entropy(outputs, targets), outputs) == [], "of probabilities the graph keeps no targets"
    assert stated(outputs.square().sum(), outputs) == []
    assert stated(F.cross_entropy(outputs.detach(), targets), outputs) == []
    deep = F.mse_loss(outputs, targets)
    for _ in range(50):
        deep = deep + 1
    assert len(stated(deep, outputs)) == 1 and stated(deep, outputs, nodes=20) == []
