"""Concept vectors: single MLP value vectors that spell a concept when they are projected to the vocabulary.

Hong et al. 2025, arXiv 2406.11614; their search code is not public, and their judge was a paid model and people. Here the
concept's words are enough (no projection at all), or every vector is projected and judged by how coherent its best tokens
are. A vector that spells a concept need not be used for it: the functional score asks what the neuron really writes, and
ablating it, next to random neurons of its block and norm, whether the answer depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from excise.encoding import encode_row
from excise.facts import Fact, Facts, Prompt
from excise.keys import consumed, write_matrices
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.scores import Localization
from excise.sites import Site
from excise.trace import _Enough, patched
from localize.concept_search import open_search, signs, unembedding
from localize.concept_validation import validation
from localize.questions import summary
from localize.weight_sums import kept_facts, prompts_of

Search = Literal["words", "functional", "open"]
SEARCHES = ("words", "functional", "open")
# Directions of more numbers than this are left out of the result: they can be read from the model.
MOST_DIRECTIONS = 2**25
# How many coherent vectors the recipe of an open search lists.
LISTED = 20


def concept_direction(unembed: Tensor, tokens: Sequence[int]) -> Tensor:
    """q = the mean unembedding row of the concept's tokens less the mean of all, [d] in float32; U [n_vocab, d]."""
    return unembed[list(tokens)].float().mean(0) - unembed.float().mean(0)


def concept_tokens(model: Model, fact: Fact, words: Sequence[str] = ()) -> list[int]:
    """First tokens of the concept's words, with and without a space before: of `words`, or of the fact's answers.

    Raises ValueError when there is none.
    """
    special = set(model.tokenizer.all_special_ids)
    found: dict[int, None] = {}
    if not words:
        row = encode_row(model.tokenizer, fact.prompt, answer=True)
        found[row.ids[row.start]] = None
    for word in words or (fact.answer, *fact.aliases):
        for text in (f" {word}", word):
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            own = (t for t in ids if t not in special and model.tokenizer.decode([t]).strip())
            found |= dict.fromkeys([t for t in own][:1])
    if not found:
        raise ValueError(f"fact {fact.id}: none of its words has a token of its own")
    return list(found)


