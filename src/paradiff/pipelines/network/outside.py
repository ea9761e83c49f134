# SPDX-License-Identifier: Apache-2.0
"""Numbers and texts outside of networks that their functions read: global variables, variables of closures, attributes of
classes and objects, environment variables.

What a loop sets there in each of its passes belongs to a place in the chain, and there is one of it for all states of a window.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from paradiff.pipelines.network.holder import Holder
from paradiff.pipelines.network.plain import PLAIN
from paradiff.pipelines.network.reads import is_read, names
from paradiff.pipelines.network.walk import Walk

OBJECTS = 256
"""Objects, containers and variables that are looked at, at most."""

ENVIRONMENT = {"environ", "getenv", "environb"}
"""Names by which functions read the environment."""


class Outside:
    """What some networks read outside of themselves, when it was last looked at.

    Args:
        networks: The networks by name.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        walk = Walk(networks.items(), (), ())
        modules = [module for network in networks.values() for module in network.modules()]
        own = {id(part) for module in modules for part in (module, module._buffers)}
        self._functions = walk.functions
        found = [holder for holder in walk.holders if not holder.hooks and id(holder.owner) not in own]
        self._holders = found[:OBJECTS] if walk.functions else []
        self._asks = any(names(function.__code__) & ENVIRONMENT for function in walk.functions)
        self._marked, self._environment = self._now()

    def mark(self) -> None:
        """Takes the present values."""
        self._marked, self._environment = self._now()

    def changed(self) -> str | None:
        """The path of a value that is another one since `mark`; None if there is none, or no function reads it."""
        for holder, before in zip(self._holders, self._marked, strict=True):
            now = _plain(holder)
            if now != before:
                for key in [*before, *(key for key in now if key not in before)]:
                    if (key not in before or key not in now or before[key] != now[key]) and self._is_read(holder.reached(key)):
                        return holder.label(key)
        return "the environment" if self._asks and self._environment != dict(os.environ) else None

    def _now(self) -> tuple[list[dict[Any, Any]], dict[str, str]]:
        """The holders' values, and the environment where it is asked."""
        return [_plain(holder) for holder in self._holders], dict(os.environ) if self._asks else {}

    def _is_read(self, name: str) -> bool:
        return not name or any(is_read(name, function) for function in self._functions)


def _plain(holder: Holder) -> dict[Any, Any]:
    """The numbers and texts among a holder's values, and which tensors, in which version, are there."""
    values = holder.read()
    found = {key: (type(value), value) for key, value in values.items() if isinstance(value, PLAIN) and value == value}
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    return found | {key: (id(value), -1 if value.is_inference() else value._version) for key, value in tensors.items()}
