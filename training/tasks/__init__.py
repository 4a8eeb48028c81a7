"""What is learned: one file a task, each of which says what data sets call it.

``task`` is the protocol, ``metrics`` what tasks count with, ``players`` the two optimizers of a game. A new task is a
file here and its line in ``build.TASKS``.
"""

from training.tasks.build import TASKS, build, find
from training.tasks.task import Task, Turn

__all__ = ["TASKS", "Task", "Turn", "build", "find"]