def standardised(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores [n_vectors, n] of the matrices of one block, less their mean and over their standard deviation there."""
    rows = torch.cat(list(scores))
    mean, sd = rows.mean(0), rows.std(0).clamp_min(1e-12)
    return [(x - mean) / sd for x in scores]


def hit_surprise(hits: Tensor, words: Sequence[int], k: int, n_vocab: int) -> Tensor:
    """-log10 of the chance that so many [n, n_facts] of a concept's `words` tokens are among k random ones."""
    from scipy.stats import hypergeom

    counts = hits.cpu().numpy()
    chance = hypergeom.sf(counts - 1, n_vocab, np.asarray(words)[None], k)
    return torch.from_numpy(-np.log10(np.clip(chance, 1e-300, 1.0)))


@localizer
def concept_vectors(
    model: Model,
    facts: Sequence[Fact],
    *,
    search: Search = "words",
    words: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    final_norm: bool = False,
    position: str = "after_bos",
    k: int = 50,
    most: int = 0,
    validate: int = 0,
    strength: float = 1.0,
    rivals: int = 20,
    form: str = "statement",
    retained: int = 64,
    seed: int = 0,
    pool: Facts | None = None,
) -> Localization:
    """How much each value vector spells each fact's concept, its answer unless `words` are given; sites are rows of W_out.

    The search words counts standard deviations, within its block, of the vector's projection on the concept's direction
    (either sign where a gate multiplies the neuron). functional: what the neuron writes along that direction at the prompt's tokens, on
    average, less what it writes on facts to keep. open: every vector is projected to the vocabulary, and the score is -log10 of
    the chance of having so many of the concept's tokens among its best; the recipe lists the most coherent vectors.
    search: words, functional or open.
    words: words of one concept, for all facts; each fact's answer and aliases when left out.
    layers: blocks to search, all when left out.
    final_norm: put the final norm's gain into the unembedding (the published projection does not).
    position: tokens of the prompt that functional counts.
    k: best tokens of a vector, for open.
    most: how many vectors of each fact become sites; 0 for all.
    validate: how many vectors of each fact are ablated, next to random ones.
    strength: size of the noise that ablates a vector, relative to its norm; 0 removes it.
    rivals: random neurons of the same block and about the same norm that an ablation is compared with.
    form: which of a fact's prompts functional reads; the direct one where it has none of this form.
    retained: how many facts to keep are read, taken evenly.
    seed: of noise and random neurons.
    pool: where facts to keep come from, those of group retain and neighbour, or any when there are none.

    Raises ExciseError where the MLP's output passes another norm before it joins the residual stream.
    """
    if search not in SEARCHES:
        raise ValueError(f"no search {search!r}; searches are {', '.join(SEARCHES)}")
    blocks = range(model.n_layers) if layers is None else sorted(set(layers))
    matrices = {layer: write_matrices(model, layer) for layer in blocks}
    concepts = [concept_tokens(model, f, words) for f in facts]
    recipe = summary(model, facts, [])
    if search == "open":
        found, listed = _by_projection(model, matrices, concepts, k, seed)
        recipe["coherent"] = [{**asdict(s), "site": str(s.site)} for s in listed[:LISTED]]
    else:
        unembed = unembedding(model, final_norm=final_norm)
        directions = torch.stack([concept_direction(unembed, tokens) for tokens in concepts])
        found = _by_words(model, matrices, directions)
        if search == "functional":
            known = pool if pool is not None else facts
            control = prompts_of(kept_facts(known, facts, retained) or _evenly(known, retained), form)
            found = _by_use(model, matrices, directions, prompts_of(facts, form), control, position)
    result = _localization(model, facts, found, most, recipe)
    if validate:
        others = kept_facts(pool if pool is not None else facts, facts, retained) or list(pool or facts)
        recipe["validation"] = validation(
            model, facts, result, others, each=validate, strength=strength, rivals=rivals, seed=seed
        )
    return result


def _evenly(facts: Sequence[Fact], most: int) -> list[Fact]:
    return [facts[i] for i in np.linspace(0, len(facts) - 1, min(most, len(facts))).round().astype(int)]


def _by_words(model: Model, matrices: dict[int, list[str]], directions: Tensor) -> dict[str, Tensor]:
    """Standardised projections [n_vectors, n_facts] of every matrix; directions [n_facts, d]."""
    found: dict[str, Tensor] = {}
    for names in matrices.values():
        raw = [model.weight(n).detach().float() @ directions.mT.to(model.weight(n).device) for n in names]
        for name, x in zip(names, standardised(raw), strict=True):
            found[name] = (x.abs() if len(signs(model, name)) > 1 else x).cpu()
    return found


def _by_use(
    model: Model,
    matrices: dict[int, list[str]],
    directions: Tensor,
    prompts: Sequence[Prompt],
    control: Sequence[Prompt],
    rule: str,
) -> dict[str, Tensor]:
    """(mean key on the fact's prompt - mean key on control prompts) * (v . q), [n_vectors, n_facts] of every matrix."""
    own = mean_keys(model, prompts, matrices, rule)
    other = mean_keys(model, control, matrices, rule)
    found = {}
    for name in (n for names in matrices.values() for n in names):
        weight = model.weight(name).detach().float()
        along = (weight @ directions.mT.to(weight.device)).cpu()
        usual = other[name].mean(0) if name in other else torch.zeros(len(weight))
        keys = own.get(name, torch.zeros(len(prompts), len(weight)))
        found[name] = (keys - usual).mT * along
    return found


@torch.no_grad()
def mean_keys(model: Model, prompts: Sequence[Prompt], matrices: dict[int, list[str]], rule: str) -> dict[str, Tensor]:
    """Mean key of every write matrix over the tokens of each prompt that a position rule picks, [n_prompts, d_in].

    Only sums are kept. Matrices of experts that no token was sent to are left out.
    """
    sums: dict[str, Tensor] = {}

    def stop(x: Tensor) -> None:
        raise _Enough

    for index, batch in bar(list(model.batches(prompts)), what="concept vectors"):
        where = batch.where(rule)
        owner = torch.tensor(index).repeat_interleave(where.shape[1])
        share = (where / where.sum(1, keepdim=True)).reshape(-1)

        def add(name: str, keys: Tensor, token: Tensor, owner: Tensor = owner, share: Tensor = share) -> None:
            at = token.cpu()
            total = sums.setdefault(name, torch.zeros(len(prompts), keys.shape[-1]))
            total.index_add_(0, owner[at], keys.float().cpu() * share[at, None])

        last = {f"blocks.{max(matrices)}.hook_resid_post": stop}
        with consumed(model, list(matrices), add), patched(model, last):
            try:
                model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
            except _Enough:
                pass
    return sums


def _by_projection(
    model: Model, matrices: dict[int, list[str]], concepts: Sequence[Sequence[int]], k: int, seed: int
) -> tuple[dict[str, Tensor], list[Any]]:
    """-log10 chance of each vector's hits [n_vectors, n_facts], by matrix, and what the open search found."""
    names = [n for own in matrices.values() for n in own]
    n_vocab = model.weight("unembed.W_U").shape[1]
    k = min(k, n_vocab - 1)
    counted = {n: torch.zeros(model.weight(n).shape[0], len(concepts)) for n in names}
    member = torch.zeros(n_vocab, len(concepts))
    for i, tokens in enumerate(concepts):
        member[list(tokens), i] = 1

    def look(name: str, rows: range, ids: Tensor) -> None:
        hits = torch.stack([member[part].sum(0) for part in ids.cpu()])
        block = counted[name][rows.start : rows.stop]
        torch.maximum(block, hits, out=block)

    listed = open_search(model, names, k=k, look=look, seed=seed)
    sizes = [len(tokens) for tokens in concepts]
    return {n: hit_surprise(x, sizes, k, n_vocab) for n, x in counted.items()}, listed


def _localization(
    model: Model, facts: Sequence[Fact], found: dict[str, Tensor], most: int, recipe: dict[str, Any]
) -> Localization:
    sites = [(name, i) for name, x in found.items() for i in range(len(x))]
    table = torch.cat(list(found.values())).mT.double().numpy()
    if most:
        best = np.unique(np.argsort(-table, axis=1, kind="stable")[:, :most])
        sites, table = [sites[i] for i in best], table[:, best]
    directions = None
    if len(sites) * model.names.d_model <= MOST_DIRECTIONS:
        rows: dict[str, list[int]] = {}
        for name, i in sites:
            rows.setdefault(name, []).append(i)
        directions = torch.cat([model.weight(n).detach()[at].float().cpu() for n, at in rows.items()]).numpy()
    placed = tuple(Site(name, None, i) for name, i in sites)
    return Localization(placed, table, tuple(f.id for f in facts), recipe, directions)


__all__ = ["concept_direction", "concept_tokens", "concept_vectors", "mean_keys"]
