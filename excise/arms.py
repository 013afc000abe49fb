"""Arms: a model under an edit (or none) as something one can ask, and `compare`, every evaluation on every arm."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from excise.encoding import Batch, Row, as_prompt
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.scores import Results, Score
from excise.sites import Site
from excise.trace import Trace, read

if TYPE_CHECKING:
    from excise.edits import Edit


@dataclass(frozen=True)
class Answer:
    """A prompt's answer under teacher forcing.

    logprobs: log-probability of each answer token. exact: every answer token is the argmax, as in greedy decoding.
    argmax: the model's own choice at each answer position; argmax[0] is the first token it would say.
    targets: the answer tokens. ranks: rank of each among all tokens, 1 for the likeliest.
    """

    logprobs: tuple[float, ...]
    argmax: tuple[int, ...]
    exact: bool
    targets: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def probability(self) -> float:
        """Length-normalised answer probability exp(mean log p) (TOFU, arXiv 2401.06121)."""
        return float(torch.tensor(self.logprobs).mean().exp())


@dataclass
class Arm:
    """A name, a model, and the edit it runs under. Each call enters the edit, runs, and leaves.

    mode: "weight" when the change can be written into the weights, "hook" when it vanishes with its hooks, "none".
    """

    name: str
    model: Model
    edit: Edit | None = None
    _answers: dict[Prompt, Answer] = field(default_factory=dict, repr=False)
    _said: dict[tuple[Any, ...], str] = field(default_factory=dict, repr=False)
    # What evaluations keep of this arm for each other, bounded by whoever keeps it (see evals/states.py).
    kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def mode(self) -> str:
        """How the arm holds its change."""
        return "none" if self.edit is None else ("weight" if self.edit.bakeable else "hook")

    @contextmanager
    def running(self) -> Iterator[Model]:
        """The model with the edit applied, inside the block only."""
        if self.edit is None:
            yield self.model
            return
        from excise.apply import applied

        with applied(self.model, self.edit):
            yield self.model

    @contextmanager
    def held(self) -> Iterator[Arm]:
        """This arm for an attacker of its weights: a fresh arm, remembering nothing, whose edit is in force all along.

        What can be written into the weights stands in them, as in an exported checkpoint; hooks stay hooks. Whoever
        changes weights inside the block puts them back; the edit itself is undone to the bit.
        """
        if self.edit is None or not self.edit.bakeable:
            with self.running() as model:
                yield Arm(self.name, model)
            return
        from excise.apply import bake

        baked = bake(self.model, self.edit)
        try:
            yield Arm(self.name, self.model)
        finally:
            baked.revert()

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Each prompt's answer under teacher forcing; one forward pass, kept for later questions about the same prompt.

        Answers of one token after the same text, such as candidates, share one row.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self._answers]
        if new:
            with self.running() as model:
                asked = _shared(new, model.tokenised(new, answers=True))
                # Batches of less than full size: an edit's own matrices are held beside their logits.
                tokens = max(1, 3 * model.batch_tokens // 4)
                for index, batch in model.batches(
                    [a.prompts[0] for a in asked], rows=[a.row for a in asked], tokens=tokens
                ):
                    for i, found in zip(index, _answers(model, batch, [asked[i].targets for i in index]), strict=True):
                        self._answers |= zip(asked[i].prompts, found, strict=True)
        return [self._answers[p] for p in prompts]

    def said(self, prompts: Sequence[Prompt]) -> float:
        """Share of the prompts whose whole answer is the model's own choice, token by token."""
        return sum(a.exact for a in self.answers(prompts)) / len(prompts)

    def generate(self, prompts: Sequence[Prompt | str], *, max_new_tokens: int = 16, **options: Any) -> list[str]:
        """The model's own words after each prompt; what greedy decoding says is kept for later questions."""
        if options.get("do_sample"):
            with self.running() as model:
                return model.generate_all(prompts, max_new_tokens=max_new_tokens, **options)
        keys = [(p, max_new_tokens, repr(sorted(options.items()))) for p in prompts]
        new = {key: p for key, p in zip(keys, prompts, strict=True) if key not in self._said}
        if new:
            with self.running() as model:
                said = model.generate_all(list(new.values()), max_new_tokens=max_new_tokens, **options)
            self._said |= dict(zip(new, said, strict=True))
        return [self._said[key] for key in keys]

    def losses(self, texts: Sequence[str]) -> list[float]:
        """Mean next-token loss of each text, in nats. Texts that carry the template's own markers are not templated again."""
        found = [0.0] * len(texts)
        with self.running() as model:
            for index, batch in model.batches([_literal(model, t) for t in texts]):
                for i, loss in zip(index, _losses(model, batch), strict=True):
                    found[i] = loss
        return found

    def trace(self, prompts: Sequence[Prompt | str], sites: Sequence[Site | str]) -> Trace:
        """Activations under the edit, as `excise.trace.read` gives them: for each site a tensor [n_rows, width]."""
        with self.running() as model:
            return read(model, prompts, sites)


