# SPDX-License-Identifier: Apache-2.0
"""What padding costs: the rows of every network call of a run, those of the check included, filled up to one of a few widths.

A row is a chain, a method and a number of samples of a mixture of Gaussians. `rows` are those of its calls; for each choice of
widths, functions of the widest round W, the share of rows that it adds is given. `summary` has the mean and largest share of
each choice. The library's choice is the first one (solver/widths.py).

    python benchmarks/shapes.py --quick
    python benchmarks/shapes.py --json benchmarks/results/shapes.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from harness import Results, Row, options, show
from torch import Tensor

from paradiff import Evaluator, Keyed, Schedule, Table, collocation, jacobi, paradigms, parasolver, quasi_newton, sample, srds
from paradiff.models.exact import Mixture
from paradiff.samplers import ddim, ddpm
from paradiff.solver import Method
from paradiff.solver.widths import widths_of

DIMENSION, CLUSTERS, SPREAD = 64, 10, 0.05
CHAINS: dict[str, Callable[[], Table]] = {
    "DDIM 50": lambda: ddim(Schedule.linear(), 50),
    "DDPM 200": lambda: ddpm(Schedule.linear(), 200),
}
SAMPLES = (1, 4)
CHOICES: dict[str, Callable[[int], Sequence[int]]] = {
    "1, W/3, 2W/3, W": widths_of,
    "1, W/4, W/2, W": lambda most: (1, -(-most // 4), -(-most // 2), most),
    "W/4, W/2, 3W/4, W": lambda most: [-(-most * part // 4) for part in (1, 2, 3, 4)],
    "W/8, W/4, W/2, W": lambda most: [-(-most // part) for part in (8, 4, 2, 1)],
    "W/2, W": lambda most: (-(-most // 2), most),
    "W": lambda most: (most,),
}


def methods(quick: bool) -> list[Method]:
    """The methods, with their windows."""
    found: list[Method] = [quasi_newton(), jacobi(), srds(), collocation()]
    for window in (8,) if quick else (4, 8, 16, 32):
        found += [parasolver(window=window), quasi_newton(window=window), paradigms(window=window), collocation(window=window)]
    return found


def denoiser(table: Table) -> Callable[[Tensor, Tensor], Tensor]:
    """The mixture's own network for a table, of states at its times."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLUSTERS, DIMENSION, generator=generator, dtype=torch.float64).clamp(-1, 1)
    target = Mixture(torch.full((CLUSTERS,), 1 / CLUSTERS), means, torch.full((CLUSTERS,), SPREAD))

    def outputs(x: Tensor, t: Tensor) -> Tensor:
        nodes = (table.t[None] == t[:, None]).int().argmax(1)
        states = x.double() / table.scale[nodes, None]
        clean = target.clean(states, table.alpha[nodes], table.sigma[nodes])
        return ((clean - table.p[nodes, None] * states) / table.q[nodes, None]).float()

    return outputs


def measure(chain: str, method: Method, samples: int) -> Row:
    """The calls of one run, and what each choice would add to their rows."""
    table, calls = CHAINS[chain](), list[int]()
    network = denoiser(table)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return network(x, t)

    found = sample(Evaluator(counted), table, Keyed((DIMENSION,), 0, samples), method)
    most = method.width(table) * samples
    row: Row = {
        "chain": chain,
        "method": method.name,
        "window": getattr(method, "window", None),
        "samples": samples,
        "widest": most,
        "rounds": found.rounds,
        "rows": sum(calls),
        "shapes": len(set(calls)),
    }
    for name, widths in CHOICES.items():
        filled = sum(min(width for width in widths(most) if width >= rows) for rows in calls)
        row[name] = round(filled / sum(calls) - 1, 4)
    return row


def main() -> None:
    given = options(__doc__)
    results = Results(given.json)
    for chain in CHAINS:
        for samples in SAMPLES:
            for method in methods(given.quick):
                results.add(measure(chain, method, samples))
    summary = {
        name: {
            "mean": round(statistics.mean(row[name] for row in results.rows), 4),
            "largest": max(row[name] for row in results.rows),
        }
        for name in CHOICES
    }
    results.save(summary=summary)
    show(results.rows, ("chain", "method", "window", "samples", "widest", "rounds", "rows", "shapes", *CHOICES))
    show([{"widths": name, **shares} for name, shares in summary.items()], ("widths", "mean", "largest"))


if __name__ == "__main__":
    main()
