# SPDX-License-Identifier: Apache-2.0
"""What is known of a class, found once and kept as long as the class: one that is made for a call, or in it, may hold a network
in the variables of its methods, and would keep it alive from a cache of the usual kind."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def by_class(find: Callable[[type], Found]) -> Callable[[type], Found]:
    """A function of a class that is called once for each. What it returns may not refer to the class."""
    kept: weakref.WeakKeyDictionary[type, Found] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def known(kind: type) -> Found:
        if kind not in kept:
            kept[kind] = find(kind)
        return kept[kind]

    return known
