# SPDX-License-Identifier: Apache-2.0
"""PIADM-ODE's corrector: does underdamped Langevin dynamics after every block bring samples nearer to the data's law?

Claim measured: the corrector repairs what a wrong score does to the ODE, but the SDE does the same in fewer rounds. The same
chain is run without and with it, beside its rivals: the ODE with more steps, and the SDE in clean-data and epsilon form.

- mixture: 8 Gaussians in 2 and 16 dimensions, stopped at the level 1e-3, where the law is known. The score is exact, or wrong
  on purpose: times 0.95 or 1.05, with a smooth random field added (its root mean square is that share of the score's), with
  that field at high noise only, or the score of other weights or variances.
- settings: friction, steps, their length, sweeps and blocks of the corrector, one at a time, for 40 steps of the ODE.
- digits: the bundled network: the share of samples to which two classifiers give the same label, and distances to held-out
  digits.

Distances are means over seeds with their standard error, beside those of as many `exact draws`: sliced Wasserstein `sw2`, total
variation of the modes' `weights`, relative error of the `covariance`, `energy` distance, Kolmogorov-Smirnov distance of log p
`density`, a lower bound of the total variation. Samples are those of the sequential chain with the corrector's M steps in K
sweeps, `MxK`; `rounds` and `evaluations` those of PIADM with the error rule; `sequential` the calls of both chains in turn. A
gain is the distance of the best rival at no more of that cost over that of the corrected chain: above 1 the corrector pays.

    python benchmarks/corrector.py --quick
    python benchmarks/corrector.py --json benchmarks/results/corrector.json          (the picture goes to corrector.png)
    python benchmarks/corrector.py --json benchmarks/results/corrector.json --draw-only
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import BLACK, BLUE, VERMILION, heading, legend, panels, plain_log, save
from harness import Results, Row, options, show
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


def on_mixtures(scores: Sequence[str], settings: Sequence[Setting], given: Namespace) -> Iterator[Row]:
    """One row a problem, score and setting; levels are equally far apart in log(alpha/sigma)."""
    samples, seeds = (1000, 2) if given.quick else (4000, 3)
    seeds = min(seeds, given.seeds)
    for dimension in (2,) if given.quick else (2, 16):
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


def mixture(given: Namespace) -> Iterator[Row]:
    """All scores; chains of all lengths, corrected ones up to 80 steps."""
    lengths = (10, 40) if given.quick else (10, 14, 20, 28, 40, 56, 80, 112, 160)
    chosen: list[Setting] = [(chain, steps, 4, None) for chain in CHAINS for steps in lengths]
    chosen += [("ODE", steps, 4, c) for steps in lengths[:7:2] for c in CORRECTORS]
    yield from on_mixtures(["exact", "field 0.2"] if given.quick else list(SCORES), chosen, given)


def settings(given: Namespace) -> Iterator[Row]:
    """Two scores; one setting of the corrector at a time."""
    changes: list[dict[str, Any]] = [{}, {"gamma": 2**0.5}, {"gamma": 32**0.5}]
    changes += [{"length": e} for e in (0.0625, 0.125, 0.5, 1.0)]
    changes += [{"steps": m, "sweeps": k} for m, k in ((1, 1), (2, 2), (8, 1), (8, 2), (8, 4), (8, 8), (32, 8))]
    tried = [replace(BASE, **change) for change in (changes[:3] if given.quick else changes)]
    chosen: list[Setting] = [("ODE", 40, 4, c) for c in (None, *tried)] + [("ODE", 40, 8, BASE)]
    yield from on_mixtures(["field 0.2"] if given.quick else ["exact", "field 0.2"], chosen, given)


def digits(given: Namespace) -> Iterator[Row]:
    """The bundled network: ODE and SDE of several lengths, and correctors; four seeds of 64 samples."""
    from sklearn import datasets, neighbors, svm

    model, (samples, seeds) = load("digits"), (8, 2) if given.quick else (64, 4)
    seeds = min(seeds, given.seeds)
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
    lengths = (10,) if given.quick else (10, 20, 50)
    tried = (None, Scaled(2, 2, length=0.5), Scaled(4, 3), Scaled(8, 4, length=0.5))
    chosen: list[Setting] = [("ODE", n, 4, c) for n in lengths for c in tried]
    chosen += [(chain, n, 4, None) for chain in ("SDE", "SDE epsilon") for n in lengths]
    chosen += [] if given.quick else [(chain, n, 4, None) for chain in ("ODE", "SDE") for n in (30, 100)]
    for chain, steps, blocks, corrector in chosen:
        table = model.exponential(f"exponential_{chain[:3].lower()}", steps, form=CHAINS[chain][1])
        drawn, row = measured([model] * seeds, table, model.shape, samples, blocks, corrector)
        row |= {"problem": "digits", "score": "trained", "chain": chain}
        yield row | spread([distances(x.flatten(1).clamp(-1, 1)) for x in drawn])


PARTS: dict[str, Callable[[Namespace], Iterator[Row]]] = {"mixture": mixture, "settings": settings, "digits": digits}
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


def pays(gain: Row, seeds: int) -> bool:
    """Whether the best corrected chain wins by 5 %, and for every seed."""
    return gain["gain"] > 1.05 and gain["wins"] == seeds


def draw(contents: dict[str, Any], path: Path) -> None:
    """The corrector's gain at equal rounds, for every score, dimension and distance, over three sets of rivals."""
    rivals = {"ODE": "rival: ODE", "ODE_SDE": "ODE or SDE", "ODE_SDE_SDE epsilon": "ODE or either SDE"}
    figure, found = panels("The corrector improves on the ODE, and seldom on the SDE", 4.6, 1, 3, sharex=True, sharey=True)
    seeds = max(len(r["sw2_seeds"]) for r in contents["rows"] if r["part"] == "mixture" and r["corrector"])
    for axes, (key, title) in zip(found[0], rivals.items(), strict=True):
        own = [g for g in contents[f"gains_over_{key}"] if g["cost"] == "rounds"]
        scores = list(dict.fromkeys(g["score"] for g in own))
        for place, score in enumerate(scores):
            chosen = [g for g in own if g["score"] == score]
            for shift, gain in zip(np.linspace(-0.3, 0.3, len(chosen)), chosen, strict=True):
                colour, fill = (BLUE, BLUE) if pays(gain, seeds) else (VERMILION, "white")
                axes.plot(gain["gain"], place + shift, "o", ms=5, color=colour, mfc=fill)
        axes.axvline(1, color=BLACK, lw=1.2)
        axes.set_yticks(range(len(scores)), scores)
        axes.set(ylim=(len(scores) - 0.5, -0.5))
        heading(axes, f"{title}: {sum(pays(g, seeds) for g in own)} of {len(own)}")
        plain_log(axes, "x", (0.5, 1, 2, 5, 10))
    found[0][0].set_ylabel("score of the network")
    found[0][1].set_xlabel("distance to the law of the best rival / of the best corrected chain, at no more rounds")
    wins = {"the corrector wins by 5 % and for every seed": {"mec": BLUE, "mfc": BLUE}}
    legend(figure, wins | {"it does not": {"mec": VERMILION, "mfc": "white"}})
    save(figure, path)


def main() -> None:
    given = options(__doc__, tuple(PARTS), draws=True)
    results = Results(given.json, given.keep)
    for part in () if given.draw_only else given.only:
        results.drop(row for row in results.rows if row["part"] != part)
        own = []
        for row in PARTS[part](given):
            own.append({"part": part} | row)
            results.add(own[-1])
        show(own, (*SHOWN, "agree", "energy", "energy_error", "mmd2") if part == "digits" else (*SHOWN, *JUDGED, "energy"))
        if part == "mixture":
            best = {"gains_over_" + "_".join(c): gains(own, c) for c in (["ODE"], ["ODE", "SDE"], list(CHAINS))}
            show([row for found in best.values() for row in found], GAINS)
            results.save(**best)
        results.save()
    if given.json and "gains_over_ODE" in results.contents:
        draw(results.contents, given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
