# SPDX-License-Identifier: Apache-2.0
"""How far methods' estimates can be trusted outside of the conditions on which collocation was tuned.

Claim measured: no sample is silently wrong. A sample counts as silently wrong where its error
exceeds twice its estimate, and exceeds 4e-3 of the data's standard deviation. Denoisers are exact but for the digits network.
Kinds:

- decisions: two points and eight Gaussians in the plane, the digits as point masses, on chains of 200 and 1000 steps.
- stages: samplers of two stages, with and without noise, and multistep ones.
- levels: zero terminal signal-to-noise ratio, pure noise, exploding variances.
- short: chains of 1 to 50 steps.
- scales: data of variance 1e-4 to 1e4 times the usual.
- options: shifts that are far off, few nodes, exact.
- digits: the trained network.
- families: all methods on the problems of planning/harness.py, windows 4, 16 and the whole chain; 4 seeds at most, 2 of the
  trained text networks, which walk some chains only.

Parts are seeds: `tuning` 0 to 31, which numbers may be chosen by; `held-out` 1000 to 1063, which collocation was not tuned on
but which were looked at; `further` 2000 to 2063; `fresh` 4000 to 4063, by which collocation's growth of paths and the estimate
of SRDS were chosen; and `later` 6000 to 6063, on which nothing was chosen.

    python benchmarks/conditions.py --only tuning --seeds 8
    python benchmarks/conditions.py --only held-out --json benchmarks/results/conditions.json
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Results, Row, console, options, show
from problem import mixture, rms

from paradiff import Keyed, Schedule, Table, sample, sequential
from paradiff.methods.presets import collocation, parasolver, quasi_newton, srds
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.models.exact import Empirical, Mixture, digits
from paradiff.models.pixel import load
from paradiff.planning.comparison import ROUNDING
from paradiff.planning.harness import contestants, family
from paradiff.samplers import (
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    flow_euler,
    from_scheduler,
    heun,
)
from paradiff.solver.protocol import Method

BEGINS = {"tuning": 0, "held-out": 1000, "further": 2000, "fresh": 4000, "later": 6000}
SEEDS = {part: range(first, first + (64 if first else 32)) for part, first in BEGINS.items()}
SHARE = 4e-3  # of the data's standard deviation: smaller errors are not counted
LINEAR, ZERO = Schedule.linear(), Schedule.linear(rescale_zero_snr=True)

Make = Callable[[], Table]
Case = tuple[str, str, str, Make, list[Method]]  # kind, data, chain, table, methods


CHAINS = (("ddpm", 100), ("ddim", 25), ("ddim", 50), ("dpmpp_2m", 25), ("heun", 18), ("two_stage_sde", 18))
CHAINS += (("euler_ancestral", 50), ("flow", 28))
TEXT = {"shapes": [("ddim", 25), ("dpmpp_2m", 25)], "shapes-flow": [("flow", 28)]}
GUIDED, SEEN = 2, 4  # seeds of the text networks, and of the other families


def data_of(name: str) -> Empirical | Mixture:
    """The data by a name: what they are, and the factor on them."""
    kind, _, factor = name.partition(" times ")
    scale = float(factor or 1)
    if kind == "two points":
        return Empirical(scale * torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64))
    if kind == "digits":
        return Empirical(scale * digits().data)
    plain = mixture(int(kind.removeprefix("mixture ")))
    return Mixture(plain.weights, scale * plain.means, scale**2 * plain.variances)


def scheduler(name: str, steps: int, **config: Any) -> Make:
    """The table of a diffusers scheduler by its class."""

    def make() -> Table:
        import diffusers

        made = getattr(diffusers, name)(**config)
        made.set_timesteps(steps)
        return from_scheduler(made)

    return make


def cases() -> Iterator[Case]:
    """All cases."""
    both: list[Method] = [collocation(), collocation(window=16)]
    usual: list[Method] = [*both, quasi_newton(), parasolver(), srds()]
    for data in ("two points", "mixture 2"):
        for steps in (200, 1000):
            yield "decisions", data, f"DDPM {steps}", lambda n=steps: ddpm(LINEAR, n), both
            yield "decisions", data, f"DDIM {steps}", lambda n=steps: ddim(LINEAR, n), both
        yield "decisions", data, "Euler ancestral 200", lambda: euler_ancestral(LINEAR, 200), both
        yield "decisions", data, "flow Euler 200", lambda: flow_euler(200), both
    yield "decisions", "digits", "DDPM 200", lambda: ddpm(LINEAR, 200), both
    yield "decisions", "mixture 64", "DDPM 200", lambda: ddpm(LINEAR, 200), both
    for data in ("two points", "mixture 2"):
        yield "stages", data, "Heun 40", lambda: heun(LINEAR, 40), both
        yield "stages", data, "Heun 200, Karras", lambda: heun(LINEAR, 200, karras=True), both
        yield "stages", data, "KDPM2 50", scheduler("KDPM2DiscreteScheduler", 50), both
        yield "stages", data, "KDPM2 ancestral 50", scheduler("KDPM2AncestralDiscreteScheduler", 50), both
        yield "stages", data, "DPM++(2M) 25", lambda: dpmpp_2m(LINEAR, 25), both
        yield "stages", data, "DPM++(2M) 100", lambda: dpmpp_2m(LINEAR, 100), both
        yield (
            "stages",
            data,
            "DPM++(2M) SDE 100",
            scheduler("DPMSolverMultistepScheduler", 100, algorithm_type="sde-dpmsolver++"),
            both,
        )
        yield "stages", data, "DPM++ singlestep 100", scheduler("DPMSolverSinglestepScheduler", 100), both
        yield "stages", data, "UniPC 100", scheduler("UniPCMultistepScheduler", 100), both
    for data in ("two points", "mixture 2"):
        for name, make in (("DDPM", ddpm), ("DDIM", ddim)):
            for steps in (2, 5, 50, 200):
                for prediction in ("sample", "v"):
                    yield "levels", data, f"zero-SNR {name} {steps}, {prediction}", _zero(make, steps, prediction), both
        yield "levels", data, "Euler 200", lambda: euler(LINEAR, 200), both
        yield "levels", data, "Euler zero-SNR 200", scheduler("EulerDiscreteScheduler", 200, rescale_betas_zero_snr=True), both
    for steps in (1, 2, 3, 4, 5, 7, 10, 25, 50):
        for name, make in (("DDPM", ddpm), ("DDIM", ddim), ("DPM++(2M)", dpmpp_2m), ("flow Euler", None)):
            table: Make = (lambda n=steps: flow_euler(n)) if make is None else (lambda n=steps, f=make: f(LINEAR, n))
            yield "short", "two points", f"{name} {steps}", table, both
            yield "short", "mixture 2", f"{name} {steps}", table, both
    for factor in (1e-2, 1e-1, 1e1, 1e2):
        for name, make in (("DDPM", ddpm), ("DDIM", ddim)):
            for steps in (50, 200):
                made: Make = lambda n=steps, f=make: f(LINEAR, n)  # noqa: E731
                yield "scales", f"mixture 2 times {factor:g}", f"{name} {steps}", made, usual
                yield "scales", f"mixture 64 times {factor:g}", f"{name} {steps}", made, usual
    odd: list[Method] = [
        collocation(shift=1e-12),
        collocation(shift=1e6),
        collocation(nodes=2),
        collocation(nodes=8),
        collocation(max_nodes=12),
        collocation(secants=0),
        collocation(order=1),
        collocation(exact=True),
        collocation(tolerance=1e-2),
        collocation(tolerance=1e-3, window=8),
    ]
    for name, make in (("DDPM", ddpm), ("DDIM", ddim)):
        for steps in (30, 200):
            yield "options", "two points", f"{name} {steps}", lambda n=steps, f=make: f(LINEAR, n), odd
    model = load("digits")
    for name in ("ddpm", "ddim"):
        for steps in (50, 200, 1000):
            some: list[Method] = [collocation(window=16)] if steps == 1000 else [*both, quasi_newton()]
            yield "digits", "digits network", f"{name.upper()} {steps}", lambda s=name, n=steps: model.table(s, n), some
    yield from families()


def families() -> Iterator[Case]:
    """The problems of the harness, each of whose methods has a window, or most rows, of its own."""
    for name in ("closed-form-digits", "mixture-2", "mixture-64", "mixture-512", "digits", *TEXT):
        chains = TEXT.get(name, [chain for chain in CHAINS if chain[0] != "flow" or name != "digits"])
        for chain, steps in chains:
            table = family(name).table(chain, steps)
            windows = (16,) if name in TEXT else (4, 16, None)
            found = [contestants(table, window) for window in windows]
            methods = [make(DEFAULT_TOLERANCE) for made in found for kind, make in made.items() if kind != "jacobi"]
            yield "families", name, f"{chain} {steps}", lambda t=table: t, methods


def _zero(make: Callable[..., Table], steps: int, prediction: str) -> Make:
    return lambda: make(ZERO, steps, prediction=prediction, spacing="linspace")


def problem(kind: str, data: str, table: Table, seeds: range) -> tuple[Any, Callable[[], Any]]:
    """A network, and a function that makes its noise."""
    if kind == "families":
        own = family(data)
        return own.evaluator(table, seeds), lambda: own.noise(seeds)
    network: Any = load("digits") if data == "digits network" else data_of(data).denoiser(table)
    shape = (1, 8, 8) if data.startswith("digits") else (2,) if "points" in data else (int(data.split()[1]),)
    return network, lambda: Keyed(shape, seeds.start, len(seeds))


def measure(part: str, case: Case, seeds: range) -> Iterator[Row]:
    """The rows of a case, one a method."""
    kind, data, chain, make, methods = case
    about = {"part": part, "kind": kind, "data": data, "chain": chain}
    if kind == "families":
        seeds = seeds[: GUIDED if data in TEXT else SEEN]
    try:
        table = make()
        network, noise = problem(kind, data, table, seeds)
    except Exception as error:
        console.print(f"{data}, {chain}: {type(error).__name__}: {error}")
        return
    reference = sample(network, table, noise(), sequential()).sample
    spread = float(reference.std())
    for method in methods:
        about |= {"method": method.name, "options": _told(method), "window": getattr(method, "window", None)}
        begin = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = sample(network, table, noise(), method)
        except Exception as error:
            yield {**about, "samples": len(seeds), "status": type(error).__name__, "message": str(error), "silent": 0}
            continue
        errors, estimates = rms(found.sample - reference), [e.estimated_error for e in found.error_estimates]
        pairs = list(zip(errors, estimates, strict=True))
        yield {
            **about,
            "samples": len(seeds),
            "status": found.status.code,
            "rounds": sum(e.rounds for e in found.error_estimates) / len(seeds),
            "rounds_max": found.rounds,
            "evaluations": found.evaluations / len(seeds),
            "error_max": max(errors),
            "told": estimates[errors.index(max(errors))],
            "spread": spread,
            "above_estimate": sum(e > max(t, ROUNDING) for e, t in pairs),
            "above_twice": sum(e > max(2 * t, ROUNDING) for e, t in pairs),
            "untold": sum(e > max(t, DEFAULT_TOLERANCE) and t <= DEFAULT_TOLERANCE for e, t in pairs),
            "told_to_have_left": sum(t > DEFAULT_TOLERANCE for _, t in pairs),
            "left": sum(e > DEFAULT_TOLERANCE for e, _ in pairs),
            "index_1_to_10": sum(1 <= t / max(e, ROUNDING) <= 10 for e, t in pairs),
            "silent": silent(errors, estimates, spread),
            "message": found.message,
            "seconds": time.perf_counter() - begin,
        }


def silent(errors: list[float], estimates: list[float], spread: float) -> int:
    """How many samples are wrong without a word."""
    return sum(not e <= max(2 * t, SHARE * spread) for e, t in zip(errors, estimates, strict=True))


def _told(method: Method) -> str:
    """A method's options that are not the usual ones."""
    return repr(method)


