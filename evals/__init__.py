"""Evaluations: `(arm, facts, *, options) -> list of Score`. One method per file."""

from evals.drift import drift
from evals.form_spread import form_spread
from evals.lens import lens
from evals.probability import probability
from evals.probe import probe
from evals.recall import recall
from evals.refusal import refusal

__all__ = ["drift", "form_spread", "lens", "probability", "probe", "recall", "refusal"]
