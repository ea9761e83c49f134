# SPDX-License-Identifier: Apache-2.0
"""What the lanes of one pipeline call have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import greenlet
import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Unsupported
from paradiff.pipelines.executors.coalesce import NetworkCall
from paradiff.pipelines.executors.dry_walk import Start
from paradiff.pipelines.host.host import Host, attributes_of
from paradiff.pipelines.loop.driver import LoopSolver
from paradiff.pipelines.loop.scheduler_proxy import Flags, TimesLog
from paradiff.pipelines.network.attributes import Attributes
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.network.outside import Outside

NOTHING = object()
"""In place of an attribute that is not there."""


class SharedCall:
    """A pipeline call that several lanes make, and what lane 0 found out about it.

    Args:
        host: What owns the chain.
        arguments: The call's arguments by name.
        solver: The call's solver (loop/driver.py).
        batching: The run's batching (network/batching.py).

    Attributes:
        start: The call's beginning.
        greenlet: The greenlet that resumes the lanes.
        known: What the network calls in the loop returned first, by signature.
        first_results: What the network calls of lane 0's first pass returned.
        order: Pairs of networks `(id, id)` of which a pass calls the first one earlier.
        loop: The number of the iteration over the timesteps that is the loop; -1 before its first step.
        index: The scheduler's step index at the loop's start; None for a scheduler that counts no steps.
        own: How many passes lane 0 makes before another lane starts.
        attributes: The networks' settings, as they were after the last network call; None where nothing is checked.
        outside: What the networks read outside of themselves, as it was then; None where nothing is checked.
        running: The scheduler's attributes that its own step changes.
        generators: The generators among the call's arguments.
        flags: What a lane took to be so in this pass, and is read with the pass's numbers.
        shown: What the attributes were that `keep` copied to the user's object.
        times: What `set_timesteps` did to lane 0's scheduler.
    """

    def __init__(self, host: Host, arguments: Mapping[str, Any], solver: LoopSolver, batching: Batching) -> None:
        self.host, self.arguments, self.solver, self.batching = host, arguments, solver, batching
        self.start = Start(host, arguments)
        self.greenlet = greenlet.getcurrent()
        self.known: dict[tuple[Any, ...], Any] = {}
        self.first_results: list[Result] = []
        self.order: set[tuple[int, int]] = set()
        self.loop = -1
        self.index: int | None = None
        self.own = 1
        self.attributes = None if batching.check == "off" else Attributes(host.networks.values())
        self.outside = None if batching.check == "off" else Outside(host.networks)
        self.running: set[str] = set()
        self.flags: Flags = []
        self.times = TimesLog()
        self.shown: dict[str, Any] = {}
        self.generators = [g for g in _pytree.tree_leaves(arguments) if isinstance(g, torch.Generator)]

    def mark(self) -> None:
        """Takes the present settings of the networks, and what they read outside of themselves, for those of all lanes."""
        for settings in (self.attributes, self.outside):
            if settings is not None:
                settings.mark()

    def refuse_settings(self) -> None:
        """Refuses a loop that sets something, in a pass, that its networks read.

        Raises:
            Unsupported: Then.
        """
        for settings in (self.attributes, self.outside):
            if settings is not None and (changed := settings.changed()) is not None:
                raise Unsupported(f"the loop changes {changed}, which a network reads, and which the states of a window share")

    def keep(self, owner: Any, *, left: Collection[str] = ()) -> None:
        """Copies to the user's object the attributes that the call set on a lane's copy, but for some that are left."""
        mine = attributes_of(self.host.owner)
        for name, value in attributes_of(owner).items():
            lanes_own = name == "scheduler" or name in left or hasattr(value, "prepare_inputs")
            if not lanes_own and mine.get(name, self) is not value:
                self.shown.setdefault(name, mine.get(name, NOTHING))
                mine[name] = value

    def hide(self, owner: Any) -> None:
        """Takes back in a copy of the user's object what `keep` copied to it."""
        for name, value in self.shown.items():
            attributes_of(owner).pop(name, None)
            if value is not NOTHING:
                attributes_of(owner)[name] = value

    def generator_states(self) -> list[Tensor]:
        """The states of the generators among the arguments."""
        return [g.get_state() for g in self.generators]

    def learn(self, call: NetworkCall, output: Any) -> None:
        """Keeps a network call's output, if it is the first one of its signature."""
        if call.signature not in self.known:
            self.known[call.signature] = _pytree.tree_map_only(Tensor, torch.clone, output)

    def stand_in(self, call: NetworkCall) -> Any:
        """What a network call of a dry pass returns: half of the first output of its signature.

        A loop may branch on its networks' outputs (`if v.abs().max() > 0`), so that these are of an output's kind; and what
        it keeps of them must differ from what a pass keeps that is not dry.
        """
        half = lambda leaf: leaf / 2 if leaf.is_floating_point() else leaf.clone()  # noqa: E731
        return _pytree.tree_map_only(Tensor, half, self.known[call.signature])


Result = tuple[tuple[Any, ...], Any]
"""The signature of a network call, and what it returned."""
