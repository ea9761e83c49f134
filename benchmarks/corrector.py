"""PIADM-ODE's corrector: does underdamped Langevin dynamics after every block ever bring samples nearer to the data's law?

The same chain is run without and with it, beside its rivals: the ODE with more steps, and the SDE, clean-data and epsilon form.

- mixture: 8 Gaussians in 2 and 16 dimensions, stopped at the level 1e-3, where the law is known; the score exact, or wrong on
  purpose: too small, too large, with a smooth random field added (of a root mean square beside the score's), with that field at
  high noise only, or that of other weights or variances.
- settings: friction, steps, their length, sweeps and blocks of the corrector, one at a time, for 40 steps of the ODE.
- digits: the bundled network; whether two classifiers agree on a sample, and distances to digits that it never saw.

Distances are means over seeds with their standard error, beside those of as many `exact draws`: sliced Wasserstein `sw2`, total
variation of the modes' `weights`, relative error of the `covariance`, `energy` distance, Kolmogorov-Smirnov distance of log p
`density`, a lower bound of the total variation. Samples are those of the sequential chain with the corrector's M steps in K
sweeps, `MxK`; `rounds` and `evaluations` those of PIADM with the error rule; `sequential` the calls of both chains in turn. A
gain is the distance of the best rival at no more of that cost over that of the corrected chain: above 1 the corrector pays.

    python benchmarks/corrector.py [--quick] [--json FILE]      (the plot goes to FILE's name with .png)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import arguments, finish
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as Sheet
from torch import Tensor

from paradiff import Keyed, Table
from paradiff.chain.slope import shifted
from paradiff.methods import Blocks, Corrector
from paradiff.methods.piadm import piadm_ode, piadm_sde
from paradiff.methods.presets import sequential
from paradiff.models.pixel import load
from paradiff.samplers import exponential_integrator, log_snr_grid, ornstein_uhlenbeck
from paradiff.samplers.exponential import Form
from paradiff.samplers.process import signal_and_noise
from paradiff.solver import Denoiser
from paradiff.solver.loop import sample

STOP, MODES, VARIANCE, SLOPE = 1e-3, 8, 0.04, shifted(0.5)
COSTS = ("rounds", "evaluations", "sequential")
CHAINS: dict[str, tuple[float, Form]] = {"ODE": (0.0, "clean"), "SDE": (1.0, "clean"), "SDE epsilon": (1.0, "epsilon")}
Row = dict[str, Any]


@dataclass(frozen=True)
class Scaled(Corrector):
    """A corrector whose friction is `gamma` sqrt(L) and whose step is `length`/sqrt(L) at every level, with
    L = 1/(alpha^2 v + sigma^2), the curvature of a mode of `variance` v; the library's 1/sigma^2 for v = 0."""

    gamma: float = math.sqrt(8)
    length: float = 0.25
    variance: float = 0.0

    def parameters(self, lipschitz: float) -> tuple[float, float]:
        """Friction and step, given 1/sigma^2."""
        root = math.sqrt(self.variance + (1 - self.variance) / lipschitz)
        return self.gamma / root, self.length * root


def measured(
    networks: Sequence[Denoiser], table: Table, shape: tuple[int, ...], samples: int, blocks: int, corrector: Scaled | None
) -> tuple[list[Tensor], Row]:
    """Samples of every seed (one network each), and the row of what was run."""
    method = replace(sequential(), blocks=Blocks(blocks), corrector=corrector)
    drawn = [sample(n, table, Keyed(shape, seed, samples), method).sample for seed, n in enumerate(networks)]
    parallel = piadm_sde(blocks, slope=SLOPE) if table.stochastic else piadm_ode(blocks, None, corrector, slope=SLOPE)
    cost = sample(networks[0], table, Keyed(shape, 0, 4) if samples > 1 else Keyed((256, *shape[1:])), parallel).error_estimates
    row: Row = {"steps": table.steps, "blocks": blocks, "corrector": "", "settings": {}, "sequential": table.steps}
    row |= {name: float(np.mean([getattr(c, name) for c in cost])) for name in COSTS[:2]}
    if corrector:
        friction, curvature = f"friction {corrector.gamma:.3g}", "known" if corrector.variance else "1/sigma^2"
        row["corrector"] = f"{corrector.steps}x{corrector.sweeps} step {corrector.length:g} {friction} L {curvature}"
        row["settings"] = asdict(corrector)
        row["sequential"] += corrector.steps * sum(float(table.sigma[e]) > 0 for e in Blocks(blocks).edges(table)[1:])
    return drawn, row


