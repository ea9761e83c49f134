# SPDX-License-Identifier: Apache-2.0
"""The library's own figures of what each method takes, by kind of chain: library.json, of benchmarks/likechains.py.

For a chain of N steps the rows of the two nearest lengths of its kind are interpolated in log N, and the same in the logarithm
of the tolerance; windows are those that were measured. Every problem and seed gives a trace of its own, so that their spread
is that among models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from paradiff.chain.table import Table
from paradiff.planning.cost import Cost, Trace

FARTHEST = 2.6
"""Most by which the length of a chain may differ from the nearest that was measured, as a factor."""


@dataclass(frozen=True)
class Alternative:
    """A shorter sequential chain of a multistep solver, as near to the exact solution of the probability-flow ODE.

    Attributes:
        solver: Its name.
        fewest: The fewest steps on any of the library's models.
        most: The most.
    """

    solver: str
    fewest: int
    most: int


@cache
def _library() -> dict[str, Any]:
    path = files("paradiff.planning").joinpath("library.json")
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _rows() -> dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]]:
    """The rows by method, window and kind of chain, and by problem."""
    found: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in _library()["rows"]:
        key = row["method"], row["window"], row["stochastic"], row["flow"]
        found.setdefault(key, {}).setdefault(row["problem"], []).append(row)
    return found


def known(table: Table, method: str, window: int | None, tolerance: float, samples: int = 1) -> Cost | None:
    """What a method takes on chains like a table's; None where none was measured.

    Args:
        table: The chain.
        method: The method's name, as in `candidates.FAMILIES`.
        window: Most rows of a sample in a round; None for the whole chain.
        tolerance: The method's tolerance.
        samples: Samples that are solved together.
    """
    key = method, window, table.stochastic, table.prediction == "flow"
    return _known(key, table.steps, tolerance, samples)


@lru_cache(maxsize=4096)
def _known(key: tuple[Any, ...], steps: int, tolerance: float, samples: int) -> Cost | None:
    problems = _rows().get(key, {})
    traces = [trace for name in sorted(problems) for trace in _interpolated(problems[name], steps, tolerance, samples)]
    return Cost(traces, "library") if traces else None


def beyond(table: Table, tolerance: float) -> str | None:
    """A clause where a tolerance lies outside those that were measured on like chains, whose nearest stands for it."""
    measured = _tolerances(table.stochastic, table.prediction == "flow", table.steps)
    if not measured or measured[0] <= tolerance <= measured[-1]:
        return None
    nearest, change = (measured[0], "more") if tolerance < measured[0] else (measured[-1], "fewer")
    return f"rounds by the library's models are those of tolerance {nearest:g}; at {tolerance:g} there are {change}"


@cache
def _tolerances(stochastic: bool, flow: bool, steps: int) -> list[float]:
    """The tolerances that were measured at both of the lengths next to a chain's, of its kind."""
    rows = [row for row in _library()["rows"] if (row["stochastic"], row["flow"]) == (stochastic, flow)]
    if not rows:
        return []
    below, above, _ = _between(sorted({row["steps"] for row in rows}), steps)
    one, other = ({row["tolerance"] for row in rows if row["steps"] == at} for at in (below, above))
    return sorted(one & other)


def alternative(table: Table) -> Alternative | None:
    """The shorter sequential chain, for deterministic one-step chains of diffusion; None where none is known."""
    if table.stochastic or table.prediction == "flow" or table.band > 1:
        return None
    found = _library()["equal"]
    near = sorted({e["steps"] for e in found}, key=lambda steps: abs(math.log(steps / table.steps)))
    if not near or not 1 / FARTHEST < near[0] / table.steps < FARTHEST:
        return None
    rows = [e for e in found if e["steps"] == near[0]]
    calls = [max(1, round(e["calls"] * math.sqrt(table.steps / e["steps"]))) for e in rows]
    return Alternative(rows[0]["solver"], min(calls), max(calls))


def _interpolated(rows: Sequence[dict[str, Any]], steps: int, tolerance: float, samples: int) -> list[Trace]:
    """One trace a seed, of the rows of one problem, method and window."""
    lengths = sorted({row["steps"] for row in rows})
    if not lengths or not lengths[0] / FARTHEST < steps < lengths[-1] * FARTHEST:
        return []
    below, above, share = _between(lengths, steps)
    one, other = (_at_tolerance([row for row in rows if row["steps"] == at], tolerance) for at in (below, above))
    found = []
    for k in range(min(len(one), len(other))):
        rounds, evaluations, own = (_mix(a, b, share) for a, b in zip(one[k], other[k], strict=True))
        if below == above:
            scale = math.sqrt(steps / below)  # beyond what was measured
            rounds, evaluations = rounds * scale, evaluations * scale
        if rounds < steps:
            found.append((rounds, evaluations, own))
    if samples > 1 and found:  # the rounds of the slowest, and the rows of all
        slowest = max(rounds for rounds, _, _ in found)
        found = [(slowest, evaluations * samples, own * math.sqrt(samples)) for _, evaluations, own in found]
    return [_trace(rounds, evaluations, own, samples) for rounds, evaluations, own in found]


def _trace(rounds: float, evaluations: float, own: float, samples: int) -> Trace:
    count = max(1, round(rounds))
    return Trace(((max(1.0, evaluations / count), count),), samples, own * count)


def _at_tolerance(rows: Sequence[dict[str, Any]], tolerance: float) -> list[tuple[float, float, float]]:
    """Rounds, evaluations and own seconds of each seed, interpolated in the logarithm of the tolerance."""
    known = sorted({row["tolerance"] for row in rows})
    below, above, share = _between(known, max(tolerance, 1e-9))
    one, other = (next(row for row in rows if row["tolerance"] == at) for at in (below, above))
    return [
        (
            _mix(one["rounds"][k], other["rounds"][k], share),
            _mix(one["evaluations"][k], other["evaluations"][k], share),
            one["own"],
        )
        for k in range(min(len(one["rounds"]), len(other["rounds"])))
    ]


def _between(known: Sequence[float], value: float) -> tuple[Any, Any, float]:
    """The known numbers on both sides of a value, and how far it lies between their logarithms; the nearest one beyond them."""
    below = max((k for k in known if k <= value), default=known[0])
    above = min((k for k in known if k >= value), default=known[-1])
    share = 0.0 if below == above else math.log(value / below) / math.log(above / below)
    return below, above, share


def _mix(one: float, other: float, share: float) -> float:
    return math.exp((1 - share) * math.log(one) + share * math.log(other))
