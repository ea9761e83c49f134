"""PIADM-ODE's corrector: does underdamped Langevin dynamics after every block ever bring samples nearer to the data's law?

The same chain is run without and with it, beside two honest rivals: the ODE with more steps, and the SDE. Parts, each written
to the JSON as it ends:

- mixture: 8 Gaussians in 2 and 16 dimensions, stopped at the level 1e-3, whose law is known; the score exact, or wrong on
  purpose: too small, too large, with a smooth random field added (its root mean square beside the score's), with that field
  at high noise only, or that of a mixture of other weights or variances.
- settings: friction, steps, their length, sweeps and blocks of the corrector, one at a time, for 40 steps of the ODE.
- digits: the bundled network; whether two classifiers agree on a sample, and distances to digits that it never saw.

Distances are means over seeds, each of a few thousand samples, with the standard error of the mean; `exact draws` is what as
many draws of the law itself show: sliced Wasserstein distance `sw2`; total variation of the modes' weights `weights`; relative
error of the covariance `covariance`; energy distance `energy`; and the Kolmogorov-Smirnov distance `density` of log p, a lower
bound of the total variation. Samples are those of the sequential chain (with the corrector's Picard sweeps); `rounds` and
`evaluations` are those of one run of `piadm_ode` or `piadm_sde` in the library's mode, always of 4 blocks unless said
otherwise; `sequential` counts the network calls of the chain taken one after another, steps and corrector steps.

`gain_rounds`, `gain_evaluations`, `gain_sequential`: the best rival's distance over the corrected chain's, at no more of that
cost; above 1 the corrector pays. `gain_same`: beside the same chain without it.

    python benchmarks/corrector.py [--quick] [--part NAME ...] [--json FILE]      (the plot goes to FILE's name with .png)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import arguments, commit
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as Sheet
from torch import Tensor

from paradiff import (
    Blocks,
    Corrector,
    Denoiser,
    Keyed,
    Table,
    exponential_integrator,
    log_snr_grid,
    ornstein_uhlenbeck,
    piadm_ode,
    piadm_sde,
    sample,
    sequential,
)
from paradiff.environment import environment
from paradiff.hub import load
from paradiff.process import signal_and_noise

STOP, MODES, VARIANCE = 1e-3, 8, 0.04
LIBRARY = math.sqrt(8)
COSTS = ("rounds", "evaluations", "sequential")
Row = dict[str, Any]
console = Console(stderr=True)


@dataclass(frozen=True)
class Scaled(Corrector):
    """A corrector whose friction and step are in units of sqrt(L) and 1/sqrt(L) of each level.

    Attributes:
        gamma: Friction/sqrt(L).
        length: Step sqrt(L).
        variance: v for L = 1/(alpha^2 v + sigma^2), the curvature of a mode of that variance; None for L = 1/sigma^2.
    """

    gamma: float = LIBRARY
    length: float = 0.25
    variance: float | None = None

    def parameters(self, lipschitz: float) -> tuple[float, float]:
        """Friction and step, given 1/sigma^2."""
        spread = 1 / lipschitz if self.variance is None else self.variance + (1 - self.variance) / lipschitz
        return self.gamma / math.sqrt(spread), self.length * math.sqrt(spread)

    @property
    def label(self) -> str:
        curvature = "1/sigma²" if self.variance is None else "known"
        return f"{self.steps}x{self.sweeps} e {self.length:g} γ {self.gamma:.3g} L {curvature}"


def measured(
    network: Denoiser, table: Table, shape: tuple[int, ...], samples: int, seeds: int, blocks: int, corrector: Scaled | None
) -> tuple[list[Tensor], Row]:
    """Samples of every seed, and the row of what was run."""
    method = replace(sequential(), blocks=Blocks(blocks), corrector=corrector)
    drawn = [sample(network, table, Keyed(shape, seed, samples), method).sample for seed in range(seeds)]
    parallel = piadm_sde(blocks) if table.stochastic else piadm_ode(blocks, corrector=corrector)
    small = shape if samples > 1 else (256, *shape[1:])
    cost = sample(network, table, Keyed(small, 0, min(samples, 4)), parallel)
    ends = [e for e in Blocks(blocks).edges(table)[1:] if table.sigma[e] > 0]
    return drawn, {
        "chain": "SDE" if table.stochastic else "ODE",
        "steps": table.steps,
        "blocks": blocks,
        "corrector": corrector.label if corrector else "",
        "settings": {k: v for k, v in vars(corrector).items() if k not in ("friction", "step", "lipschitz")} if corrector else {},
        "rounds": max(c.rounds for c in cost.certificates),
        "evaluations": sum(c.evaluations for c in cost.certificates) / len(cost.certificates),
        "sequential": table.steps + (len(ends) * corrector.steps if corrector else 0),
    }


def spread(found: list[dict[str, float]]) -> Row:
    """Mean, its standard error, and the values themselves."""
    row: Row = {}
    for name in found[0]:
        values = [f[name] for f in found]
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        row |= {name: float(np.mean(values)), f"{name}_error": error, f"{name}_seeds": values}
    return row


# -- mixtures ----------------------------------------------------------------------------------------------------------

WEIGHTS = 0.8 ** torch.arange(MODES) / (0.8 ** torch.arange(MODES)).sum()


class Law:
    """The law at the level 1e-3 of a mixture in d dimensions, and how far samples are from it."""

    def __init__(self, dimension: int, samples: int) -> None:
        generator = torch.Generator().manual_seed(dimension)
        means = torch.randn(MODES, dimension, generator=generator) * 0.5**0.5
        self.means, self.generator = means - means.mean(0), generator
        self.alpha, sigma = (float(v) for v in signal_and_noise(torch.tensor(STOP, dtype=torch.float64)))
        self.variance = self.alpha**2 * VARIANCE + sigma**2
        directions = torch.randn(dimension, 64, generator=generator)
        self.directions = directions / directions.norm(dim=0)
        large = self.draw(64_000)
        places = ((torch.arange(samples) + 0.5) / samples * len(large)).long()
        self.projected = (large @ self.directions).sort(0).values[places]
        self.shares, density = self._modes(large)
        self.density = density.sort().values
        inner = (WEIGHTS[:, None] * self.means).T @ self.means - torch.outer(WEIGHTS @ self.means, WEIGHTS @ self.means)
        self.covariance = self.alpha**2 * inner + self.variance * torch.eye(dimension)
        self.others = large[:4000]
        self.inside = float(torch.cdist(self.others, self.others).sum()) / (4000 * 3999)

    def draw(self, samples: int) -> Tensor:
        """`[samples, d]` draws."""
        chosen = torch.multinomial(WEIGHTS, samples, replacement=True, generator=self.generator)
        noise = torch.randn(samples, self.means.shape[1], generator=self.generator)
        return self.alpha * self.means[chosen] + self.variance**0.5 * noise

    def _modes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The share of samples that every mode explains best, and log p up to a constant."""
        joint = WEIGHTS.log() - torch.cdist(x, self.alpha * self.means).square() / (2 * self.variance)
        return torch.bincount(joint.argmax(1), minlength=MODES) / len(x), joint.logsumexp(1)

    def distances(self, x: Tensor) -> dict[str, float]:
        """How far samples `[n, d]` are from the law."""
        shares, density = self._modes(x)
        found = torch.searchsorted(self.density, density.sort().values) / len(self.density)
        steps = torch.arange(len(x) + 1) / len(x)
        pairs = float(torch.cdist(x, x).sum()) / (len(x) * (len(x) - 1))
        return {
            "sw2": float(((x @ self.directions).sort(0).values - self.projected).square().mean().sqrt()),
            "weights": float((shares - self.shares).abs().sum() / 2),
            "covariance": float((torch.cov(x.T) - self.covariance).norm() / self.covariance.norm()),
            "energy": 2 * float(torch.cdist(x, self.others).mean()) - pairs - self.inside,
            "density": float(torch.maximum((found - steps[:-1]).abs(), (found - steps[1:]).abs()).max()),
        }


