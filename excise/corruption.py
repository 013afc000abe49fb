"""Prompts made ready for tracing: answer and foil as tokens, and a counterpart or noise that breaks the subject."""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from excise.encoding import Row, encode_row
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.restore import Runs

Corruption = Literal["swap", "noise"]


@dataclass(frozen=True)
class Case:
    """One fact, ready to be traced.

    ids: tokens of the prompt, up to where the answer starts. subject: token span. answer, foil: first tokens.
    corrupt: the same prompt about somebody else; None when noise breaks the subject instead.
    """

    fact_id: str
    ids: tuple[int, ...]
    subject: tuple[int, int]
    answer: int
    foil: int
    has_bos: bool
    corrupt: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Prepared:
    """Cases to trace; skipped: {"fact", "reason"} of the others; noise_std: of the noise, 0 where none is."""

    cases: tuple[Case, ...]
    skipped: tuple[dict[str, str], ...]
    noise_std: float

    @property
    def corruptions(self) -> dict[str, int]:
        """Cases per kind of corruption."""
        swapped = sum(c.corrupt is not None for c in self.cases)
        return {name: n for name, n in (("swap", swapped), ("noise", len(self.cases) - swapped)) if n}


def prepare(
    model: Model,
    facts: Sequence[Fact],
    *,
    corruption: Corruption = "swap",
    form: str = "statement",
    noise: float = 3.0,
    known_only: bool = True,
    seed: int = 0,
    pool: Sequence[Fact] | None = None,
) -> Prepared:
    """Cases for `facts`, in order; counterparts and the scale of the noise come from `pool` (default: the facts).

    known_only: skip facts whose answer's first token is not what the model would say.
    """
    others = sorted(facts if pool is None else pool, key=lambda f: f.id)
    skipped: list[dict[str, str]] = []
    found: list[tuple[Fact, Prompt, Row]] = []
    for fact in facts:
        prompt = next(iter(fact.ask(form)), fact.prompt)
        if prompt.span is None:
            skipped.append({"fact": fact.id, "reason": f"its prompt {prompt.text!r} names no subject"})
            continue
        found.append((fact, prompt, model.tokenised([prompt], answers=True)[0]))
    first = _first_choices(model, [row.ids[: row.start] for _, _, row in found])
    cases = []
    for (fact, prompt, row), choices in zip(found, first, strict=True):
        answer = row.ids[row.start]
        if known_only and choices[0] != answer:
            said, meant = (model.tokenizer.decode([t]).strip() for t in (choices[0], answer))
            skipped.append({"fact": fact.id, "reason": f"the model says {said!r}, not {meant!r}"})
        else:
            cases.append(_case(model, fact, prompt, row, choices, others, corruption, seed))
    noisy = sum(c.corrupt is None for c in cases)
    if noisy and corruption == "swap":
        warnings.warn(
            f"{noisy} of {len(cases)} facts have no counterpart with as many subject tokens: noise breaks them",
            stacklevel=4,
        )
    return Prepared(tuple(cases), tuple(skipped), noise * embedding_std(model, others) if noisy else 0.0)


def _case(
    model: Model,
    fact: Fact,
    prompt: Prompt,
    row: Row,
    choices: Sequence[int],
    pool: Sequence[Fact],
    corruption: Corruption,
    seed: int,
) -> Case:
    answer = row.ids[row.start]
    assert row.subject is not None
    case = Case(fact.id, tuple(row.ids[: row.start]), row.subject, answer, -1, row.has_bos)
    foils = (_first_token(model, prompt, row, text) for text in fact.foils)
    listed = next((t for t in foils if t not in (None, answer)), None)
    if corruption == "swap":
        for other in _candidates(fact, pool, seed):
            ids = _counterpart(model, prompt, row, other.subject)
            theirs = _first_token(model, prompt, row, other.answer) if other.relation == fact.relation else listed
            if ids is not None and theirs not in (None, answer):
                return replace(case, foil=theirs, corrupt=ids)
    runner_up = next(t for t in choices if t != answer)
    return replace(case, foil=listed if listed is not None else runner_up)


def _candidates(fact: Fact, pool: Sequence[Fact], seed: int) -> Iterator[Fact]:
    """Facts about others with other answers, in a random order fixed by seed and fact, the same relation first.

    pool: sorted, so that the order of a file does not matter.
    """
    apart = [f for f in pool if f.subject and f.subject != fact.subject and f.answer != fact.answer]
    random.Random(f"{seed}-{fact.id}").shuffle(apart)
    yield from (f for f in apart if f.relation == fact.relation)
    yield from (f for f in apart if f.relation != fact.relation)


