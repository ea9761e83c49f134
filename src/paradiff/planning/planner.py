# SPDX-License-Identifier: Apache-2.0
"""Makes the plan of a model and a chain: its latency curve, what methods take on it, and the choice.

What a method takes is known, in this order, from stored traces of this model and chain, from pilot runs (trials.py), and from
the library's own models on like chains.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.errors import require_real, require_whole, shown
from paradiff.methods.presets import sequential
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.planning.choice import Choice
from paradiff.planning.cost import Devices, Trace
from paradiff.planning.curves import MEASURED, curve_of
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.pilots import pilot, pilot_noise, sequential_pilot
from paradiff.planning.plan import Plan
from paradiff.planning.traces import traces_of
from paradiff.planning.trials import Trials
from paradiff.planning.wish import Objective, Wish
from paradiff.solver.arguments import require_model, require_problem
from paradiff.solver.evaluator import Evaluator

PATIENCE, GRACE = 1.25, 2.0
"""Times as long as the plain chain that a pilot may take on the curve before it is cut, and seconds more, since a short one is
better made to its end than foreseen from its beginning."""

MOST_PILOTS = 1000
"""Most runs of each choice that a plan is asked to try."""


def devices_asked(tolerance: Any, pilots: Any, most: Any, devices: Any, curve: Any) -> Devices:
    """The devices of a plan, if what it was asked with is of the right kinds.

    Raises:
        ValueError: If not.
    """
    require_real("the tolerance", tolerance, positive=True)
    require_whole("pilots", pilots, 0, most=MOST_PILOTS)
    if most is not None:
        require_whole("the most rows of a sample", most, 1, ", or None for no bound")
    if curve is not None and not isinstance(curve, LatencyCurve):
        raise ValueError(f"the latency curve is {shown(curve)}; give a LatencyCurve, such as LatencyCurve({{1: 1.0, 4: 1.44}})")
    return devices if isinstance(devices, Devices) else Devices(devices)


def plan_of(
    denoiser: Any,
    table: Table,
    noise: Noise,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    most: int | None = None,
    devices: Devices | int = 1,
    curve: LatencyCurve | None = None,
    pilots: int = 1,
    objective: Objective | None = None,
    deadline: float | None = None,
    seconds: float = MEASURED,
    folder: Path | None = None,
) -> Plan:
    """Plans the sampling of a model (`paradiff.plan`).

    Args:
        denoiser: The model, or an evaluator of it.
        table: The chain.
        noise: The states' shape and the number of samples; its draws are not used.
        tolerance: Root mean square error that a sample may have by estimate.
        most: Most rows of a sample in a round; None for no bound.
        devices: Devices that share the rows of a round, simulated where they are several.
        curve: A latency curve, of another device say; None for that of this machine.
        pilots: Runs of each choice that is tried, at most 1000; 0 for none, where all is foreseen from traces and like chains.
        objective: What is made least, as `auto` has it; None for the seconds.
        deadline: Seconds within which the best sample is wanted; None for no bound.
        seconds: How long the curve's measurement takes, about.
        folder: Where curves and traces are kept; None for the user's cache folder.

    Raises:
        ValueError: If an argument is of another kind.
    """
    require_problem(table, noise, sequential())
    devices = devices_asked(tolerance, pilots, most, devices, curve)
    wish = Wish(tolerance, most, None, objective, deadline, devices=devices)
    if not isinstance(denoiser, Evaluator):
        require_model(denoiser)
    evaluator = denoiser if isinstance(denoiser, Evaluator) else Evaluator(denoiser)
    own = curve is None
    notes: list[str] = []
    if curve is None:
        curve, notes = curve_of(evaluator, table, noise, seconds=seconds, folder=folder)
    traces = traces_of(evaluator, table, noise.shape, folder)
    notes += traces.notes
    trials = Trials(table, noise.samples, tolerance, curve, devices, most, traces.known if own else {})
    if pilots:
        begin = time.perf_counter()
        trials.make(
            pilots,
            lambda: sequential_pilot(evaluator, table, pilot_noise(evaluator, noise, 0), curve, own=own),
            lambda one, number, plain: _pilot(
                evaluator, table, pilot_noise(evaluator, noise, number), one, curve, PATIENCE * plain + GRACE, own
            ),
        )
        if trials.tried:
            notes.append(f"pilot runs of {'; '.join(trials.tried)} took {time.perf_counter() - begin:.2g} s")
        if own and trials.made:
            traces.notes.clear()
            traces.add(trials.made)
            notes += traces.notes
    return trials.plan(notes, wish, simulated=not own)


def _pilot(
    evaluator: Evaluator, table: Table, noise: Noise, one: Choice, curve: LatencyCurve, limit: float, own: bool
) -> Trace | None:
    """A pilot; None where the method does not fit the chain."""
    try:
        return pilot(evaluator, table, noise, one.method, curve, limit, own=own)
    except ValueError:
        return None
