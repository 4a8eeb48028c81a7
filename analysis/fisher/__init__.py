"""How good the optimizers' approximations of the Fisher matrix are, against the exact one.

- ``operators``: matrices over a layer's parameters as factors, with norms and products in closed form;
- ``blocks``: a layer's exact block and the errors of what approximates it;
- ``reading``: what an optimizer's state keeps, as operators;
- ``methods``: the optimizers that are compared; ``measure``: all of them on one batch;
- ``profiles``: where in the spectrum an approximation is wrong;
- ``nets``: four nets to begin with; ``results``: rows on disk; ``tables``, ``figures``: what is seen.
"""

from analysis.fisher.blocks import Errors, ExactBlock
from analysis.fisher.figures import directions, errors, profile, training
from analysis.fisher.measure import Problem, Row, angle, measure
from analysis.fisher.methods import METHODS, Method, Settings
from analysis.fisher.nets import NETS, Net, batch, trained
from analysis.fisher.profiles import Binned, Profile, profiles
from analysis.fisher.results import Results, kept
from analysis.fisher.tables import order, summary, to_csv, to_markdown

__all__ = [
    "METHODS",
    "NETS",
    "Binned",
    "Errors",
    "ExactBlock",
    "Method",
    "Net",
    "Problem",
    "Profile",
    "Results",
    "Row",
    "Settings",
    "angle",
    "batch",
    "directions",
    "errors",
    "kept",
    "measure",
    "order",
    "profile",
    "profiles",
    "summary",
    "to_csv",
    "to_markdown",
    "trained",
    "training",
]
