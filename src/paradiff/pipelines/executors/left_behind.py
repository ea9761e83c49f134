# SPDX-License-Identifier: Apache-2.0
"""What the passes of a loop leave in places that outlive the call: global variables, closures, objects, the call's arguments.

A parallel run makes other passes than the loop, and more of them, but its last one is the loop's last. So what passes leave is
right if it is what the last pass alone would leave, whatever was there before: a time, a buffer for the present state. A log, a
count, a largest value or a table with a row of each pass is not. The dry walk (dry_walk.py) sees which of the two it is: its
passes in order, and the last one from what was there before the others, must leave the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from paradiff.pipelines.host.host import Host
from paradiff.pipelines.network.memory import Memory
from paradiff.pipelines.network.origin import users_methods


class LeftBehind:
    """What is within reach of a loop's own functions, and outlives its call, after the first pass of a walk.

    Args:
        host: What owns the chain.
        owner: The object of the walk, whose attributes are among what is left.
        arguments: The walk's arguments by name.
        scheduler: The walk's scheduler.

    Attributes:
        found: The path of what the last pass alone does not leave as all of them do; None if there is nothing.
    """

    def __init__(self, host: Host, owner: Any, arguments: Mapping[str, Any], scheduler: Any) -> None:
        self._roots = [*arguments.items(), *((method.__name__, method) for method in users_methods(host.kind))]
        self._owner = owner
        parts = [part for part in vars(owner).values() if isinstance(part, nn.Module)]
        modules = [module for network in [*host.networks.values(), *parts] for module in network.modules()]
        self._leave = [host, host.owner, host.scheduler, scheduler, *modules]
        self._before: Memory | None = self._memory() if users_methods(host.kind) else None
        self._after: Memory | None = None
        self.found: str | None = None

    def _memory(self) -> Memory:
        return Memory(self._roots, owners=[self._owner], leave=self._leave)

    def note(self) -> bool:
        """Takes what all passes left; whether they left anything."""
        if self._before is None or self._before.change() is None:
            return False
        self._after = self._memory()
        return True

    def restore(self) -> None:
        """Puts back what was there before the passes."""
        assert self._before is not None
        self._before.restore()

    def compare(self) -> None:
        """Compares what the last pass alone left with what all of them left."""
        assert self._after is not None
        change = self._after.change()
        self.found = None if change is None else change.path