COLUMNS = (
    "kind",
    "data",
    "chain",
    "options",
    "status",
    "rounds",
    "rounds_max",
    "evaluations",
    "error_max",
    "told",
    "spread",
    "silent",
    "samples",
)


def main() -> None:
    """See the module."""
    given = options(__doc__, [*SEEDS, *(f"{part}:{kind}" for part in SEEDS for kind in KINDS)])
    results = Results(given.json, given.keep)
    fresh: list[Row] = []
    for part, all_seeds in SEEDS.items():
        chosen = all_seeds[: given.seeds]
        kinds = KINDS if part in given.only else [kind for kind in KINDS if f"{part}:{kind}" in given.only]
        results.drop(r for r in results.rows if r["part"] != part or r["kind"] not in kinds)
        for case in cases():
            if case[0] in kinds:
                for row in measure(part, case, chosen):
                    results.add(row)
                    fresh.append(row)
                    if row["silent"]:
                        console.print({k: row.get(k) for k in COLUMNS})
    results.save(summary=summary(results.rows))
    show(fresh, COLUMNS)
    show(summary(results.rows), ("part", "kind", "method", "samples", "silent", "above_estimate", *COUNTED))


KINDS = ("decisions", "stages", "levels", "short", "scales", "options", "digits", "families")
COUNTED = ("above_twice", "untold", "told_to_have_left", "left", "index_1_to_10")


def summary(rows: list[Row]) -> list[Row]:
    """How many samples of each kind are silently wrong."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["kind"], row["method"]), []).append(row)
    return [
        {
            "part": part,
            "kind": kind,
            "method": method,
            "samples": sum(r["samples"] for r in found),
            "silent": sum(r["silent"] for r in found),
            "above_estimate": sum(r.get("above_estimate", 0) for r in found),
            **{name: sum(r.get(name, 0) for r in found) for name in COUNTED},
        }
        for (part, kind, method), found in groups.items()
    ]


if __name__ == "__main__":
    main()
