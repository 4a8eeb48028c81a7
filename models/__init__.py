"""Models: thin factories over plain modules. Nothing here knows optimizers, data sets or Hydra."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

if sys.argv[:1] == ["-m"]:  # python -m models: what is not installed is a sentence
    importlib.import_module("training.missing")  # beside this package, which does not know it otherwise

from torch import nn

from models.convolutional.convnets import cuda_convnet, vgg11
from models.convolutional.densenet import densenet
from models.convolutional.focalnet import focalnet
from models.convolutional.mobilenet import mobilenetv3
from models.convolutional.resnet import cifar_resnet, resnet
from models.generative.autoencoder import autoencoder, conv_autoencoder
from models.generative.gan import GAN, dcgan, resnet_gan
from models.parts.plain import plain_layers
from models.simple.mlp import mlp
from models.simple.toy import deep_linear, toynet
from models.transformers.cct import cct
from models.transformers.gpt import gpt
from models.transformers.vision import swin, vit
from models.weights.files import read_weights
from models.weights.fitting import Loaded, load
from models.wrapped import timm_model, torchvision_model

__all__ = [
    "GAN",
    "Loaded",
    "autoencoder",
    "build_model",
    "cct",
    "cifar_resnet",
    "conv_autoencoder",
    "cuda_convnet",
    "dcgan",
    "deep_linear",
    "densenet",
    "focalnet",
    "gpt",
    "load",
    "mlp",
    "mobilenetv3",
    "plain_layers",
    "read_weights",
    "require_facts",
    "resnet",
    "resnet_gan",
    "swin",
    "timm_model",
    "torchvision_model",
    "toynet",
    "vgg11",
    "vit",
]


def build_model(factory: Callable[..., nn.Module], facts: Mapping[str, Any], **options: Any) -> nn.Module:
    """Call a model factory with its options and with whatever facts of the data set its signature names.

    Args:
        factory: any callable that returns a module; the parameters it names (``num_classes``, ``in_channels``, ...)
            are looked up in the facts, of whatever kind they are, with a default or without.
        facts: of the data set, such as ``{"in_channels": 3, "num_classes": 10, "image_size": 32}``.
        options: the factory's other arguments; they win over a fact of the same name.

    Raises:
        ValueError: the factory requires something that is neither an option nor a fact.
    """
    require_facts(factory, facts, options)
    named = _named(factory)
    options |= {p.name: facts[p.name] for p in named if p.name in facts and p.name not in options}
    ordered = itertools.takewhile(lambda p: p.name in options, (p for p in named if p.kind is p.POSITIONAL_ONLY))
    return factory(*[options.pop(p.name) for p in ordered], **options)


def require_facts(factory: Callable[..., nn.Module], facts: Collection[str], options: Collection[str]) -> None:
    """See to it that a model factory gets all that it requires.

    Args:
        factory: any callable that returns a module.
        facts: names of those of the data set.
        options: names of its other arguments.

    Raises:
        ValueError: it requires something that is neither.
    """
    wanted = [p for p in _named(factory) if p.name not in options]
    missing = next((p for p in wanted if p.default is p.empty and p.name not in facts), None)
    if missing:
        name = getattr(factory, "__name__", str(factory))
        given = "" if missing.kind is missing.KEYWORD_ONLY else f", or give model.{missing.name}=..."
        has = ", ".join(facts) or "no facts"
        raise ValueError(
            f"{name} needs {missing.name}, which this data set does not have (it has {has}): choose another model or "
            f"another data set{given}"
        )


def _named(factory: Callable[..., nn.Module]) -> list[inspect.Parameter]:
    every = inspect.signature(factory).parameters.values()
    return [p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