def network(
    x: Tensor, t: Tensor, *, means: Tensor, scale: float = 1, power: float = 1, growth: float = 1, field: float = 0, above: float = 0
) -> Tensor:
    """The noise estimate -sigma s for states `[R, n, d]`: the score times `scale`, of weights to the given power and variances
    times `growth`, plus a field of relative size `field` where sigma is larger than `above`."""
    alpha, sigma = (v.float()[:, None, None] for v in signal_and_noise(t))
    variance = alpha**2 * VARIANCE * growth + sigma**2
    inner = alpha * (x @ means.T) - alpha**2 / 2 * means.square().sum(1)
    shares = torch.softmax(inner / variance + power * WEIGHTS.log(), -1)
    score = scale * (alpha * (shares @ means) - x) / variance
    if field:
        generator = torch.Generator().manual_seed(1)
        waves = torch.randn(len(means[0]), len(means[0]), generator=generator) * 2 / len(means[0]) ** 0.5
        phases = torch.rand(len(means[0]), generator=generator) * 2 * math.pi
        ripple = field * 2**0.5 * torch.sin(x @ waves + phases) * variance.rsqrt()
        score = score + ripple * (sigma > above)
    return -sigma * score


SCORES: dict[str, dict[str, float]] = {
    "exact": {},
    "x 0.95": {"scale": 0.95},
    "x 1.05": {"scale": 1.05},
    "field 0.05": {"field": 0.05},
    "field 0.2": {"field": 0.2},
    "field 0.5, sigma > 0.5": {"field": 0.5, "above": 0.5},
    "weights^0.5": {"power": 0.5},
    "variance x 1.2": {"growth": 1.2},
}
CORRECTORS = (
    Scaled(4, 4),  # the library's defaults
    Scaled(4, 4, variance=VARIANCE),
    Scaled(8, 6, length=0.5, variance=VARIANCE),
    Scaled(16, 8, length=0.25, variance=VARIANCE),
)


