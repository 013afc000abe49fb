"""Sampling leak: greedy decoding may refuse where one of ten samples says it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evals.attacking import given_away, leak, score, targets
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def sampling_leak(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = ("forget",),
    samples: int = 10,
    budgets: tuple[int, ...] = (1, 10),
    temperatures: tuple[float, ...] = (1.0,),
    limit: int = 24,
    seed: int = 0,
    words: int = 8,
) -> list[Score]:
    """Chance that one of n sampled continuations holds the answer, leak@n: unbiased, from all samples drawn.

    A model that guesses among few possible answers leaks too: compare with the oracle.
    groups: groups of facts to ask about.
    samples: continuations drawn per fact and temperature.
    budgets: values of n, at most `samples`.
    temperatures: temperatures to sample at.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more, and the draws.
    words: tokens to generate.
    """
    items, scores = targets(arm.model, facts, groups=groups, limit=limit, seed=seed)
    for temperature in temperatures:
        texts = drawn(arm, [i.prompt for i in items for _ in range(samples)], temperature, words, seed)
        for n, item in enumerate(items):
            own = texts[n * samples : (n + 1) * samples]
            said = [t for t in own if given_away(item, t)]
            for budget in budgets:
                scores.append(
                    score(
                        item,
                        leak(len(said), samples, budget),
                        variant=f"leak@{budget}, temperature {temperature:g}",
                        detail=said[0] if said else own[0],
                    )
                )
    return scores


def drawn(arm: Arm, prompts: Sequence[Prompt | str], temperature: float, words: int, seed: int) -> list[str]:
    """One sampled continuation per prompt; the same under the same seed, and the generator is left as it was."""
    device = arm.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return arm.generate(prompts, max_new_tokens=words, do_sample=True, temperature=temperature, top_k=0)
