"""Linear probes at the name and what routers separate: two more properties that localizers rely on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from excise.facts import Prompt
from excise.testbed.refusal import states_at_end
from excise.testbed.sampler import Sampler
from excise.testbed.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FOLDS, RIDGE = 8, 30.0
PROBED = ("birthplace", "profession", "employer", "pet", "hobby", "instrument", "dish")
ROUTED_DOCUMENTS = 1500


def attribute_probes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, people: tuple[str, ...]
) -> dict[str, object]:
    """Accuracy per relation and layer of a ridge classifier at the last token of a bare name, on unseen people."""
    states = states_at_end(model, tokenizer, [Prompt(person, "", person) for person in people], subject=True)
    result: dict[str, object] = {"n": len(people)}
    for relation in PROBED:
        values = sorted({world.answers[person, relation] for person in people})
        labels = torch.tensor([values.index(world.answers[person, relation]) for person in people])
        accuracies = [round(cross_validated(layer, labels), 4) for layer in states]
        result[relation] = {"chance": round(1 / len(values), 4), "accuracy": accuracies}
    return result


def cross_validated(features: Tensor, labels: Tensor) -> float:
    """Accuracy of one-against-all ridge regression over folds of people."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-5)
    targets = F.one_hot(labels).float()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    correct = 0
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        kept = order[torch.arange(len(order)) % FOLDS != fold]
        gram = features[kept] @ features[kept].T + RIDGE * torch.eye(len(kept))
        weights = torch.linalg.solve(gram, targets[kept] - targets[kept].mean(0))
        guesses = (features[held] @ features[kept].T @ weights).argmax(-1)
        correct += int((guesses == labels[held]).sum())
    return correct / len(labels)


@torch.no_grad()
def router_domains(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> list[dict[str, object]]:
    """Per layer: mutual information (nats) between a token's domain and its experts, and each domain's load."""
    documents = list(islice(Sampler(world, seed=2_000_000, people=world.retain_people), ROUTED_DOCUMENTS))
    domains = sorted({document.domain for document in documents})
    routers = [layer.mlp.gate for layer in model.model.layers]
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    load = torch.zeros(len(routers), len(domains), experts)
    for document in documents:
        row = domains.index(document.domain)
        ids = torch.tensor([tokenizer(document.text)["input_ids"]])
        handles = [gate.register_forward_hook(_counter(load[i, row], chosen)) for i, gate in enumerate(routers)]
        try:
            model.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return [_separation(layer, domains) for layer in load]


def _counter(counts: Tensor, chosen: int) -> Callable[[nn.Module, object, Any], None]:
    def count(module: nn.Module, inputs: object, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        picked = logits.topk(chosen, dim=-1).indices.flatten()
        counts.add_(torch.bincount(picked, minlength=len(counts)) / chosen)

    return count


def _separation(load: Tensor, domains: list[str]) -> dict[str, object]:
    joint = load / load.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information = (joint * (joint.clamp_min(1e-12) / independent.clamp_min(1e-12)).log()).sum()
    share = load / load.sum(1, keepdim=True)
    return {
        "mutual_information": round(float(information), 4),
        "load": {domain: [round(x, 3) for x in row.tolist()] for domain, row in zip(domains, share, strict=True)},
    }
