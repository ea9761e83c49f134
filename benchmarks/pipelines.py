# SPDX-License-Identifier: Apache-2.0
"""Pipelines: whole calls of the bundled text pipelines with guidance, methods beside schedulers.

Claim measured: with `parallelize`, two lines around an unchanged call, a pipeline takes fewer rounds than its scheduler has
steps, at a small error of its latents. A row is a set of whole calls, one image each (a prompt and a seed of its own), latents
out: the seconds include text encoder, loop and solver. Beside it stands the plain call, timed in the same run. Errors are root
mean square differences of the latents to those of the plain call, in units of the latents' standard deviation; `error_max` is
that of the worst image.

`StableDiffusionParadigmsPipeline` is diffusers' own parallel pipeline, on the same components; it has DDIM and DDPM only. Its
rounds are counted as calls of its network. `bookkeeping` is the time of a round outside a network that costs nothing.

    python benchmarks/pipelines.py --quick
    python benchmarks/pipelines.py --json benchmarks/results/pipelines.json
    python benchmarks/pipelines.py --only 'DPM*' 'flow*' --json FILE
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from harness import Results, Row, options, show
from torch import Tensor

from paradiff import paradigms, parallelize, parasolver, quasi_newton, srds
from paradiff.chain.slope import freeze_clean_data, identity, shifted
from paradiff.models.pipeline import load_pipeline
from paradiff.planning.harness import GUIDANCE as GUIDANCE
from paradiff.planning.harness import PROMPTS as PROMPTS

Make = Callable[[Any], Any]

SCHEDULERS: dict[str, tuple[str, Make]] = {
    "DDIM": ("shapes", diffusers.DDIMScheduler.from_config),
    "DPM++(2M)": ("shapes", diffusers.DPMSolverMultistepScheduler.from_config),
    "SDE-DPM++(2M)": (
        "shapes",
        lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"),
    ),
    "Euler": ("shapes", diffusers.EulerDiscreteScheduler.from_config),
    "Euler ancestral": ("shapes", diffusers.EulerAncestralDiscreteScheduler.from_config),
    "UniPC": ("shapes", diffusers.UniPCMultistepScheduler.from_config),
    "DDPM": ("shapes", lambda config: diffusers.DDPMScheduler.from_config(config, clip_sample=False)),
    "DDIM, trailing": (  # the spacing that has a place for as many steps as the network was trained on
        "shapes",
        lambda config: diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=True),
    ),
    "DDPM, trailing": (
        "shapes",
        lambda config: diffusers.DDPMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False),
    ),
    "flow Euler": ("shapes-flow", diffusers.FlowMatchEulerDiscreteScheduler.from_config),
}
CHAINS = {
    "DDIM": 50,
    "DPM++(2M)": 25,
    "SDE-DPM++(2M)": 25,
    "Euler ancestral": 50,
    "UniPC": 25,
    "DDPM": 100,
    "flow Euler": 28,
}
QUICK = ("DDIM", "DPM++(2M)", "flow Euler")
COLUMNS = ("model", "scheduler", "steps", "method", "rounds", "rounds_max", "evaluations", "error_median", "error_max")
COLUMNS += ("seconds", "sequential_seconds")


def methods(stochastic: bool, one_step: bool) -> dict[str, Any]:
    """The rows of one chain: a label and a method."""
    found: dict[str, Any] = {
        "parasolver": parasolver(slope=identity),
        "parasolver, freeze-clean-data": parasolver(slope=freeze_clean_data),
        "parasolver, shifted:0.25": parasolver(slope=shifted(0.25)),
        "parasolver, window 16": parasolver(16, slope=shifted(0.25)),
        "quasi_newton": quasi_newton(),
        "quasi_newton, tolerance 0.12": quasi_newton(tolerance=0.12),
        "quasi_newton, window 16": quasi_newton(16),
        "paradigms": paradigms(tolerance=0.1 if stochastic else 0.01),
    }
    if one_step:
        found["srds"] = srds()
    return found


class Bench:
    """One pipeline with one scheduler at one number of steps, and the plain calls to compare with.

    Args:
        chain: A key of `SCHEDULERS`.
        steps: Number of steps.
        images: How many prompts and seeds.
    """

    def __init__(self, chain: str, steps: int, images: int) -> None:
        self.chain, self.steps, self.images = chain, steps, images
        model, make = SCHEDULERS[chain]
        self.model = model
        self.pipe = load(model)
        self.pipe.scheduler = make(self.pipe.scheduler.config)
        self.call(self.pipe, 0)  # the first call of a network sets itself up
        found = [self.call(self.pipe, k) for k in range(images)]
        self.references = torch.stack([latents for latents, _ in found])
        self.sequential_seconds = sum(seconds for _, seconds in found) / images
        self.spread = float(self.references.std())

    def call(self, pipe: Any, image: int, **extra: Any) -> tuple[Tensor, float]:
        """One image's latents, and the seconds of the whole call."""
        begin = time.perf_counter()
        found = pipe(
            PROMPTS[image % len(PROMPTS)],
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(image),
            output_type="latent",
            **extra,
        ).images
        return found, time.perf_counter() - begin

    def row(self, label: str, found: list[tuple[Tensor, float]], rounds: list[int], rows: list[int], **more: Any) -> Row:
        """The figures of a set of calls."""
        gaps = torch.stack([latents for latents, _ in found]) - self.references
        errors = gaps.double().square().flatten(1).mean(1).sqrt() / self.spread
        return {
            "model": self.model,
            "scheduler": self.chain,
            "steps": self.steps,
            "method": label,
            "images": self.images,
            "rounds": sum(rounds) / len(rounds),
            "rounds_max": max(rounds),
            "evaluations": sum(rows) / len(rows),
            "error_median": errors.median().item(),
            "error_max": errors.max().item(),
            "seconds": sum(s for _, s in found) / len(found),
            "sequential_seconds": self.sequential_seconds,
            **more,
        }

    def measure(self, label: str, method: Any) -> Row:
        """A method of this library's."""
        found, reports = [], []
        with parallelize(self.pipe, method) as run:
            for image in range(self.images):
                found.append(self.call(self.pipe, image))
                reports.append(run.report)
        estimates = [r.error_estimate.estimated_error / self.spread for r in reports]
        outside = [(s - r.network_seconds) / r.passes for (_, s), r in zip(found, reports, strict=True)]
        return self.row(
            label,
            found,
            [r.passes for r in reports],
            [r.rows - r.checks for r in reports],
            tolerance=method.tolerance,
            rule=method.rule,
            executor=reports[0].executor,
            estimated_error_max=max(estimates),
            milliseconds_outside_networks_a_round=1000 * sum(outside) / len(outside),
        )

    def measure_diffusers(self) -> Row:
        """diffusers' own parallel pipeline."""
        kind = {"DDIM": diffusers.DDIMParallelScheduler, "DDPM": diffusers.DDPMParallelScheduler}[self.chain]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = {**self.pipe.components, "scheduler": kind.from_config(self.pipe.scheduler.config)}
            parts.pop("image_encoder")
            pipe = diffusers.StableDiffusionParadigmsPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.wrapped_unet = pipe.unet
        calls: list[int] = []
        hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0]) // 2))
        found, rounds, rows = [], [], []
        tolerance = 0.1 if self.chain == "DDPM" else 0.01
        for image in range(self.images):
            calls.clear()
            found.append(self.call(pipe, image, parallel=self.steps, tolerance=tolerance))
            rounds.append(len(calls))
            rows.append(sum(calls))
        hook.remove()
        return self.row("diffusers' paradigms", found, rounds, rows, tolerance=tolerance, rule="change", executor="its own")