def spread(found: list[dict[str, float]]) -> Row:
    """Mean, its standard error, and the values themselves."""
    row: Row = {}
    for name in found[0]:
        v = np.array([f[name] for f in found])
        error = v.std(ddof=min(1, len(v) - 1)) / math.sqrt(len(v))
        row |= {name: float(v.mean()), f"{name}_error": float(error), f"{name}_seeds": v.tolist()}
    return row


def contrast(first: Tensor, second: Tensor, width: float = 0.0) -> float:
    """Mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over different data, k a Gaussian of that width, or minus the distance."""
    distances = [torch.cdist(x, y) for x, y in ((first, first), (second, second), (first, second))]
    *inside, across = [(-x.square() / (2 * width**2)).exp() if width else -x for x in distances]
    return sum(float(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in inside) - 2 * float(across.mean())


WEIGHTS = 0.8 ** torch.arange(MODES) / (0.8 ** torch.arange(MODES)).sum()


class Law:
    """The law at the level 1e-3 of a mixture in d dimensions, and how far samples are from it."""

    def __init__(self, dimension: int, samples: int) -> None:
        self.generator = torch.Generator().manual_seed(dimension)
        means = torch.randn(MODES, dimension, generator=self.generator) * 0.5**0.5
        self.means = means - means.mean(0)
        self.alpha, sigma = (float(v) for v in signal_and_noise(torch.tensor(STOP, dtype=torch.float64)))
        self.variance = self.alpha**2 * VARIANCE + sigma**2
        self.directions = torch.nn.functional.normalize(torch.randn(dimension, 64, generator=self.generator), dim=0)
        self.large = self.draw(64_000)
        places = ((torch.arange(samples) + 0.5) / samples * len(self.large)).long()
        self.projected = (self.large @ self.directions).sort(0).values[places]
        self.shares, density = self._modes(self.large)
        self.density = density.sort().values
        spread = torch.cov(self.means.T, aweights=WEIGHTS, correction=0)
        self.covariance = self.alpha**2 * spread + self.variance * torch.eye(dimension)

    def draw(self, samples: int) -> Tensor:
        chosen = torch.multinomial(WEIGHTS, samples, replacement=True, generator=self.generator)
        return torch.normal(self.alpha * self.means[chosen], self.variance**0.5, generator=self.generator)

    def _modes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The share of samples that every mode explains best, and log p up to a constant."""
        joint = WEIGHTS.log() - torch.cdist(x, self.alpha * self.means).square() / (2 * self.variance)
        return torch.bincount(joint.argmax(1), minlength=MODES) / len(x), joint.logsumexp(1)

    def distances(self, x: Tensor) -> dict[str, float]:
        shares, density = self._modes(x)
        found = torch.searchsorted(self.density, density.sort().values) / len(self.density)
        steps = torch.arange(len(x) + 1) / len(x)
        return {
            "sw2": float(((x @ self.directions).sort(0).values - self.projected).square().mean().sqrt()),
            "weights": float((shares - self.shares).abs().sum() / 2),
            "covariance": float((torch.cov(x.T) - self.covariance).norm() / self.covariance.norm()),
            "energy": contrast(x[:2000], self.large[:2000]),
            "density": float(torch.maximum((found - steps[:-1]).abs(), (found - steps[1:]).abs()).max()),
        }


def network(x: Tensor, t: Tensor, *, means: Tensor, wrong: dict[str, float], seed: int) -> Tensor:
    """The noise estimate -sigma s for states `[R, n, d]`: the score times `scale`, of weights to the `power`, of variances
    times `growth`, plus the seed's random field where sigma > `above`."""
    alpha, sigma = (v.float()[:, None, None] for v in signal_and_noise(t))
    variance = alpha**2 * VARIANCE * wrong.get("growth", 1) + sigma**2
    inner = alpha * (x @ means.T) - alpha**2 / 2 * means.square().sum(1)
    shares = torch.softmax(inner / variance + wrong.get("power", 1) * WEIGHTS.log(), -1)
    score = wrong.get("scale", 1) * (alpha * (shares @ means) - x) / variance
    if "field" in wrong:
        generator, d = torch.Generator().manual_seed(seed), x.shape[-1]
        waves, phases = torch.randn(d, d, generator=generator) * 2 / d**0.5, torch.rand(d, generator=generator) * 2 * math.pi
        field = wrong["field"] * 2**0.5 * torch.sin(x @ waves + phases) * variance.rsqrt()
        score += field * (sigma > wrong.get("above", 0))
    return -sigma * score


SCORES: dict[str, dict[str, float]] = {"exact": {}, "x 0.95": {"scale": 0.95}, "x 1.05": {"scale": 1.05}}
SCORES |= {"field 0.05": {"field": 0.05}, "field 0.2": {"field": 0.2}, "field 0.5, sigma > 0.5": {"field": 0.5, "above": 0.5}}
SCORES |= {"weights^0.5": {"power": 0.5}, "variance x 1.2": {"growth": 1.2}}
BASE = Scaled(4, 4, variance=VARIANCE)
CORRECTORS = (Scaled(4, 4), Scaled(8, 2, variance=VARIANCE), Scaled(8, 5, length=0.5, variance=VARIANCE))
Setting = tuple[str, int, int, Scaled | None]  # chain, steps, blocks, corrector
NOTHING = dict.fromkeys(("steps", "blocks", *COSTS), 0) | {"score": "", "corrector": ""}


def on_mixtures(scores: Sequence[str], settings: Sequence[Setting], quick: bool) -> Iterator[Row]:
    """One row a problem, score and setting; levels are equally far apart in log(alpha/sigma)."""
    samples, seeds = (1000, 2) if quick else (4000, 3)
    for dimension in (2,) if quick else (2, 16):
        law, problem = Law(dimension, samples), {"problem": f"mixture, d = {dimension}"}
        yield problem | NOTHING | {"chain": "exact draws"} | spread([law.distances(law.draw(samples)) for _ in range(8)])
        for score in scores:
            networks = [partial(network, means=law.means, wrong=SCORES[score], seed=seed) for seed in range(seeds)]
            for chain, steps, blocks, corrector in settings:
                grid, (volatility, form) = log_snr_grid(9.0, STOP, 1, steps), CHAINS[chain]
                table = exponential_integrator(ornstein_uhlenbeck(), grid, form=form, volatility=volatility)
                drawn, row = measured(networks, table, (samples, dimension), 1, blocks, corrector)
                row |= problem | {"score": score, "chain": chain}
                yield row | spread([law.distances(x[0]) for x in drawn])


def mixture(quick: bool) -> Iterator[Row]:
    """All scores; chains of all lengths, corrected ones up to 80 steps."""
    lengths = (10, 40) if quick else (10, 14, 20, 28, 40, 56, 80, 112, 160)
    chosen: list[Setting] = [(chain, steps, 4, None) for chain in CHAINS for steps in lengths]
    chosen += [("ODE", steps, 4, c) for steps in lengths[:7:2] for c in CORRECTORS]
    yield from on_mixtures(["exact", "field 0.2"] if quick else list(SCORES), chosen, quick)


def settings(quick: bool) -> Iterator[Row]:
    """Two scores; one setting of the corrector at a time."""
    changes: list[dict[str, Any]] = [{}, {"gamma": 2**0.5}, {"gamma": 32**0.5}]
    changes += [{"length": e} for e in (0.0625, 0.125, 0.5, 1.0)]
    changes += [{"steps": m, "sweeps": k} for m, k in ((1, 1), (2, 2), (8, 1), (8, 2), (8, 4), (8, 8), (32, 8))]
    tried = [replace(BASE, **change) for change in (changes[:3] if quick else changes)]
    chosen: list[Setting] = [("ODE", 40, 4, c) for c in (None, *tried)] + [("ODE", 40, 8, BASE)]
    yield from on_mixtures(["field 0.2"] if quick else ["exact", "field 0.2"], chosen, quick)


def digits(quick: bool) -> Iterator[Row]:
    """The bundled network: ODE and SDE of several lengths, and correctors; four seeds of 64 samples."""
    from sklearn import datasets, neighbors, svm

    model, (samples, seeds) = load("digits"), (8, 2) if quick else (64, 4)
    pixels, labels = (np.asarray(v) for v in datasets.load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(pixels))  # the split of training/digits.py
    held, real = torch.from_numpy(pixels[order] / 8 - 1).float().tensor_split([360])
    judges = [judge.fit(real.numpy(), labels[order[360:]]) for judge in (svm.SVC(C=10), neighbors.KNeighborsClassifier(3))]
    width = float(torch.cdist(real, real).median())

    def distances(x: Tensor) -> dict[str, float]:
        first, second = (judge.predict(x.numpy()) for judge in judges)
        return {"agree": float(np.mean(first == second)), "energy": contrast(x, held), "mmd2": contrast(x, held, width)}

    yield NOTHING | {"problem": "digits", "chain": "real, seen"} | spread([distances(x) for x in real[:1024].split(64)])
    yield NOTHING | {"problem": "digits", "chain": "real, unseen"} | spread([{"agree": distances(held)["agree"]}])
    lengths = (10,) if quick else (10, 20, 50)
    tried = (None, Scaled(2, 2, length=0.5), Scaled(4, 3), Scaled(8, 4, length=0.5))
    chosen: list[Setting] = [("ODE", n, 4, c) for n in lengths for c in tried]
    chosen += [(chain, n, 4, None) for chain in ("SDE", "SDE epsilon") for n in lengths]
    chosen += [] if quick else [(chain, n, 4, None) for chain in ("ODE", "SDE") for n in (30, 100)]
    for chain, steps, blocks, corrector in chosen:
        table = model.exponential(f"exponential_{chain[:3].lower()}", steps, form=CHAINS[chain][1])
        drawn, row = measured([model] * seeds, table, model.shape, samples, blocks, corrector)
        row |= {"problem": "digits", "score": "trained", "chain": chain}
        yield row | spread([distances(x.flatten(1).clamp(-1, 1)) for x in drawn])


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {"mixture": mixture, "settings": settings, "digits": digits}
JUDGED = ("sw2", "weights", "covariance", "density")
SHOWN = ("problem", "score", "chain", "steps", "blocks", "corrector", *COSTS)
GAINS = ("problem", "score", "metric", "cost", "gain", "wins", "corrected", "at", "rival", "rival at", "spent")


def gains(rows: list[Row], chains: Sequence[str]) -> list[Row]:
    """The largest gain over rivals of these chains, for every problem, score, metric and cost; `wins` counts seeds."""
    found: dict[tuple[str, ...], Row] = {}
    for row in (r for r in rows if r["corrector"]):
        rivals = [r for r in rows if all(r[k] == row[k] for k in SHOWN[:2]) and not r["corrector"] and r["chain"] in chains]
        for metric, cost in ((m, c) for m in JUDGED for c in COSTS):
            best = min((r for r in rivals if r[cost] <= row[cost]), key=lambda r: r[metric])
            wins = sum(a < b for a, b in zip(row[f"{metric}_seeds"], best[f"{metric}_seeds"], strict=True))
            key, gain = (row["problem"], row["score"], metric, cost), best[metric] / row[metric]
            if key not in found or found[key]["gain"] < gain:
                own, rival = f"{row['steps']} steps, {row['corrector']}", f"{best['chain']} {best['steps']}"
                values = (*key, gain, wins, own, row[metric], rival, best[metric], row[cost])
                found[key] = dict(zip(GAINS, values, strict=True))
    return list(found.values())


def show(rows: list[Row], columns: Sequence[str]) -> None:
    """Prints rows as a table."""
    sheet = Sheet(*columns)
    for row in rows:
        sheet.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)))
    Console(width=210).print(sheet)


