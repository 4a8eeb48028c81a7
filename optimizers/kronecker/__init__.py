"""Methods whose blocks are Kronecker products."""

from .kfac import EKFAC, KFAC
from .method import KroneckerMethod
from .svd import KPSVD, Deflation, KFACCorrected, Lanczos

__all__ = ["EKFAC", "KFAC", "KPSVD", "Deflation", "KFACCorrected", "KroneckerMethod", "Lanczos"]
