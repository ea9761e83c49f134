# SPDX-License-Identifier: Apache-2.0
"""Stretches: long states are worked on a part at a time, since beside them there is no room for as many temporary ones.

Short states, and all those of samples of a few hundred numbers, are one part.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

NUMBERS = 2**17  # that are worked on at once, 1 MiB
DENSE = 2**20  # up to which there is room for some that may never be needed, 8 MiB


def stretches(shape: Sequence[int], rows: int) -> Iterator[slice]:
    """Stretches of the numbers of states of a shape `[.., b, d]`, of which so many rows are worked on at once."""
    _, members, size = shape
    return _slices(size, NUMBERS // (rows * members))


def blocks(count: int, numbers: int) -> Iterator[slice]:
    """Consecutive ones of so many states of so many numbers each."""
    return _slices(count, NUMBERS // numbers)


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of some tensors."""
    return functools.reduce(torch.add, terms)


def _slices(count: int, width: int) -> Iterator[slice]:
    for begin in range(0, count, max(width, 1)):
        yield slice(begin, min(begin + max(width, 1), count))