@dataclass(frozen=True)
class _Asked:
    """A row of tokens and the prompts that are answered by it, each with its answer's tokens."""

    row: Row
    prompts: list[Prompt]
    targets: list[list[int]]


def _shared(prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[_Asked]:
    """One row per prompt; those with an answer of one token need only what stands before it, one row per such text."""
    found: dict[tuple[int, ...], _Asked] = {}
    for prompt, row in zip(prompts, rows, strict=True):
        before, answer = row.ids[: row.start], row.ids[row.start :]
        key = (*(before if len(answer) == 1 else row.ids), -len(answer))
        short = replace(row, ids=before) if len(answer) == 1 else row
        asked = found.setdefault(key, _Asked(short, [], []))
        asked.prompts.append(prompt)
        asked.targets.append(answer)
    return list(found.values())


# One function a batch, so that its logits are gone before the next batch's are made.
def _answers(model: Model, batch: Batch, targets: Sequence[Sequence[Sequence[int]]]) -> list[list[Answer]]:
    logits = model.logits(batch)
    found = []
    for row, answers in enumerate(targets):
        start = batch.starts[row] - 1
        logp = logits[row, start : start + len(answers[0])].log_softmax(-1)
        found.append([_answer(logp, torch.tensor(a, device=logp.device)) for a in answers])
    return found


def _answer(logp: torch.Tensor, target: torch.Tensor) -> Answer:
    own, picked = logp.argmax(-1), logp.gather(-1, target[:, None])
    ranks = 1 + (logp > picked).sum(-1)
    return Answer(
        tuple(picked[:, 0].tolist()), tuple(own.tolist()), bool((own == target).all()),
        tuple(target.tolist()), tuple(ranks.tolist()),
    )  # fmt: skip


def _losses(model: Model, batch: Batch) -> list[float]:
    logits = model.logits(batch)
    return [cross_entropy(logits[row, : n - 1], batch.ids[row, 1:n]).item() for row, n in enumerate(batch.lengths)]


def _literal(model: Model, text: str) -> Prompt:
    bos = getattr(model.tokenizer, "bos_token", None)
    # The tokenizer adds BOS itself; a text that already starts with it must not get two.
    return as_prompt(text.removeprefix(bos) if bos else text)


Evaluation = Callable[..., Sequence[Score]]


def compare(
    arms: Sequence[Arm] | Model,
    edits: Mapping[str, Edit] | None,
    evaluations: Sequence[Evaluation],
    facts: Sequence[Fact],
    *,
    oracle: Model | None = None,
    progress: Callable[[str], None] | None = None,
) -> Results:
    """Every evaluation on every arm, over the same facts.

    arms: a list of arms (the first is "before"), or a model, with `edits` naming one arm per edit.
    evaluations: functions (arm, facts, *, before, options) -> scores.
    oracle: a model that never learned the forget facts, added as the last arm.
    Raises ValueError when two arms have one name.
    """
    if isinstance(arms, Model):
        arms = [Arm("before", arms), *(Arm(name, arms, edit) for name, edit in (edits or {}).items())]
    every = [*arms, *([Arm("oracle", oracle)] if oracle is not None else [])]
    names = [arm.name for arm in every]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two arms are called {min(twice)!r}: one would overwrite the other's scores; rename one")
    known = facts if isinstance(facts, Facts) else Facts(facts)
    scores: dict[tuple[str, str], tuple[Score, ...]] = {}
    for evaluation in evaluations:
        name = getattr(inspect.unwrap(getattr(evaluation, "func", evaluation)), "__name__", str(evaluation))
        for arm in every:
            if progress:
                progress(f"{name} on {arm.name}")
            scores[arm.name, name] = evaluate(
                evaluation, arm, known, every[0], every[-1] if oracle is not None else None
            )
    return Results(scores, {a.name: a.mode for a in every})


def evaluate(
    evaluation: Evaluation, arm: Arm, facts: Facts, before: Arm, oracle: Arm | None = None, **options: Any
) -> tuple[Score, ...]:
    """One evaluation on one arm; `before` and `oracle` go to those that compare."""
    wanted = inspect.signature(evaluation).parameters
    others = {k: v for k, v in (("before", before), ("oracle", oracle)) if k in wanted}
    return tuple(evaluation(arm, facts, **others, **options))
