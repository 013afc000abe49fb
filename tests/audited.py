"""What a report is tried on: planted results of an audit, and facts, a localization and an edit with hostile text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from excise.facts import Fact, Facts, Prompt
from excise.scores import Localization, Results, Score, TraceMap
from excise.sites import Site

EVIL = """<script>alert('x')</script>"><img src=x onerror="alert(1)">&amp;"""
ARMS = {"before": 1.0, "edited": 0.0, "oracle": 0.0}


def facts(evil: str = EVIL) -> Facts:
    found = []
    for i in range(12):
        subject = f"Person {i} {evil if i == 0 else ''}".strip()
        prompts = (
            Prompt(f"{subject} lives in", f"Rome{evil}", subject),
            Prompt(f"Where does {subject} live?", f"Rome{evil}", subject, form="question"),
        )
        found.append(
            Fact(
                f"f{i}{evil if i == 0 else ''}",
                subject,
                f"Rome{evil}",
                prompts,
                "home",
                ("forget", "retain", "neighbour")[i % 3],
            )
        )
    return Facts(found)


def localization() -> Localization:
    sites = tuple(Site(f"blocks.{i}.hook_resid_post", "subject_last") for i in range(3))
    grid = np.random.default_rng(0).random((3, 4))
    maps = (
        TraceMap(f"f0{EVIL}", ("<s>", EVIL, "b", "in"), (1, 3), {"resid": grid, "mlp": grid, "attn": grid}, 0.0, 1.0),
    )
    return Localization(sites, np.ones((1, 3)), (f"f0{EVIL}",), {"method": "causal_trace"}, None, maps)


def edit() -> Any:
    row = {"site": "blocks.1.mlp.W_out", "kind": "low rank", "rank": 2, "norm": 0.123456, "gate": EVIL}
    return SimpleNamespace(summary=lambda: [row], recipe={"method": EVIL})


def planted(values: dict[str, float] | float, group: str = "forget", variant: str = "") -> list[Score]:
    given = values if isinstance(values, dict) else {f"f{i}": values for i in range(12)}
    return [Score(f, f, group, v, variant=variant) for f, v in given.items()]


def audit(draws: dict[str, float], skips: dict[str, float]) -> Results:
    """Everything is forgotten; relearning draws so much by step, and skipping a layer so much by fact."""
    found: dict[tuple[str, str], tuple[Score, ...]] = {}
    for arm, known in ARMS.items():
        recall = planted(known) + [Score(f"k{i}", f"k{i}", "retain", 1.0) for i in range(12)]
        lens = planted(known, variant="hit@5, any layer") + planted(-known, variant="log-probability, layer 3")
        drawn = draws if arm == "edited" else dict.fromkeys(draws, known)
        steps = [s for name, value in drawn.items() for s in planted(value, variant=f"lora, step {name}")]
        best = planted(max(drawn.values()), variant="lora, best")
        skipped = planted(skips if arm == "edited" else known, variant="any")
        quiet = planted(known) + planted(1.0, "retain")
        found |= {
            (arm, "recall"): tuple(recall), (arm, "lens"): tuple(lens), (arm, "relearning"): tuple(steps + best),
            (arm, "layer_skip"): tuple(skipped), (arm, "refusal_suppression"): tuple(quiet),
            (arm, "rouge"): tuple(planted(known, variant="rougeL recall") + planted(1.0, "retain", "rougeL recall")),
        }  # fmt: skip
    return Results(found, {"before": "none", "edited": "weight", "oracle": "none"})


SKIPS = {f"f{i}": float(i < 9) for i in range(12)}
