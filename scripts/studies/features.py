"""Train the small classifiers whose features compare real and generated images (models/features/).

    python scripts/studies/features.py mnist --root PATH      # in torchvision's layout
    python scripts/studies/features.py cifar10 --root PATH    # a folder a class, or train/ and test/ with these

Adam with half a cosine of its rate, batches of 128, without augmentation but for mirrored photographs. Prints the
accuracy on the test images, and writes the weights, nothing else.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from data import BatchLoader, DataError, image_folder_generation, mnist_generation
from models.features import FOLDER, SHAPES, FeatureNet
from training.show import heart

EVERY_IMAGE = 10**9  # no limit of an evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SHAPES), help="which classifier")
    parser.add_argument("--root", required=True, help="folder of its images")
    parser.add_argument("--epochs", type=int, default=None, help="passes over the images; unless given 5 and 12")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the weights")
    options = parser.parse_args(argv)
    try:
        print(train(options.name, options.root, options.epochs or (5 if options.name == "mnist" else 12), options.out))
    except (DataError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def train(name: str, root: str, epochs: int, out: Path) -> str:
    """Train one classifier and write its weights.

    Args:
        name: mnist or cifar10.
        root: folder of its images.
        epochs: passes over them.
        out: folder for the weights.

    Returns:
        A line with what it reached.
    """
    began = time.perf_counter()
    torch.manual_seed(0)
    if name == "mnist":
        sets = mnist_generation(root, download=False, batch_size=128, eval_images=EVERY_IMAGE)
    else:
        sets = image_folder_generation(root, batch_size=128, eval_images=EVERY_IMAGE)
    net = FeatureNet(*SHAPES[name])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=1e-5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(sets.train))
    for epoch in range(epochs):
        for images, labels in sets.train.epoch(epoch):
            if name == "cifar10":
                images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(-1))
            optimizer.zero_grad()
            cross_entropy(net.classify(images), labels).backward()
            optimizer.step()
            scheduler.step()
    net.eval()
    right = accuracy(net, sets.test)
    path = out / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    size, seconds = path.stat().st_size / 1e3, time.perf_counter() - began
    parameters = sum(p.numel() for p in net.parameters())
    return f"{path}: {parameters} parameters, {size:.0f} kB, test accuracy {100 * right:.2f} %, {seconds:.0f} s"


@torch.no_grad()
def accuracy(net: FeatureNet, loader: BatchLoader) -> float:
    """Share of the images of a set that a classifier names right."""
    hits = [net.classify(images).argmax(1) == labels for images, labels in loader.epoch(0)]
    found: Tensor = torch.cat(hits).double().mean()
    return float(found)


if __name__ == "__main__":
    with heart.working("features"):
        sys.exit(main())
