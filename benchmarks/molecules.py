# SPDX-License-Identifier: Apache-2.0
"""Molecules: AlphaFold 3's sampler and EDM's on the bundled denoiser of chains, in rounds and errors.

- alphafold3-64, -128, -256: 200 steps at window 16 on as many atoms, the whole augmentation on. Neighbours, their damping and
  the slope were chosen on seeds 300 to 303, 20 to 64 atoms; the network was trained on chains of up to 64.
- alphafold3-parts: the same on 64 atoms without the known turns, or without the pairs of neighbours.
- conformations-64, -128, -256: the same on clouds of a known denoiser (conformations.py), one of four random walks that are
  turned in any way, deviations of 1 angstrom. The control's numbers for chains with churn were chosen on seeds below 400.
- churn: two-stage steps, 18 and 40 of them, with churn and ancestral, on chains of 32 atoms.
- churn-mixture: the same on a closed-form mixture of eight Gaussians in 64 dimensions.
- cold: 1000 steps of DDPM with less noise, as Genie samples, at window 32, on the digits network.

Tolerances are parts of the deviation of 16, on digits in their units. Errors are root mean squares over coordinates or pixels;
`per_atom` is the largest distance of an atom, or of a pixel, to where the sequential loop puts it, beside the structure's own
deviation.

    python benchmarks/molecules.py --json benchmarks/results/molecules.json
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from conformations import Conformations, walks
from harness import Results, options, show
from torch import Tensor

from paradiff import (
    Evaluator,
    Keyed,
    Method,
    Recorded,
    Solution,
    Table,
    collocation,
    quasi_newton,
    sample,
    sequential,
    slopes,
)
from paradiff.models import Folding, Frames, Mixture, load
from paradiff.samplers import alphafold3, dpmpp_2s, edm, with_noise_scale

DEVIATION = 16.0
SEEDS = {
    "alphafold3-64": range(400, 404),
    "alphafold3-128": range(400, 404),
    "alphafold3-256": range(400, 402),
    "alphafold3-parts": range(400, 402),
    "conformations-64": range(400, 416),
    "conformations-128": range(400, 412),
    "conformations-256": range(400, 408),
    "churn": range(400, 412),
    "churn-mixture": range(400, 448),
    "cold": range(7024, 7036),
}
HELIX, STRAND = "HHHHHHHHHHTTT", "SSSSSSSTTT"
LEVELS: dict[str, Any] = {"sigma_min": 4e-4 * DEVIATION, "sigma_max": 160 * DEVIATION}
COLUMNS = (
    "part",
    "table",
    "method",
    "tolerance",
    "seeds",
    "rounds",
    "rounds_max",
    "evaluations",
    "error_max",
    "per_atom",
    "held",
)


def chain(seed: int, atoms: int) -> str:
    """A chain of helices and strands, another for each seed."""
    bits = [(seed >> k) & 1 for k in range(12)] * 4
    return "".join((HELIX if (bit + k) % 2 else STRAND) for k, bit in enumerate(bits))[:atoms]


def row(part: str, table: Table, name: str, method: Method, found: Solution, plain: Solution) -> dict[str, Any]:
    """What a run is held to."""
    off = found.sample - plain.sample
    errors = off.square().mean((1, 2)).sqrt()
    told = torch.tensor([e.estimated_error for e in found.error_estimates])
    rounds = [e.rounds for e in found.error_estimates]
    spread = plain.sample.square().mean((1, 2)).sqrt()
    return {
        "part": part,
        "table": f"{table.name} {table.steps}",
        "method": name,
        "tolerance": getattr(method, "tolerance", 0.0),
        "seeds": len(rounds),
        "rounds": sum(rounds) / len(rounds),
        "rounds_max": max(rounds),
        "evaluations": found.evaluations / len(rounds),
        "error_median": float(errors.median()),
        "error_max": float(errors.max()),
        "estimated": float(told.max()),
        "per_atom": float((off.square().sum(2).sqrt().amax(1) / spread).max()),
        "held": int((errors <= told).sum()),
    }


def turned(results: Results, part: str, seeds: list[int]) -> None:
    """AlphaFold 3's sampler."""
    known = "parts" not in part
    atoms = int(part.partition("-")[2]) if known else 64
    network, table, noise = Folding.bundled(), alphafold3(200), Keyed((atoms, 3), seed=seeds)
    frames, kinds = Frames.drawn(table, noise), Folding.kinds_of([chain(seed, atoms) for seed in seeds])

    def solved(method: Method, turns: bool = True) -> Solution:
        model = frames.model(network)
        model.symmetry = model.symmetry if turns else None
        return sample(Evaluator(model, conditioning={"kinds": kinds}, max_rows=8), table, frames.moving(), method, check="off")

    plain = solved(sequential())
    whole = ("quasi_newton, turns, neighbours", True, 8, slopes.shifted(DEVIATION))
    for name, turns, neighbours, slope in (
        (whole,) if known else (("quasi_newton", False, 0, None), ("quasi_newton, turns", True, 0, None))
    ):
        method = quasi_newton(window=16, tolerance=1e-2 * DEVIATION, neighbours=neighbours, neighbour_damping=0.4, slope=slope)
        results.add(row(part, table, f"{name}, {atoms} atoms", method, solved(method, turns), plain))


