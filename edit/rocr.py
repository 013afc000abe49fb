"""ROCR: rank-one concept redirection. Whatever is asked about a name, the model reads another entity instead.

The early MLPs turn the last token of a name into what later layers read about it. The key at that token is given a new
value, so that the residual stream becomes that of a name the model has never heard of (or of a neutral entity, or of
the centroid of a class). No training; only names are used, a fact's answer only where a reversed prompt names it.

Method: Ye, Zhang, Wu, "LLM Unlearning Should Be Form-Independent", arXiv 2506.07795. Beyond it: paired contexts, one
column per name and context, all names in one solve, protected name-sharers, scale-free ridge, fictitious names as
target, block by measured effect, copies at further blocks, experts as one linear map, books read backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from excise.cutting import Cuts
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts
from excise.keys import read_keys, write_matrices
from excise.ledger import Ledger, Request
from excise.mentions import mentions
from excise.model import Model
from excise.redirection import candidate_blocks, edit_effect, name_prompts, patch_effect, redirect
from excise.registry import editor
from excise.requests import groups, ordinary_text
from excise.scores import Localization
from excise.solve import Covariance

# Blocks whose best possible edit comes within this share of the best one's are tried out, ...
WORTH_TRYING = 0.1
# ... and those whose real edit does are equally good at forgetting.
AS_GOOD = 0.02
# Blocks within this share of the best one can carry a copy.
WORTH_COPYING = 0.25
# Prompts that are asked to compare blocks.
ASKED = 128
# Wordings in which made-up names are read; what stands before a name changes its key little.
WORDINGS = 2


@editor
def rocr(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    target: str = "fictitious",
    layers: int = 1,
    copies: int = 1,
    candidates: int = 4,
    contexts: int = 8,
    names: int = 32,
    mode: Literal["ridge", "hard"] = "ridge",
    ridge: float = 0.3,
    protect: int = 256,
    relatives: int = 24,
    guard: float = 1.0,
    texts: Sequence[str] | None = None,
    budget: int = 20_000,
    seed: int = 0,
    ledger: str | None = None,
) -> Edit:
    """An edit after which every name in `forget` reads as a name the model does not know.

    target: "fictitious" (centroid of made-up names), "centroid" (centroid of the retain names), or a subject's name.
    layers: how many consecutive blocks share the change.
    copies: how many of the compared blocks carry the whole change each. With 2, whoever skips one block, or undoes its
        change, meets the other; but each copy takes some people nobody listed along. With a ledger, always one.
    candidates: how many blocks from `where` (without it, from the first half of the model) are compared by patching.
    contexts: wordings in which each name is read.
    names: how many names make the centroid.
    mode: "ridge" or "hard", see excise.solve.solve_edit.
    ridge: relative ridge of the key system; larger writes less of what only some wordings ask for, and disturbs less.
    protect: how many names that share a word with a forget name are held fixed: as many of the retain facts, and as many
        that `texts` speaks of.
    relatives: made-up name-sharers per word of each forget name that the covariance is told of, for people nobody listed.
    guard: weight of made-up names, and again of retain names, against ordinary text in the covariance.
    texts: ordinary text for the covariance; None uses the retain facts.
    budget: tokens of ordinary text to read.
    seed: draws the fictitious names.
    ledger: a file that keeps the keys of every name; the edit then carries out all names in it jointly, and later calls
        add theirs, at the block and under the covariance of the first. `excise withdraw` takes names out again.

    Raises ExciseError when there is nothing to forget, no name to redirect to, no site at the subject's last token in
    `where`, or when the block's MLP cannot write to the residual stream directly.
    """
    facts, kept = groups(forget, retain)
    told, others = mentions(facts, limit=contexts), mentions(kept, limit=contexts)
    redirection = redirect(told, others, target=target, names=names, seed=seed)
    blocks = [b for b in candidate_blocks(model, where, candidates) if b >= layers - 1] or [layers - 1]
    for block in blocks:
        write_matrices(model, block)  # fails before the long part
    strangers = name_prompts(told, others, each=relatives, wordings=WORDINGS, seed=seed + 1)
    text = ordinary_text(texts, kept)
    cuts = Cuts(model, redirection, others, text, strangers, layers, protect, guard, budget, mode, ridge)
    book = _opened(model, ledger, layers) if ledger else None
    edit, compared = (Edit(()), []) if book else _best(cuts, facts, blocks)
    if not ledger:
        edit = _copied(cuts, edit, compared, copies - 1)
    else:
        book = book or _blank(cuts, edit)
        book = book.add(*_requests(cuts, book))
        book.save(ledger)
        edit = book.edit()
    recipe = {
        "model": model.name,
        "subjects": facts.subjects,
        "blocks compared": compared,
        **edit.recipe,
        "columns": len(told),
        "protected": len(cuts.guarded),
    }
    return replace(edit, recipe=recipe)


def _best(cuts: Cuts, facts: Facts, blocks: Sequence[int]) -> tuple[Edit, list[dict[str, float]]]:
    """The edit that ends at the best block: of those whose edits silence the answers, the one least entangled with others.

    A block is tried out, not only patched: how much of the target state its keys let through is part of the effect.
    """
    if len(blocks) == 1:
        return cuts.edit(blocks[0]), []
    names = {m.name for m in cuts.redirection.mentions}
    asked = [p for p in facts.prompts(held_out=False) if p.subject in names and p.form != "choice"]
    asked = asked[:: max(1, len(asked) // ASKED)]
    compared: list[dict[str, float]] = [
        {"block": block, "patched": patch_effect(cuts.model, cuts.redirection, asked, block)} for block in blocks
    ]
    tried: list[tuple[dict[str, float], Edit]] = []
    for row in _near_best(compared, "patched", WORTH_TRYING):
        block = int(row["block"])
        row["entanglement"] = cuts.entanglement(block)
        tried.append((row, cuts.edit(block)))
        row["effect"] = edit_effect(cuts.model, tried[-1][1], asked)
    good = _near_best([row for row, _ in tried], "effect", AS_GOOD)
    best = min(good, key=lambda row: row["entanglement"])
    return next(edit for row, edit in tried if row is best), compared


def _copied(cuts: Cuts, edit: Edit, compared: Sequence[dict[str, float]], more: int) -> Edit:
    """The edit with the same change once more at the next best blocks, the least entangled first, each as if it were alone.

    Where the first change is met, what later blocks read is the target already, which their own columns leave alone.
    """
    good = _near_best(compared, "patched", WORTH_COPYING) if compared else []
    for row in sorted(good, key=lambda row: ("effect" not in row, row.get("entanglement", -row["patched"]))):
        taken, last = [int(r["block"]) for r in edit.recipe["solution"]], int(row["block"])
        if more > 0 and not any(last - cuts.layers < block <= last for block in taken):
            copy = cuts.edit(last)
            solution = [*edit.recipe["solution"], *copy.recipe["solution"]]
            prints = {**edit.fingerprints, **copy.fingerprints}
            edit, more = Edit(edit.changes + copy.changes, {"solution": solution}, prints), more - 1
    return edit


def _near_best(rows: Sequence[dict[str, float]], key: str, share: float) -> list[dict[str, float]]:
    best = max(row[key] for row in rows)
    return [row for row in rows if row[key] >= best - share * abs(best)]


def _opened(model: Model, path: str, layers: int) -> Ledger | None:
    """The ledger at `path`, checked against the model; None when there is no file yet."""
    if layers != 1:
        raise ExciseError("a ledger keeps the keys of one block: use layers=1")
    if any(model.active.values()):
        raise ExciseError("requests are read on the unedited model: leave applied() first")
    if not Path(path).exists():
        return None
    book = Ledger.load(path)
    book.check(model)
    return book


def _blank(cuts: Cuts, first: Edit) -> Ledger:
    """A ledger without requests, for the block that the first edit was made at."""
    block = int(first.recipe["solution"][0]["block"])
    metrics = {name: metric for name, metric in cuts.metrics(block).items() if isinstance(metric, Covariance)}
    model = cuts.model
    prints = {"tokenizer": model.tokenizer_fingerprint} | {n: model.matrix_fingerprint(n) for n in metrics}
    return Ledger(metrics, prints, {"model": model.name, "block": block}, cuts.mode, cuts.ridge)


def _requests(cuts: Cuts, book: Ledger) -> list[Request]:
    """One request per name: its keys at the ledger's block, what they are to gain, and the name-sharers to hold."""
    model, block, told = cuts.model, int(book.recipe["block"]), cuts.redirection.mentions
    point = f"blocks.{block}.hook_resid_post"
    keys, states = read_keys(model, cuts.redirection.prompts, [block], points=[point])
    gap = cuts.redirection.targets(model, point) - states[point]
    mine = {name: [i for i, m in enumerate(told) if m.name == name] for name in dict.fromkeys(m.name for m in told)}
    guarded = {name: cuts.near([told[i] for i in rows]) for name, rows in mine.items()}
    walls = list(dict.fromkeys(m.prompt for found in guarded.values() for m in found))
    at = {prompt: i for i, prompt in enumerate(walls)}
    held = read_keys(model, walls, [block])[0][block] if walls else {}
    found = []
    for name, rows in mine.items():
        kept = [at[m.prompt] for m in guarded[name]]
        found.append(
            Request(
                name,
                {n: k[rows] for n, k in keys[block].items() if n in book.metrics and bool(k[rows].any())},
                gap[rows],
                {n: k[kept] for n, k in held.items() if n in book.metrics} if kept else {},
                tuple(m.prompt.text for m in guarded[name]),
            )
        )
    return found
