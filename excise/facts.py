"""Facts: what a model should forget, keep, or never have known, and every way to ask for it.

A `Fact` is data only: nothing here knows a model or a tokenizer. Reading and writing files is `excise.facts_io`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

GROUPS = ("forget", "retain", "neighbour", "unknown", "general")
# Value of the tag "role" of a fact that is measured and never shown to an editor.
CHECK = "check"
GENERATIVE_FORMS = ("statement", "question", "cloze")


@dataclass(frozen=True)
class Prompt:
    """One way to ask for one fact.

    text: what the user writes, before any chat template; the answer follows it.
    answer: the continuation that states the fact, without leading space or final full stop.
    subject: the string in `text` that the fact is about ("" when the prompt names none).
    form: "statement", "question", "cloze", "choice", "reversed", or a name of one's own.
    held_out: the pair (fact, form or wording) was withheld when the model was taught, or is kept for testing.
    chat: render `text` as a user turn with the tokenizer's chat template.
    choices: candidate answers named in `text`, the right one included (form "choice").
    """

    text: str
    answer: str
    subject: str = ""
    form: str = "statement"
    held_out: bool = False
    chat: bool = False
    choices: tuple[str, ...] = ()
    fact_id: str = ""

    @property
    def span(self) -> tuple[int, int] | None:
        """Character span [start, end) of the subject in `text`; None when the prompt names none."""
        if not self.subject:
            return None
        start = self.text.find(self.subject)
        if start < 0:
            raise ValueError(
                f"fact {self.fact_id or '?'}: subject {self.subject!r} does not occur in the prompt {self.text!r}; "
                "write the subject exactly as the prompt spells it"
            )
        return start, start + len(self.subject)


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge: a subject, a relation, an answer, and the prompts that ask for it.

    prompts: at least one; the first is the direct one.
    aliases: other accepted answers.
    foils: wrong answers of the same kind, used for logit differences, truth ratios and choices.
    group: "forget", "retain", "neighbour" (close to a forget fact, must stay), "unknown" (never taught; the right
        behaviour is to refuse) or "general" (unrelated text and skills).
    """

    id: str
    subject: str
    answer: str
    prompts: tuple[Prompt, ...]
    relation: str = ""
    group: str = "forget"
    aliases: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"fact {self.id!r} has no prompt: give at least one")
        if any(p.fact_id != self.id for p in self.prompts):
            object.__setattr__(self, "prompts", tuple(replace(p, fact_id=self.id) for p in self.prompts))

    @property
    def prompt(self) -> Prompt:
        """The direct prompt."""
        return self.prompts[0]

    def ask(self, *forms: str, held_out: bool | None = None) -> list[Prompt]:
        """Prompts of the given forms (all when none is given); `held_out` narrows to one side of the split."""
        return [
            p for p in self.prompts if (not forms or p.form in forms) and (held_out is None or p.held_out == held_out)
        ]

    def _repr_html_(self) -> str:
        from excise.notebook import fact_view

        return fact_view(self)


class Facts(Sequence[Fact]):
    """An immutable list of facts that knows how to split by group, subject and relation."""

    def __init__(self, facts: Iterable[Fact]) -> None:
        self._facts = tuple(facts)
        seen: set[str] = set()
        for fact in self._facts:
            if fact.id in seen:
                raise ValueError(f"two facts share the id {fact.id!r}: ids must be unique")
            seen.add(fact.id)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> Facts: ...
    def __getitem__(self, index: int | slice) -> Fact | Facts:
        return Facts(self._facts[index]) if isinstance(index, slice) else self._facts[index]

    def __len__(self) -> int:
        return len(self._facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts)

    def __add__(self, other: Iterable[Fact]) -> Facts:
        return Facts((*self._facts, *other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Facts) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)

    def where(self, predicate: Callable[[Fact], bool]) -> Facts:
        """The facts for which `predicate` holds, in order."""
        return Facts(f for f in self._facts if predicate(f))

    def group(self, *names: str) -> Facts:
        """The facts of the given groups, in order."""
        for name in names:
            if name not in GROUPS:
                raise ValueError(f"no group {name!r}; groups are {', '.join(GROUPS)}")
        return self.where(lambda f: f.group in names)

    def split(self, *names: str) -> tuple[Facts, ...]:
        """One `Facts` per given group name."""
        return tuple(self.group(name) for name in names)

    @property
    def shown(self) -> Facts:
        """The facts that an editor may look at: all but those tagged `"role": "check"`, which are for measuring alone."""
        return self.where(lambda f: f.tags.get("role") != CHECK)

    @property
    def checks(self) -> Facts:
        """The facts that no editor is shown, so that what holds for them was not arranged."""
        return self.where(lambda f: f.tags.get("role") == CHECK)

    @property
    def subjects(self) -> list[str]:
        """Distinct subjects, in order of first appearance."""
        return list(dict.fromkeys(f.subject for f in self._facts))

    @property
    def counts(self) -> dict[str, int]:
        """Facts per group, empty groups left out."""
        return {g: n for g in GROUPS if (n := sum(f.group == g for f in self._facts))}

    def prompts(self, *forms: str, held_out: bool | None = None) -> list[Prompt]:
        """All prompts of all facts, narrowed as in `Fact.ask`."""
        return [p for f in self._facts for p in f.ask(*forms, held_out=held_out)]

    def __repr__(self) -> str:
        groups = ", ".join(f"{n} {g}" for g, n in self.counts.items())
        return f"Facts({len(self)}: {groups}; {len(self.subjects)} subjects)"

    def _repr_html_(self) -> str:
        from excise.notebook import facts_view

        return facts_view(self)
