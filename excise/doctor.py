"""What excise can reach in a model: parameters by component, names, dtype and placement, tokenizer, experts."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from excise.model import Model
from excise.sites import Site

# Text with what trips tokenizers up: a name of several pieces, an apostrophe, an accent, a number.
SAMPLE = "Ada O'Neill-Zoë was born in 1815."


def doctor(model: Model) -> dict[str, Any]:
    """A report of plain values; `problems` lists what will not work, with what would do."""
    report: dict[str, Any] = {
        "model": model.name,
        "architecture": type(model.hf).__name__,
        **_weights(model),
        **_names(model),
        **_placement(model),
        "context": getattr(model.hf.config.get_text_config(), "max_position_embeddings", None),
        "tokenizer": _tokenizer(model),
        "fingerprint": model.fingerprint,
    }
    report["problems"] = _problems(report)
    return report


def lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (topic, text) pairs for a terminal."""
    tokenizer, names = report["tokenizer"], report["names"]
    offsets = "exact" if tokenizer["offsets"] else "missing"
    shares = ", ".join(f"{k} {v:.1%}" for k, v in report["components"].items())
    places = ", ".join(f"{k} {v:.0%}" for k, v in report["devices"].items())
    experts = f"{report['experts']} a block, {report['experts_per_token']} per token" if report["experts"] else "none"
    found = [
        ("model", f"{report['model']} ({report['architecture']})"),
        ("parameters", f"{report['parameters']:,} in {report['layers']} layers: {shares}"),
        ("experts", experts),
        ("tied embeddings", "yes: an edit of one is an edit of both" if report["tied_embeddings"] else "no"),
        (
            "names",
            f"{names['activations']} activations, {names['matrices']} matrices, "
            f"which reach {report['reachable']:.1%} of the parameters",
        ),
        ("dtype", ", ".join(report["dtypes"])),
        ("devices", places),
        ("context", f"{report['context'] or 'unknown'} tokens"),
        ("tokenizer", f"{tokenizer['class']}, {tokenizer['entries']} entries, offsets {offsets}"),
        ("BOS", "added" if tokenizer["adds_bos"] else "not added" if tokenizer["has_bos"] else "none"),
        ("chat template", "yes" if tokenizer["chat_template"] else "no: chat prompts are sent as plain text"),
        ("fingerprint", report["fingerprint"]),
    ]
    return found + [("problem", p) for p in report["problems"]]


def _weights(model: Model) -> dict[str, Any]:
    owner: dict[str, str] = {}
    for name in model.names.weights():
        owner.setdefault(model.names.weight(name).parameter, name)
    # A tied matrix has several names in the model and is counted once.
    sizes = {n: p.numel() for n, p in model.hf.named_parameters()}
    total = sum(sizes.values())
    counted: Counter[str] = Counter()
    for name, size in sizes.items():
        counted[_component(owner.get(name), name)] += size
    return {
        "parameters": total,
        "layers": model.n_layers,
        "components": {k: v / total for k, v in counted.most_common()},
        "reachable": sum(s for n, s in sizes.items() if n in owner) / total,
        "experts": model.names.n_experts,
        "experts_per_token": model.names.experts_per_token,
        "tied_embeddings": model.hf.get_output_embeddings() is not None
        and model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight,
    }


def _component(name: str | None, parameter: str) -> str:
    if name is None:
        return "norms and biases" if re.search(r"norm|ln_|bias|\bln", parameter) else "out of reach"
    site = Site(name)
    if site.expert is not None:
        return "experts"
    if name.endswith(".W_router"):
        return "routers"
    return name.removeprefix(f"blocks.{site.layer}.").split(".")[0]


def _names(model: Model) -> dict[str, Any]:
    points, matrices = model.names.points(), model.names.weights()
    first = [n for n in (*model.names.points(0), *model.names.weights(0))]
    return {"names": {"activations": len(points), "matrices": len(matrices), "block_0": first}}


def _placement(model: Model) -> dict[str, Any]:
    devices: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for parameter in model.hf.parameters():
        devices["offloaded" if parameter.is_meta else str(parameter.device)] += parameter.numel()
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    total = sum(devices.values())
    return {
        "dtypes": [d for d, _ in dtypes.most_common()],
        "devices": {k: v / total for k, v in devices.most_common()},
        "quantised": getattr(model.hf.config, "quantization_config", None) is not None,
    }


def _tokenizer(model: Model) -> dict[str, Any]:
    tokenizer = model.tokenizer
    ids = tokenizer(SAMPLE)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "class": type(tokenizer).__name__,
        "entries": len(tokenizer),
        "embeddings": model.hf.get_input_embeddings().weight.shape[0],
        "offsets": _offsets_hold(tokenizer),
        "has_bos": bos is not None,
        "adds_bos": bool(ids) and bos is not None and ids[0] == bos,
        "adds_eos": bool(ids) and eos is not None and ids[-1] == eos,
        "has_pad": tokenizer.pad_token_id is not None,
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }


def _offsets_hold(tokenizer: Any) -> bool:
    """Whether every letter of a text belongs to a token that says where it came from."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    spans = tokenizer(SAMPLE, return_offsets_mapping=True)["offset_mapping"]
    covered = {i for a, b in spans for i in range(a, b)}
    return all(i in covered for i, c in enumerate(SAMPLE) if not c.isspace())


def _problems(report: dict[str, Any]) -> list[str]:
    tokenizer, found = report["tokenizer"], []
    if not tokenizer["offsets"]:
        found.append(
            "the tokenizer does not say where its tokens come from, so subjects cannot be found; use its fast version"
        )
    if tokenizer["entries"] > tokenizer["embeddings"]:
        found.append(
            f"the tokenizer has {tokenizer['entries']} entries but the model {tokenizer['embeddings']} embeddings; "
            "they do not belong together"
        )
    if "offloaded" in report["devices"]:
        found.append("some weights are offloaded, and an edit of those would be lost; load the model without offload")
    if report["quantised"]:
        found.append("weights are quantised: hooks work, but editing and exporting need the full-precision checkpoint")
    if report["components"].get("out of reach", 0) > 0.01:
        found.append(
            f"{report['components']['out of reach']:.1%} of the parameters have no name that an edit could use"
        )
    return found
