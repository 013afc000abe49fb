"""Readings that are not taken twice while many edits of one model are made one after another, as in a search.

Outside `readings_kept()` nothing is kept. A reading is found again for the same arguments and the model as it was then, with
the same values in every parameter and the same hooks: an edit that has come and gone in between does no harm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from excise.model import Model

Given = ParamSpec("Given")
Found = TypeVar("Found")
# Bytes that are kept at most; the reading that was not asked for the longest goes first.
MOST = 1 << 30


class _Memo:
    def __init__(self, most: int) -> None:
        self.most, self.size = most, 0
        self.found: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any, take: Callable[[], Any]) -> Any:
        if key in self.found:
            self.found.move_to_end(key)
            return self.found[key][0]
        value = take()
        self.found[key] = value, _bytes(value)
        self.size += self.found[key][1]
        while self.size > self.most:
            self.size -= self.found.popitem(last=False)[1][1]
        return value


_MEMO: ContextVar[_Memo | None] = ContextVar("memo", default=None)


@contextmanager
def readings_kept(most: int = MOST) -> Iterator[None]:
    """Within it, readings are kept, of at most so many bytes of tensors; what they return must not be written to."""
    token = _MEMO.set(_Memo(most))
    try:
        yield
    finally:
        _MEMO.reset(token)


def reading(function: Callable[Concatenate[Model, Given], Found]) -> Callable[Concatenate[Model, Given], Found]:
    """Decorates a function of a model and plain values that only reads the model."""

    @wraps(function)
    def kept(model: Model, /, *args: Given.args, **options: Given.kwargs) -> Found:
        memo = _MEMO.get()
        if memo is None:
            return function(model, *args, **options)
        key = (function.__qualname__, model.state, _frozen(args), _frozen(options))
        found: Found = memo.get(key, lambda: function(model, *args, **options))
        return found

    return kept


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, parts))
