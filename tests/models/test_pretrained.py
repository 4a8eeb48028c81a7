"""Pretrained weights: files of every kind round-trip, heads and stems are fitted, the account says what happened."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import re
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from models.weights.files import read_weights
from models.weights.fitting import Loaded, load

DIGITS = {"in_channels": 1, "image_size": 8, "num_classes": 10}
CIFAR = {"in_channels": 3, "image_size": 32, "num_classes": 10}


def build(name: str, facts: dict[str, int], /, **options: Any) -> nn.Module:
    return models.build_model(getattr(models, name), facts, **options)


def loaded(net: nn.Module) -> Loaded:
    account = net.loaded
    assert isinstance(account, Loaded)
    return account


def write(folder: Path, kind: str, weights: dict[str, Tensor]) -> Path:
    """A file of one of the kinds that are read, or a run folder."""
    path = folder / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    elif kind == "state dict":
        torch.save(weights, path)
    elif kind == "other program":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    else:  # as training/checkpoints.py writes it
        path = folder / "checkpoints" / "best.pt"
        path.parent.mkdir()
        torch.save({"format": 1, "model": weights, "optimizer": {"state": {}}, "config_id": "abc"}, path)
    return folder if kind == "run folder" else path


KINDS = ["state dict", "safetensors", "other program", "checkpoint", "run folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_round_trips(kind: str, tmp_path: Path) -> None:
    source = build("timm_model", CIFAR, name="test_efficientnet").eval()
    path = write(tmp_path, kind, source.state_dict())
    net = build("timm_model", CIFAR, name="test_efficientnet", pretrained=str(path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(images), source(images))
    count = len(source.state_dict())
    file = path / "checkpoints" / "best.pt" if path.is_dir() else path
    assert str(loaded(net)) == f"{count} of {count} tensors loaded from {file}"


@pytest.mark.parametrize(
    "name, options, theirs",
    [
        ("timm_model", {"name": "test_convnext"}, lambda: timm.create_model("test_convnext", num_classes=10)),
        ("torchvision_model", {"name": "squeezenet1_1"}, lambda: torchvision.models.squeezenet1_1(num_classes=10)),
        ("torchvision_model", {"name": "mnasnet0_5"}, lambda: torchvision.models.mnasnet0_5(num_classes=10)),
        ("resnet", {"depth": 18, "stem": "imagenet"}, lambda: torchvision.models.resnet18(num_classes=10)),
        ("densenet", {"depth": 121, "stem": "imagenet"}, lambda: torchvision.models.densenet121(num_classes=10)),
        ("mobilenetv3", {"size": "small", "stem": "imagenet"},
         lambda: torchvision.models.mobilenet_v3_small(num_classes=10)),
        ("focalnet", {"patch_size": 4}, lambda: timm.create_model("focalnet_tiny_srf", num_classes=10)),
        ("swin", {"size": "tiny"}, lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", num_classes=10, img_size=32, patch_size=2, window_size=4)),
    ],
)  # fmt: skip
def test_a_file_of_the_package_s_own_model_loads(
    name: str, options: dict[str, Any], theirs: Any, tmp_path: Path
) -> None:
    """Under the names that the weights have there, whatever was replaced by plain layers here."""
    source = theirs().eval()
    path = write(tmp_path, "safetensors", source.state_dict())
    net = build(name, CIFAR, **options, pretrained=str(path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(images), source(images))
    account = loaded(net)
    assert len(account.loaded) == account.total and not account.unused


def test_another_head_stays_fresh_and_a_gray_stem_is_summed_up(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet")
    path = write(tmp_path, "state dict", source.state_dict())
    net = build("timm_model", DIGITS | {"image_size": 32}, name="test_resnet", pretrained=str(path))
    account = loaded(net)
    width = source.get_classifier().in_features
    assert account.replaced == [f"fc.weight [1000, {width}] -> [10, {width}]", "fc.bias [1000] -> [10]"]
    (stem,) = account.adapted
    gray = torch.randn(2, 1, 32, 32)
    name = stem.split(".weight")[0]
    ours, theirs = net.get_submodule(name), source.get_submodule(name)
    torch.testing.assert_close(ours(gray), theirs(gray.expand(-1, 3, -1, -1)))
    line = str(account)
    assert f"{account.total - 2} of {account.total} tensors loaded from {path}; adapted: {stem}" in line
    assert "replaced by fresh ones (other shape): " in line and "[1000] -> [10]" in line


@pytest.mark.usefixtures("float64")
def test_more_input_channels_keep_the_expected_response() -> None:
    source, target = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(6, 4, 3))
    account = load(target, source.state_dict(), "here")
    assert account.adapted == ["0.weight [4, 3, 3, 3] -> [4, 6, 3, 3]"] and account.loaded == ["0.bias"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target(torch.cat([x, x], 1)), source(x))  # twice the image at half the weight
    uneven = nn.Sequential(nn.Conv2d(4, 4, 3))
    load(uneven, source.state_dict(), "here")
    by_hand = torch.stack([source[0].weight[:, c] for c in (0, 1, 2, 0)], 1) * 3 / 4
    torch.testing.assert_close(uneven[0].weight, by_hand)


def test_only_the_first_convolution_is_adapted() -> None:
    def net(middle: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, middle, 1), nn.Conv2d(middle, 4, 1), nn.Linear(4, 2))

    account = load(net(6), net(5).state_dict(), "here")
    assert not account.adapted
    changes = ["0.weight [5, 3, 1, 1] -> [6, 3, 1, 1]", "0.bias [5] -> [6]", "1.weight [4, 5, 1, 1] -> [4, 6, 1, 1]"]
    assert account.replaced == changes
    assert account.loaded == ["1.bias", "2.weight", "2.bias"]


class Positions(nn.Module):
    """Positions of a grid behind class tokens, and a window's table."""

    def __init__(self, side: int, tokens: int, window: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, tokens + side**2, 3))
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, 2))
        self.register_buffer("relative_position_index", torch.zeros(window**2, window**2, dtype=torch.long))
        self.head = nn.Linear(3, 2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("side, window", [(4, 3), (9, 7)])
def test_positions_are_resampled(tokens: int, side: int, window: int) -> None:
    """A plane stays the plane away from the edge; class tokens stay what they are."""
    source, target = Positions(7, tokens, 5), Positions(side, tokens, window)

    def plane(n: int) -> Tensor:
        places = (torch.arange(n) + 0.5) / n  # pixel centres of the unit square
        return torch.stack(torch.meshgrid(places, places, indexing="ij"), -1)

    with torch.no_grad():
        source.pos_embed[0, tokens:, :2] = plane(7).reshape(-1, 2)
        source.relative_position_bias_table.copy_(plane(9).reshape(-1, 2))
    account = load(target, source.state_dict(), "here")
    assert [change.split()[0] for change in account.adapted] == ["pos_embed", "relative_position_bias_table"]
    assert [change.split()[0] for change in account.replaced] == ["relative_position_index"]
    assert torch.equal(target.pos_embed[0, :tokens], source.pos_embed[0, :tokens])
    grid = target.pos_embed[0, tokens:, :2].reshape(side, side, 2).detach()
    inner = slice(side // 3, side - side // 3)
    torch.testing.assert_close(grid[inner, inner], plane(side)[inner, inner], atol=0.03, rtol=0)
    table = target.relative_position_bias_table.reshape(2 * window - 1, 2 * window - 1, 2).detach()
    middle = window - 1
    torch.testing.assert_close(table[middle, middle], plane(9)[4, 4], atol=0.01, rtol=0)


def test_positions_of_no_square_stay_fresh() -> None:
    source, target = nn.Module(), nn.Module()
    for net, count in ((source, 12), (target, 50)):
        net.pos_embed = nn.Parameter(torch.randn(1, count, 3))
        net.head = nn.Linear(3, 2)
    assert load(target, source.state_dict(), "here").replaced == ["pos_embed [1, 12, 3] -> [1, 50, 3]"]


def test_a_vision_transformer_of_another_image_size(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    path = write(tmp_path, "safetensors", source.state_dict())
    net = build("vit", CIFAR | {"image_size": 96}, size="tiny", pretrained=str(path))
    account = loaded(net)
    assert account.adapted == ["pos_embed [1, 197, 192] -> [1, 37, 192]"] and not account.replaced
    own = net.get_parameter("pos_embed")[0, 1:].T.reshape(192, 6, 6)
    theirs = source.pos_embed[0, 1:].T.reshape(1, 192, 14, 14)
    shrunk = F.interpolate(theirs, (6, 6), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(own, shrunk)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, r"pretrained=.*weights.pt: there is no such file; give a checkpoint, a state dict or a run folder"),
        (b"no file of tensors", r"pretrained=.*weights.pt cannot be read: it is damaged, or no file of tensors .*"),
        ({"epoch": 3}, r"pretrained=.*weights.pt holds no state dict \(a mapping from names to tensors\)"),
        ({"other.weight": torch.zeros(3)},
         r"pretrained=.*weights.pt: none of its 1 tensors fits this model by name and shape: choose the model .*"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_use_ends_in_a_sentence(content: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        build("timm_model", CIFAR, name="test_efficientnet", pretrained=str(path))


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "state dict", {"weight": torch.ones(5000)})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = b"oops"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.pt is damaged \(checksum of"):
        read_weights(path)
    other = tmp_path / "weights.safetensors"
    other.write_bytes(b"oops")
    with pytest.raises(ValueError, match=r"weights.safetensors cannot be read: it is damaged, or no safetensors file$"):
        read_weights(other)
    with pytest.raises(ValueError, match=r": no checkpoints/best.pt in this folder; give"):
        read_weights(tmp_path)


def test_without_a_connection_published_weights_end_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the package's own switch
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    # urllib keeps the opener that it made first, proxies included: others get back the one that was there before.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    began = time.monotonic()
    for name, model in (("timm_model", "test_efficientnet"), ("torchvision_model", "squeezenet1_1")):
        with pytest.raises(ValueError, match=r"^pretrained weights cannot be downloaded .* give pretrained=PATH") as e:
            build(name, CIFAR, name=model, pretrained=True)
        assert "cannot be reached: Connection refused" in str(e.value)
    out, err = capfd.readouterr()
    assert out == err == "", "nobody tries six times, and tells of each"
    assert time.monotonic() - began < 20 and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_without_a_connection_what_lies_in_the_hubs_cache_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = timm.create_model("test_efficientnet")
    there = tmp_path / f"models--{source.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (there / "snapshots" / "abc").mkdir(parents=True)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc")
    save_file(source.state_dict(), there / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    net = build("timm_model", CIFAR | {"image_size": 64}, name="test_efficientnet", pretrained=True)
    assert torch.equal(net.get_parameter("conv_stem.weight"), source.conv_stem.weight)


def test_published_weights_are_loaded_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch's cache of downloads, where torchvision finds a file that is there already."""
    source = torchvision.models.squeezenet1_1()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / url.rsplit("/", 1)[1])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    net = build("torchvision_model", DIGITS | {"image_size": 32}, name="squeezenet1_1", pretrained=True)
    account = loaded(net)
    assert account.source == "the published weights"
    assert account.adapted == ["features.0.weight [64, 3, 3, 3] -> [64, 1, 3, 3]"]
    assert [change.split()[0] for change in account.replaced] == ["classifier.1.weight", "classifier.1.bias"]
    assert torch.equal(net.get_parameter("features.3.squeeze.weight"), source.features[3].squeeze.weight)
    assert net.statistics == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), "what its pixels were normalised by"


# ------------------------------------------------------------------------------------------ files of other programs


def small() -> nn.Module:
    """Names of two levels, with buffers."""
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.ModuleDict({"features": features, "fc": nn.Linear(4 * 36, 5)})


def prefixed(weights: dict[str, Tensor], prefix: str, shift: float = 0.0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value + shift for name, value in weights.items()}


def assert_loaded(path: Path, weights: dict[str, Tensor]) -> Loaded:
    """All of a model's tensors come out of the file."""
    model = small()
    account = load(model, read_weights(path)[0], str(path))
    assert len(account.loaded) == len(weights) and not account.fresh
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    return account


PREFIXES = [
    "model.", "backbone.", "module.", "net.", "encoder.", "module.model.", "_orig_mod.", "model._orig_mod.",
    "_orig_mod.module.", "module._orig_mod.model.", "student.backbone.", "network.module.model.net.", "features.",
    "_fsdp_wrapped_module.model.", "classifier.",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["state dict", "safetensors", "checkpoint"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_names_share_is_left_out(kind: str, prefix: str, tmp_path: Path) -> None:
    weights = small().state_dict()
    account = assert_loaded(write(tmp_path, kind, prefixed(weights, prefix)), weights)
    assert not account.unused and account.prefix == re.sub("_orig_mod.|_fsdp_wrapped_module.", "", prefix)


@pytest.mark.parametrize("kind", ["state dict", "safetensors"])
@pytest.mark.parametrize(
    "prefix, others",
    [
        ("model.", lambda weights: {"loss.weight": torch.ones(5), "criterion.pos_weight": torch.ones(5)}),
        ("model.", lambda weights: prefixed(weights, "model_ema.", 1.0)),
        ("net.", lambda weights: prefixed(weights, "ema.", 1.0) | {"ema.decay": torch.tensor(0.9)}),
        ("student.", lambda weights: prefixed(weights, "teacher.", 1.0) | {"loss.center": torch.ones(3)}),
        ("online_model.", lambda weights: prefixed(weights, "ema_model.", 1.0) | {"step": torch.tensor(4)}),
        ("backbone.", lambda weights: {f"neck.{i}.weight": torch.ones(2) for i in range(30)}),
        ("", lambda weights: prefixed(weights, "model_ema.", 1.0) | {"loss.weight": torch.ones(5)}),
        ("", lambda weights: prefixed(weights, "module.", 1.0)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_names_beside_those_of_the_model_are_not_used(
    kind: str, prefix: str, others: Callable[[dict[str, Tensor]], dict[str, Tensor]], first: bool, tmp_path: Path
) -> None:
    weights = small().state_dict()
    parts = [prefixed(weights, prefix), others(weights)]
    both = {name: value for part in (parts if first else parts[::-1]) for name, value in part.items()}
    account = assert_loaded(write(tmp_path, kind, both), weights)
    assert sorted(account.unused) == sorted(parts[1]) and account.prefix == prefix


@pytest.mark.parametrize("name", ["module", "model", "net"])
def test_names_of_the_model_itself_are_no_prefix(name: str, tmp_path: Path) -> None:
    source, target = (nn.ModuleDict({name: small()}) for _ in range(2))
    path = write(tmp_path, "state dict", source.state_dict())
    account = load(target, read_weights(path)[0], "here")
    assert len(account.loaded) == account.total and not account.prefix


def test_a_backbone_without_its_head_and_one_of_replaced_layers(tmp_path: Path) -> None:
    source = timm.create_model("test_vit")
    weights = {f"model.{name}": value for name, value in source.state_dict().items() if not name.startswith("head.")}
    path = write(tmp_path, "state dict", weights)
    net = build("timm_model", CIFAR, name="test_vit", pretrained=str(path))
    assert sorted(loaded(net).fresh) == ["head.bias", "head.weight"] and not loaded(net).unused
    for seed, name in enumerate(("focalnet", "torchvision_model")):  # the layers of these are replaced by plain ones
        theirs = timm.create_model("focalnet_tiny_srf", num_classes=10) if not seed else torchvision.models.vit_b_32(
            num_classes=10, image_size=32)  # fmt: skip
        path = write(tmp_path, "safetensors", {f"net.model.{key}": value for key, value in theirs.state_dict().items()})
        options = {"patch_size": 4} if not seed else {"name": "vit_b_32"}
        account = loaded(build(name, CIFAR, **options, pretrained=str(path)))
        assert len(account.loaded) == account.total and not account.unused


@pytest.mark.parametrize(
    "wrap",
    [
        *({key: 0} for key in ("state_dict", "model", "net", "ema", "module", "params", "network", "model_state")),
        {"mine": 0},
        {"state_dict": {"model": 0}}, {"model": {"state_dict": 0}}, {"ckpt": {"module": {"net": 0}}},
    ],
)  # fmt: skip
def test_wrappers_are_opened(wrap: dict[str, Any], tmp_path: Path) -> None:
    weights = small().state_dict()

    def filled(part: Any) -> Any:
        return {key: filled(inner) for key, inner in part.items()} if isinstance(part, dict) else weights

    torch.save(filled(wrap) | {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": 1.0}}}}, tmp_path / "weights.pt")
    assert_loaded(tmp_path / "weights.pt", weights)


def test_of_several_sets_the_averaged_one_is_not_taken_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights, path = small().state_dict(), tmp_path / "weights.pt"
    torch.save({"ema": prefixed(weights, "", 1.0), "net": weights}, path)
    assert_loaded(path, weights)
    assert f"{path}: the weights are those under 'net'; 'ema' hold some, too" in caplog.text
    torch.save({"first": weights, "second": weights}, path)
    with pytest.raises(ValueError, match=r"holds several sets of tensors \('first', 'second'\): save the state dict"):
        read_weights(path)


RAN: list[str] = []


def ran(text: str) -> str:
    RAN.append(text)
    return text


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ran, ("evil",)


OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "numpy": (lambda: np.float64(1.0), r"numpy\S+scalar"),
    "array": (lambda: np.ones(3), r"numpy\S+_reconstruct"),
    "arguments": (lambda: argparse.Namespace(lr=1), r"argparse\.Namespace"),
    "path": (lambda: PurePosixPath("a"), r"pathlib\.PurePosixPath"),
    "configuration": (lambda: OmegaConf.create({"lr": 1.0}), r"omegaconf\S+"),
    "module": (lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "class": (lambda: Loaded("here", 1), r"models\.weights\.fitting\.Loaded"),
    "call": (Evil, r"tests\.models\.test_pretrained\.ran"),
    "system": (lambda: os.getcwd, r"posix\.getcwd"),
}


@pytest.mark.parametrize("written", ["zip", "old", "protocol 4", "pickle"])
@pytest.mark.parametrize("name", OBJECTS)
def test_other_objects_are_named_told_from_damage_and_not_run(name: str, written: str, tmp_path: Path) -> None:
    make, expected = OBJECTS[name]
    content = {"state_dict": small().state_dict(), "best": make()}
    path = tmp_path / "weights.pt"
    if written == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=written != "old",
                   pickle_protocol=4 if written == "protocol 4" else 2)  # fmt: skip
    with pytest.raises(ValueError, match=rf"weights.pt holds other objects than tensors \(.*{expected}.*torch.save\("):
        read_weights(path)
    assert not RAN


def test_the_advice_for_other_objects_helps(tmp_path: Path) -> None:
    weights = small().state_dict()
    torch.save({"state_dict": weights, "best": np.float64(1.0)}, tmp_path / "old.pt")
    torch.save(torch.load(tmp_path / "old.pt", weights_only=False)["state_dict"], tmp_path / "new.pt")
    assert_loaded(tmp_path / "new.pt", weights)


def archived(kind: str) -> bytes:
    """A file in an archive of some kind."""
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("weights.pth", b"x")
    else:
        with tarfile.open(fileobj=made, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    return made.getvalue()


def scripted() -> bytes:
    made = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), made)
    return made.getvalue()


def saved(content: Any, old: bool = False) -> bytes:
    made = io.BytesIO()
    torch.save(content, made, _use_new_zipfile_serialization=not old)
    return made.getvalue()


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty: download or save it anew"),
    "page": (lambda: b"<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
    "page in capitals": (lambda: b"\n  <HTML><body>sign in</body>", "is a web page, not weights"),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a pointer of Git"),
    "index": (lambda: b'{"weight_map": {}}', "is JSON"),
    "keras": (lambda: b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "is an HDF5 file"),
    "gzip": (lambda: gzip.compress(b"x"), "is compressed with gzip"),
    "zip": (lambda: archived("zip"), r"is a zip archive that torch.save did not write \(it holds weights.pth\)"),
    "tar": (lambda: archived("tar"), "is a tar archive"),
    "script": (scripted, "is a TorchScript archive"),
    "cut": (lambda: saved({"a": torch.ones(999)})[:-300], "is damaged: its end is missing"),
    "cut by half": (lambda: saved({"a": torch.ones(999)})[:2000], "is damaged: its end is missing"),
    "old and cut": (lambda: saved({"a": torch.ones(999)}, old=True)[:-300], "cannot be read: it is damaged, or no"),
    "old and cut early": (lambda: saved({"a": torch.ones(999)}, old=True)[:100], "cannot be read: it is damaged, or"),
    "text": (lambda: b"hello", "cannot be read: it is damaged, or no"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", BAD)
def test_what_is_damaged_or_no_file_of_weights_is_told_apart(name: str, suffix: str, tmp_path: Path) -> None:
    make, sentence = BAD[name]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=f"weights{suffix} {sentence}") as caught:
        read_weights(path)
    assert "other objects" not in str(caught.value)


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    weights = small().state_dict()
    save_file(weights, tmp_path / "safe.pt")
    torch.save(weights, tmp_path / "pickled.safetensors")
    for name in ("safe.pt", "pickled.safetensors"):
        assert_loaded(tmp_path / name, weights)
    content = (tmp_path / "safe.pt").read_bytes()
    (tmp_path / "safe.pt").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"safe.pt cannot be read: it is damaged, or no safetensors file"):
        read_weights(tmp_path / "safe.pt")


def test_where_nothing_fits_both_sides_are_shown() -> None:
    given = {"model.stage.weight": torch.ones(3, 2), "model.stage.bias": torch.ones(3), "model.x": torch.ones(1)}
    sentence = (
        r"^here: none of its 3 tensors fits this model by name and shape: choose the model that the file is of "
        r"\(it has model.stage.weight \[3, 2\], model.stage.bias \[3\] and 1 more; the model has "
        r"features.0.weight \[4, 3, 3, 3\], features.0.bias \[4\] and \d more\)$"
    )
    with pytest.raises(ValueError, match=sentence):
        load(small(), given, "here")


def test_a_few_names_that_fit_by_chance_are_no_reason_to_leave_out_a_prefix() -> None:
    given = {f"stage{i}.{name}": value for i in range(9) for name, value in nn.ModuleDict(
        {"fc": nn.Linear(4 * 36, 5), "other": nn.Linear(3, 3)}).state_dict().items()}  # fmt: skip
    with pytest.raises(ValueError, match="none of its 36 tensors fits this model"):
        load(small(), given, "here")
