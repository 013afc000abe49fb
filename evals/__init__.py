"""Evaluations: `(arm, facts, *, options) -> list of Score`. One method per file."""

from evals.drift import drift
from evals.form_spread import form_spread
from evals.head_projection import head_projection
from evals.lens import lens
from evals.lens_erasure import lens_erasure
from evals.probability import probability
from evals.probe import probe
from evals.recall import recall
from evals.refusal import refusal

__all__ = [
    "drift",
    "form_spread",
    "head_projection",
    "lens",
    "lens_erasure",
    "probability",
    "probe",
    "recall",
    "refusal",
]
