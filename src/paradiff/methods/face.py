# SPDX-License-Identifier: Apache-2.0
"""What methods show of themselves, and when two are equal.

A method is shown as the call that one would write: its name, and the fields that differ from the defaults of its class.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from paradiff.chain.slope import label
from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_whole, shown

LISTED = 8
"""Numbers of a longer sequence that are shown, at its two ends together."""


class Face:
    """A method's repr, equality and hash, for frozen dataclasses that leave these to it (`repr=False, eq=False`)."""

    def __repr__(self) -> str:
        text = _call(getattr(self, "name", type(self).__name__), self, but=("name",))
        lines = textwrap.wrap(text, 120, subsequent_indent="    ", max_lines=3, placeholder=" ...", break_on_hyphens=False)
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; tensors are by their numbers."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(one, two) for (_, one), (_, two) in zip(_fields(self), _fields(other), strict=True))

    def __hash__(self) -> int:
        return hash((type(self), *(_key(value) for _, value in _fields(self))))


def _fields(value: object) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    return ((field, getattr(value, field.name)) for field in dataclasses.fields(cast("Any", value)))


def _same(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and bool((one.cpu() == two.cpu()).all())
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return False
    try:
        return bool(one == two)
    except Exception:  # of a user's own slope, which may compare as it likes
        return one is two


def _key(value: object) -> object:
    """A hashable stand-in, equal for equal values."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    try:
        hash(value)
    except Exception:  # as above
        return type(value)
    return value


def _call(name: str, value: object, but: Sequence[str] = ()) -> str:
    """A dataclass as the call that makes it."""
    given = [
        f"{field.name}={_shown(own)}"
        for field, own in _fields(value)
        if field.name not in but and (field.default is dataclasses.MISSING or not _same(own, field.default))
    ]
    return f"{name}({', '.join(given)})"


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"slope of {'x'.join(map(str, value.shape))}"
    if isinstance(value, Table):
        return f"{value.name} of {value.steps} steps"
    if isinstance(value, tuple) and len(value) > LISTED and are_whole(value):
        half = LISTED // 2
        return f"({', '.join(map(str, value[:half]))}, ..., {', '.join(map(str, value[-half:]))}: {len(value)} numbers)"
    if isinstance(value, Path):
        return repr(str(value))
    if callable(value):
        return label(cast("Callable[..., Any]", value))
    if dataclasses.is_dataclass(value):
        return _call(type(value).__name__, value)
    return shown(value)


def plain(value: Any) -> Any:
    """A whole number as Python's, a sequence of them as a tuple; any other value as it is."""
    if is_whole(value):
        return int(value)
    return tuple(map(int, value)) if are_whole(value) else value


def settle(method: object, *wholes: str, numbers: Sequence[str] = ()) -> None:
    """Puts the fields of a frozen method into the form in which they are compared.

    Args:
        method: Its fields are of the right kinds.
        wholes: Fields that hold whole numbers, sequences of them, or something else, which stays.
        numbers: Fields that hold a number.
    """
    for name in wholes:
        object.__setattr__(method, name, plain(getattr(method, name)))
    for name in numbers:
        object.__setattr__(method, name, float(getattr(method, name)))
