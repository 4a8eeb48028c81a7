"""Models out of plain layers: the same numbers, the weights of either form, and nothing an optimizer cannot see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from models.parts.plain import Around, PadSame, SeparateAttention, plain_layers
from optimizers import KFAC, Categorical


class Holder(nn.Module):
    """A module under a name, as a model has it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def packed(**options: Any) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(12, 3, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)  # biases start at zero: a forgotten one would go unnoticed
    return attention


LAYOUTS = [
    {"batch_first": True},
    {"batch_first": False},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "kdim": 5, "vdim": 7},
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "both", "by head"])
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_separate_attention_is_multi_head_attention(options: dict[str, Any], masks: str, need_weights: bool) -> None:
    theirs = packed(**options)
    ours = SeparateAttention(theirs)
    query = torch.randn(2, 4, 12, requires_grad=True)
    key = torch.randn(2, 4, options.get("kdim", 12))
    value = torch.randn(2, 4, options.get("vdim", 12))
    inputs = [t if options["batch_first"] else t.transpose(0, 1) for t in (query, key, value)]
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, True, True], [False, False, False, True]])
    given: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": False}
    if masks in ("causal", "both"):
        given["attn_mask"] = causal if masks == "causal" else torch.zeros(4, 4).masked_fill(causal, -torch.inf)
    if masks in ("padding", "both"):
        given["key_padding_mask"] = (
            padding if masks == "padding" else torch.zeros(2, 4).masked_fill(padding, -torch.inf)
        )
    if masks == "by head":
        given["attn_mask"] = torch.randn(2 * 3, 4, 4)
    (expected, weights), (found, own_weights) = theirs(*inputs, **given), ours(*inputs, **given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own_weights, weights)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), query),
        torch.autograd.grad(expected.square().sum(), query),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("float64")
def test_a_single_sequence_without_batch() -> None:
    theirs = packed()
    x = torch.randn(4, 12)
    padding = torch.tensor([False, False, False, True])
    expected, found = (m(x, x, x, key_padding_mask=padding) for m in (theirs, SeparateAttention(theirs)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_weights_of_packed_attention_load_into_the_separate_one(options: dict[str, Any]) -> None:
    source = Holder(packed(**options))
    target = plain_layers(Holder(packed(**options)))
    target.load_state_dict(source.state_dict())
    assert next(iter(source.state_dict())).startswith("part."), "what was given stays as it was"
    expected = plain_layers(source).state_dict()
    letters = [
        f"part.{x}_proj.{kind}"
        for x in "qkv"
        for kind in ("weight", "bias")
        if options.get("bias", True) or kind == "weight"
    ]
    assert set(letters) <= set(expected)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    target.load_state_dict(expected)  # and its own names


def test_attention_with_added_keys_is_refused() -> None:
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match=r"^add_bias_kv and add_zero_attn have no equivalent out of plain layers"):
            plain_layers(Holder(nn.MultiheadAttention(4, 2, **options)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_s_own_encoder_layers_work_with_it() -> None:
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 4, 12), torch.tensor([[False, False, True, True], [False, False, False, False]])
    with torch.no_grad():
        expected = [net(x), net(x, src_key_padding_mask=padding)]
        plain_layers(net)
        found = [net(x), net(x, src_key_padding_mask=padding)]
    kept = ~padding  # what comes out at the padding is nobody's business, and differs
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1][kept], expected[1][kept])


def test_dropout_of_attention_weights() -> None:
    attention = SeparateAttention(nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True))
    x = torch.randn(2, 4, 12)
    for need_weights in (True, False):
        draws = [attention(x, x, x, need_weights=need_weights)[0] for _ in range(2)]
        assert not torch.equal(*draws)
        same = [attention.eval()(x, x, x, need_weights=need_weights)[0] for _ in range(2)]
        assert torch.equal(*same)
        attention.train()


# Fused layers of several kinds: the smallest models that have them.
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    [
        "test_efficientnet",
        "test_efficientnet_gn",
        "test_efficientnet_ln",
        "test_convnext",
        "test_vit",
        "tf_mobilenetv3_small_minimal_100",
        "poolformerv2_s12",
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_timm_models_compute_what_they_did(name: str, training: bool) -> None:
    size = 160 if name == "test_vit" else 37  # odd: where "same" padding is not symmetric
    theirs = timm.create_model(name, num_classes=5)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    ours = timm.create_model(name, num_classes=5)
    plain_layers(ours).load_state_dict(theirs.state_dict())
    theirs.train(training), ours.train(training)
    for p in (*theirs.modules(), *ours.modules()):
        if isinstance(p, nn.Dropout) or type(p).__name__ == "DropPath":
            p.eval()
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(ours(images), theirs(images))


def small_convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(16, 32, 1), block(32, None, 1)], num_classes=5)


def small_vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(8, 4, 2, 3, 12, 20, num_classes=5)
    nn.init.normal_(net.get_submodule("heads.head").weight)  # it starts at zero
    return net


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make, inside", [(small_vit, SeparateAttention), (small_convnext, Around)])
def test_torchvision_models_compute_what_they_did(make: Callable[[], nn.Module], inside: type[nn.Module]) -> None:
    net, images = make().eval(), torch.randn(2, 3, 8, 8)
    before = net(images)
    assert before.std() > 1e-3
    torch.testing.assert_close(plain_layers(net)(images), before)
    assert any(isinstance(part, inside) for part in net.modules())


def test_a_module_used_twice_is_replaced_by_one() -> None:
    shared = nn.MultiheadAttention(4, 2)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    plain_layers(net)
    assert isinstance(net["a"], SeparateAttention) and net["a"] is net["b"][0]


def test_one_s_own_layers_and_plain_ones_stay() -> None:
    class LayerNorm2d(nn.LayerNorm):  # a name that packages use, too
        pass

    net = nn.Sequential(LayerNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    before = [type(layer) for layer in net]
    assert [type(layer) for layer in plain_layers(net)] == before


@pytest.mark.parametrize("size, kernel, stride, dilation", [(7, 3, 2, 1), (8, 3, 2, 1), (5, 5, 1, 2), (4, 1, 3, 1)])
def test_same_padding_leaves_the_side_divided_by_the_stride(size: int, kernel: int, stride: int, dilation: int) -> None:
    conv = nn.Conv2d(1, 1, kernel, stride, dilation=dilation)
    padded = PadSame(conv)(torch.ones(1, 1, size, size))
    assert conv(padded).shape[-1] == -(-size // stride)
    assert padded.sum() == size**2 and padded.shape[-1] - size in range(dilation * (kernel - 1) + 1)


def test_separate_attention_is_all_under_curvature() -> None:
    """And so is the packed module, whose out_proj is never called."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    def gathered(net: nn.Module) -> list[str]:
        optimizer = KFAC(net, likelihood=Categorical())
        outputs = net(torch.randn(5, 4, 8))
        optimizer.backward(optimizer.likelihood.nll(outputs, torch.randint(3, (5,))), outputs)  # type: ignore[union-attr]
        optimizer.step()
        return sorted(optimizer.curvature_matrices())

    assert gathered(Net()) == ["attention", "attention.out_proj", "head"]
    assert gathered(plain_layers(Net())) == [*(f"attention.{x}_proj" for x in ("k", "out", "q", "v")), "head"]
