# SPDX-License-Identifier: Apache-2.0
"""Pilot runs: what a method takes on the user's own model, from a run with noise of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from paradiff.chain.correlated import Correlated
from paradiff.chain.noise import Keyed, Noise
from paradiff.chain.table import Table
from paradiff.methods.presets import sequential
from paradiff.planning.choice import CHECKED
from paradiff.planning.cost import Trace
from paradiff.planning.latency import LatencyCurve
from paradiff.solver.by_row import ByRow
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample, solve
from paradiff.solver.protocol import Batch, Method, Round

SEED = 2**40
"""Seed of the first pilot's noise, which no user's sample is likely to have."""

WALKED = 2.0
"""Seconds after which a sequential pilot ends, and the rest of its steps are taken to be like those that it made."""

SHORT = 1.0
"""Seconds below which a pilot is made twice, and the second run counts."""


class Kept(Evaluator, alike=True):
    """An evaluator that keeps the rows of its rounds, and the seconds of its calls.

    Args:
        of: The evaluator whose model, device and bound it shares.
    """

    def __init__(self, of: Evaluator) -> None:
        vars(self).update(vars(of))
        self.widths: list[int] = []
        self.called = 0.0

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs, as the evaluator's."""
        begin = time.perf_counter()
        outputs = super().__call__(batch)
        self.called += time.perf_counter() - begin
        self.widths.append(len(batch.x))
        return outputs


def pilot_noise(evaluator: Evaluator, noise: Noise, number: int) -> Noise:
    """The noise of a pilot: of the shape, number of samples and covariance of another; that one, for a model that knows it."""
    if isinstance(evaluator.denoiser, ByRow) and evaluator.denoiser.noise is not None:
        return noise
    keyed = Keyed(noise.shape, SEED + number, noise.samples)
    return noise.over(keyed) if isinstance(noise, Correlated) else keyed


def pilot(
    evaluator: Evaluator, table: Table, noise: Noise, method: Method, curve: LatencyCurve, limit: float, *, own: bool
) -> Trace:
    """The trace of a run, or of its beginning where it takes longer on the curve than `limit` seconds.

    Args:
        evaluator: The model.
        table: The chain.
        noise: The pilot's noise.
        method: The method.
        curve: The latency curve.
        limit: Seconds on the curve, after which the run is cut.
        own: Whether the curve is that of this machine; seconds beside the network are then all that the curve does not explain.

    Raises:
        ValueError: As `sample` does.
    """
    trace, seconds = _run(evaluator, table, noise, method, curve, limit, own)
    if seconds < SHORT:  # the first run sets up what later ones find
        trace, _ = _run(evaluator, table, noise, method, curve, limit, own)
    return trace


def _run(
    evaluator: Evaluator, table: Table, noise: Noise, method: Method, curve: LatencyCurve, limit: float, own: bool
) -> tuple[Trace, float]:
    """The trace of a run as `pilot` has it, and its seconds."""
    kept = Kept(evaluator)
    spent = 0.0

    def watch(round: Round) -> bool:
        nonlocal spent
        spent += curve.within(kept.widths[-1])
        return spent > limit

    begin = time.perf_counter()
    found = sample(kept, table, noise, method, observer=watch)
    found.sample.flatten()[-1:].tolist()  # waits for the device
    seconds = time.perf_counter() - begin
    return Trace.of_widths(kept.widths, noise.samples, seconds - (spent if own else kept.called)), seconds


@torch.inference_mode()
def sequential_pilot(evaluator: Evaluator, table: Table, noise: Noise, curve: LatencyCurve, *, own: bool) -> Trace:
    """The trace of the plain chain, of which only the first steps are walked where it is long."""
    kept = Kept(evaluator)
    samples = noise.samples
    if curve.within(samples) * table.steps < WALKED:
        if curve.within(samples) * table.steps < SHORT:  # the first run sets up what later ones find
            sample(kept, table, noise, sequential())
            kept.called = 0.0
        begin = time.perf_counter()
        sample(kept, table, noise, sequential()).sample.flatten()[-1:].tolist()
        seconds = time.perf_counter() - begin
        beside = seconds - (curve.within(samples) * table.steps if own else kept.called)
        return Trace(((samples, table.steps),), samples, max(beside, 0.0))
    rounds = solve(table, noise, sequential(), device=evaluator.device)
    batch = next(rounds)
    step: Callable[[Batch], Batch] = lambda batch: rounds.send(kept(batch))  # noqa: E731
    batch = step(batch)  # the first call sets things up
    begin, called, walked = time.perf_counter(), kept.called, 0
    while time.perf_counter() - begin < WALKED and walked < table.steps - 2:
        batch = step(batch)
        walked += 1
    batch.x.flatten()[-1:].tolist()
    seconds = (time.perf_counter() - begin) / max(walked, 1)
    rounds.close()
    explained = curve.within(samples) if own else (kept.called - called) / max(walked, 1)
    checks = CHECKED * curve.within(1)
    return Trace(((samples, table.steps),), samples, max((seconds - explained) * table.steps, 0.0) + checks)
