"""Evaluations: `(arm, facts, *, options) -> list of Score`. One method per file."""

from evals.answer_prefix import answer_prefix
from evals.answer_rank import answer_rank
from evals.concept_residual import concept_residual
from evals.coverage import coverage
from evals.direction_reversal import direction_reversal
from evals.drift import drift
from evals.erasure import erasure
from evals.expert_rollback import expert_rollback
from evals.few_shot import few_shot
from evals.fisher_erasure import fisher_erasure
from evals.fluency import fluency
from evals.forced_choice import forced_choice
from evals.form_spread import form_spread
from evals.head_projection import head_projection
from evals.hook_removal import hook_removal
from evals.in_context import in_context
from evals.interpolation import interpolation
from evals.jailbreak import jailbreak
from evals.layer_skip import layer_skip
from evals.lens import lens
from evals.lens_erasure import lens_erasure
from evals.linear_recovery import linear_recovery
from evals.lm_eval import lm_eval
from evals.mapping_attack import mapping_attack
from evals.memorisation import memorisation
from evals.mixed_prompts import mixed_prompts
from evals.multiple_choice import multiple_choice
from evals.noise import noise
from evals.offered_choice import offered_choice
from evals.patching_recovery import patching_recovery
from evals.patchscope import patchscope
from evals.prefilled import prefilled
from evals.privacy import privacy
from evals.probability import probability
from evals.probe import probe
from evals.probe_selectivity import probe_selectivity
from evals.pruning import pruning
from evals.quantisation import quantisation
from evals.recall import recall
from evals.refusal import refusal
from evals.refusal_quality import refusal_quality
from evals.refusal_suppression import refusal_suppression
from evals.relearning import relearning
from evals.relocalized import relocalized
from evals.rephrasing import rephrasing
from evals.reversed_question import reversed_question
from evals.rouge import rouge
from evals.router_shift import router_shift
from evals.sae_residual import sae_residual
from evals.sampling_leak import sampling_leak
from evals.similarity import similarity
from evals.soft_prompt import soft_prompt
from evals.step_by_step import step_by_step
from evals.subtoken import subtoken
from evals.suffix_search import suffix_search
from evals.truth_ratio import truth_ratio
from evals.unlearning_depth import unlearning_depth
from evals.verbatim import verbatim
from evals.weight_anatomy import weight_anatomy
from evals.weight_diff import weight_diff

__all__ = [
    "answer_prefix",
    "answer_rank",
    "concept_residual",
    "coverage",
    "direction_reversal",
    "drift",
    "erasure",
    "expert_rollback",
    "few_shot",
    "fisher_erasure",
    "fluency",
    "forced_choice",
    "form_spread",
    "head_projection",
    "hook_removal",
    "in_context",
    "interpolation",
    "jailbreak",
    "layer_skip",
    "lens",
    "lens_erasure",
    "linear_recovery",
    "lm_eval",
    "mapping_attack",
    "memorisation",
    "mixed_prompts",
    "multiple_choice",
    "noise",
    "offered_choice",
    "patching_recovery",
    "patchscope",
    "prefilled",
    "privacy",
    "probability",
    "probe",
    "probe_selectivity",
    "pruning",
    "quantisation",
    "recall",
    "refusal",
    "refusal_quality",
    "refusal_suppression",
    "relearning",
    "relocalized",
    "rephrasing",
    "reversed_question",
    "rouge",
    "router_shift",
    "sae_residual",
    "sampling_leak",
    "similarity",
    "soft_prompt",
    "step_by_step",
    "subtoken",
    "suffix_search",
    "truth_ratio",
    "unlearning_depth",
    "verbatim",
    "weight_anatomy",
    "weight_diff",
]
