"""A clamp is a guard and not removal, and the evaluations say so: what it silences is still in the weights and below the hook."""

import functools

import numpy as np
import pytest

import evals
from edit import rocr, sae_clamp
from excise.arms import Arm
from excise.model import load
from excise.scores import Localization
from excise.testbed import facts
from sae.load import load as load_dictionary

# Drawn with a seed that no default was chosen on.
SEED, PEOPLE, LIMIT = 8123, 2, 12
HOOKED = load_dictionary("testbed:dense").layer


@functools.cache
def known():
    return facts("dense", people=PEOPLE, seed=SEED, retain=10, neighbours=5, unknown=0, general=0)


@functools.cache
def arms():
    """The model as it is, under a clamp at block 3, and with an edit written into the weights of block 2."""
    model, shown = load("testbed:dense"), known().shown
    forget, retain = shown.group("forget"), shown.group("retain", "neighbour")
    where = Localization.of([f"blocks.{HOOKED - 1}.hook_resid_post@subject_last"])
    cut = rocr(model, forget, retain, where, candidates=1, contexts=4, names=16, relatives=8, budget=4000)
    clamp = sae_clamp(model, forget, retain, None)
    return {"before": Arm("before", model), "clamp": Arm("clamp", model, clamp), "rocr": Arm("rocr", model, cut)}


def found(evaluation, name, **options):
    """Variant -> values on the facts to forget."""
    every = arms()
    scores = evaluation(every[name], known(), **options)
    by_variant = {}
    for s in scores:
        if s.group == "forget" and s.value is not None:
            by_variant.setdefault(s.variant, []).append(s.value)
    return by_variant


@pytest.mark.slow
def test_what_a_clamp_silences_is_still_there():
    every, asked = arms(), known().group("forget").prompts("statement", "question")
    said = {name: np.mean([a.exact for a in arm.answers(asked)]) for name, arm in every.items()}
    assert said["before"] > 0.95 and said["clamp"] < 0.1 and said["rocr"] < 0.1, said

    # Without the hook everything is back, because no weight has changed.
    back = {name: np.mean(found(evals.hook_removal, name, limit=LIMIT)[""]) for name in every}
    assert back["clamp"] == back["before"] > 0.95 and back["rocr"] < 0.1, back
    before = every["before"]
    (unchanged,) = {s.reason for s in evals.weight_diff(every["clamp"], known(), before=before)}
    assert "no matrix differs" in unchanged
    assert any(s.value for s in evals.weight_diff(every["rocr"], known(), before=before))

    # Below the hook the lens reads what it read before, to the bit; behind it nothing.
    lens = {name: found(evals.lens, name, before=before, limit=LIMIT) for name in every}
    for layer in range(HOOKED):
        assert lens["clamp"][f"log-probability, layer {layer}"] == lens["before"][f"log-probability, layer {layer}"]
    assert (
        np.mean(lens["clamp"][f"top-1, layer {HOOKED}"]) < 0.1 < 0.8 < np.mean(lens["before"][f"top-1, layer {HOOKED}"])
    )
    assert (
        lens["rocr"][f"log-probability, layer {HOOKED - 1}"] != lens["before"][f"log-probability, layer {HOOKED - 1}"]
    )

    # The states below it, carried on by the original blocks, answer; those of the edit's block no longer do.
    below = f"answered, layer {HOOKED - 1}"
    carried = {
        name: np.mean(found(evals.linear_recovery, name, before=before, limit=LIMIT, layers=(HOOKED - 1,))[below])
        for name in ("clamp", "rocr")
    }
    assert carried["clamp"] > 0.9 and carried["rocr"] < 0.1, carried
