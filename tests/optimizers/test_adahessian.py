"""AdaHessian against the dense Hessian, and against its own formulas worked out by hand."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from optimizers import AdaHessian
from optimizers.adahessian import block_expand, block_mean, hutchinson, rademacher
from tests import dense
from tests.optimizers.problems import PROBLEMS, ViTBlock, conv_net, images


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3), nn.Tanh(), nn.Linear(3, 4)
    )


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.Tanh(), nn.Linear(256, 4))


def test_probes_are_fair_independent_signs_and_repeatable() -> None:
    shapes = [torch.zeros(300, 101), torch.zeros(7), torch.zeros(()), torch.zeros(33, dtype=torch.float64)]
    probes = rademacher(shapes, seed=3)
    assert all(z.shape == t.shape and z.dtype == t.dtype for z, t in zip(probes, shapes, strict=True))
    flat = torch.cat([z.flatten().double() for z in probes])
    assert set(flat.tolist()) == {-1.0, 1.0}
    assert abs(float(flat.mean())) < 4 / len(flat) ** 0.5
    for lag in (1, 8, 64):  # neighbours, and the same bit of the next byte and word
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 4 / len(flat) ** 0.5
    assert all(torch.equal(a, b) for a, b in zip(probes, rademacher(shapes, seed=3), strict=True))
    assert not torch.equal(probes[0], rademacher(shapes, seed=4)[0])


@pytest.mark.usefixtures("float64")
def test_hutchinson_averages_to_the_dense_hessian_diagonal() -> None:
    model, (inputs, targets) = small_net(), images()
    params = list(model.parameters())
    loss = F.cross_entropy(model(inputs), targets)
    full = dense.hessian(loss, params)
    samples = 4000
    grads = torch.autograd.grad(F.cross_entropy(model(inputs), targets), params, create_graph=True)
    estimate = dense.flatten(hutchinson(grads, params, seed=1, samples=samples))
    # The estimator's variance is the off-diagonal mass of the row: five standard errors of every entry.
    error = (estimate - full.diagonal()).abs()
    spread = (full.square().sum(1) - full.diagonal().square()).sqrt() / samples**0.5
    assert bool((error <= 5 * spread + 1e-12).all())
    assert 0.5 < float((error / spread).square().mean()) < 1.5, "as far off as theory says, no more and no less"


@pytest.mark.usefixtures("float64")
def test_one_probe_is_z_times_the_dense_hessian_times_z() -> None:
    model, (inputs, targets) = small_net(), images()
    params = list(model.parameters())
    full = dense.hessian(F.cross_entropy(model(inputs), targets), params)
    grads = torch.autograd.grad(F.cross_entropy(model(inputs), targets), params, create_graph=True)
    z = dense.flatten(rademacher(params, seed=5))
    torch.testing.assert_close(dense.flatten(hutchinson(grads, params, seed=5)), z * (full @ z), rtol=1e-9, atol=1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_average_is_of_the_squares_of_what_the_dense_hessian_gives(samples: int, parts: int) -> None:
    """Of one sample the sign is never worked out; micro-batches are summed before it would matter."""
    model, (inputs, targets) = small_net(), images(8)
    params = list(model.parameters())
    optimizer = AdaHessian(model, lr=0.0, samples=samples, betas=(0.9, 0.5))
    full = dense.hessian(F.cross_entropy(model(inputs), targets), params)
    for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        optimizer.backward(F.cross_entropy(model(x), y) / parts)
    probes = [dense.flatten(rademacher(params, optimizer._probe_seed() + i)) for i in range(samples)]
    expected = (sum(z * (full @ z) for z in probes) / samples).abs().split([p.numel() for p in params])
    optimizer.step()
    for p, d in zip(params, expected, strict=True):
        d = d.view_as(p)
        d = d.mean((2, 3), keepdim=True) if d.dim() == 4 else d
        torch.testing.assert_close(optimizer.state[p]["exp_hessian_sq"], d.square() / 2, rtol=1e-8, atol=1e-14)


def accumulated(into: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], **others: object) -> int:
    """Operations of ``addmm_``, of which torch's counter knows nothing."""
    return 2 * left[0] * left[1] * right[1]


