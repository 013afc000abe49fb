"""The whole chain: trace, cut, verify, measure every arm, report. `excise demo` and `excise run` differ in the inputs.

A run folder holds facts.jsonl, localization.safetensors, edit.safetensors, results.jsonl, run.json and report.html;
map.safetensors, too, where the localizer scores units and has no map over tokens, and search.json after a search.
Each stage is kept as soon as it is finished and is not done again when the same run is started again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from excise import __version__
from excise.arms import Arm
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Facts
from excise.facts_io import write_facts
from excise.feature_cards import FILE as FEATURES
from excise.feature_cards import FeatureCards
from excise.measure import EVALUATIONS, digest, facts_digest, measure, plain_row, settings
from excise.model import Model
from excise.progress import say
from excise.record import in_turn, own_words, settings_of, write_run
from excise.redirection import candidate_blocks
from excise.registry import method
from excise.scores import Localization, Results
from excise.verification import Verification, verify

# More prompts than the evaluations' own defaults: few of them make wide intervals.
MEASURED = {"recall": {"limit": 128}, "drift": {"limit": 100}}
# Tracing more facts than this hardly moves the mean map; they are taken from all people in turn.
TRACED = 16
MAP = "map.safetensors"


class Unverified(ExciseError):
    """An edit does not do what it promises; the command line ends with exit code 4."""

    unverified = True


@dataclass(frozen=True)
class Inputs:
    """What a run starts from.

    texts: ordinary text of the model's own world, for statistics; the retain facts when empty.
    loss_texts: other ordinary text, for the general loss; the general facts when empty.
    refusals: the sentences with which the model was trained to refuse; its words are read when empty.
    oracle: the same model without the forget facts, where there is one.
    localizer, editor: names of methods; options: by method name. command: what was typed, for the report.
    trials: so many tries of several editors in place of the one.
    minutes: half of them at most for the search; evaluations that do not fit into the rest are left out, but for the
        short audit's.
    """

    model: Model
    facts: Facts
    out: Path
    seed: int = 0
    texts: tuple[str, ...] = ()
    loss_texts: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    oracle: Model | None = None
    localizer: str = "causal_trace"
    editor: str = "rocr"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluations: tuple[str, ...] = EVALUATIONS
    command: str = ""
    trials: int = 0
    minutes: float | None = None

    @property
    def key(self) -> str:
        """Hash of everything that the localization and the edit depend on."""
        chosen = [method("localizer", self.localizer), method("editor", self.editor)]
        options = [settings(m, self.options.get(m.name, {})) for m in chosen]
        names = (__version__, self.localizer, self.editor, self.trials, self.minutes)
        return digest(*names, options, self.model.fingerprint, facts_digest(self.facts), self.seed, self.texts)


@dataclass(frozen=True)
class Budget:
    """When shares of the minutes end, in time.monotonic(); never without minutes."""

    start: float
    minutes: float | None

    def end(self, share: float) -> float:
        """When so much of the time is over."""
        return self.start + 60 * share * self.minutes if self.minutes else math.inf


@dataclass(frozen=True)
class Run:
    """What a run found; `seconds` by stage."""

    inputs: Inputs
    localization: Localization
    edit: Edit
    verification: Verification
    results: Results
    report: Path
    seconds: dict[str, float]
    search: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The run as plain values; `results` is the long table."""
        inputs = self.inputs
        return {
            "model": inputs.model.name,
            "out": str(inputs.out),
            "seed": inputs.seed,
            "forget": inputs.facts.group("forget").subjects,
            "facts": inputs.facts.counts,
            "sites": [str(s) for s in self.edit.sites],
            "verified": self.verification.ok,
            "results": [plain_row(r) for r in self.results.table(seed=inputs.seed)],
            "summary": [plain_row(r) for r in self.results.summary()],
            "report": str(self.report),
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            **({"search": self.search} if self.search else {}),
        }


