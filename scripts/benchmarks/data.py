"""Measure the in-memory pipeline: against torchvision's per-image transforms, and as a share of a training step.

    python scripts/benchmarks/data.py

Both pipelines do the same to random CIFAR-size images: crop with padding 4, mirror, to float, normalise. Blocks (an
epoch each) are interleaved, so that a slow spell of the machine hits both, and the figures are medians over blocks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from analysis import records
from data import Augmentation, ImageStore, InMemoryLoader
from models import resnet
from training.show import heart

MEAN, STD, SIZE, CLASSES = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], 32, 10


class PerImage(Dataset[tuple[Tensor, int]]):
    """What torchvision's users write: a chain of transforms, image by image."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIZE, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def in_memory(images: Tensor, targets: Tensor, batch_size: int, cutout: int = 0, device: str = "cpu") -> InMemoryLoader:
    """Our pipeline over the same images."""
    store = ImageStore(images, targets, padding=4, device=device)
    augmentation = Augmentation(crop=4, flip=True, cutout=cutout)
    rows = torch.arange(len(store))
    return InMemoryLoader(
        store, rows, batch_size=batch_size, mean=MEAN, std=STD, training=True, augmentation=augmentation, device=device
    )


def rate(batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Images a second over all the batches."""
    start, count = time.perf_counter(), 0
    for inputs, _ in batches:
        count += len(inputs)
    return count / (time.perf_counter() - start)


def compare(blocks: int, images: Tensor, targets: Tensor, batch_size: int, workers: int) -> dict[str, list[float]]:
    """Images a second in each block, by pipeline."""
    per_image = DataLoader(
        PerImage(images, targets), batch_size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    standard, cutout = (in_memory(images, targets, batch_size, cutout=side) for side in (0, 16))
    rates: dict[str, list[float]] = {f"torchvision, {workers} workers": [], "in memory": [], "in memory, cutout": []}
    for block in range(blocks + 1):  # the first warms up workers, allocator and threads
        # A worker runs ahead within an epoch only, so between epochs the workers are idle and disturb nobody.
        found = rate(iter(per_image)), rate(standard.epoch(block)), rate(cutout.epoch(block))
        if block:
            for name, value in zip(rates, found, strict=True):
                rates[name].append(value)
    return rates


def step_shares(steps: int, images: Tensor, targets: Tensor, batch_size: int, device: str) -> list[float]:
    """Share of each ResNet-18 training step (SGD, float32) that is spent on getting the batch."""
    net = resnet(18, in_channels=3, num_classes=CLASSES, image_size=SIZE).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    batches = in_memory(images, targets, batch_size, device=device).epoch(0)
    shares = []
    for step in range(steps + 2):
        start = _now(device)
        inputs, labels = next(batches)
        ready = _now(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        if step >= 2:
            shares.append((ready - start) / (_now(device) - start))
    return shares


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7, help="blocks (epochs) a pipeline")
    parser.add_argument("--images", type=int, default=6400, help="images a block")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2, help="of torchvision's DataLoader")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the in-memory pipeline; more suffer on a busy machine"
    )
    parser.add_argument("--steps", type=int, default=10, help="ResNet-18 training steps; 0 skips that part")
    parser.add_argument("--step-batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="of the training step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of a record, which docs/results is made of (none)")
    options = parser.parse_args()

    images = torch.randint(0, 256, (options.images, 3, SIZE, SIZE), dtype=torch.uint8)
    targets = torch.randint(0, CLASSES, (options.images,))
    all_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rates = compare(options.blocks, images, targets, options.batch_size, options.workers)
    torch.set_num_threads(all_threads)
    baseline = next(iter(rates.values()))
    print(f"{options.images} images of 3 × {SIZE} × {SIZE}, batch {options.batch_size}, {options.threads} thread(s)")
    print(f"{'pipeline':<26}{'images/s':>12}{'ratio':>9}")
    rows: list[dict[str, object]] = []
    for name, values in rates.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, baseline, strict=True))
        print(f"{name:<26}{statistics.median(values):>12,.0f}{ratio:>8.1f}×")
        rows.append({"pipeline": name, "images/s": statistics.median(values), "ratio": ratio})
    facts = {}
    if options.steps:
        shares = step_shares(options.steps, images, targets, options.step_batch_size, options.device)
        facts["share"] = statistics.median(shares)
        print(f"data share of a ResNet-18 step, batch {options.step_batch_size}: {facts['share']:.2%}")
    if options.json:
        records.write(options.json, rows, **facts)


if __name__ == "__main__":
    with heart.working("input pipelines"):
        main()
