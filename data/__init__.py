"""Data sets as three loaders each (train, val, test) that serve whole batches on the target device."""

from data.base import BatchLoader, DataError, DataModule
from data.memory import Augmentation, ImageStore, InMemoryLoader
from data.vision import cifar10, cifar100, digits, fashion_mnist, image_folder, mnist

__all__ = [
    "Augmentation",
    "BatchLoader",
    "DataError",
    "DataModule",
    "ImageStore",
    "InMemoryLoader",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "image_folder",
    "mnist",
]
