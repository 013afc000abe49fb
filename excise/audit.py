"""The audit: which evaluations are asked for, and what their outcome is called, in words and as plain values."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from excise.errors import ExciseError
from excise.fates import Fate, counted, fates
from excise.registry import Family, Method, methods
from excise.scores import Results
from excise.verdict import verdict

FAMILIES: tuple[str, ...] = get_args(Family)
# What `excise eval` measures when nothing is named: cheap first, and of each family what `benchmarks/metric_meta.py`
# found to tell models that know from models that never learned.
DEFAULT = (
    *("recall", "probability", "form_spread", "truth_ratio", "memorisation", "erasure", "drift", "refusal", "fluency"),
    *("few_shot", "jailbreak", "rephrasing", "prefilled", "step_by_step", "answer_prefix", "offered_choice"),
    *("sampling_leak", "refusal_suppression", "reversed_question", "hook_removal", "quantisation", "pruning"),
    *("layer_skip", "weight_diff", "relearning"),
    *("lens", "lens_erasure", "head_projection", "probe", "unlearning_depth", "linear_recovery", "patching_recovery"),
    "weight_anatomy",
)
# Fates that a terminal lists one by one; the rest is counted.
MOST = 20
UNTOLD = ("removed", "kept", "no longer stated", "not known before")


def chosen(wanted: Sequence[str] = ()) -> list[Method]:
    """The evaluations of the given names and families ("all": every one); the default audit when none is given.

    Those that need other arms than there are do no harm: they say so in place of a value.
    """
    known = methods("evaluation")
    names: list[str] = []
    for word in wanted or DEFAULT:
        word = word.replace("-", "_")
        if word in known:
            names.append(word)
        elif word in FAMILIES or word == "all":
            names += [n for n in _in_order(known) if word in (known[n].family, "all")]
        else:
            near = difflib.get_close_matches(word, [*known, *FAMILIES], n=3) or [*FAMILIES]
            raise ExciseError(f"no evaluation or family {word!r}; did you mean {', '.join(near)}?")
    return [known[n] for n in dict.fromkeys(names)]


def _in_order(known: Mapping[str, Method]) -> list[str]:
    """Families in their order, the default audit's evaluations first in each."""
    return sorted(known, key=lambda n: (FAMILIES.index(known[n].family), n not in DEFAULT, n))


def need_oracle(chosen: Sequence[Method]) -> list[str]:
    """Those of the evaluations that look at a model that never learned the facts."""
    return [m.name for m in chosen if "oracle" in inspect.signature(m.function).parameters]


def outcome(results: Results, recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Verdict and fates as plain values, with what was left out and the seconds that each evaluation took."""
    said, found = verdict(results, recipe), fates(results, recipe)
    return {
        "verdict": said.headline,
        "state": said.state,
        "findings": [{"question": f.question, "state": f.state, "text": f.text} for f in said.findings],
        "fates": [
            {"fact": f.fact, "group": f.group, "fate": f.word, "by": list(f.by), "evidence": f.evidence} for f in found
        ],
        "left_out": results.recipe.get("left_out", {}),
        "seconds": results.recipe.get("seconds", {}),
    }


def told(results: Results, recipe: Mapping[str, Any] | None = None) -> str:
    """The same for a terminal: the headline, each finding, how many facts met which fate, and the worst one by one."""
    said, found = verdict(results, recipe), fates(results, recipe)
    lines = [said.headline, ""]
    lines += [f"  {f.question} {f.text}" for f in said.findings]
    lines += ["", counted(found)] if found else []
    lines += _listed([f for f in found if f.word not in UNTOLD])
    lines += [f"Left out: {name} ({reason})." for name, reason in results.recipe.get("left_out", {}).items()]
    return "\n".join(lines)


def _listed(found: Sequence[Fate]) -> list[str]:
    more = [f"  and {len(found) - MOST} more"] if len(found) > MOST else []
    return [f"  {f}" for f in found[:MOST]] + more
