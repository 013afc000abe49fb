"""Export of an edit as a PEFT adapter. The model itself is not copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from excise.actions import LowRank, WeightAction
from excise.checkpoint import new_folder, record
from excise.checks import check
from excise.edits import Change, Edit
from excise.errors import ExciseError, NotBakeable

if TYPE_CHECKING:
    from excise.model import Model

# Singular values below this share of the largest are rounding.
NOISE = 1e-6


@dataclass(frozen=True)
class Factor:
    """What a stored matrix, or one expert's slice of it, gains: left [d_in, r] @ right [r, d_out]."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Number of factors."""
        return self.left.shape[1]


def export_peft(model: Model, edit: Edit, folder: str | Path, *, force: bool = False) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, by PEFT's own writer; the base model is named, not copied.

    Linear layers (GPT-2's transposed ones and fused ones too) become target modules, fused experts target parameters. The
    adapter's product with PEFT's scaling of 1 is the change itself, in float32. Raises ExciseError without the extra
    [peft], for matrices that PEFT's LoRA cannot reach (embeddings, tied or not) and for changes that are not low rank;
    NotBakeable for activation changes and gates.
    """
    peft = _peft()
    stuck = [str(c.site) for c in edit.changes if not c.bakeable]
    if stuck:
        raise NotBakeable(
            f"{', '.join(stuck)}: an adapter holds changes of matrices alone; use applied(), or --to steering"
        )
    if not edit.changes:
        raise ExciseError("the edit changes nothing, so there is no adapter to write")
    check(model, edit, force=force)
    modules, parameters = _targets(model, edit)
    with new_folder(folder) as temporary:
        shell = _filled(peft, model, modules, parameters)
        shell.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "excise.json").write_text(record(model, edit), encoding="utf-8")
    return Path(folder)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ExciseError("a PEFT adapter needs the extra [peft]: pip install 'excise[peft]'") from error
    return peft


def _targets(model: Model, edit: Edit) -> tuple[dict[str, Factor], dict[str, dict[int, Factor]]]:
    """The factors per linear module, and per fused parameter and expert."""
    modules: dict[str, Factor] = {}
    parameters: dict[str, dict[int, Factor]] = {}
    for name in dict.fromkeys(c.site.point for c in edit.changes):
        where = model.names.weight(name)
        found = _widened(model, name, _factor(model, name, [c for c in edit.changes if c.site.point == name]))
        if where.expert is not None:
            experts = parameters.setdefault(where.parameter, {})
            experts[where.expert] = _joined(experts.get(where.expert), found)
            continue
        module = model.hf.get_submodule(where.module)
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ExciseError(
                f"{name}: PEFT's LoRA adapts linear layers and experts, not a {type(module).__name__}; export a checkpoint"
            )
        if module.weight is model.hf.get_input_embeddings().weight:
            raise ExciseError(
                f"{name}: tied to the embedding, which an adapter of one of the two would tear apart; export a checkpoint"
            )
        modules[where.module] = _joined(modules.get(where.module), found)
    return modules, parameters


def _joined(a: Factor | None, b: Factor) -> Factor:
    return b if a is None else Factor(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right], 0))


def _factor(model: Model, name: str, changes: list[Change]) -> Factor:
    """All changes of one matrix as one product. Raises ExciseError when an adapter would not be smaller than the matrix."""
    actions = [c.action for c in changes]
    if all(isinstance(a, LowRank) for a in actions):
        found = None
        for a in actions:
            assert isinstance(a, LowRank)
            found = _joined(found, Factor(a.left.float().cpu(), a.right.float().cpu()))
        assert found is not None
    else:
        old = model.weight(name).detach().double().cpu()
        new = old
        for action in actions:
            assert isinstance(action, WeightAction)
            new = new + action.delta(new)
        u, s, v = torch.linalg.svd(new - old, full_matrices=False)
        keep = max(1, int((s > NOISE * s[0]).sum()))
        found = Factor((u[:, :keep] * s[:keep]).float(), v[:keep].float())
    d_in, d_out = model.weight(name).shape
    if found.rank * (d_in + d_out) >= d_in * d_out:
        raise ExciseError(
            f"{name}: the change has rank {found.rank} in a {d_in} x {d_out} matrix, so it is not low rank; export a checkpoint"
        )
    return found


def _widened(model: Model, name: str, found: Factor) -> Factor:
    """The factor on the whole stored matrix, where `name` is only some of its columns."""
    where = model.names.weight(name)
    if where.part is None:
        return found
    stored = model.hf.get_parameter(where.parameter)
    stored = stored if where.expert is None else stored[where.expert]
    right = torch.zeros(found.rank, stored.shape[0 if where.transposed else 1])
    right[:, where.part] = found.right
    return Factor(found.left, right)


def _filled(peft: Any, model: Model, modules: dict[str, Factor], parameters: dict[str, dict[int, Factor]]) -> Any:
    """A PEFT model without base weights that holds the factors: PEFT names, nests and writes them as it reads them."""
    from transformers import AutoModelForCausalLM

    # Fused parameters share one rank, smaller ones padded with zeros: PEFT's patterns are for modules.
    shared = max((f.rank for experts in parameters.values() for f in experts.values()), default=0)
    shared = shared or max(f.rank for f in modules.values())
    ranks = {name: f.rank for name, f in modules.items() if f.rank != shared}
    fused = all(isinstance(model.hf.get_submodule(n), Conv1D) for n in modules) and bool(modules)
    if fused != any(isinstance(model.hf.get_submodule(n), Conv1D) for n in modules):
        raise ExciseError(
            "the edit changes ordinary and transposed linear layers at once, which one adapter cannot; export a checkpoint"
        )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=shared,
        lora_alpha=shared,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),  # alpha / r = 1
        target_modules=list(modules),
        target_parameters=list(parameters) or None,
        fan_in_fan_out=fused,
        init_lora_weights=False,
        inference_mode=True,
    )
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.hf.config)
        plain.name_or_path = model.name  # what the adapter says it belongs to
        shell = peft.get_peft_model(plain, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    filled = set()
    for path, layer in shell.named_modules():
        if "default" not in getattr(layer, "lora_A", {}):
            continue
        target = path.removeprefix("base_model.model.").replace(".base_layer", "")
        if hasattr(layer, "parameter_name"):
            target = f"{target}.{layer.parameter_name}"
            a, b = _stacked(parameters[target], layer.num_experts, shared)
        else:
            a, b = modules[target].left.mT, modules[target].right.mT
        for side, tensor in (("lora_A", a), ("lora_B", b)):
            slot = getattr(layer, side)["default"]
            assert slot.weight.shape == tensor.shape, (target, slot.weight.shape, tensor.shape)
            slot.weight = nn.Parameter(tensor.contiguous(), requires_grad=False)
        filled.add(target)
    missing = [n for n in [*modules, *parameters] if n not in filled]
    if missing:
        raise ExciseError(f"{missing[0]}: PEFT {peft.__version__} does not adapt it; export a checkpoint")
    return shell


def _stacked(experts: dict[int, Factor], count: int, rank: int) -> tuple[Tensor, Tensor]:
    """Experts' factors as PEFT lays them out: A [experts * r, d_in] by expert, B [d_out, r * experts] by factor."""
    first = next(iter(experts.values()))
    a, b = torch.zeros(count, rank, len(first.left)), torch.zeros(first.right.shape[1], rank, count)
    for i, f in experts.items():
        a[i, : f.rank] = f.left.mT
        b[:, : f.rank, i] = f.right.mT
    return a.flatten(0, 1), b.flatten(1, 2)


__all__ = ["export_peft"]
