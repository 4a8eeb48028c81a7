"""What training with an optimizer will hold and take, found out before it begins.

A step is taken with a copy of the model whose tensors have shapes and no data (``rehearsal``): the optimizer's own code
says what it keeps and which operations it asks torch for, whatever its options. Each operation is priced by calling it
on this machine (``prices``), and the passes through the model by timing one (``forecast``).
"""

from .forecast import Forecast, forecast
from .memory import held, total
from .operations import Operation, Recording
from .prices import Prices
from .rehearsal import Rehearsal, interval, looked, rehearse, round_of

__all__ = [
    "Forecast",
    "Operation",
    "Prices",
    "Recording",
    "Rehearsal",
    "forecast",
    "held",
    "interval",
    "looked",
    "rehearse",
    "round_of",
    "total",
]