def draw(rows: list[Row], path: Path) -> None:
    """A distance against rounds, one panel a problem and score, one curve a chain and corrector."""
    rows = [r for r in rows if r["score"] and r["part"] != "settings"]
    keys = list(dict.fromkeys((r["problem"], r["score"]) for r in rows))
    figure = Figure(figsize=(16, 3.2 * math.ceil(len(keys) / 4)), layout="constrained")
    for place, key in enumerate(keys, start=1):
        own = [r for r in rows if (r["problem"], r["score"]) == key]
        axes = figure.add_subplot(math.ceil(len(keys) / 4), 4, place)
        metric = "sw2" if "sw2" in own[0] else "energy"
        for name in dict.fromkeys((r["chain"], r["corrector"]) for r in own):
            curve = sorted((r for r in own if (r["chain"], r["corrector"]) == name), key=lambda r: r["rounds"])
            x, y, error = ([r[k] for r in curve] for k in ("rounds", metric, f"{metric}_error"))
            axes.errorbar(x, y, error, fmt="s:" if name[1] else "o-", ms=3, label=name[1] or name[0])
        axes.set(title=", ".join(key), xlabel="rounds", ylabel=metric)
        if place in (1, len(keys)):
            axes.legend(fontsize=6)
    figure.savefig(path, dpi=100)


def main() -> None:
    given = arguments(__doc__ or "")
    rows: list[Row] = []
    best: dict[str, list[Row]] = {}
    for part, make in PARTS.items():
        own = [{"part": part} | row for row in make(given.quick)]
        rows += own
        show(own, (*SHOWN, "agree", "energy", "energy_error", "mmd2") if part == "digits" else (*SHOWN, *JUDGED, "energy"))
        if part == "mixture":
            best = {"gains_over_" + "_".join(c): gains(own, c) for c in (["ODE"], ["ODE", "SDE"], list(CHAINS))}
            show([row for found in best.values() for row in found], GAINS)
        finish(rows, given, best, show=False)
        if given.json:
            draw(rows, given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
