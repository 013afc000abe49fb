"""What a run writes down of itself: its settings, how to repeat and undo it, and the model's own words before and after."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from excise import __version__
from excise.arms import Arm
from excise.edits import Edit
from excise.facts import Fact, Facts, Prompt
from excise.files import write_text
from excise.verification import Verification

if TYPE_CHECKING:
    from excise.chain import Inputs


def own_words(inputs: Inputs, edit: Edit, count: int = 8) -> list[dict[str, str]]:
    """What the model says before and after, to one question a subject: forget facts first, then facts to keep."""
    asked: list[tuple[Fact, Prompt]] = []
    for group, most in (("forget", count), ("retain", count // 2), ("unknown", count // 4)):
        asked += [(f, (f.ask("question") or [f.prompt])[0]) for f in in_turn(inputs.facts.group(group), most)]
    prompts = [p for _, p in asked]
    arms = {"before": Arm("before", inputs.model), "edited": Arm("edited", inputs.model, edit)}
    if inputs.oracle is not None:
        arms["oracle"] = Arm("oracle", inputs.oracle)
    said = {name: arm.generate(prompts, max_new_tokens=16) for name, arm in arms.items()}
    return [
        {"group": f.group, "prompt": p.text, "answer": p.answer, **{name: texts[i] for name, texts in said.items()}}
        for i, (f, p) in enumerate(asked)
    ]


def in_turn(facts: Facts, most: int) -> list[Fact]:
    """The first fact of every subject, then the second of each, and so on; another relation for each subject."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject or fact.id, []).append(fact)
    turned = [group[i % len(group) :] + group[: i % len(group)] for i, group in enumerate(by_subject.values())]
    longest = max(map(len, turned), default=0)
    return [group[i] for i in range(longest) for group in turned if i < len(group)][:most]


def settings_of(inputs: Inputs) -> dict[str, Any]:
    """How the run can be repeated, in the words of the report."""
    oracle = {"oracle": inputs.oracle.name} if inputs.oracle else {}
    prints = {"model": inputs.model.fingerprint, "tokenizer": inputs.model.tokenizer_fingerprint}
    prints |= {"oracle": inputs.oracle.fingerprint} if inputs.oracle else {}
    return {
        "command": inputs.command,
        "model": inputs.model.name,
        **oracle,
        "facts": inputs.facts.counts,
        "forget": inputs.facts.group("forget").subjects,
        "localizer": inputs.localizer,
        "editor": inputs.editor if not inputs.trials else f"the best of {inputs.trials} tries",
        "options": {name: dict(given) for name, given in inputs.options.items()},
        "evaluations": list(inputs.evaluations),
        "seeds": {"run": inputs.seed},
        "fingerprints": prints,
        "versions": versions(),
        "undo": f"{inputs.model.name} was never written to: load it without edit.safetensors and all is as it was.",
    }


def versions() -> dict[str, str]:
    """Versions of everything that a number depends on."""
    from importlib import metadata

    names = ("torch", "transformers", "transformer-lens")
    return {"excise": __version__, "python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def write_run(
    inputs: Inputs,
    clock: Mapping[str, float],
    verification: Verification | None,
    samples: Sequence[Mapping[str, str]] = (),
    found: Mapping[str, Any] | None = None,
) -> None:
    """Write run.json; `verification` is None while the run is going on; found: what else the report is to say."""
    record = {
        "key": inputs.key,
        **settings_of(inputs),
        **(found or {}),
        "device": str(inputs.model.device),
        "threads": torch.get_num_threads(),
        "seconds": {k: round(v, 2) for k, v in clock.items()},
        "verification": None if verification is None else {"said": str(verification), "changes": verification.rows()},
        "samples": list(samples),
    }
    write_text(inputs.out / "run.json", json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
