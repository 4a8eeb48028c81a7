"""AdaHessian: Adam with a Hutchinson estimate of the Hessian's diagonal."""

from .hutchinson import block_expand, block_mean, hutchinson, rademacher
from .optimizer import AdaHessian

__all__ = ["AdaHessian", "block_expand", "block_mean", "hutchinson", "rademacher"]
