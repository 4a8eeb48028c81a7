"""One adapter a layer type: what flows through the layer, brought to one shape, and its parameters, to one matrix.

- ``layer``: what an adapter does, and the layers whose curvature is a diagonal; ``affine``: those ``y_t = W a_t + b``;
- ``linear``, ``conv``, ``conv_transpose``, ``norm``, ``embedding``: the layers of torch, a file each;
- ``registry``: which adapter a module has;
- ``flow``: what one backward pass leaves of a layer.

A further layer type is a class that derives from ``AffineLayer`` or ``ElementwiseLayer``, in a file of its own, here or
anywhere else, and registers itself::

    @adapts(MyModule)
    class MyLayer(AffineLayer): ...
"""

from .affine import AffineLayer
from .conv import ConvLayer
from .conv_transpose import ConvTransposeLayer
from .embedding import EmbeddingLayer
from .flow import Flow
from .layer import ElementwiseLayer, ImageRows, Layer
from .linear import LinearLayer, TransposedLinearLayer
from .norm import NormLayer
from .registry import COMPUTED, OPERATIONS, adapt, adapts, layer_kinds

__all__ = [
    "COMPUTED",
    "OPERATIONS",
    "AffineLayer",
    "ConvLayer",
    "ConvTransposeLayer",
    "ElementwiseLayer",
    "EmbeddingLayer",
    "Flow",
    "ImageRows",
    "Layer",
    "LinearLayer",
    "NormLayer",
    "TransposedLinearLayer",
    "adapt",
    "adapts",
    "layer_kinds",
]
