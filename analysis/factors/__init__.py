"""Kronecker factors of a model's layers: what they are over training, and what their approximations lose.

- ``observing``: ``observe`` takes the factors of a model on a batch from the optimizers' own engine;
- ``matrices``: spectra, conditions, dominance, Gershgorin's discs, Fourier fields; ``noise``: the AdaFisher study's
  perturbation; ``kept``: what AdaFisher keeps; ``fit``: how near a Fisher block is to its Kronecker product;
- ``study``: all of these over training; ``seen``: what pictures show of a factor; ``figures`` and ``fields``: pictures;
  ``saving``: files; ``recording``: a study as a record, and back.
"""

from analysis.factors.figures import runs
from analysis.factors.fit import Fit
from analysis.factors.kept import Kept
from analysis.factors.noise import Perturbation
from analysis.factors.observing import LABELS, LayerFactors, Observation, View, chosen, halves, observe, taken
from analysis.factors.recording import from_record, to_record
from analysis.factors.saving import COLUMNS, SHORT, cell, pictures, save, save_figure, table, to_json, to_markdown
from analysis.factors.study import MEANINGS, Plan, Point, Spectra, Study, measure, perturbations, spread

__all__ = [
    "COLUMNS", "LABELS", "MEANINGS", "SHORT", "Fit", "Kept", "LayerFactors", "Observation", "Perturbation", "Plan",
    "Point", "Spectra", "Study", "View", "cell", "chosen", "from_record", "halves", "measure", "observe",
    "perturbations", "pictures", "runs", "save", "save_figure", "spread", "table", "taken", "to_json", "to_markdown",
    "to_record",
]  # fmt: skip