COUNTED = {
    "linear": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4)
        ),
        [192 * 16, 16 * 10, 10 * 4],
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4),
        ),
        [3 * 4 * 9 * 64, 4 * 6 * 9 * 16, 96 * 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "whole"), [("linear", True), ("linear", False), ("convolution", True)])
def test_a_step_takes_no_product_that_nobody_needs(kind: str, whole: bool) -> None:
    """Of a layer's size: nine for SGD's three; of the first, whose input has no derivative, four for SGD's two.

    Torch's kernels take the same of linear layers, and more of convolutions.
    """
    build, sizes = COUNTED[kind]
    model, (inputs, targets) = build(), images(8)
    counts = []
    optimizer = AdaHessian(model if whole else model.parameters())
    for own in (True, False):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: accumulated}) as counter:
            loss = F.cross_entropy(model(inputs), targets)
            if own:
                optimizer.backward(loss)
                optimizer.step()
            else:
                loss.backward()
        counts.append(counter.get_total_flops() / (2 * len(inputs)))
    assert counts[0] == 4 * sizes[0] + 9 * sum(sizes[1:])
    assert counts[1] == 2 * sizes[0] + 3 * sum(sizes[1:]), "what is counted of SGD"


class Checkpointed(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside, self.part = inside, nn.Sequential(nn.Linear(192, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x.flatten(1), use_reentrant=False) if self.inside else self.part(x.flatten(1))


def test_a_checkpoint_changes_nothing() -> None:
    """Its second pass saves what its first one did, though only the first runs on kernels of our own."""
    found, batch = [], images()
    for inside in (False, True):
        torch.manual_seed(0)
        optimizer = AdaHessian(model := Checkpointed(inside), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(F.cross_entropy(model(batch[0]), batch[1]))
            optimizer.step()
        found.append(dense.flatten([p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_steps_by_hand(power: float) -> None:
    """Three steps, curvature on the first and third: v and its bias correction count curvature updates only."""
    lr, b1, b2, eps, decay = 0.1, 0.9, 0.99, 1e-4, 0.05
    model, (inputs, targets) = small_net(), images()
    params = list(model.parameters())
    optimizer = AdaHessian(
        model, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay, hessian_power=power, hessian_every=2, seed=4,
        max_update=None,
    )  # fmt: skip
    theta = [p.detach().clone() for p in params]
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    updates = 0
    for t in range(1, 4):
        loss = F.cross_entropy(model(inputs), targets)
        full = dense.hessian(loss, params)
        grads = torch.autograd.grad(F.cross_entropy(model(inputs), targets), params)
        if t in (1, 3):
            updates += 1
            z = dense.flatten(rademacher(params, optimizer._probe_seed()))
            curvature = (z * (full @ z)).abs().split([p.numel() for p in params])
            for i, (d, p) in enumerate(zip(curvature, params, strict=True)):
                d = d.view_as(p)
                if d.dim() == 4:  # |D| averaged over the kernel's positions
                    d = d.mean((2, 3), keepdim=True).expand_as(d)
                v[i] = b2 * v[i] + (1 - b2) * d**2
        for i, g in enumerate(grads):
            m[i] = b1 * m[i] + (1 - b1) * g
            denominator = (v[i] / (1 - b2**updates)).sqrt() ** power + eps
            theta[i] = theta[i] - lr * (m[i] / (1 - b1**t) / denominator + decay * theta[i])
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        torch.testing.assert_close(dense.flatten(params), dense.flatten(theta), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((6,), None, (6,)),
        ((4, 6), None, (4, 6)),
        ((4, 6), 6, (4, 1)),
        ((4, 6), 2, (4, 3)),
        ((4, 7), 3, (4, 3)),  # a shorter last block
        ((4, 6, 5), None, (4, 6, 1)),
        ((4, 6, 3, 3), 2, (4, 6, 1, 1)),
    ],
)
def test_block_averaging(shape: tuple[int, ...], block: int | None, expected: tuple[int, ...]) -> None:
    d = torch.rand(shape)
    means = block_mean(d, block)
    assert means.shape == expected
    spread = block_expand(means, d.shape, block)
    naive = d.clone()
    if d.dim() >= 3:
        for index in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).tolist():
            naive[tuple(index)] = d[tuple(index)].mean()
    elif d.dim() == 2 and block:
        for row in range(shape[0]):
            for start in range(0, shape[1], block):
                naive[row, start : start + block] = d[row, start : start + block].mean()
    torch.testing.assert_close(spread, naive)


def test_gradients_are_those_of_plain_backward_and_hold_no_graph() -> None:
    model, (inputs, targets) = conv_net(), images()
    optimizer = AdaHessian(model)
    F.cross_entropy(model(inputs), targets).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.backward(F.cross_entropy(model(inputs), targets))
    for p, g in zip(model.parameters(), plain, strict=True):
        assert not p.grad.requires_grad
        torch.testing.assert_close(p.grad, g)


def test_scripts_that_call_backward_with_create_graph_still_work() -> None:
    models, (inputs, targets) = [], images()
    for own in (True, False):
        torch.manual_seed(0)
        model = small_net()
        optimizer = AdaHessian(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            if own:
                optimizer.backward(loss)
            else:
                loss.backward(create_graph=True)
            optimizer.step()
        assert not any(p.grad.requires_grad for p in model.parameters())
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_plain_backward_on_a_due_step_says_what_to_call() -> None:
    model, (inputs, targets) = small_net(), images()
    optimizer = AdaHessian(model, hessian_every=2)
    F.cross_entropy(model(inputs), targets).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.backward\(loss\)"):
        optimizer.step()


def test_fused_attention_is_switched_off_for_a_module_and_explained_for_bare_parameters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs, targets = images()
    model = ViTBlock(fused=True)
    optimizer = AdaHessian(model)
    with caplog.at_level("INFO"):
        for _ in range(2):
            optimizer.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
    assert sum("math" in line for line in caplog.messages) == 1, "told once"
    another = AdaHessian(model)  # a second one on the same model, the first still there
    another.backward(F.cross_entropy(model(inputs), targets))
    enabled = torch.backends.cuda.flash_sdp_enabled()
    assert enabled, "the kernel choice must be restored after the forward pass"
    bare = AdaHessian(ViTBlock(fused=True).parameters())
    assert bare.model is None
    model = ViTBlock(fused=True)
    with pytest.raises(RuntimeError, match="give AdaHessian the whole module"):
        AdaHessian(model.parameters()).backward(F.cross_entropy(model(inputs), targets))


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3), "frozen": nn.Linear(3, 3)})
    model["frozen"].requires_grad_(False)
    optimizer = AdaHessian(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = model["frozen"](torch.tanh(model["used"](torch.randn(5, 4))))
    optimizer.backward(F.cross_entropy(out, torch.randint(0, 3, (5,))))
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"used.weight", "used.bias"}


def test_groups_have_their_own_settings() -> None:
    """Each half of a two-group optimizer moves as in an optimizer of one group with that half's settings."""
    inputs, targets = images()
    settings = [{"lr": 0.1, "hessian_power": 1.0}, {"lr": 0.01, "betas": (0.5, 0.9), "hessian_power": 0.5}]

    def one_step(groups: list[dict[str, object]]) -> list[Tensor]:
        torch.manual_seed(0)
        model = small_net()
        parameters = list(model.parameters())
        halves = [parameters[:2], parameters[2:]]
        optimizer = AdaHessian([{"params": half, **group} for half, group in zip(halves, groups, strict=True)])
        optimizer.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        return [dense.flatten([p.detach() for p in half]) for half in halves]

    mixed, first, second = one_step(settings), one_step([settings[0]] * 2), one_step([settings[1]] * 2)
    assert torch.equal(mixed[0], first[0]) and torch.equal(mixed[1], second[1])
    assert not torch.equal(first[1], second[1])


def tensor_bytes() -> int:
    """Bytes of every live tensor that Python can see."""
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_is_flat_over_two_hundred_steps() -> None:
    gc.disable()  # a cycle through the graph would otherwise be cleaned up behind our back
    try:
        model, (inputs, targets) = small_mlp(), images(64)
        optimizer = AdaHessian(model)
        sizes, peaks = [], []
        for step in range(200):
            optimizer.zero_grad()
            optimizer.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
            if step % 50 == 49:
                sizes.append(tensor_bytes())
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    finally:
        gc.enable()
    assert sizes[0] == sizes[-1]
    # a leaked graph would hold at least the weights' gradient, 200 KB a step, 30 MB over the last 150
    assert peaks[-1] - peaks[0] < 8_000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"hessian_power": 1.5}, r"hessian_power must be in \[0, 1\], got 1.5"),
        ({"hessian_every": 0}, "hessian_every must be in"),
        ({"block_size": 0}, "block_size must be in"),
        ({"samples": 0}, "samples must be in"),
    ],
)
def test_bad_arguments_are_sentences(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AdaHessian(small_net(), **options)


def test_every_problem_has_second_derivatives() -> None:
    for name, (build, data) in PROBLEMS.items():
        model, (inputs, targets) = build(), data()
        optimizer = AdaHessian(model, lr=0.01)
        optimizer.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters()), name


