"""Which optimizer for this problem: how a budget of time is divided, and what a verdict's folder holds."""

from analysis.verdict.plan import LOOKS, Division, divide, steps_of
from analysis.verdict.state import State

__all__ = ["LOOKS", "Division", "State", "divide", "steps_of"]
