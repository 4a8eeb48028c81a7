"""The only package that touches hooks: what flows through a layer, shown to an observer on the steps that need it.

- ``recorder``: the recorder, which shows what came; ``watcher``: when a forward pass is recorded, and what of it;
- ``operations``: the mode that sees the operations with weights; ``passes``: what they leave;
- ``rows``: whose gradient is whose, by probes; ``look``: what a probe shows of a layer, and the verdict;
- ``hooks``: hooks that die with their owner, and silence for backward passes of our own;
- ``reasons``: why a layer is not shown;
- ``root_inputs``: what the whole model was called with; ``twice_differentiable``: passes differentiated twice.
"""

from .hooks import Hook, aside, quieten, remove_dead_hooks, set_aside
from .reasons import BEHIND, NOT_CALLED, NOT_SEEN, TWICE
from .recorder import Observer, Recorder
from .root_inputs import Call, RootInputs, UnderWay
from .twice_differentiable import TwiceDifferentiable

__all__ = [
    "BEHIND",
    "NOT_CALLED",
    "NOT_SEEN",
    "TWICE",
    "Call",
    "Hook",
    "Observer",
    "Recorder",
    "RootInputs",
    "TwiceDifferentiable",
    "UnderWay",
    "aside",
    "quieten",
    "remove_dead_hooks",
    "set_aside",
]
