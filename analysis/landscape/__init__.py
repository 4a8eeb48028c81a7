"""Loss surfaces around a model, and the ways of optimizers over them.

A `Surface` comes of `around`, random directions from a model's weights, or of `under`, the plane that is nearest to the
snapshots of several runs (`callbacks=trajectory`). `plot` and `to_page` draw it, and `to_record` keeps it for later.
"""

from analysis.landscape.directions import random_direction
from analysis.landscape.figures import plot
from analysis.landscape.losses import Examples, Ground
from analysis.landscape.page import to_page
from analysis.landscape.plane import Plane, Projection
from analysis.landscape.recording import from_record, to_record
from analysis.landscape.surface import Surface, Track, around, to_csv, tracks_csv, under
from analysis.landscape.survey import survey
from analysis.landscape.ways import Principal, Way, principal_plane

__all__ = [
    "Examples",
    "Ground",
    "Plane",
    "Principal",
    "Projection",
    "Surface",
    "Track",
    "Way",
    "around",
    "from_record",
    "plot",
    "principal_plane",
    "random_direction",
    "survey",
    "to_csv",
    "to_page",
    "to_record",
    "tracks_csv",
    "under",
]
