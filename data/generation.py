"""Images to be imitated: any labelled set served with pixels in [-1, 1], which is what a generator's tanh yields.

The sets, their splits and their files are those of classification. The labels are served too, and not learned from.
"""

from __future__ import annotations

from collections.abc import Callable

from data.base import DataModule
from data.options import served
from data.readers import Folder, Published, read_digits
from data.tasks.imitated import Imitating, imitated_set


@served(without=("augment", "test_fraction"), batch_size=64, eval_batch_size=500)
def digits_generation(*, loading: Imitating) -> DataModule:
    """scikit-learn's bundled handwritten digits, to be imitated: 1797 grey 8 × 8 images; nothing to download.

    Args:
        loading: how it is split and served.

    Raises:
        ValueError: for an option out of its range.
    """
    return imitated_set("digits_generation", read_digits(), loading)


@served(without=("augment", "flip"), frechet="cifar10", batch_size=64, eval_batch_size=500)
def image_folder_generation(*, folder: Folder, loading: Imitating) -> DataModule:
    """Any images, to be imitated: folders as of ``image_folder``.

    Args:
        folder: the images.
        loading: how they are split and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: for a folder without such a layout, an unreadable image, or a set too large for memory.
    """
    return imitated_set("image_folder_generation", folder.read(), loading)


def _published(name: str, source: str, features: str, summary: str) -> Callable[..., DataModule]:
    """A builder for one of torchvision's sets."""

    def build(*, place: Published, loading: Imitating) -> DataModule:
        return imitated_set(f"{name}_generation", place.read(name, source, flip=False), loading)

    build.__name__ = build.__qualname__ = f"{name}_generation"
    build.__doc__ = f"""{summary}

    Args:
        place: where it lies.
        loading: how it is split and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: the set is not there and cannot be fetched.
    """
    return served(without=("augment", "test_fraction"), frechet=features, batch_size=64, eval_batch_size=500)(build)


mnist_generation = _published(
    "mnist", "MNIST", "mnist", "MNIST, to be imitated: 60,000 + 10,000 grey 28 × 28 images of handwritten digits."
)
cifar10_generation = _published(
    "cifar10", "CIFAR10", "cifar10", "CIFAR-10, to be imitated: 50,000 + 10,000 colour 32 × 32 photographs."
)
