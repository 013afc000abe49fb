"""Editors: one method per file, each `(model, forget, retain, where, *, options) -> Edit`."""

from edit.control import control
from edit.rocr import rocr

__all__ = ["control", "rocr"]
