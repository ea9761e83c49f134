# SPDX-License-Identifier: Apache-2.0
"""The choices for a chain, each with its predicted seconds, fastest first."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paradiff.chain.table import Table
from paradiff.methods.presets import sequential
from paradiff.planning import library
from paradiff.planning.candidates import FAMILIES, called, windows_of
from paradiff.planning.cost import ONE, Cost, Devices, Trace
from paradiff.planning.latency import LatencyCurve
from paradiff.solver.protocol import Method

SEQUENTIAL = "sequential"

STEP = 1.5e-4
"""Seconds of a sequential step beside the network, where no run was made."""

CHECKED = 10
"""Rows, about, that a run evaluates again by themselves to check the model; the library's figures are without them."""

Known = Callable[[str, int], Sequence[Trace]]
"""Traces of a method's label for so many samples."""


@dataclass(frozen=True)
class Choice:
    """One way to walk a chain.

    Attributes:
        family: The method's name.
        window: Most rows of a sample in a round; None for the whole chain.
        method: The method.
        cost: What it takes.
        seconds: Predicted seconds, the median over what is known.
        fastest: The least of them.
        slowest: The most.
    """

    family: str
    window: int | None
    method: Method
    cost: Cost
    seconds: float
    fastest: float
    slowest: float

    @property
    def sequential(self) -> bool:
        """Whether it is the plain chain."""
        return self.family == SEQUENTIAL

    @property
    def label(self) -> str:
        """Name and window, for tables."""
        if self.sequential:
            return self.family
        return f"{self.family}, {'whole chain' if self.window is None else f'window {self.window}'}"

    @property
    def call(self) -> str:
        """The call by which it is asked for by name."""
        return called(self.family, self.window, self.method.tolerance)


def choice(family: str, window: int | None, method: Method, cost: Cost, curve: LatencyCurve, devices: Devices = ONE) -> Choice:
    """A choice with its seconds on a curve."""
    seconds = cost.seconds(curve, devices)
    return Choice(family, window, method, cost, statistics.median(seconds), seconds[0], seconds[-1])


def plain(table: Table, samples: int, curve: LatencyCurve, traces: Sequence[Trace] = ()) -> Choice:
    """The sequential chain, on one device whatever there are: each of its rounds is one row a sample."""
    cost = Cost(traces, "trace") if traces else Cost([Trace(((samples, table.steps),), samples, STEP * table.steps)], "library")
    return choice(SEQUENTIAL, 1, sequential(), cost, curve)


def choices(
    table: Table,
    samples: int,
    tolerance: float,
    curve: LatencyCurve,
    *,
    known: Known = lambda label, samples: (),
    devices: Devices = ONE,
    most: int | None = None,
) -> list[Choice]:
    """Every method and window of which anything is known, and the sequential chain, fastest first.

    How much longer this model takes with a method than the library's models do is taken to hold for the method's other windows,
    and in the median for other methods: it is mostly this model, or this machine.

    Args:
        table: The chain.
        samples: Samples that are solved together.
        tolerance: The tolerance of every method.
        curve: The latency curve.
        known: Traces of runs of this model; the library's own of like chains are taken where there are none.
        devices: Devices that share the rows of a round.
        most: Most rows of a sample in a round; None for no bound.
    """
    found = [plain(table, samples, curve, known(repr(sequential()), samples))]
    others: list[Choice] = []
    ratios: dict[str, list[float]] = {}
    for family, build in FAMILIES.items():
        for window in windows_of(table.steps, most):
            method = build(window, tolerance)
            if not fits(method, table):
                continue
            traces = known(repr(method), samples)
            like = library.known(table, family, window, tolerance, samples)
            expected = None if like is None else choice(family, window, method, _checked(like, curve), curve, devices)
            if traces:
                found.append(choice(family, window, method, Cost(traces, "trace"), curve, devices))
                if expected is not None:
                    ratios.setdefault(family, []).append(found[-1].seconds / expected.seconds)
            elif expected is not None:
                others.append(expected)
    factors = {family: statistics.median(of) for family, of in ratios.items()}
    usual = statistics.median(factors.values()) if factors else 1.0
    found += [_slower(one, factors.get(one.family, usual), curve, devices) for one in others]
    return sorted(found, key=lambda one: one.seconds)


def _checked(cost: Cost, curve: LatencyCurve) -> Cost:
    """A cost with the rows that check the model."""
    seconds = CHECKED * curve.within(1)
    return Cost([dataclasses.replace(trace, beside=trace.beside + seconds) for trace in cost.traces], cost.source)


def _slower(one: Choice, factor: float, curve: LatencyCurve, devices: Devices) -> Choice:
    """A choice whose runs take so many times as long."""
    traces = [dataclasses.replace(trace, factor=factor) for trace in one.cost.traces]
    return choice(one.family, one.window, one.method, Cost(traces, one.cost.source), curve, devices)


def fits(method: Method, table: Table) -> bool:
    """Whether a method fits a chain."""
    try:
        method.edges(table)
    except ValueError:
        return False
    return True
