"""Names that configurations, checkpoints and code agree on. Importing them costs nothing."""

from __future__ import annotations

#: The key under which a group's file names a callable.
TARGET = "_target_"
#: The two players of a game: in its model, in configurations and in checkpoints.
PLAYERS = ("generator", "critic")
#: An optimizer's option that leaves a run what it is: who of several processes does what.
SHARING = "assign"
#: Groups of what goes around an optimizer, from the innermost on, and what stands for nothing.
AROUND = {"step_length": "optimizers.step_length.own", "averaging": "optimizers.averaging.none"}
#: Keys that a resumed run cannot change: their state lies in a checkpoint, or they go with what does.
RESTORED = (
    "seed", "model", "optimizer", *PLAYERS, *AROUND, "scheduler", "schedules", "init_from", "finetune",
)  # fmt: skip
