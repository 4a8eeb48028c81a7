"""What every curvature-aware optimizer shares, from the parts of an update to the verbs of training."""

from .build import build_optimizer, consolidate
from .coverage import Coverage
from .encoding import adopted
from .groups import OfGroups, Params
from .layers import CURVATURE, LONG_AGO
from .model import placed_mask, unwrap
from .optimizer import CurvatureOptimizer
from .options import complete, with_fixed
from .update import descend, descend_scaled, known_rate, limited, rate, real

__all__ = [
    "CURVATURE",
    "LONG_AGO",
    "Coverage",
    "CurvatureOptimizer",
    "OfGroups",
    "Params",
    "adopted",
    "build_optimizer",
    "complete",
    "consolidate",
    "descend",
    "descend_scaled",
    "known_rate",
    "limited",
    "placed_mask",
    "rate",
    "real",
    "unwrap",
    "with_fixed",
]
