"""Data sets as three loaders each (train, val, test) that serve whole batches on the target device."""

import importlib
import sys

if sys.argv[:1] == ["-m"]:  # python -m data.fetch: what is not installed is a sentence
    importlib.import_module("training.missing")  # beside this package, which does not know it otherwise

from data.autoencoding import (
    cifar10_autoencoder,
    curves,
    digits_autoencoder,
    faces,
    image_folder_autoencoder,
    mnist_autoencoder,
    svhn_autoencoder,
)
from data.base import BatchLoader, DataError, DataModule
from data.generation import (
    cifar10_generation,
    digits_generation,
    image_folder_generation,
    mnist_generation,
)
from data.memory import Augmentation, ImageStore, InMemoryLoader
from data.own import wrap
from data.tasks.reproduced import ReconstructionLoader
from data.text import TextLoader, Vocabulary, text_file, wikitext2, wikitext103
from data.vision import (
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    image_folder,
    imagenet,
    mnist,
    svhn,
    tiny_imagenet,
)

__all__ = [
    "Augmentation",
    "BatchLoader",
    "DataError",
    "DataModule",
    "ImageStore",
    "InMemoryLoader",
    "ReconstructionLoader",
    "TextLoader",
    "Vocabulary",
    "cifar10",
    "cifar10_autoencoder",
    "cifar10_generation",
    "cifar100",
    "curves",
    "digits",
    "digits_autoencoder",
    "digits_generation",
    "faces",
    "fashion_mnist",
    "image_folder",
    "image_folder_autoencoder",
    "image_folder_generation",
    "imagenet",
    "mnist",
    "mnist_autoencoder",
    "mnist_generation",
    "svhn",
    "svhn_autoencoder",
    "text_file",
    "tiny_imagenet",
    "wikitext2",
    "wikitext103",
    "wrap",
]