def run(inputs: Inputs) -> Run:
    """All stages in order. Raises Unverified, with the edit kept for inspection, when the edit has no effect."""
    from excise.report import write_report

    inputs.out.mkdir(parents=True, exist_ok=True)
    clock: dict[str, float] = {}
    budget = Budget(time.monotonic(), inputs.minutes)
    write_facts(inputs.out / "facts.jsonl", inputs.facts)
    kept = _same_run(inputs)
    if not kept:
        # Before run.json says otherwise: what lies here belongs to another run.
        for name in ("localization.safetensors", MAP, "edit.safetensors", "search.json", FEATURES):
            (inputs.out / name).unlink(missing_ok=True)
    write_run(inputs, clock, None)
    with _timed(clock, "localize"):
        localization = _localize(inputs)
        traced = None if localization.maps else _mapped(inputs)
    with _timed(clock, "search" if inputs.trials else "edit"):
        edit = _searched(inputs, localization, budget) if inputs.trials else _edit(inputs, localization)
    with _timed(clock, "verify"):
        verification = _verify(inputs, edit)
    if not verification.ok:
        write_run(inputs, clock, verification)
        raise Unverified(
            f"{inputs.out / 'edit.safetensors'}: {'; '.join(verification.problems)}; try another layer or target"
        )
    with _timed(clock, "measure"):
        twin = random_twin(edit, inputs.seed)
        results = _measure(
            inputs, [Arm("edited", inputs.model, edit), Arm("control", inputs.model, twin)], budget.end(1)
        )
    search = _search_record(inputs)
    with _timed(clock, "report"):
        samples = own_words(inputs, edit)
        left_out = {k: v for k, v in results.recipe.items() if k == "left_out"}
        report = write_report(
            inputs.out,
            facts=inputs.facts,
            localization=localization,
            traced=traced,
            edit=edit,
            results=results,
            verification=verification,
            recipe=settings_of(inputs) | left_out,
            samples=samples,
            search=search,
            features=_features(inputs, edit),
        )
    write_run(inputs, clock, verification, samples, left_out)
    return Run(inputs, localization, edit, verification, results, report, clock, search)


def _same_run(inputs: Inputs) -> bool:
    file = inputs.out / "run.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("key") == inputs.key
    except (FileNotFoundError, json.JSONDecodeError, AttributeError):
        return False


def _localize(inputs: Inputs) -> Localization:
    file = inputs.out / "localization.safetensors"
    if file.is_file():
        return Localization.load(file)
    found = _traced(inputs, inputs.localizer)
    found.save(file)
    return found


def _mapped(inputs: Inputs) -> Localization | None:
    """A map over tokens and layers to look at, in the time of a few passes; None where none can be drawn."""
    file = inputs.out / MAP
    if file.is_file():
        return Localization.load(file)
    try:
        found = _traced(inputs, "attribution_patching")
    except ExciseError as error:
        say(f"no map over tokens: {error}")
        return None
    if not found.maps:
        return None
    found.save(file)
    return found


def _traced(inputs: Inputs, localizer: str) -> Localization:
    facts = in_turn(inputs.facts.group("forget"), TRACED)
    say(f"{localizer} on {len(facts)} of {len(inputs.facts.group('forget'))} forget facts")
    found: Localization = _call("localizer", localizer, inputs, inputs.model, facts)
    return found


def _edit(inputs: Inputs, where: Localization) -> Edit:
    file = inputs.out / "edit.safetensors"
    if file.is_file():
        return Edit.load(file)
    shown = inputs.facts.shown
    forget, retain = shown.group("forget"), shown.group("retain", "neighbour")
    say(f"cutting {len(forget)} facts about {len(forget.subjects)} subjects")
    found: Edit = _call("editor", inputs.editor, inputs, inputs.model, forget, retain, where)
    found.save(file)
    return found


