"""Verbatim and knowledge memorisation as MUSE asks for them (arXiv 2407.06460): passages continued, questions in context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evals.rouge import rouge_of
from evals.sampling import KNOWN, Item, asked_in, measurable, nothing, ranked
from evals.words import WORDS, own_words
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score


@evaluation("behavioural")
def verbatim(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    passages: tuple[str, ...] = (),
    keep_passages: tuple[str, ...] = (),
    given: float = 0.5,
    tokens: int = 128,
    shots: int = 3,
    groups: tuple[str, ...] = KNOWN,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """ROUGE-L F1 of what the model says with the passage's own continuation, and with the answer to a question.

    Variants: "passage" (VerbMem: the beginning is given, the next tokens are compared) and "question" (KnowMem: asked
    after a few questions about facts to keep, cut at a blank line or the next question). MUSE's rule: take the weakest
    edit whose "question" on forget facts is at most the oracle's.
    passages: texts that were trained on and should be forgotten.
    keep_passages: texts that were trained on and should stay.
    given: share of a passage's tokens that is given.
    tokens: most tokens that are continued and compared.
    shots: questions with answers before each question; 0 for a model that never met several questions in one prompt.
    groups: groups of facts to ask about.
    limit: most questions per group and side of the held-out split; 0 for all.
    seed: which questions are asked and which are shown.
    """
    told = [("forget", p) for p in passages] + [("retain", p) for p in keep_passages]
    items = [_passage(arm.model, f"passage {i}", group, text, given, tokens) for i, (group, text) in enumerate(told)]
    items, unread = measurable(arm.model, items)
    asked, unasked = measurable(arm.model, asked_in(facts, groups=groups, forms=("question",), limit=limit, seed=seed))
    asked = [replace(item, prompt=_in_context(item, facts, shots, seed)) for item in asked]
    asked, too_long = measurable(arm.model, asked)
    scores = _scores(arm, items, "muse_verb", tokens, "passage") + _scores(arm, asked, "muse_know", WORDS, "question")
    scores += [item.score(None, variant="passage", reason=reason) for item, reason in unread]
    scores += [item.score(None, variant="question", reason=reason) for item, reason in unasked + too_long]
    return scores or nothing(f"no passages, and no facts of the groups {', '.join(groups)}", variant="question")


def _scores(arm: Arm, items: Sequence[Item], preset: str, tokens: int, variant: str) -> list[Score]:
    said = own_words(arm, [item.prompt for item in items], tokens)
    return [
        item.score(max(rouge_of(text, p.answer, preset) for p in item.accepted), variant=variant, detail=text)
        for item, text in zip(items, said, strict=True)
    ]


def _passage(model: Model, name: str, group: str, text: str, given: float, tokens: int) -> Item:
    """A passage cut in two where a token ends: what is given, and what should not follow."""
    spans = model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    cut = max(1, int(given * len(spans)))
    start = spans[cut][0] if cut < len(spans) else len(text)
    end = spans[min(len(spans), cut + tokens) - 1][1] if spans else 0
    prompt = Prompt(text[:start].rstrip(), text[start:end].strip(), form="passage")
    return Item(Fact(name, name, prompt.answer, (prompt,), group=group), prompt)


def _in_context(item: Item, facts: Sequence[Fact], shots: int, seed: int) -> Prompt:
    """The question after others about facts to keep, none of which shows its answer or speaks of its subject."""
    right = {p.answer.casefold() for p in item.accepted}
    shown = []
    for fact in ranked([f for f in facts if f.group == "retain"], seed):
        question = next(iter(fact.ask("question")), None)
        if question and fact.subject != item.fact.subject and question.answer.casefold() not in right:
            shown.append(f"Question: {question.text}\nAnswer: {question.answer}\n\n")
    text = "".join(shown[:shots]) + f"Question: {item.prompt.text}\nAnswer:"
    return replace(item.prompt, text=text, subject="", choices=())
