"""The builders of the embedded and torchvision's sets: splits, facts, downloads and the sentences for users."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchvision import datasets

import data
from data.memory import InMemoryLoader, pixel_statistics
from data.splits import stratified_order as _stratified_order
from data.tasks.labelled import augmentation_of as _augmentation
from data.vision import _published

ROOT = Path(__file__).resolve().parents[2]
BUILDERS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder")
INJECTED = {"seed", "device", "rank", "world_size"}


def rows(loader: data.BatchLoader) -> set[int]:
    assert isinstance(loader, InMemoryLoader)
    assert len(set(loader.rows.tolist())) == len(loader.rows)
    return set(loader.rows.tolist())


def class_shares(loader: data.BatchLoader) -> torch.Tensor:
    assert isinstance(loader, InMemoryLoader)
    counts = loader.store.targets[loader.rows].bincount()
    return counts / counts.sum()


def write_idx(path: Path, array: np.ndarray) -> bytes:
    """A file in the format of MNIST's; returns its bytes."""
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


IDX_FILES = {
    "train-images-idx3-ubyte": (100, 28, 28),
    "train-labels-idx1-ubyte": (100,),
    "t10k-images-idx3-ubyte": (30, 28, 28),
    "t10k-labels-idx1-ubyte": (30,),
}


def idx_arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        name: np.arange(shape[0]) % 10 if len(shape) == 1 else draw.integers(0, 256, shape)
        for name, shape in IDX_FILES.items()
    }


# --------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_bundled_images_in_three_disjoint_stratified_parts() -> None:
    digits = data.digits(augment="none")
    assert digits.facts == {"in_channels": 1, "num_classes": 10, "image_size": 8}
    assert (digits.name, digits.task, digits.class_names) == ("digits", "classification", list("0123456789"))
    parts = [rows(split) for split in (digits.train, digits.val, digits.test)]
    assert set.union(*parts) == set(range(1797)) and sum(map(len, parts)) == 1797
    assert [len(part) for part in parts] == [1294, 144, 359]
    whole = class_shares(digits.train)
    assert all((class_shares(split) - whole).abs().max() < 0.01 for split in (digits.val, digits.test))
    inputs, targets = next(digits.test.epoch(0))
    assert inputs.shape == (359, 1, 8, 8) and targets.shape == (359,)


def test_digits_pixels_keep_their_order_and_span_the_byte_range() -> None:
    from sklearn.datasets import load_digits

    digits = data.digits(augment="none")
    assert isinstance(digits.test, InMemoryLoader)
    inputs, _ = next(digits.test.epoch(0))
    pixels = (inputs - digits.test._shift) / digits.test._scale
    original = torch.from_numpy(load_digits().images)[digits.test.rows]
    torch.testing.assert_close(pixels[:, 0].double() / 255 * 16, original, rtol=0, atol=0.04)


def test_the_train_split_is_normalised_by_itself() -> None:
    digits = data.digits(augment="none", batch_size=1294)
    inputs, _ = next(digits.train.epoch(0))
    assert abs(inputs.mean()) < 1e-5 and abs(inputs.std(correction=0) - 1) < 1e-5


def test_the_run_seed_orders_and_the_split_seed_splits() -> None:
    first, reordered, resplit = data.digits(), data.digits(seed=1), data.digits(split_seed=1)
    assert rows(first.train) == rows(reordered.train) != rows(resplit.train)
    assert rows(first.test) != rows(resplit.test)
    assert not torch.equal(next(first.train.epoch(0))[1], next(reordered.train.epoch(0))[1])


def test_limits_shorten_train_and_validation_but_not_the_test() -> None:
    whole, limited = data.digits(), data.digits(limit_train=0.25, limit_val=0.5)
    assert rows(limited.train) < rows(whole.train) and len(rows(limited.train)) == round(0.25 * 1294)
    assert rows(limited.val) < rows(whole.val) and len(rows(limited.val)) == 72
    assert rows(limited.test) == rows(whole.test)
    assert (class_shares(limited.train) - 0.1).abs().max() < 0.02