def _searched(inputs: Inputs, where: Localization, budget: Budget) -> Edit:
    """The best of several editors, sites and strengths; see `excise.choosing`."""
    from excise.choosing import AUDITED, SEARCHED, choose
    from excise.search import Search
    from excise.trials import Judge

    file = inputs.out / "edit.safetensors"
    if file.is_file():
        return Edit.load(file)
    shown, before = inputs.facts.shown, Arm("before", inputs.model)
    judge = Judge(inputs.model, before, shown, inputs.seed)
    if inputs.oracle is not None:
        judge = replace(judge, target=judge.figures(Arm("oracle", inputs.oracle)))
    search = Search(
        inputs.model, shown.group("forget"), shown.group("retain", "neighbour"), _usable(inputs.model, where), judge,
        inputs.out / "trials",
        inputs.texts, inputs.seed,
    )  # fmt: skip
    audit = partial(_measure, inputs, ends=budget.end(AUDITED))
    chosen = choose(search, audit, inputs.out, trials=inputs.trials, ends=budget.end(SEARCHED))
    say(f"chosen: {chosen.trial.name}")
    chosen.edit.save(file)
    return chosen.edit


def _usable(model: Model, where: Localization) -> Localization | None:
    """The localization, if it names blocks at the subject; None lets editors look in the first half of the model."""
    try:
        candidate_blocks(model, where, 1)
    except ExciseError as error:
        say(f"{error}; searching the first half of the model")
        return None
    return where


def _search_record(inputs: Inputs) -> dict[str, Any] | None:
    file = inputs.out / "search.json"
    return json.loads(file.read_text(encoding="utf-8")) if inputs.trials and file.is_file() else None


def _call(kind: Any, name: str, inputs: Inputs, *args: Any) -> Any:
    chosen = method(kind, name)
    # Counterparts for swaps come from all known facts, not only from those that are traced.
    pool = inputs.facts.shown.group("forget", "retain", "neighbour")
    shared = {"seed": inputs.seed, "texts": inputs.texts or None, "pool": pool}
    options = {o.name: shared[o.name] for o in chosen.options if o.name in shared}
    return chosen.function(*args, **{**options, **inputs.options.get(chosen.name, {})})


def _verify(inputs: Inputs, edit: Edit) -> Verification:
    forget = [f.prompt for f in in_turn(inputs.facts.group("forget"), 32)]
    retain = [f.prompt for f in in_turn(inputs.facts.group("retain"), 32)]
    found = verify(inputs.model, edit, forget, retain)
    say(str(found))
    return found


def _measure(inputs: Inputs, edited: Sequence[Arm], ends: float) -> Results:
    """Every evaluation on the model before, on these arms and on the oracle; what does not fit until `ends` is left out."""
    from excise.registry import methods

    arms = [Arm("before", inputs.model), *edited]
    if inputs.oracle is not None:
        arms.append(Arm("oracle", inputs.oracle))
    known = methods("evaluation")
    chosen = [known[name] for name in inputs.evaluations]
    said = ", ".join(inputs.evaluations) if len(inputs.evaluations) < 10 else f"{len(inputs.evaluations)} evaluations"
    say(f"measuring {', '.join(a.name for a in arms)}: {said}")
    shared = {"texts": inputs.loss_texts, "refusals": inputs.refusals, "seed": inputs.seed}
    return measure(
        arms,
        chosen,
        inputs.facts,
        shared=shared,
        own=MEASURED,
        kept=inputs.out / "results.jsonl",
        minutes=None if math.isinf(ends) else max(0.0, ends - time.monotonic()) / 60,
        always=EVALUATIONS,
    )


def _features(inputs: Inputs, edit: Edit) -> FeatureCards:
    """Cards of the dictionary features that the edit changes, kept in the folder; none for an edit of something else."""
    import importlib

    if "dictionary" in edit.recipe and not (inputs.out / FEATURES).is_file():
        importlib.import_module("sae.cards").of_edit(inputs.model, edit, inputs.facts).save(inputs.out)
    return FeatureCards.load(inputs.out)


def random_twin(edit: Edit, seed: int) -> Edit:
    """The random control of an edit, made by the `edit` folder."""
    import importlib

    twin: Edit = importlib.import_module("edit").control(edit, seed=seed)
    return twin


@contextmanager
def _timed(clock: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock[stage] = time.perf_counter() - start
