# SPDX-License-Identifier: Apache-2.0
"""The published rules beside `quasi_newton` and `collocation`, at equal error, on the trained digits network.

Of each setting of each method the largest tolerance is taken with which every one of the tuning seeds errs by less than
MARGIN times 4e-3; its rounds, evaluations, errors and estimates are then measured on seeds that no number was fitted on, all in
one batch, since a sample's rounds do not depend on its neighbours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from harness import Results, Row, options, show
from problem import EQUAL, Problem, trained

import paradiff
from paradiff.solver.protocol import Method

TUNING, HELD_OUT = range(2000, 2008), range(3000, 3012)
MARGIN = 0.75
CHAINS = {"DDIM 50": ("ddim", 50), "DDIM 25": ("ddim", 25), "DDIM 100": ("ddim", 100), "DDPM 100": ("ddpm", 100)}
SHOWN = ("chain", "method", "tolerance", "rounds", "rounds_max", "evaluations", "error_median", "error_max", "above", "seconds")


@dataclass(frozen=True)
class Setting:
    """A method as a function of its tolerance, and the tolerances that are tried, the largest first."""

    name: str
    make: Callable[[float], Method]
    tolerances: tuple[float, ...]


ESTIMATED = (0.1, 0.05, 0.024, 0.012, 4e-3, 1.5e-3)
RESIDUAL = (1e-2, 4e-3, 2e-3, 1e-3, 5e-4, 2e-4)
SETTINGS = (
    Setting("quasi_newton", lambda t: paradiff.quasi_newton(tolerance=t), ESTIMATED),
    Setting("quasi_newton, window 8", lambda t: paradiff.quasi_newton(8, t), ESTIMATED),
    Setting("collocation", lambda t: paradiff.collocation(tolerance=t), (1e-2, 4e-3, 1.5e-3)),
    Setting("collocation, window 8", lambda t: paradiff.collocation(window=8, tolerance=t), (1e-2, 4e-3, 1.5e-3)),
    Setting("parataa, history 1", lambda t: paradiff.parataa(tolerance=t, history=1), RESIDUAL),
    Setting("parataa, history 2", lambda t: paradiff.parataa(tolerance=t, history=2), RESIDUAL),
    Setting("parataa, history 3", lambda t: paradiff.parataa(tolerance=t, history=3), RESIDUAL),
    Setting("parataa, order 8, history 2", lambda t: paradiff.parataa(tolerance=t, order=8, history=2), RESIDUAL),
    Setting("parataa, window 8, history 2", lambda t: paradiff.parataa(8, t, history=2), RESIDUAL),
    Setting("chords, 4 cores", lambda t: paradiff.chords(4, t), ESTIMATED),
    Setting("chords, 8 cores", lambda t: paradiff.chords(8, t), ESTIMATED),
    Setting("quasi_deer", lambda t: paradiff.quasi_deer(tolerance=t), ESTIMATED),
    Setting("quasi_deer, window 8", lambda t: paradiff.quasi_deer(8, t), ESTIMATED),
)


def tuned(problem: Problem, setting: Setting, seeds: range) -> float | None:
    """The largest tolerance with which every tuning seed errs by less than it may; None where there is none."""
    reference = problem.references(seeds)
    for tolerance in setting.tolerances:
        solution, _ = problem.solve(setting.make(tolerance), seeds)
        if max(problem.errors(solution.sample, reference)) < MARGIN * EQUAL:
            return tolerance
    return None


def held_out(problem: Problem, setting: Setting, tolerance: float, seeds: range) -> Row:
    """What the setting costs, and how far it errs, on seeds that it was not tuned on."""
    reference = problem.references(seeds)
    solution, seconds = problem.solve(setting.make(tolerance), seeds)
    errors, estimates = problem.errors(solution.sample, reference), solution.error_estimates
    rounds = [e.rounds for e in estimates]
    return {
        "rounds": statistics.mean(rounds),
        "rounds_max": max(rounds),
        "evaluations": statistics.mean(e.evaluations for e in estimates),
        "error_median": statistics.median(errors),
        "error_max": max(errors),
        "estimated_median": statistics.median(e.estimated_error for e in estimates),
        "above": sum(error > e.estimated_error for error, e in zip(errors, estimates, strict=True)),
        "seconds": seconds / len(seeds),
        "message": solution.message,
    }


def main() -> None:
    given = options(__doc__, tuple(CHAINS))
    results = Results(given.json, given.keep)
    tuning, seeds = TUNING[: given.seeds], HELD_OUT[: given.seeds]
    if given.quick:
        tuning, seeds = tuning[:2], seeds[:2]
    for chain in given.only:
        problem, own = trained(*CHAINS[chain]), []
        results.drop(row for row in results.rows if row["chain"] != chain)
        for setting in SETTINGS:
            if setting.name.startswith("chords") and problem.table.stochastic:
                continue
            tolerance = tuned(problem, setting, tuning)
            row: Row = {"chain": chain, "method": setting.name, "tolerance": tolerance, "seeds": len(seeds)}
            if tolerance is not None:
                row |= held_out(problem, setting, tolerance, seeds)
            own.append(row)
            results.add(row)
        show([row for row in own if row["tolerance"] is not None], SHOWN)
        results.save()


if __name__ == "__main__":
    main()
