"""Twelve small problems that default values are chosen on, or checked on, and running optimizers on them."""

from scripts.problems.catalogue import CONFIGS, LEARNED, PROBLEMS, SPLIT, UNIGRAM, Problem
from scripts.problems.pieces import _photos, ill_conditioned, slim_resnet18, slim_vit, small_photos

__all__ = [
    "CONFIGS",
    "LEARNED",
    "PROBLEMS",
    "SPLIT",
    "UNIGRAM",
    "Problem",
    "_photos",
    "ill_conditioned",
    "slim_resnet18",
    "slim_vit",
    "small_photos",
]
