"""Data sets as three loaders each (train, val, test) that serve whole batches on the target device."""

from data.autoencoding import (
    ReconstructionLoader,
    cifar10_autoencoder,
    curves,
    digits_autoencoder,
    faces,
    image_folder_autoencoder,
    mnist_autoencoder,
)
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
    "ReconstructionLoader",
    "cifar10",
    "cifar10_autoencoder",
    "cifar100",
    "curves",
    "digits",
    "digits_autoencoder",
    "faces",
    "fashion_mnist",
    "image_folder",
    "image_folder_autoencoder",
    "mnist",
    "mnist_autoencoder",
]