@pytest.mark.usefixtures("float64")
def test_updates_are_no_longer_than_their_limit() -> None:
    inputs, targets = images()
    moves = []
    for limit in (None, 0.05):
        torch.manual_seed(0)
        model = small_net()
        optimizer = AdaHessian(model, lr=0.1, max_update=limit)
        before = [p.detach().clone() for p in model.parameters()]
        outputs = model(inputs)
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)
        optimizer.step()
        moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    lengths = [float(whole.square().mean().sqrt()) / 0.1 for whole in moves[0]]
    assert max(lengths) > 0.05
    for whole, short, length in zip(*moves, lengths, strict=True):
        torch.testing.assert_close(short, whole * min(1.0, 0.05 / length))


def test_coverage_is_a_line_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(7, 7))
    model[0].bias.requires_grad_(False)
    optimizer = AdaHessian(model, block_size=2)
    loss = model[1](model[0](torch.randn(8, 5))).square().mean()
    assert optimizer.coverage().fraction == 1 and not optimizer.state
    optimizer.backward(loss)
    optimizer.step()
    rows = {name: rest for name, *rest in optimizer.coverage().rows}
    assert rows["0.weight"] == ["HessianDiagonal", "D[4, 3]", 20, 48] and "0.bias" not in rows
    assert rows["2.weight"][0].startswith("fallback: no loss") and rows["2.weight"][3] == 0
    assert AdaHessian(model.parameters(), model=None).coverage().rows[0][0] == "group 0, 0"


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_not_its_own_has_the_gradient_of_a_plain_backward_pass(whole: bool) -> None:
    """A head that another optimizer trains, an embedding with sparse gradients, an input that asks for its own."""
    model = nn.ModuleDict({"e": nn.Embedding(7, 5, sparse=True), "body": nn.Linear(5, 4), "head": nn.Linear(4, 3)})
    shift, ids = torch.randn(6, 5, requires_grad=True), torch.arange(6)
    optimizer = AdaHessian(model["body"].parameters(), model=model if whole else None)
    others = [*model["e"].parameters(), *model["head"].parameters(), shift]

    def loss() -> Tensor:
        hidden = torch.tanh(model["body"](model["e"](ids) + shift))
        return F.cross_entropy(model["head"](hidden), ids % 3)

    loss().backward()
    plain = [p.grad for p in (*others, *model["body"].parameters())]
    for p in (*others, *model["body"].parameters()):
        p.grad = None
    optimizer.backward(loss())
    for p, g in zip((*others, *model["body"].parameters()), plain, strict=True):
        assert p.grad is not None and g is not None and not p.grad.requires_grad
        torch.testing.assert_close(p.grad.to_dense(), g.to_dense())
    optimizer.backward(loss())
    torch.testing.assert_close(shift.grad, 2 * plain[3])


@pytest.mark.parametrize("announced", [False, True])
def test_hooks_of_parameters_are_called_once(announced: bool) -> None:
    """With their gradient, before and after it is there."""
    model, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    before: list[Tensor] = []
    after: list[Tensor] = []
    model.weight.register_hook(lambda g: before.append(g.detach()))
    model.weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad))
    optimizer = AdaHessian(model)
    loss = F.cross_entropy(model(x), y)
    if announced:
        optimizer.before_backward(loss).backward()
    else:
        optimizer.backward(loss)
    assert len(before) == len(after) == 1 and torch.equal(before[0], after[0]) and after[0] is model.weight.grad
