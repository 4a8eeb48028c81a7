"""The vision zoo: published sizes, images of every kind, every optimizer, and sentences for what cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from models.wrapped import create_timm, finish, patch_side, widen
from optimizers import KFAC, AdaFisher, AdaHessian, Categorical

IMAGENET = {"in_channels": 3, "image_size": 224, "num_classes": 1000}
CIFAR = {"in_channels": 3, "image_size": 32, "num_classes": 10}
DIGITS = {"in_channels": 1, "image_size": 8, "num_classes": 10}


def build(name: str, facts: dict[str, int], /, **options: Any) -> nn.Module:
    return models.build_model(getattr(models, name), facts, **options)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    "name, options, count",
    [
        # torchvision publishes these with its weights
        ("densenet", {"depth": 121}, 7_978_856), ("densenet", {"depth": 161}, 28_681_000),
        ("densenet", {"depth": 169}, 14_149_480), ("densenet", {"depth": 201}, 20_013_928),
        ("mobilenetv3", {"size": "large"}, 5_483_032), ("mobilenetv3", {"size": "small"}, 2_542_856),
        ("torchvision_model", {"name": "vit_b_16"}, 86_567_656),
        ("torchvision_model", {"name": "resnet18"}, 11_689_512), ("torchvision_model", {"name": "vgg16"}, 138_357_544),
        ("torchvision_model", {"name": "swin_t"}, 28_288_354),
        ("torchvision_model", {"name": "convnext_tiny"}, 28_589_128),
        ("torchvision_model", {"name": "wide_resnet50_2"}, 68_883_240),
        ("torchvision_model", {"name": "efficientnet_b0"}, 5_288_548),
        ("timm_model", {"name": "resnet18"}, 11_689_512), ("timm_model", {"name": "efficientnet_b0"}, 5_288_548),
        ("timm_model", {"name": "convnext_tiny"}, 28_589_128),
        # Table 1 of DeiT: 5M, 22M, 86M; of Swin: 29M, 50M, 88M, 197M; of FocalNet: 28.4M and 28.6M, 49.9M, 88.1M;
        # timm counts the same
        ("vit", {"size": "tiny"}, 5_717_416), ("vit", {"size": "small"}, 22_050_664),
        ("vit", {"size": "base"}, 86_567_656),
        ("swin", {"size": "tiny"}, 28_288_354), ("swin", {"size": "small"}, 49_606_258),
        ("swin", {"size": "base"}, 87_768_224), ("swin", {"size": "large"}, 196_532_476),
        ("focalnet", {"size": "tiny"}, 28_427_116), ("focalnet", {"size": "tiny", "field": "lrf"}, 28_647_928),
        ("focalnet", {"size": "small"}, 49_891_216), ("focalnet", {"size": "base"}, 88_148_144),
    ],
)  # fmt: skip
def test_parameter_counts_on_imagenet_are_the_published_ones(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        net = build(name, IMAGENET, **options)
    assert parameters(net) == count


# He et al. (2016), table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M; by hand: 432 + 32 in front, per stage of 2n layers
# 9 w_in w_out + 2 w_out weights each, 64 * 10 + 10 behind.
@pytest.mark.parametrize("depth, count", [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)])
def test_cifar_resnets_have_the_parameters_of_the_paper(depth: int, count: float) -> None:
    net = build("cifar_resnet", CIFAR, depth=depth)
    blocks = (depth - 2) // 6
    layers = [(16, 16)] * 2 * blocks + [(16, 32)] + [(32, 32)] * (2 * blocks - 1) + [(32, 64)]
    layers += [(64, 64)] * (2 * blocks - 1)
    by_hand = 3 * 16 * 9 + 2 * 16 + sum(9 * a * b + 2 * b for a, b in layers) + 64 * 10 + 10
    assert parameters(net) == by_hand == pytest.approx(count, rel=0.02)
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in net.modules()) == depth
    assert net.get_submodule("layer1")(torch.zeros(1, 16, 32, 32)).shape == (1, 16, 32, 32)
    assert net[:-3](torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)  # type: ignore[index]


def test_the_padded_shortcut_takes_every_second_pixel_and_adds_nothing() -> None:
    x = torch.randn(2, 3, 5, 5)
    short = models.resnet.__globals__["PaddedShortcut"](4)(x)
    assert short.shape == (2, 7, 3, 3) and not short[:, [0, 1, 5, 6]].any()
    assert torch.equal(short[:, 2:5], x[:, :, ::2, ::2])


def test_cct_7_3x1_has_the_published_parameter_count() -> None:
    # Table 2 of Hassani et al.: 3.76M. A block: 2 norms, 4 projections (3 without bias), 2 layers of the MLP.
    block = 2 * 512 + 4 * 256**2 + 256 + 2 * 256 * 512 + 512 + 256
    rest = 27 * 256 + 256 * 256 + 512 + 257 + 2570  # convolution, positions, norm, pooling, head
    assert parameters(build("cct", CIFAR)) == 7 * block + rest == 3_760_139
    # CCT-14/7x2 on ImageNet: 22.36M, with tokens of 384 and 6 heads
    with torch.device("meta"):
        large = build("cct", IMAGENET, layers=14, heads=6, width=384, mlp_ratio=3.0, convolutions=2, kernel_size=7)
    assert parameters(large) == pytest.approx(22.36e6, rel=0.002)


@pytest.mark.usefixtures("float64")
def test_cct_pools_its_tokens_with_learned_weights() -> None:
    net = build("cct", DIGITS, layers=2, width=8, heads=2).eval()
    encoder = net.get_submodule("encoder")
    image = torch.randn(1, 8, 4, 4)
    tokens = torch.stack([image[0, :, i, j] for i in range(4) for j in range(4)])
    tokens = encoder.norm(encoder.blocks((tokens + encoder.positions[0])[None])[0])  # type: ignore[operator]
    scores = torch.stack([encoder.pool.weight[0] @ t + encoder.pool.bias[0] for t in tokens]).exp()  # type: ignore
    pooled = sum(s / scores.sum() * t for s, t in zip(scores, tokens, strict=True))
    torch.testing.assert_close(encoder(image)[0], pooled)


# ------------------------------------------------------------------------------------------ what packages compute


@pytest.mark.parametrize(
    "name, options, size, theirs",
    [
        ("resnet", {"depth": 18, "stem": "imagenet"}, 32, lambda: torchvision.models.resnet18(num_classes=7)),
        ("resnet", {"depth": 50, "stem": "imagenet"}, 32, lambda: torchvision.models.resnet50(num_classes=7)),
        ("densenet", {"depth": 121, "stem": "imagenet"}, 32, lambda: torchvision.models.densenet121(num_classes=7)),
        ("mobilenetv3", {"size": "small", "stem": "imagenet"}, 32,
         lambda: torchvision.models.mobilenet_v3_small(num_classes=7)),
        ("mobilenetv3", {"size": "large", "stem": "imagenet"}, 32,
         lambda: torchvision.models.mobilenet_v3_large(num_classes=7)),
        ("torchvision_model", {"name": "swin_t"}, 32, lambda: torchvision.models.swin_t(num_classes=7)),
        ("torchvision_model", {"name": "convnext_tiny"}, 32, lambda: torchvision.models.convnext_tiny(num_classes=7)),
        ("timm_model", {"name": "convnext_atto"}, 32, lambda: timm.create_model("convnext_atto", num_classes=7)),
        ("timm_model", {"name": "resnet18"}, 32, lambda: timm.create_model("resnet18", num_classes=7)),
        ("vit", {"size": "tiny", "patch_size": 16}, 32,
         lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32)),
        ("swin", {"size": "tiny", "patch_size": 4, "window_size": 7}, 32,
         lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, img_size=32)),
        ("focalnet", {"patch_size": 4}, 32, lambda: timm.create_model("focalnet_tiny_srf", num_classes=7)),
    ],
)  # fmt: skip
def test_logits_are_the_package_s_with_the_same_weights(
    name: str, options: dict[str, Any], size: int, theirs: Any
) -> None:
    ours, original = build(name, CIFAR | {"num_classes": 7, "image_size": size}, **options), theirs()
    ours.load_state_dict(original.state_dict())
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), original.eval()(images))


# ------------------------------------------------------------------------------------------------ images and stems

SMALL: dict[str, dict[str, Any]] = {
    "cifar_resnet": {"depth": 8},
    "densenet": {"depth": 121},
    "mobilenetv3": {"size": "small"},
    "vit": {"size": "tiny"},
    "swin": {"size": "tiny"},
    "focalnet": {},
    "cct": {"layers": 2},
    "timm_model": {"name": "test_efficientnet"},
    "torchvision_model": {"name": "squeezenet1_1"},
}


@pytest.mark.parametrize("in_channels, size", [(1, 28), (2, 8), (4, 96)])
@pytest.mark.parametrize("name", SMALL)
def test_images_of_every_kind_become_one_logit_a_class(name: str, in_channels: int, size: int) -> None:
    if name == "torchvision_model" and size == 8:
        pytest.skip("SqueezeNet's poolings leave nothing of 8 pixels")
    with torch.device("meta"):
        net = build(name, {"in_channels": in_channels, "image_size": size, "num_classes": 7}, **SMALL[name])
        assert net(torch.randn(2, in_channels, size, size)).shape == (2, 7)
    assert net.training


@pytest.mark.parametrize(
    "name, conv, small, large",
    [
        ("densenet", "features.conv0", (3, 1, 1), (7, 2, 3)),
        ("mobilenetv3", "features.0.0", (3, 1, 1), (3, 2, 1)),
    ],
)
@pytest.mark.parametrize(
    "stem, size, is_small", [("auto", 64, True), ("auto", 96, False), ("cifar", 96, True), ("imagenet", 64, False)]
)
def test_the_stem_suits_the_image_size(
    name: str, conv: str, small: Any, large: Any, stem: str, size: int, is_small: bool
) -> None:
    with torch.device("meta"):
        net = build(name, CIFAR | {"image_size": size}, stem=stem, **SMALL[name])
    first = net.get_submodule(conv)
    assert isinstance(first, nn.Conv2d)
    assert (first.kernel_size[0], first.stride[0], first.padding[0]) == (small if is_small else large)
    if name == "densenet":
        assert isinstance(net.get_submodule("features.pool0"), nn.Identity if is_small else nn.MaxPool2d)


def test_patches_suit_the_image_size() -> None:
    assert [patch_side(None, size, 16, 8) for size in (8, 28, 32, 48, 64, 224)] == [1, 2, 4, 6, 8, 16]
    assert [patch_side(None, size, 4, 16) for size in (8, 28, 32, 64, 224)] == [1, 1, 2, 4, 4]
    assert patch_side(7, 28, 16, 8) == 7
    for given, size in ((5, 32), (0, 32), (None, 100)):
        with pytest.raises(ValueError, match=r"^patch_size must be a divisor of the image's side"):
            patch_side(given, size, 16, 8)


def test_the_fresh_stem_starts_at_he_s_values() -> None:
    first = build("densenet", CIFAR | {"in_channels": 4}, depth=121).get_submodule("features.conv0")
    assert first.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)


# ------------------------------------------------------------------------------------------------- every optimizer


def coverage(net: nn.Module) -> float:
    optimizer = KFAC(net, likelihood=Categorical())
    optimizer.close()
    return optimizer.coverage().fraction


@pytest.mark.parametrize(
    "name, options, least",
    [
        ("cifar_resnet", {"depth": 20}, 1.0), ("densenet", {"depth": 121}, 1.0), ("mobilenetv3", {}, 1.0),
        ("vit", {"size": "tiny"}, 0.99), ("swin", {"size": "tiny"}, 0.99), ("focalnet", {}, 1.0),
        ("cct", {}, 0.98),  # 256 learned positions of 256 numbers are 1.7 % of so small a model
        ("cct", {"positions": False}, 1.0),
        ("timm_model", {"name": "efficientnet_b0"}, 1.0),
        ("torchvision_model", {"name": "vit_b_32"}, 0.99),
        ("torchvision_model", {"name": "convnext_tiny"}, 0.99),
    ],
)  # fmt: skip
def test_all_but_positions_tokens_and_scales_is_under_curvature(
    name: str, options: dict[str, Any], least: float
) -> None:
    with torch.device("meta"):
        assert coverage(build(name, CIFAR, **options)) >= least


OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "adafisher": lambda net: AdaFisher(net),
    "kfac": lambda net: KFAC(net, batch_fraction=0.5, max_factor_dim=512, likelihood=Categorical()),
    "adahessian": lambda net: AdaHessian(net),
}


def small(name: str, in_channels: int, image_size: int) -> nn.Module:
    """The layers of a family in a small net."""
    if name == "swin":
        options = {"img_size": image_size, "patch_size": 2, "window_size": 4, "embed_dim": 24, "num_heads": (2, 4)}
        net = create_timm("swin_tiny_patch4_window7_224", in_channels, 10, depths=(2, 1), drop_path_rate=0.2, **options)
    elif name == "focalnet":
        net = timm.models.focalnet.FocalNet(in_channels, 10, embed_dim=16, depths=(2, 1), drop_path_rate=0.2)
    elif name == "densenet":
        net = torchvision.models.DenseNet(8, (2, 2), 16, bn_size=2, drop_rate=0.1, num_classes=10)
        widen(net, in_channels)
    elif name == "vit":
        options = {"embed_dim": 24, "depth": 2, "num_heads": 3, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}
        net = create_timm("vit_tiny_patch16_224", in_channels, 10, img_size=image_size, patch_size=4, **options)
    elif name == "vit of torchvision":
        net = torchvision.models.VisionTransformer(image_size, 4, 2, 3, 24, 40, dropout=0.1, num_classes=10)
        widen(net, in_channels)
    elif name == "cct":
        facts = {"in_channels": in_channels, "image_size": image_size, "num_classes": 10}
        return build("cct", facts, layers=2, width=24, heads=3)
    elif name == "resnet":
        return build("cifar_resnet", {"in_channels": in_channels, "num_classes": 10}, depth=8)
    elif name == "mobilenetv3":
        net = torchvision.models.mobilenet_v3_small(num_classes=10, width_mult=0.25)
        widen(net, in_channels)
    else:
        net = create_timm(name, in_channels, 10)
    return finish(net, name, in_channels, image_size, 10, False, dict)


@pytest.mark.parametrize(
    "name",
    [
        "resnet", "densenet", "mobilenetv3", "vit", "vit of torchvision", "swin", "focalnet", "cct",
        "test_efficientnet", "test_efficientnet_ln", "test_convnext",
    ],
)  # fmt: skip
def test_every_optimizer_takes_two_steps(name: str) -> None:
    """In-place layers, fused attention, batch norms, dropped paths, depthwise convolutions, squeezed channels."""
    size = 32 if name.startswith("test") else 16
    net = small(name, 1, size)
    images, classes = torch.randn(6, 1, size, size), torch.randint(10, (6,))
    for kind, make in OPTIMIZERS.items():
        optimizer = make(net)
        before = [p.detach().clone() for p in net.parameters()]
        for _ in range(2):
            optimizer.zero_grad()
            outputs = net(images)
            loss = F.cross_entropy(outputs, classes)
            optimizer.backward(loss, outputs) if kind != "sgd" else loss.backward()
            optimizer.step()
        still = sum(bool(p.equal(old)) for p, old in zip(net.parameters(), before, strict=True))
        assert still <= 0.1 * len(before), kind  # what lies behind a dropped path, or before a head that starts at zero
        assert all(bool(p.isfinite().all()) for p in net.parameters()), kind
        if kind in ("adafisher", "kfac"):
            assert not [layer for layer, block in optimizer.blocks.items() if not block.factors], kind
            optimizer.close()


def goes_around(name: str) -> nn.Module:
    """A net that multiplies by the weights of its attention's layers instead of calling them."""
    if name == "swin_t":
        return build("torchvision_model", CIFAR, name="swin_t")
    options = {"embed_dim": 24, "num_heads": 3, "img_size": 32}
    if name == "swinv2_tiny_window8_256":
        options |= {"depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "patch_size": 2}
    else:
        options |= {"depth": 2, "patch_size": 8}
    net = create_timm(name, 3, 10, **options)
    return finish(net, name, 3, 32, 10, False, dict)


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_a_name_that_timm_has_given_up_still_builds() -> None:
    with torch.device("meta"):
        net = build("timm_model", {"in_channels": 3, "image_size": 299, "num_classes": 10}, name="adv_inception_v3")
    assert net.get_classifier().out_features == 10


@pytest.mark.parametrize("name", ["swin_t", "swinv2_tiny_window8_256", "beit_base_patch16_224"])
def test_layers_that_are_gone_around_have_curvature_and_move(name: str) -> None:
    net = goes_around(name)
    images, classes = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    called = {layer.weight for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    hooks = [
        layer.register_forward_hook(lambda layer, *_: called.discard(layer.weight))
        for layer in net.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    net(images)
    for hook in hooks:
        hook.remove()
    silent = {layer for layer, module in net.named_modules() if getattr(module, "weight", None) in called}
    assert silent
    for make in (lambda: AdaFisher(net), lambda: KFAC(net, max_factor_dim=8, likelihood=Categorical())):
        optimizer = make()
        before = {layer: net.get_parameter(f"{layer}.weight").detach().clone() for layer in silent}
        for _ in range(2):  # Swin-v2's branches start at zero: nothing flows back through them in the first step
            optimizer.zero_grad()
            outputs = net(images)
            optimizer.backward(F.cross_entropy(outputs, classes), outputs)
            optimizer.step()
        found = {row[0] for row in optimizer.coverage().rows if not row[1].startswith("fallback")}
        assert silent <= found
        assert not [layer for layer in silent if net.get_parameter(f"{layer}.weight").equal(before[layer])]
        optimizer.close()


# ------------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("cifar_resnet", {"depth": 18}, r"depth must be 6n \+ 2 \(20, 32, 44, 56, ...\), got 18"),
        ("cifar_resnet", {"depth": 20, "width": 0}, "width must be at least 1, got 0"),
        ("densenet", {"depth": 100}, "depth must be one of 121, 161, 169 and 201, got 100"),
        ("densenet", {"depth": 121, "stem": "small"}, "stem must be auto, cifar or imagenet, got 'small'"),
        ("densenet", {"depth": 121, "dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        ("mobilenetv3", {"size": "huge"}, "size must be small or large, got 'huge'"),
        ("vit", {"size": "huge"}, "size must be tiny, small or base, got 'huge'"),
        ("vit", {"size": "tiny", "drop_path": -1}, "drop_path must be at least 0 and below 1, got -1"),
        ("swin", {"size": "huge"}, "size must be one of tiny, small, base, large, got 'huge'"),
        ("swin", {"size": "tiny", "window_size": 0}, "window_size must be at least 1, got 0"),
        ("focalnet", {"field": "mrf"}, "field must be srf or lrf, got 'mrf'"),
        ("cct", {"width": 10, "heads": 4}, r"width must be a multiple of heads \(4\), got 10"),
        ("cct", {"kernel_size": 4}, "kernel_size must be 1, 3, 5 or 7, got 4"),
        ("cct", {"layers": 0}, "layers must be at least 1, got 0"),
        ("timm_model", {"name": "resnte18"}, r"name 'resnte18' is no model of timm \(did you mean 'resnet18'\?\)"),
        ("timm_model", {"name": "resnet18.nothing"}, "name resnet18.nothing cannot be built .*choose another model"),
        ("timm_model", {"name": "vgg11", "drop_path": 0.1}, "drop_path is no option of vgg11: leave it at null"),
        ("timm_model", {"name": "vgg11", "dropout": 1.5}, "dropout must be at least 0 and below 1, got 1.5"),
        ("timm_model", {"name": "vit_tiny_patch16_224"}, "name vit_tiny_patch16_224 .*choose another model.*"),
        ("torchvision_model", {"name": "vit_b"},
         r"name 'vit_b' is no model of torchvision \(did you mean 'vit_[bhl]_\d\d'\?\)"),
        ("torchvision_model", {"name": "vit_b_16"}, "name vit_b_16 cannot be built .*choose another model"),
        ("torchvision_model", {"name": "alexnet"}, "name alexnet takes no images of 1 × 8 × 8 .*another image size"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_ends_in_a_sentence(name: str, options: dict[str, Any], sentence: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=f"^{sentence}$"):
        build(name, DIGITS, **options)
