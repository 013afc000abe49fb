"""The search: several editors over a few sites, options and strengths, each trial judged by three cheap figures.

Which trial comes next is Optuna's choice (tree-structured Parzen estimators for several objectives), by seed; every
editor's defaults are tried first, then the defaults with one choice made otherwise, then the best of those stronger as
long as that helps. What is read of the model is kept between trials. A finished trial is two files, its edit and its figures: a
search that was interrupted goes on from them, and with the same seed tries the same things.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from excise import __version__
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Facts
from excise.files import write_text
from excise.measure import digest, facts_digest
from excise.memo import readings_kept
from excise.model import Model
from excise.progress import bar, say
from excise.redirection import candidate_blocks
from excise.registry import method
from excise.scores import Localization
from excise.trials import FIGURES, Judge, Trial, best_of_each, distance

# What is tried of each editor: values to choose from, or the ends of a range on a log scale. Its own default comes first
# where it is among them, else the first value.
Space = Mapping[str, list[Any] | tuple[float, float]]
SPACES: dict[str, Space] = {
    "rocr": {"layers": [1, 2], "copies": [1, 2], "ridge": (0.03, 1.0), "guard": (0.3, 3.0)},
    "lunar": {"position": ["auto", "subject_last", "last"], "remove": [False, True]},
    "rome": {"value": ["fictitious"]},
    "memit": {"value": ["fictitious"]},
    "alphaedit": {"value": ["fictitious"]},
    "leace": {},
    "expert_edit": {"experts": [4, 8, 16]},
}
# Editors that choose among the blocks of a localization, and those that are told one block; ROCR leaves its change at
# several, so it is left to choose. The others find their own places.
GUIDED = ("rocr", "rome", "memit", "alphaedit")
PLACED = ("lunar", "rome", "memit", "alphaedit")
# An edit is multiplied by a strength between these; so many are made stronger step by step, by so much each time.
STRENGTHS, STRONGER, STEP = (0.7, 2.0), 6, 1.3
# What a try that made no edit is told the optimiser as.
WORST = (1.0, 1.0, 1.0)
# Blocks that are tried one by one, and pairs of good edits that are added up at the end.
BLOCKS, SUMS = 4, 3


@dataclass(frozen=True)
class Search:
    """A search in one folder.

    where: what a localizer found; its blocks are tried one by one, and editors that choose a block choose among them.
    texts: ordinary text for editors that take it; the retain facts when empty.
    """

    model: Model
    forget: Facts
    retain: Facts
    where: Localization | None
    judge: Judge
    folder: Path
    texts: tuple[str, ...] = ()
    seed: int = 0
    editors: tuple[str, ...] = tuple(SPACES)

    def run(self, trials: int, ends: float = math.inf) -> list[Trial]:
        """At most so many trials, none begun after `ends` (time.monotonic); finished ones are read, not made again.

        Raises ExciseError when no editor applies.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with readings_kept():
            return self._run(trials, ends)

    def _run(self, trials: int, ends: float) -> list[Trial]:
        done: list[Trial] = []
        # Not one before the clock is looked at, and never none: without a trial there is nothing to choose.
        for editor in bar(self.editors[:trials], what="trying every editor"):
            if not done or time.monotonic() < ends:
                done.append(self._trial(len(done), *self._default(editor)))
        able = [t.editor for t in done if t.figures]
        if not able:
            raise ExciseError(f"no editor applies: {'; '.join(f'{t.editor}: {t.reason}' for t in done)}")
        for other in bar(self._others(able)[: max(0, trials - len(done))], what="trying their choices"):
            if time.monotonic() < ends:
                done.append(self._trial(len(done), *other))
        self._strengthen(done, trials, ends)
        study = self._study([t for t in done if t.figures])
        for _ in bar(range(max(0, trials - len(done))), what="trying"):
            if time.monotonic() >= ends:
                say(f"time is up after {len(done)} trials")
                break
            asked = study.ask()
            found = self._trial(len(done), *self._suggested(asked, able))
            done.append(found)
            study.tell(asked, found.figures or WORST)
        for a, b in self._pairs(done):
            if time.monotonic() < ends:
                done.append(self._trial(len(done), "sum", {"of": [a.name, b.name], "keys": [a.key, b.key]}, None, 1.0))
        return done

    def _strengthen(self, done: list[Trial], trials: int, ends: float) -> None:
        """Try those nearest to the target stronger, each as long as that brings it nearer."""
        for trial in sorted((t for t in done if t.figures), key=self._away)[:STRONGER]:
            weaker = trial
            while weaker.strength * STEP <= STRENGTHS[1] and len(done) < trials and time.monotonic() < ends:
                found = self._trial(len(done), trial.editor, dict(trial.options), trial.block, weaker.strength * STEP)
                done.append(found)
                if self._away(found) >= self._away(weaker):
                    break
                weaker = found

    def _away(self, trial: Trial) -> float:
        return distance(trial.figures or WORST, self.judge.target)

    def edit(self, trial: Trial) -> Edit:
        """The edit of a finished trial."""
        return Edit.load(self._file(trial.key))

    def _pairs(self, done: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
        """The best edits of different editors in pairs: each may miss what the other one meets."""
        ranked = best_of_each(done, lambda t: t.editor, self.judge.target)
        places = combinations(range(len({t.editor for t in ranked})), 2)
        return [(ranked[i], ranked[j]) for i, j in sorted(places, key=sum)[:SUMS]]

    # --- what is tried

    def _default(self, editor: str) -> tuple[str, dict[str, Any], int | None, float]:
        own = {o.name: o.default for o in method("editor", editor).options}
        options = {
            name: own[name] if isinstance(space, tuple) or own[name] in space else space[0]
            for name, space in SPACES.get(editor, {}).items()
        }
        return editor, options, None, 1.0

    def _others(self, editors: Sequence[str]) -> list[tuple[str, dict[str, Any], int | None, float]]:
        """The editors' defaults with one choice made otherwise: so few trials would leave most of them to chance."""
        found = []
        for editor in editors:
            _, options, block, strength = self._default(editor)
            for name, space in SPACES.get(editor, {}).items():
                values = [] if isinstance(space, tuple) else [v for v in space if v != options[name]]
                found += [(editor, {**options, name: v}, block, strength) for v in values]
        return found

    def _study(self, able: Sequence[Trial]) -> Any:
        """A study that knows how the first trials fared."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        names = list(dict.fromkeys(t.editor for t in able))
        sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=2 * len(names))
        study = optuna.create_study(directions=["minimize"] * len(FIGURES), sampler=sampler)
        kinds = optuna.distributions
        for trial in able:
            space: dict[str, Any] = {"editor": kinds.CategoricalDistribution(names)}
            space |= {"strength": kinds.FloatDistribution(*STRENGTHS, log=True)}
            params: dict[str, Any] = {"editor": trial.editor, "strength": trial.strength}
            if trial.editor in PLACED:
                space[f"{trial.editor}.block"] = kinds.CategoricalDistribution(self._blocks)
                params[f"{trial.editor}.block"] = trial.block
            for name, values in SPACES.get(trial.editor, {}).items():
                key, ends = f"{trial.editor}.{name}", isinstance(values, tuple)
                space[key] = (
                    kinds.FloatDistribution(values[0], values[1], log=True)
                    if ends
                    else kinds.CategoricalDistribution(values)
                )
                params[key] = trial.options[name]
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=trial.figures))
        return study

    def _suggested(self, asked: Any, able: list[str]) -> tuple[str, dict[str, Any], int | None, float]:
        editor = asked.suggest_categorical("editor", able)
        strength = asked.suggest_float("strength", *STRENGTHS, log=True)
        block = asked.suggest_categorical(f"{editor}.block", self._blocks) if editor in PLACED else None
        options = {}
        for name, values in SPACES.get(editor, {}).items():
            key = f"{editor}.{name}"
            if isinstance(values, tuple):
                options[name] = asked.suggest_float(key, *values, log=True)
            else:
                options[name] = asked.suggest_categorical(key, values)
        return editor, options, block, strength

    @property
    def _blocks(self) -> list[int | None]:
        """None: the editor's own choice; else one of the responsible blocks."""
        return [None, *candidate_blocks(self.model, self.where, BLOCKS)]

    # --- trying it

    def _trial(self, number: int, editor: str, options: dict[str, Any], block: int | None, strength: float) -> Trial:
        key = self._key(editor, options, block, strength)
        file = self.folder / f"{key}.json"
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            return Trial(**{**kept, "number": number})
        start = time.monotonic()
        try:
            edit = self._edited(editor, options, block)
            edit = edit if strength == 1 else edit.scaled(strength)
            edit.save(self._file(key))
            figures: dict[str, Any] = dict(zip(FIGURES, self.judge(edit), strict=True))
        except ExciseError as error:
            figures = {"reason": str(error)}
        found = Trial(key, number, editor, options, block, strength, seconds=time.monotonic() - start, **figures)
        # The edit's file first: a trial whose line is there has its edit too.
        write_text(file, json.dumps(asdict(found), ensure_ascii=False) + "\n")
        return found

    def _edited(self, editor: str, options: Mapping[str, Any], block: int | None) -> Edit:
        if editor == "sum":
            a, b = (Edit.load(self._file(key)) for key in options["keys"])
            return a + b
        if (made := self._file(self._key(editor, options, block, 1.0))).is_file():
            return Edit.load(made)
        chosen = method("editor", editor)
        given = {"seed": self.seed, "texts": self.texts or None}
        shared = {o.name: given[o.name] for o in chosen.options if o.name in given}
        where = self.where if editor in GUIDED else None
        if block is not None:
            where = Localization.of([f"blocks.{block}.hook_resid_post@{rule}" for rule in ("subject_last", "last")])
        found: Edit = chosen.function(self.model, self.forget, self.retain, where, **{**shared, **options})
        return found

    def _key(self, *tried: Any) -> str:
        return digest(self._about, *tried)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    @cached_property
    def _about(self) -> str:
        """What every trial of this search depends on."""
        facts = [facts_digest(f) for f in (self.forget, self.retain, self.judge.facts)]
        where = [str(s) for s in self.where.sites] if self.where is not None else None
        return digest(__version__, self.model.fingerprint, facts, where, self.texts, self.seed)
