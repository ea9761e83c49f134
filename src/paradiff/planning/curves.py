# SPDX-License-Identifier: Apache-2.0
"""The latency curve of a model on this machine, measured once and kept in the user's cache folder (store.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.planning.identity import curve_key, machine_facts
from paradiff.planning.latency import ROWS, LatencyCurve, measure_latency
from paradiff.planning.store import Store
from paradiff.solver.evaluator import Evaluator

MEASURED = 2.0
"""Seconds that a measurement takes, about."""


def curve_of(
    evaluator: Evaluator,
    table: Table,
    noise: Noise,
    *,
    seconds: float = MEASURED,
    folder: Path | None = None,
    anew: bool = False,
) -> tuple[LatencyCurve, list[str]]:
    """The curve of a model: the stored one, or one that is measured and stored.

    Args:
        evaluator: The model.
        table: Its chain.
        noise: The states' shape, and the number of samples; the curve has so many rows, and multiples of it.
        seconds: How long a measurement takes, about.
        folder: Where curves are kept; None for the user's cache folder.
        anew: Whether a stored curve is left out, and replaced.

    Returns:
        The curve, and sentences: which stored file was left out, or could not be written, and why.

    Raises:
        ValueError: If an argument is of another kind.
    """
    notes: list[str] = []
    found = None
    if not anew:
        found, notes = stored_curve(evaluator, noise, folder=folder)
    if found is not None and min(found.points) <= noise.samples:
        return found, notes
    rows = sorted({*(noise.samples * r for r in ROWS), *(() if noise.samples == 1 else (1,))})
    curve = measure_latency(evaluator, table, noise, rows=rows, seconds=seconds)
    return curve, [*notes, *keep(evaluator, noise, curve, folder=folder)]


def stored_curve(
    evaluator: Evaluator, noise: Noise, *, folder: Path | None = None, key: str | None = None
) -> tuple[LatencyCurve | None, list[str]]:
    """The stored curve of a model, without a call of it; None where there is none that holds here."""
    key = curve_key(evaluator, (noise.samples, *noise.shape), key)
    return read_curve(Store("curve", folder), key, machine_facts(evaluator.device))


def read_curve(store: Store, key: str, facts: Mapping[str, object]) -> tuple[LatencyCurve | None, list[str]]:
    """The curve of a key, and a sentence where one was left out; None where there is none that holds for these facts."""
    content, notice = store.read(key, facts)
    notes = [] if notice is None else [notice]
    if content is None:
        return None, notes
    try:
        return LatencyCurve.of_json(content), notes
    except ValueError as error:
        return None, [*notes, f"the stored curve {str(store.path(key))!r} was left out: {error}"]


def curve_file(evaluator: Evaluator, noise: Noise, *, folder: Path | None = None, key: str | None = None) -> Path | None:
    """The file in which a model's curve is stored; None where nothing is."""
    return Store("curve", folder).path(curve_key(evaluator, (noise.samples, *noise.shape), key))


def keep(evaluator: Evaluator, noise: Noise, curve: LatencyCurve, *, folder: Path | None = None) -> list[str]:
    """Stores a curve; a sentence where that cannot be."""
    content: Mapping[str, object] = curve.to_json()
    notice = Store("curve", folder).write(
        curve_key(evaluator, (noise.samples, *noise.shape)), machine_facts(evaluator.device), content
    )
    return [] if notice is None else [notice]
