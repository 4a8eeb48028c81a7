"""Where the events of a run go: JSON lines, TensorBoard, the terminal, a log in words, what peers have. Rank 0 only.

Those that need a package of their own, ``training.loggers.wandb.WandB`` and the like, are imported where they are asked
for.
"""

from training.loggers.console import Console, epoch_line
from training.loggers.jsonlines import JSONLines
from training.loggers.tensorboard import TensorBoard
from training.loggers.words import log_file
from training.runs.run import Logger

__all__ = ["Console", "JSONLines", "Logger", "TensorBoard", "epoch_line", "log_file"]