def test_a_stratified_order_holds_every_class_in_every_stretch() -> None:
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = _stratified_order(targets, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    for start in range(0, 100, 10):
        counts = targets[order[start : start + 10]].bincount(minlength=3)
        assert (counts - torch.tensor([6, 3, 1])).abs().max() <= 1
    assert not torch.equal(order, _stratified_order(targets, seed=1))


# --------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("size, crop, hole", [(8, 1, 4), (28, 3, 14), (32, 4, 16), (64, 4, 16), (224, 4, 16)])
def test_augmentation_is_the_published_one_scaled_down_below_32_pixels(size: int, crop: int, hole: int) -> None:
    assert _augmentation("none", size, True) == data.Augmentation()
    assert _augmentation("standard", size, True) == data.Augmentation(crop, True, 0)
    assert _augmentation("cutout", size, False) == data.Augmentation(crop, False, hole)


def test_only_what_may_be_mirrored_is_mirrored(tmp_path: Path) -> None:
    for name, array in idx_arrays().items():
        write_idx(tmp_path / "MNIST" / "raw" / name, array)
        write_idx(tmp_path / "FashionMNIST" / "raw" / name, array)
    options = {"batch_size": 10, "augment": "standard"}
    flips = {
        name: getattr(data, name)(**options, **({} if name == "digits" else {"root": str(tmp_path)}))
        for name in ("digits", "mnist", "fashion_mnist")
    }
    found = {name: module.train.augmentation.flip for name, module in flips.items()}
    assert found == {"digits": False, "mnist": False, "fashion_mnist": True}


# ---------------------------------------------------------------------------------------------- torchvision's sets


def test_real_mnist(shared_data: Callable[[str], Path]) -> None:
    root = shared_data("mnist")
    mnist = data.mnist(str(root), augment="none", download=False)
    assert mnist.facts == {"in_channels": 1, "num_classes": 10, "image_size": 28}
    assert [split.num_examples for split in (mnist.train, mnist.val, mnist.test)] == [53_888, 6_000, 10_000]
    assert not rows(mnist.train) & rows(mnist.val)
    raw = datasets.MNIST(str(root), train=False)
    inputs, targets = next(mnist.test.epoch(0))
    assert torch.equal(targets, raw.targets[:512])
    torch.testing.assert_close(inputs[:, 0], (raw.data[:512] / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-5)
    assert isinstance(mnist.train, InMemoryLoader)
    whole = datasets.MNIST(str(root)).data[:, None]
    mean, std = pixel_statistics(whole, torch.arange(60_000))  # the published constants are these
    assert (mean[0], std[0]) == (pytest.approx(0.1307, abs=1e-4), pytest.approx(0.3081, abs=1e-4))


class TinyCIFAR(datasets.CIFAR10):
    """CIFAR-10's format and code with files of our own, written by `write_cifar`."""

    train_list: list = []  # noqa: RUF012
    test_list: list = []  # noqa: RUF012


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Six train batches' worth of random images; returns the test images [N, 3, 32, 32]."""
    folder = root / TinyCIFAR.base_folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)

    def dump(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def images(count: int) -> dict:
        return {"data": draw.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    test = images(20)
    monkeypatch.setattr(TinyCIFAR, "train_list", [dump("data_batch_1", images(100))])
    monkeypatch.setattr(TinyCIFAR, "test_list", [dump("test_batch", test)])
    name, md5 = dump("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(TinyCIFAR, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return test["data"].reshape(-1, 3, 32, 32)


def test_colour_sets_arrive_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_cifar(tmp_path, monkeypatch)
    build = _published("tiny", TinyCIFAR, [0.5] * 3, [0.25] * 3, True, "A set.")
    tiny = build(str(tmp_path), download=False, batch_size=30, val_fraction=0.2)
    assert tiny.facts == {"in_channels": 3, "num_classes": 10, "image_size": 32}
    assert tiny.class_names == [f"class {i}" for i in range(10)]
    assert [split.num_examples for split in (tiny.train, tiny.val, tiny.test)] == [
        60,
        20,
        20,
    ]  # 80 less a partial batch
    inputs, targets = next(tiny.test.epoch(0))
    assert targets.tolist() == [i % 10 for i in range(20)]
    torch.testing.assert_close(inputs, (torch.from_numpy(images) / 255 - 0.5) / 0.25, rtol=0, atol=1e-5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[type, list[str]]]:
    """A set in MNIST's format on a web server of our own, and the list of the files it was asked for."""
    served, asked, resources = tmp_path / "served", [], []
    for name, array in idx_arrays().items():
        packed = gzip.compress(write_idx(served / name, array))
        (served / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args: object) -> None:
            """Stay quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        mirrors = [f"http://127.0.0.1:{http.server_address[1]}/"]
        yield type("Served", (datasets.MNIST,), {"mirrors": mirrors, "resources": resources}), asked
        http.shutdown()


def test_a_missing_set_is_downloaded_once_whoever_else_wants_it(tmp_path: Path, server: tuple[type, list[str]]) -> None:
    source, asked = server
    build = partial(_published("served", source, [0.5], [0.5], False, "A set."), batch_size=10)
    build(str(tmp_path / "one" / "set"))
    alone = sorted(asked)
    assert set(alone) == {f"/{name}.gz" for name in IDX_FILES}
    asked.clear()
    with ThreadPoolExecutor(3) as ranks:
        built = list(ranks.map(lambda _: build(str(tmp_path / "three" / "set")), range(3)))
    assert [module.test.num_examples for module in built] == [30, 30, 30]
    assert sorted(asked) == alone
    build(str(tmp_path / "three" / "set"), download=False)
    assert len(asked) == len(alone)


def one_sentence(error: pytest.ExceptionInfo[data.DataError]) -> str:
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


@pytest.mark.parametrize("download", [True, False])
def test_offline_ends_in_one_sentence_naming_set_folder_and_way_out(tmp_path: Path, download: bool) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        offline = [
            type("OfflineMNIST", (datasets.MNIST,), {"mirrors": [address, address]}),
            type("OfflineCIFAR", (datasets.CIFAR10,), {"url": f"{address}x.tar.gz"}),
        ]
        for source in offline:
            with pytest.raises(data.DataError) as error:
                _published("wanted", source, [0.5], [0.5], False, "A set.")(str(tmp_path), download=download)
            sentence = one_sentence(error)
            assert sentence.startswith(f"wanted is absent from {tmp_path}") and "dataset=digits" in sentence
            assert ("cannot be downloaded" in sentence) == download
            assert ("dataset.download=true" in sentence) != download


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sources.downloads.SILENCE", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz"
        source = type("Silent", (datasets.CIFAR10,), {"url": url})
        with pytest.raises(data.DataError) as error:
            _published("wanted", source, [0.5], [0.5], False, "A set.")(str(tmp_path))
    assert "timed out" in one_sentence(error)
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("download", [True, False])
def test_a_damaged_set_ends_in_a_sentence(tmp_path: Path, download: bool) -> None:
    for name, array in idx_arrays().items():
        content = write_idx(tmp_path / "MNIST" / "raw" / name, array)
        (tmp_path / "MNIST" / "raw" / name).write_bytes(content[:-5])
    with pytest.raises(data.DataError) as error:
        data.mnist(str(tmp_path), download=download)
    assert one_sentence(error).startswith(f"mnist is absent from {tmp_path}, or damaged there")


def test_a_root_that_is_no_folder_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(data.DataError) as error:
        data.cifar10(str(tmp_path / "file"))
    assert one_sentence(error).startswith(f"cifar10 is absent from {tmp_path}/file")


# ------------------------------------------------------------------------------------------------ options and YAML


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("batch_size", 0, "must be at least 1, got 0"),
        ("batch_size", 2000, "must be at most the 1294 examples that are left to train on, got 2000"),
        ("eval_batch_size", -3, "must be at least 1, got -3"),
        ("augment", "mixup", "must be none, standard or cutout, got 'mixup'"),
        ("val_fraction", 0.0, "must be between 0 and 1, both excluded, got 0.0"),
        ("val_fraction", 1.0, "must be between 0 and 1, both excluded, got 1.0"),
        ("split_seed", -1, "must be at least 0, got -1"),
        ("limit_train", 0.0, "must be above 0 and at most 1, got 0.0"),
        ("limit_val", 1.5, "must be above 0 and at most 1, got 1.5"),
        ("limit_train", 1e-4, "must leave at least one of the 1294 examples, got 0.0001"),
        ("limit_val", 1e-3, "must leave at least one of the 144 examples, got 0.001"),
        ("seed", -1, "must be at least 0, got -1"),
    ],
)
def test_values_out_of_range_end_in_a_sentence_that_begins_with_the_option(
    name: str, value: object, sentence: str
) -> None:
    with pytest.raises(ValueError) as error:
        data.digits(**{name: value})
    assert str(error.value).startswith(f"{name} {sentence}")


def test_too_small_a_limit_for_a_batch_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"batch_size must be at most the 13 examples .* raise limit_train"):
        data.digits(limit_train=0.01)


def test_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be divisible by the number of processes, got 9 for 2"):
        data.cifar10(str(tmp_path / "absent"), batch_size=9, world_size=2)
    with pytest.raises(ValueError, match="test_fraction"):
        data.image_folder(str(tmp_path / "absent"), test_fraction=0.0)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_option_stands_in_the_yaml_with_a_comment(name: str) -> None:
    path = ROOT / "configs" / "dataset" / f"{name}.yaml"
    node = OmegaConf.load(path)
    options = set(inspect.signature(getattr(data, name)).parameters) - INJECTED
    assert node.pop("_target_") == f"data.{name}"
    assert set(node) == options
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "_target_"))]
    assert all("  # " in line for line in lines)


def test_the_yaml_of_the_digits_builds_them() -> None:
    options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "dataset" / "digits.yaml"))
    assert isinstance(options, dict) and options.pop("_target_")
    assert data.digits(**options).train.num_examples == 20 * 64


def test_images_are_normalised_as_pretrained_weights_expect_it() -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    found = data.digits(batch_size=8, augment="none")
    own = next(iter(found.val.epoch(0)))[0]
    pixels = (own - found.val._shift) / (255 * found.val._scale)
    found.normalise(mean, std)
    for loader in (found.train, found.test):
        torch.testing.assert_close(loader._scale.flatten(), torch.tensor([1 / (255 * 0.3)]))  # grey: the average
    torch.testing.assert_close(next(iter(found.val.epoch(0)))[0], (pixels - 0.4) / 0.3, rtol=1e-5, atol=1e-5)
