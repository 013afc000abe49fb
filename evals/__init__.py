"""Evaluations: `(arm, facts, *, options) -> list of Score`. One method per file."""

from evals.coverage import coverage
from evals.drift import drift
from evals.erasure import erasure
from evals.fluency import fluency
from evals.forced_choice import forced_choice
from evals.form_spread import form_spread
from evals.head_projection import head_projection
from evals.lens import lens
from evals.lens_erasure import lens_erasure
from evals.linear_recovery import linear_recovery
from evals.memorisation import memorisation
from evals.patching_recovery import patching_recovery
from evals.patchscope import patchscope
from evals.privacy import privacy
from evals.probability import probability
from evals.probe import probe
from evals.recall import recall
from evals.refusal import refusal
from evals.rouge import rouge
from evals.similarity import similarity
from evals.truth_ratio import truth_ratio
from evals.unlearning_depth import unlearning_depth
from evals.weight_anatomy import weight_anatomy

__all__ = [
    "coverage",
    "drift",
    "erasure",
    "fluency",
    "forced_choice",
    "form_spread",
    "head_projection",
    "lens",
    "lens_erasure",
    "linear_recovery",
    "memorisation",
    "patching_recovery",
    "patchscope",
    "privacy",
    "probability",
    "probe",
    "recall",
    "refusal",
    "rouge",
    "similarity",
    "truth_ratio",
    "unlearning_depth",
    "weight_anatomy",
]