def conformed(results: Results, part: str, seeds: list[int]) -> None:
    """AlphaFold 3's sampler on clouds whose denoiser is known."""
    atoms = int(part.partition("-")[2])
    table, noise = alphafold3(200), Keyed((atoms, 3), seed=seeds)
    frames, folds = Frames.drawn(table, noise), torch.stack([walks(4, atoms, DEVIATION, seed) for seed in seeds])
    evaluator = Evaluator(frames.model(Conformations(1.0)), conditioning={"conformations": folds.float()}, max_rows=16)

    def solved(method: Method) -> Solution:
        return sample(evaluator, table, frames.moving(), method, check="off")

    method = quasi_newton(
        window=16, tolerance=1e-2 * DEVIATION, neighbours=8, neighbour_damping=0.4, slope=slopes.shifted(DEVIATION)
    )
    name = f"quasi_newton, turns, neighbours, {atoms} atoms, known"
    results.add(row(part, table, name, method, solved(method), solved(sequential())))


def two_stage() -> list[Table]:
    """Chains with churn, and ancestral ones."""
    tables = [edm(steps, s_churn=steps / 2, solver=solver, **LEVELS) for steps in (18, 40) for solver in ("heun", "midpoint")]
    return tables + [dpmpp_2s(steps, eta=1.0, **LEVELS) for steps in (18, 40)]


def compared(results: Results, part: str, table: Table, model: Any, noise: Keyed, kind: str = "") -> None:
    """One chain by both methods, at a tolerance of 4e-3 of the deviation."""
    plain = sample(model, table, noise, sequential(), check="off")
    for method in (quasi_newton(window=16, tolerance=4e-3 * DEVIATION), collocation(tolerance=4e-3 * DEVIATION)):
        found = sample(model, table, noise, method, check="off")
        flat = (found, plain) if plain.sample.ndim == 3 else _flat(found, plain)
        results.add(row(part, table, method.name + kind, method, *flat))


def churned(results: Results, part: str, seeds: list[int]) -> None:
    """Two-stage steps, of structures that are brought to the middle."""
    network, noise = Folding.bundled(), Keyed((32, 3), seed=seeds)

    def centred(x: Tensor, t: Tensor, kinds: Tensor) -> Tensor:
        found = network(x, t, kinds)
        return found - found.mean(1, keepdim=True)

    kinds = Folding.kinds_of([chain(seed, 32) for seed in seeds])
    for table in two_stage():
        compared(results, part, table, Evaluator(centred, conditioning={"kinds": kinds}), noise)


def churned_mixture(results: Results, part: str, seeds: list[int]) -> None:
    """The same on a mixture whose denoiser is known, at the noise levels that are its times."""
    means = DEVIATION * torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    mixture = Mixture(torch.full((8,), 1 / 8), means, torch.full((8,), (0.2 * DEVIATION) ** 2))

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        return mixture.clean(x, torch.ones_like(t), t)

    for table in two_stage():
        compared(results, part, table, posterior_mean, Keyed((64,), seed=seeds), ", mixture")


def cold(results: Results, part: str, seeds: list[int]) -> None:
    """Chains with less noise."""
    digits = load("digits")
    noise = Recorded(digits.shape, [torch.Generator().manual_seed(seed) for seed in seeds])
    for scale in (0.9, 0.8, 0.6):
        table = with_noise_scale(digits.table("ddpm", 1000), scale)
        plain = sample(digits, table, noise, sequential(), check="off")
        for method in (collocation(window=32), quasi_newton(window=32)):
            results.add(
                row(part, table, method.name, method, *(_flat(sample(digits, table, noise, method, check="off"), plain)))
            )


def _flat(*solutions: Solution) -> list[Solution]:
    """Pictures as rows of pixels."""
    return [replace(found, sample=found.sample.flatten(1)[..., None]) for found in solutions]


def main() -> None:
    given = options(__doc__, tuple(SEEDS))
    results = Results(given.json, given.keep)
    for part in given.only:
        results.drop(row for row in results.rows if row["part"] != part)
        seeds = list(SEEDS[part])[: given.seeds]
        PARTS[part](results, part, seeds)
    results.save()
    show(results.rows, COLUMNS)


PARTS = {part: turned for part in SEEDS if part.startswith("alphafold3")} | {
    **{part: conformed for part in SEEDS if part.startswith("conformations")},
    "churn": churned,
    "churn-mixture": churned_mixture,
    "cold": cold,
}

if __name__ == "__main__":
    main()
