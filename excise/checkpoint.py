"""Export: an edited model as a plain checkpoint that `transformers` loads without excise."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from excise.apply import bake
from excise.edits import Edit
from excise.errors import ExciseError

if TYPE_CHECKING:
    from excise.model import Model


def export(model: Model, edit: Edit, folder: str | Path, *, force: bool = False) -> Path:
    """Write model + edit as a plain checkpoint with tokenizer and an `excise.json` that says what was done.

    The model in memory is unchanged afterwards, to the bit. The folder appears only when complete.
    Raises NotBakeable for edits with activation changes or gates, ExciseError when the folder is not empty.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise ExciseError(f"{target}: not empty; choose a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    baked = bake(model, edit, force=force)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        model.hf.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        (temporary / "excise.json").write_text(
            json.dumps(_record(model, edit), indent=1, sort_keys=True), encoding="utf-8"
        )
        if target.exists():
            target.rmdir()
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError as error:
        raise ExciseError(
            f"{target}: could not write the checkpoint ({error.strerror or error}); free some space or choose another folder"
        ) from error
    finally:
        baked.revert()
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _record(model: Model, edit: Edit) -> dict[str, object]:
    parameters = sorted({model.names.weight(c.site.point).parameter for c in edit.changes})
    return {
        "base": model.name,
        "recipe": edit.recipe,
        "fingerprints": edit.fingerprints,
        "changed parameters": parameters,
    }