def bookkeeping(repeats: int) -> list[Row]:
    """Milliseconds of a round that are not the network's: guided calls of the text pipeline with a network that returns a
    tenth of its input, with 50 more steps against without, by the rounds that these take; the best of some repeats."""
    pipe = load("shapes")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.unet.forward = lambda sample, *args, **kwargs: (0.1 * sample,)

    def best(steps: int, window: int | None, executor: Any) -> tuple[float, int]:
        found = []
        for _ in range(repeats):
            begin = time.perf_counter()
            with parallelize(pipe, parasolver(window, tolerance=0.0), executor=executor, check="off") as run:
                pipe(PROMPTS[0], num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="latent")
            found.append((time.perf_counter() - begin, run.report.passes or steps))
        return min(found)

    def a_round(window: int | None, executor: str) -> float:
        (short, few), (long, many) = best(50, window, executor), best(100, window, executor)
        return 1000 * (long - short) / (many - few)

    plain = a_round(None, "sequential")
    return [
        {
            "executor": executor,
            "window": window,
            "milliseconds_a_round": a_round(window, executor),
            "plain_milliseconds_a_step": plain,
        }
        for executor in ("vector", "lanes")
        for window in (4, 16, 32)
    ]


def load(model: str) -> Any:
    """A bundled pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    given = options(__doc__, tuple(CHAINS))
    results = Results(given.json, given.keep)
    for chain in given.only:
        if given.quick and chain not in QUICK and not given.keep:
            continue
        results.drop(row for row in results.rows if row["scheduler"] != chain)
        images = min(2 if given.quick else 4 if chain.startswith("flow") else 8, given.seeds)
        bench = Bench(chain, CHAINS[chain], images)
        one_step = chain not in ("DPM++(2M)", "SDE-DPM++(2M)", "UniPC")
        for label, method in methods(chain in ("SDE-DPM++(2M)", "Euler ancestral", "DDPM"), one_step).items():
            results.add(bench.measure(label, method))
        if chain in ("DDIM", "DDPM"):
            results.add(bench.measure_diffusers())
        results.save()
    results.save(bookkeeping=bookkeeping(2 if given.quick else 9))
    show(results.contents["bookkeeping"], tuple(results.contents["bookkeeping"][0]))
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()