def _counterpart(model: Model, prompt: Prompt, row: Row, subject: str) -> tuple[int, ...] | None:
    """The prompt's tokens with another subject; None unless it has as many tokens and all others are the same."""
    assert prompt.span is not None and row.subject is not None
    start, end = prompt.span
    swapped = replace(prompt, text=prompt.text[:start] + subject + prompt.text[end:], subject=subject)
    if swapped.span != (start, start + len(subject)):
        return None
    new = encode_row(model.tokenizer, swapped, answer=True)
    a, b = row.subject
    same = (
        new.subject == row.subject
        and new.start == row.start
        and new.ids[:a] == row.ids[:a]
        and new.ids[b : row.start] == row.ids[b : row.start]
    )
    return tuple(new.ids[: new.start]) if same else None


def _first_token(model: Model, prompt: Prompt, row: Row, answer: str) -> int | None:
    """First token of another answer to the prompt; None where it would be tokenised from another position on."""
    other = encode_row(model.tokenizer, replace(prompt, answer=answer), answer=True)
    return other.ids[other.start] if other.start == row.start else None


@torch.no_grad()
def _first_choices(model: Model, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The model's two likeliest next tokens after each row."""
    best: list[list[int]] = [[] for _ in rows]
    for index in _by(range(len(rows)), lambda i: len(rows[i]), lambda i: len(rows[i]), model.batch_tokens):
        ids = torch.tensor([rows[i] for i in index], device=model.device)
        logits = model.hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        for i, top in zip(index, logits.topk(2).indices.tolist(), strict=True):
            best[i] = top
    return best


def _by(items: Any, key: Any, size: Any, budget: int) -> Iterator[list[Any]]:
    """Items of equal key together, at most `budget` in the sum of their sizes (at least one)."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for group in groups.values():
        step = max(1, budget // max(1, size(group[0])))
        yield from (group[i : i + step] for i in range(0, len(group), step))


# Standard deviations of a model's embeddings over the subjects of a pool: a batch run asks for the same one again and again.
_STDS: WeakKeyDictionary[Model, dict[tuple[int, ...], float]] = WeakKeyDictionary()


@torch.no_grad()
def embedding_std(model: Model, facts: Sequence[Fact]) -> float:
    """Standard deviation of the token embedding's output over all subjects' tokens (ROME, arXiv 2202.05262)."""
    embed = model.hf.get_submodule(model.names.embed)
    kept = _STDS.setdefault(model, {})
    key = (hash(tuple((f.subject, f.prompt.text) for f in facts)), embed.weight.data_ptr(), embed.weight._version)
    if key in kept:
        return kept[key]
    ids: list[int] = []
    for subject, prompt in {f.subject: f.prompt for f in facts if f.prompt.span is not None}.items():
        row = encode_row(model.tokenizer, prompt, answer=False)
        assert row.subject is not None, subject
        ids += row.ids[slice(*row.subject)]
    if not ids:
        raise ValueError(
            "noise is scaled by the embeddings of the subjects, and no fact has a prompt that names its subject"
        )
    kept[key] = embed(torch.tensor(ids, device=model.device)).double().std().item()
    return kept[key]


def batches(cases: Sequence[Case], *, draws: int, tokens: int) -> Iterator[list[Case]]:
    """Cases of one length, subject start and kind of corruption, at most `tokens` tokens of corrupted rows each."""
    rows = {True: 1, False: draws}
    yield from _by(
        cases,
        lambda c: (len(c.ids), c.subject[0], c.corrupt is None),
        lambda c: len(c.ids) * rows[c.corrupt is not None],
        tokens,
    )


def runs_of(model: Model, cases: Sequence[Case], *, noise_std: float, draws: int, seed: int) -> Runs:
    """The clean and corrupted rows of one batch of cases."""
    ids = torch.tensor([c.ids for c in cases], device=model.device)
    answer = torch.tensor([c.answer for c in cases], device=model.device)
    foil = torch.tensor([c.foil for c in cases], device=model.device)
    if cases[0].corrupt is not None:
        return Runs(ids, torch.tensor([c.corrupt for c in cases], device=model.device)[:, None], answer, foil)
    width = max(c.subject[1] - c.subject[0] for c in cases)
    noise = torch.stack([_draw(c, draws, width, model.names.d_model, seed) for c in cases]) * noise_std
    placed = noise.to(model.device, model.dtype)
    return Runs(ids, ids[:, None].repeat(1, draws, 1), answer, foil, placed, noise_start=cases[0].subject[0])


def _draw(case: Case, draws: int, width: int, d: int, seed: int) -> Tensor:
    """Standard normal noise [draws, width, d] in float64 on the subject's tokens, fixed by seed and fact."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}-{case.fact_id}".encode()))
    noise = torch.zeros(draws, width, d, dtype=torch.float64)
    own = case.subject[1] - case.subject[0]
    noise[:, :own] = torch.randn(draws, own, d, generator=generator, dtype=torch.float64)
    return noise