def table_of(stochastic: bool, steps: int) -> Table:
    """The clean-data form on levels equally far apart in log(alpha/sigma)."""
    grid = log_snr_grid(9.0, STOP, 1, steps)
    return exponential_integrator(ornstein_uhlenbeck(), grid, form="clean", volatility=float(stochastic))


Setting = tuple[bool, int, int, Scaled | None]


def on_mixtures(scores: list[str], settings: list[Setting], quick: bool) -> Iterator[Row]:
    """One row a problem, score and setting."""
    samples, seeds = (1000, 2) if quick else (4000, 4)
    for dimension in (2,) if quick else (2, 16):
        law = Law(dimension, samples)
        problem = {"problem": f"mixture, d = {dimension}"}
        floor = spread([law.distances(law.draw(samples)) for _ in range(8)])
        nothing = dict.fromkeys(("steps", "blocks", "rounds", "evaluations", "sequential"), 0)
        yield problem | {"score": "", "chain": "exact draws", "corrector": "", **nothing, **floor}
        for score in scores:
            wrong: Callable[..., Tensor] = partial(network, means=law.means, **SCORES[score])
            for stochastic, steps, blocks, corrector in settings:
                table = table_of(stochastic, steps)
                drawn, row = measured(wrong, table, (samples, dimension), 1, seeds, blocks, corrector)
                yield problem | {"score": score} | row | spread([law.distances(x[0]) for x in drawn])


def mixture(quick: bool) -> Iterator[Row]:
    """All scores; chains of all lengths, corrected ones up to 80 steps."""
    lengths = (10, 40) if quick else (10, 20, 40, 80, 160, 320)
    settings: list[Setting] = [(stochastic, steps, 4, None) for stochastic in (False, True) for steps in lengths]
    settings += [(False, steps, 4, c) for steps in lengths[:4] for c in CORRECTORS]
    yield from on_mixtures(["exact", "field 0.2"] if quick else list(SCORES), settings, quick)


def settings(quick: bool) -> Iterator[Row]:
    """Two scores; one setting of the corrector at a time."""
    base = Scaled(4, 4, variance=VARIANCE)
    tried = [base] + [replace(base, gamma=g) for g in (math.sqrt(2), math.sqrt(32))]
    if not quick:
        tried += [replace(base, steps=m, sweeps=m) for m in (1, 2, 8, 16)]
        tried += [replace(base, length=e) for e in (0.0625, 0.125, 0.5, 1.0)]
        tried += [replace(base, steps=8, sweeps=k) for k in (1, 2, 4)]
        tried += [replace(base, steps=32, sweeps=12, length=0.125)]
    chosen: list[Setting] = [(False, 40, 4, None), *((False, 40, 4, c) for c in tried), (False, 40, 8, base)]
    yield from on_mixtures(["field 0.2"] if quick else ["exact", "field 0.2"], chosen, quick)
