# SPDX-License-Identifier: Apache-2.0
"""How far a method's samples err, by calibration: split conformal prediction of an error from its estimate.

The ratios r of true error to estimate of n seeds, and that of a further seed, are exchangeable: their joint law does not depend
on their order, since each comes of its own independent noise. So the further one is as likely to take any place among the n + 1
as any other, and with r[1] <= ... <= r[n] in order

    P(r[new] <= r[k]) >= k / (n + 1),      k = ceil((n + 1)·coverage)                                              (1)

(Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; Angelopoulos and Bates, arXiv 2107.07511, theorem 1).
The error of the new sample is then at most r[k] times its estimate, however good or bad estimates are.

The probability in (1) is over the n seeds and the new one together. Of one calibration, the share of new samples that it covers
is itself random, with the law Beta(k, n + 1 - k) where ratios are continuous, whose mean is k / (n + 1). It holds for all
samples together, not for those of large estimates, or of one prompt among several, by themselves; and for samples of the
model, chain and method that were calibrated. Seeds whose runs are stopped are left out, as runs that are stopped have no bound:
those that are left are exchangeable among each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from paradiff.errors import are_whole, is_real, number_of, require_real, shown
from paradiff.planning.effectivity import Effectivity
from paradiff.solver.solution import ROUNDING, ErrorBound

COVERAGE = 0.95
"""The share of samples that a bound holds for, where no other is asked for."""


def rank_of(seeds: int, coverage: float) -> int:
    """The place k of the ratio that bounds a share of samples, from 1, equation (1); above `seeds` where they are too few.

    Args:
        seeds: Their number n.
        coverage: The share, as it is written in decimals.
    """
    return math.ceil((seeds + 1) * Fraction(str(coverage)))


def fewest(coverage: float) -> int:
    """The fewest seeds by which a share of samples can be bounded: 19 for 0.95, 99 for 0.99."""
    share = Fraction(str(coverage))
    return math.ceil(share / (1 - share))


def require_coverage(coverage: Any) -> None:
    """Refuses what is no share of samples.

    Raises:
        ValueError: If it is no number between 0 and 1.
    """
    if not is_real(coverage) or not 0 < number_of(coverage) < 1:
        raise ValueError(f"the coverage is {shown(coverage)}; it must be a number between 0 and 1, such as 0.95")


def require_enough(seeds: int, coverage: float, what: str = "seeds were given") -> None:
    """Refuses fewer seeds than a share needs.

    Args:
        seeds: Their number.
        coverage: The share.
        what: What is said of them.

    Raises:
        ValueError: If there are fewer.
    """
    if seeds < fewest(coverage):
        raise ValueError(
            f"{seeds} {what}, and a bound that {100 * float(coverage):g} of 100 samples keep needs at least {fewest(coverage)}"
            "; give more seeds, or a smaller coverage"
        )


@dataclass(frozen=True, repr=False)
class Calibration:
    """The true errors of a method on a model and a chain, over their estimates.

    Attributes:
        chain: The chain, its name and steps.
        method: The method, as the call that makes it.
        errors: The true errors of the seeds, to the sequential sample, in the data's units.
        estimates: Their estimates.
        coverage: The share of samples that the bound holds for.
        stopped: Seeds that are left out, since their runs were stopped.
        conditioning: Digests of the conditioning that the seeds had; empty where there is none.
        notes: Sentences: why it could not be stored.

    Raises:
        ValueError: If a number is none, or there are too few.
    """

    chain: str
    method: str
    errors: Sequence[float]
    estimates: Sequence[float]
    coverage: float = COVERAGE
    stopped: int = 0
    conditioning: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_coverage(self.coverage)
        object.__setattr__(self, "coverage", float(self.coverage))
        if len(self.errors) != len(self.estimates):
            raise ValueError(
                f"there are {len(self.errors)} errors and {len(self.estimates)} estimates; give one of each a seed"
            )
        for one in self.errors:
            require_real("an error", one)
        wrong = next((one for one in self.estimates if not number_of(one) >= 0), None)
        if wrong is not None:
            raise ValueError(f"an estimate is {shown(wrong)}; it must be a number, 0 or more, or infinite")
        require_enough(len(self.errors), self.coverage)

    @property
    def ratios(self) -> list[float]:
        """True error over estimate of every seed, in order; an estimate counts as `ROUNDING` at least."""
        return sorted(
            0.0 if math.isinf(estimate) else error / max(estimate, ROUNDING)
            for error, estimate in zip(self.errors, self.estimates, strict=True)
        )

    @property
    def bound(self) -> ErrorBound:
        """What it says of the errors of further samples, equation (1)."""
        ratios = self.ratios
        return ErrorBound(ratios[rank_of(len(ratios), self.coverage) - 1], self.coverage, len(ratios))

    @property
    def effectivity(self) -> Effectivity:
        """The seeds' estimates over their errors."""
        return Effectivity.of(zip(self.estimates, self.errors, strict=True))

    def to_json(self) -> dict[str, Any]:
        """All that was measured, as JSON has it."""
        return {
            "chain": self.chain,
            "method": self.method,
            "errors": list(self.errors),
            "estimates": [one if math.isfinite(one) else None for one in self.estimates],
            "coverage": self.coverage,
            "stopped": self.stopped,
            "conditioning": list(self.conditioning),
        }

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Calibration:
        """The calibration that `to_json` gave.

        Raises:
            ValueError: If it is none.
        """
        found = {name: content.get(name) for name in ("chain", "method", "errors", "estimates", "conditioning")}
        texts = isinstance(found["chain"], str) and isinstance(found["method"], str)
        lists = all(isinstance(found[name], list) for name in ("errors", "estimates", "conditioning"))
        if not texts or not lists or not are_whole([content.get("stopped")]):
            raise ValueError("it is no calibration")
        estimates = [math.inf if one is None else one for one in content["estimates"]]
        own = {**found, "errors": tuple(content["errors"]), "estimates": tuple(estimates)}
        own["conditioning"] = tuple(map(str, content["conditioning"]))
        return cls(**own, coverage=content.get("coverage", COVERAGE), stopped=content["stopped"])

    def __repr__(self) -> str:
        bound = self.bound
        return (
            f"Calibration({self.method} on {self.chain},\n"
            f"            {bound.seeds} seeds: {100 * bound.coverage:g} of 100 samples err by at most {bound.factor:.3g} times "
            "their estimate)"
        )

    def __str__(self) -> str:
        bound, ratios = self.bound, self.ratios
        largest = max((one for one in self.estimates if math.isfinite(one)), default=math.inf)
        lines = [
            f"{self.method} on {self.chain}, {bound.seeds} seeds against the sequential chain",
            f"errors      median {_middle(self.errors):.2g}, worst {max(self.errors):.2g}",
            f"estimates   median {_middle(self.estimates):.2g}, largest {largest:.2g}",
            f"estimate over error   median {self.effectivity}",
            f"bound       {100 * bound.coverage:g} of 100 samples err by at most {bound.factor:.3g} times their estimate, "
            f"ratio {rank_of(bound.seeds, bound.coverage)} of {bound.seeds}; the largest is {ratios[-1]:.3g}",
        ]
        if self.stopped:
            lines.append(f"left out    {self.stopped} seeds whose runs were stopped; such a run has no bound")
        return "\n".join([*lines, *self.notes])


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
