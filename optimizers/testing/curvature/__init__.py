"""``check_curvature``: is what an optimizer records of each layer of a model right, for this model, loss and data?

- ``check``: the check; ``case``: the model with its data and loss, run on copies;
- ``comparison``: what was recorded against the gradients of single examples; ``report``: the table of what was found.
"""

from .check import check_curvature
from .report import CurvatureReport, LayerCheck

__all__ = ["CurvatureReport", "LayerCheck", "check_curvature"]
