# SPDX-License-Identifier: Apache-2.0
"""The README's first lines: one picture from a text, plain and in parallel, whole clock.

Claim measured: on a CPU, where a call of the flow network costs nearly in proportion to its rows, a parallel call gains where
it evaluates fewer states than the chain has steps: `collocation` on chains of hundreds of steps. A row of `rows` is one
picture, with a prompt and a seed of its own: the plain call, then the parallel one. Seconds are those of whole calls, with text
encoders and decoding, by the clock and of the processor. `grey_rms` and `grey_max` are differences of the pictures in levels of
0 to 255.

A row of `network` is the price of one network call in the processor's time, the first quartile of its repeats, with the two
rows a state that guidance takes.

    python benchmarks/front.py --quick
    python benchmarks/front.py --json benchmarks/results/front.json
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import heading, panels, save
from harness import Results, Row, options, show
from torch import Tensor, nn

from paradiff import collocation, parallelize
from paradiff.models import load_pipeline

PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow circle",
    "a blue square right of a red triangle",
    "a yellow circle below a green square",
    "a red triangle above a blue circle",
    "a green circle right of a yellow triangle",
    "a blue circle left of a green square",
    "a yellow square below a red circle",
)
FIRST_SEED = 20
"""Seeds 0 to 19 served to choose the windows."""

CASES = {"1000 steps": ("shapes-flow", 1000, 4), "50 steps": ("shapes-flow", 50, 4)}
"""Model, steps and window."""

STATES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Clock:
    """What a call took: the whole clock, and the processor's time, which other programs on the machine do not lengthen."""

    seconds: float
    cpu_seconds: float


def picture(pipe: Any, steps: int, number: int) -> tuple[np.ndarray, Clock]:
    """A picture's grey levels, and what the whole call took."""
    begin, cpu = time.perf_counter(), time.process_time()
    found = pipe(
        PROMPTS[number],
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(FIRST_SEED + number),
    ).images[0]
    return np.asarray(found, dtype=float), Clock(time.perf_counter() - begin, time.process_time() - cpu)


def measure(pipe: Any, case: str, number: int) -> tuple[Row, np.ndarray, np.ndarray]:
    """One picture, plain and in parallel: the figures, and the pictures in this order."""
    model, steps, window = CASES[case]
    plain, before = picture(pipe, steps, number)
    with parallelize(pipe, collocation(window=window)) as run:
        found, clock = picture(pipe, steps, number)
    report, gap = run.report, found - plain
    row = {
        "case": case,
        "model": model,
        "steps": steps,
        "window": window,
        "prompt": PROMPTS[number],
        "seed": FIRST_SEED + number,
        "executor": report.executor,
        "rounds": report.passes,
        "evaluations": report.rows - report.checks,
        "seconds": clock.seconds,
        "network_seconds": report.network_seconds,
        "sequential_seconds": before.seconds,
        "gain": before.seconds / clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "sequential_cpu_seconds": before.cpu_seconds,
        "cpu_gain": before.cpu_seconds / clock.cpu_seconds,
        "grey_rms": float(np.sqrt((gap**2).mean())),
        "grey_max": float(abs(gap).max()),
    }
    return row, plain, found


def draw(shown: list[tuple[Row, np.ndarray, np.ndarray]], path: Path) -> None:
    """The first four pictures, plain above parallel, under their prompts."""
    row = shown[0][0]
    title = f"{row['model']}, {row['steps']} steps: the plain call's picture, in fewer rounds"
    figure, grid = panels(title, 5.2, 2, len(shown[:4]))
    for column, (row, *pictures) in zip(grid.T, shown, strict=False):
        texts = f"plain, {row['steps']} rounds", f"parallel, {row['rounds']} rounds"
        for axes, picture, text in zip(column, pictures, texts, strict=True):
            axes.imshow(picture.astype(np.uint8))
            axes.set(xticks=[], yticks=[], xlabel=text)
        heading(column[0], row["prompt"].replace(" of ", " of\n").replace(" above ", " above\n").replace(" below ", " below\n"))
    save(figure, path)


def price(pipe: Any, model: str, repeats: int) -> list[Row]:
    """Milliseconds of the processor that a network call takes on several states, each with guidance's two rows."""
    network: nn.Module = pipe.unet if model == "shapes" else pipe.transformer
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = network.register_forward_pre_hook(lambda _, args, named: seen.append((args, named)), with_kwargs=True)
    pipe(PROMPTS[0], num_inference_steps=1, guidance_scale=4.0, output_type="latent")
    hook.remove()
    args, named = seen[0]

    def wide(value: Any, states: int) -> Any:
        return value.repeat(states, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value

    found = []
    for states in STATES:
        given = [wide(value, states) for value in args]
        by_name = {name: wide(value, states) for name, value in named.items()}
        seconds = []
        with torch.no_grad():
            for _ in range(repeats):
                begin = time.process_time()
                network(*given, **by_name)
                seconds.append(time.process_time() - begin)
        found.append({"model": model, "states": states, "milliseconds": 1000 * sorted(seconds)[repeats // 4]})
    for row in found:
        row["times_one_state"] = row["milliseconds"] / found[0]["milliseconds"]
    return found


def load(model: str) -> Any:
    """A bundled pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    given = options(__doc__, tuple(CASES))
    results = Results(given.json, given.keep)
    pictures = min(2 if given.quick else len(PROMPTS), given.seeds)
    for case in given.only:
        results.drop(row for row in results.rows if row["case"] != case)
        pipe = load(CASES[case][0])
        picture(pipe, 2, 0)  # the first call of a network sets itself up
        shown = []
        for number in range(pictures):
            row, *both = measure(pipe, case, number)
            results.add(row)
            shown.append((row, *both))
        results.save()
        if given.json and case == next(iter(CASES)):
            draw(shown, given.json.with_suffix(".png"))
    network = [row for model in ("shapes", "shapes-flow") for row in price(load(model), model, 8 if given.quick else 24)]
    results.save(network=network)
    show(network, tuple(network[0]), "a network call")
    columns = (
        "case",
        "seed",
        "rounds",
        "evaluations",
        "seconds",
        "sequential_seconds",
        "gain",
        "cpu_gain",
        "grey_rms",
        "grey_max",
    )
    show(results.rows, columns)


if __name__ == "__main__":
    main()
