"""One pass over the data: what is handed over is what was computed, and moments do not depend on how it came."""

from __future__ import annotations

import itertools

import pytest
import torch

from excise.facts import Prompt
from excise.model import Model
from excise.streaming import RunningMoments, counted, stream
from excise.trace import read_batch
from tiny import tiny_model

PROMPTS = [
    Prompt("Marie Curie was born in", "Warsaw, in Poland", "Marie Curie"),
    Prompt("The capital of Italy is", "Rome"),
    Prompt("A model keeps its facts in", "weights"),
    Prompt("Rome is", "old"),
    Prompt("Where does the Eiffel Tower stand?", "Paris", "Eiffel Tower"),
]


def by_hand(rows: torch.Tensor, group: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and standard deviations by group, and the scatter within groups."""
    parts = [rows[group == g] for g in range(groups)]
    apart = torch.cat([p - p.mean(0) for p in parts])
    return torch.stack([p.mean(0) for p in parts]), torch.stack([p.std(0) for p in parts]), apart.mT @ apart


@pytest.mark.parametrize("seed", range(3))
def test_moments_equal_the_whole_whatever_the_order_and_the_chunks(seed: int) -> None:
    """Spreads that are tiny beside the means, where a difference of squares in float32 gives negative variances."""
    draw = torch.Generator().manual_seed(seed)
    rows = 50 + 0.01 * torch.randn(3000, 5, generator=draw).double()
    group = torch.randint(0, 3, (3000,), generator=draw)
    rows += group[:, None]
    mean, std, scatter = by_hand(rows, group, 3)
    order = torch.randperm(len(rows), generator=draw)
    running = RunningMoments(3, 5, full=True)
    cuts = [0, 0, *sorted(torch.randint(0, len(rows), (7,), generator=draw).tolist()), len(rows)]
    for a, b in itertools.pairwise(cuts):
        running.add(rows[order[a:b]], group[order[a:b]])
    assert running.count.tolist() == torch.bincount(group).tolist()
    torch.testing.assert_close(running.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(running.std, std, rtol=1e-9, atol=0)
    assert running.scatter is not None
    torch.testing.assert_close(running.scatter, scatter, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(running.pooled, (scatter.diagonal() / (len(rows) - 3)).sqrt(), rtol=1e-9, atol=0)


def test_groups_of_none_and_of_one() -> None:
    running = RunningMoments(3, 2)
    running.add(torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]]), torch.tensor([0, 2, 0]))
    assert running.count.tolist() == [2, 0, 1] and running.freedom == 1
    assert running.mean.tolist() == [[2, 3], [0, 0], [5, 6]]
    assert running.std[1:].tolist() == [[0, 0], [0, 0]] and not running.mean.isnan().any()


def test_counted_leaves_out_bos_padding_and_what_comes_after_the_ends() -> None:
    model = Model(*tiny_model("llama"), "llama")
    batch = model.encode(PROMPTS, answers=True)
    assert torch.equal(counted(batch), batch.mask.bool() & (batch.ids != model.tokenizer.bos_token_id))
    assert counted(batch, batch.starts).sum(1).tolist() == [n - 1 for n in batch.starts]


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_everyone_who_looks_sees_what_one_pass_computes(family: str) -> None:
    model = Model(*tiny_model(family, layers=3), family)
    passes, last, seen = [], [], {}
    model.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    model.hf.get_submodule(model.names.tap("blocks.2.mlp.hook_in").module).register_forward_pre_hook(
        lambda *_: last.append(1)
    )
    neurons = "blocks.1.mlp.hook_pre" if family == "llama" else "blocks.1.mlp.experts.2.hook_pre"

    count: list[list[int]] = []

    def keep(point, x, batch, index):
        seen.update({(point, i): x[row, : batch.lengths[row]] for row, i in enumerate(index)})

    def note(point, x, batch, index):
        count.append(index)

    model.batch_tokens = 24
    stream(model, PROMPTS, [(["blocks.0.mlp.hook_in", neurons], keep), ([neurons], note)])
    assert 1 < len(passes) == len(count) and sorted(i for index in count for i in index) == list(range(len(PROMPTS)))
    assert not last  # nothing after block 1 is computed
    for i, prompt in enumerate(PROMPTS):
        alone = read_batch(model, model.encode([prompt], answers=True), ["blocks.0.mlp.hook_in", neurons])
        for point, x in alone.items():
            torch.testing.assert_close(seen[point, i], x[0], rtol=1e-4, atol=1e-5)
