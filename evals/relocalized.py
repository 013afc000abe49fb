"""Localization after the edit: does the subject's state still carry the answer, and in the same blocks as before?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from evals.sampling import direct, measurable, nothing
from evals.shares import SMALLEST
from excise.arms import Arm
from excise.corruption import Case, Prepared, batches, prepare, runs_of
from excise.facts import Fact
from excise.grid import BATCH_TOKENS, restoration_grid
from excise.model import Model
from excise.registry import evaluation
from excise.restore import Grid, Plan, Runs, loop_grid
from excise.scores import Score


@evaluation("intrinsic")
def relocalized(
    arm: Arm, facts: Sequence[Fact], *, before: Arm, draws: int = 4, limit: int = 24, seed: int = 0
) -> list[Score]:
    """Causal tracing repeated on the arm: what restoring the subject's last state brings back, compared with `before`.

    The subject is swapped for another (noise where none has as many tokens), the state after block i at its last token is
    restored, and the answer's log-probability is taken, since the arm may answer nothing any more (ROME, arXiv 2202.05262,
    section 2.1). Variants: "effect, layer i" in nats; "flattening", the mean effect over the middle half of the blocks as
    a share of that of `before` (1 unchanged, 0 flat); "rank correlation" of the two layer profiles; "peak moved", 1 where
    the block of the largest effect is another; "peak", that block.
    draws: draws of noise per fact.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more, and of the counterparts.
    """
    items, unasked = measurable(before.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else "no facts to forget", group="forget")
    if arm.model.tokenizer_fingerprint != before.model.tokenizer_fingerprint:
        return [i.score(None, variant="flattening", reason="the two models have different vocabularies") for i in items]
    pool, _ = measurable(
        before.model, direct(facts, groups=("forget", "retain", "neighbour"), limit=4 * limit, seed=seed)
    )
    with before.running() as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(model, [i.fact for i in items], seed=seed, pool=[i.fact for i in pool])
    then = _profiles(before, prepared, draws, seed)
    now = then if arm is before else _profiles(arm, prepared, draws, seed)
    skipped = {s["fact"]: s["reason"] for s in prepared.skipped}
    scores = [item.score(None, variant="flattening", reason=why) for item, why in unasked]
    for item in items:
        if item.fact.id in then:
            found = compared(then[item.fact.id], now[item.fact.id])
            scores += [item.score(float(x), variant=f"effect, layer {i}") for i, x in enumerate(now[item.fact.id])]
            for variant, value in found.items():
                why = "" if value is not None else "restoring it brought nothing back before"
                scores.append(item.score(value, variant=variant, reason=why))
        else:
            scores.append(item.score(None, variant="flattening", reason=skipped.get(item.fact.id, "it was not traced")))
    return scores


def compared(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """What became of a layer profile of effects [n_layers]; None where there is nothing to compare with."""
    from scipy.stats import spearmanr

    n = len(before)
    middle = slice(n // 4, max(n // 4 + 1, n - n // 4))
    whole = float(before[middle].mean())
    depth = min(len(before), len(after))
    varied = depth > 2 and np.ptp(before[:depth]) > 0 and np.ptp(after[:depth]) > 0
    same = np.array_equal(before, after)
    rank = 1.0 if same else float(spearmanr(before[:depth], after[:depth]).statistic) if varied else None
    return {
        "flattening": float(after[middle].mean()) / whole if whole > SMALLEST else None,
        "rank correlation": rank if whole > SMALLEST else None,
        "peak moved": float(np.argmax(before) != np.argmax(after)) if whole > SMALLEST else None,
        "peak": float(np.argmax(after)),
    }


def _profiles(arm: Arm, prepared: Prepared, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Effect in nats of restoring the residual stream at the subject's last token after each block, by fact; kept."""
    key = ("profiles", prepared.cases, draws, seed)
    if key not in arm.kept:
        # What stands in the weights can be traced block by block; hooks must see whole forward passes.
        entered = arm.held() if arm.mode == "weight" else arm.running()
        found: dict[str, np.ndarray] = {}
        with entered as inside:
            model = inside.model if isinstance(inside, Arm) else arm.model
            for batch in batches(prepared.cases, draws=draws, tokens=BATCH_TOKENS["cpu"]):
                runs = runs_of(model, batch, noise_std=prepared.noise_std, draws=draws, seed=seed)
                found |= _of_batch(batch, _grid(arm, model, runs, batch))
        arm.kept[key] = found
    kept: dict[str, np.ndarray] = arm.kept[key]
    return kept


def _grid(arm: Arm, model: Model, runs: Runs, batch: Sequence[Case]) -> Grid:
    plan = Plan(("resid",), positions=sorted({c.subject[1] - 1 for c in batch}))
    engine = loop_grid if arm.mode == "hook" else restoration_grid
    return engine(model, runs, plan, metrics=("logprob",))


def _of_batch(batch: Sequence[Case], grid: Grid) -> dict[str, np.ndarray]:
    values, low = grid.values["logprob"]["resid"], grid.low["logprob"]
    return {c.fact_id: values[i, :, c.subject[1] - 1] - low[i] for i, c in enumerate(batch)}
