# SPDX-License-Identifier: Apache-2.0
"""What `auto` costs, or gains, in a pipeline's first call, of which nothing is known, and in the calls after it.

Calls are made in pairs, a plain one and one by `auto`, in either order in turns. Before each first call all that is known is
forgotten: the cache folder is another one, and so is the process's memory of earlier calls. Later calls follow a first one. The
clock is the processor's time of one thread. Networks of stated t(W) add the stated seconds to it, without a sleep, and compute
as they do; `own` is the network's own t(W).

    python benchmarks/first_calls.py --threads 1 --json benchmarks/results/first_calls.json
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Results, console, options

import paradiff
from paradiff.models.files import BUNDLED
from paradiff.models.pipeline import load_pipeline
from paradiff.pipelines.known import forget_calls

CELLS = [
    ("shapes-flow", "own", 28),
    ("shapes-flow", "own", 50),
    ("shapes-flow", "own", 100),
    ("shapes", "own", 50),
    ("digits", "own", 50),
    ("digits", "own", 100),
    ("digits", "own", 300),
    ("shapes-flow", "steep", 50),
    ("shapes-flow", "half", 50),
    ("shapes-flow", "flat", 50),
    ("shapes-flow", "flat", 28),
]
STATED: dict[str, Callable[[float], float]] = {
    "flat": lambda states: 0.2,
    "half": lambda states: 0.1 * (1 + states),
    "steep": lambda states: 0.2 * states,
}
"""Seconds of a call by its states, beside what it computes."""

PAIRS, LATER = 9, 8
slept = 0.0


def clock() -> float:
    """The processor's time of this process, and the seconds that were stated."""
    return time.process_time() + slept


def pipeline_of(name: str, curve: str) -> Any:
    """A bundled pipeline, whose network takes the stated seconds."""
    if name == "digits":
        from diffusers import DDPMPipeline

        pipe: Any = DDPMPipeline.from_pretrained(BUNDLED / "digits")
    else:
        pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    if curve != "own":
        network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        real, own = network.forward, [0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            global slept
            rows = len(args[0] if args else kwargs["hidden_states"])
            own[0] = own[0] or rows
            slept += STATED[curve](rows / own[0])
            return real(*args, **kwargs)

        network.forward = forward
    return pipe


def called(pipe: Any, name: str, steps: int) -> float:
    """The seconds of a call."""
    text = {} if name == "digits" else {"prompt": "a large red circle"}
    gc.collect()
    begin = clock()
    pipe(**text, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    return clock() - begin


def measure(name: str, curve: str, steps: int, pairs: int) -> dict[str, Any]:
    """A row."""
    pipe = pipeline_of(name, curve)
    run = paradiff.parallelize(pipe)
    called(pipe, name, steps)
    seconds: dict[str, list[float]] = {"plain": [], "first": [], "plain beside later": [], "later": []}

    def by_auto() -> float:
        with run:
            return called(pipe, name, steps)

    for turn in range(pairs):
        os.environ["PARADIFF_CACHE"] = tempfile.mkdtemp()
        forget_calls()
        turns = [("plain", lambda: called(pipe, name, steps)), ("first", by_auto)]
        for label, call in turns if turn % 2 else reversed(turns):
            seconds[label].append(call())
    first = run.report
    for _ in range(LATER):
        seconds["plain beside later"].append(called(pipe, name, steps))
        seconds["later"].append(by_auto())
    ratios = [a / p for a, p in zip(seconds["first"], seconds["plain"], strict=True)]
    later = [a / p for a, p in zip(seconds["later"], seconds["plain beside later"], strict=True)]
    return {
        "pipeline": name,
        "curve": curve,
        "steps": steps,
        "pairs": pairs,
        "plain_seconds": statistics.median(seconds["plain"]),
        "first_ratio": statistics.median(ratios),
        "first_ratio_worst": max(ratios),
        "later_ratio": statistics.median(later),
        "later_ratios": later,
        "first_message": first.message,
        "later_message": run.report.message,
    }


def main() -> None:
    """Measures the cells that the file does not have."""
    given = options(__doc__, minutes=14.0, resumes=True)
    begin = time.monotonic()
    results = Results(given.json, keep=given.resume)
    time.perf_counter = clock
    warnings.simplefilter("ignore")
    had = {(row["pipeline"], row["curve"], row["steps"]) for row in results.rows}
    for name, curve, steps in CELLS[:: 4 if given.quick else 1]:
        if (name, curve, steps) in had or time.monotonic() - begin > 60 * given.minutes:
            continue
        row = measure(name, curve, steps, 3 if given.quick else PAIRS)
        results.add(row)
        results.save()
        first, worst, later = row["first_ratio"], row["first_ratio_worst"], row["later_ratio"]
        console.print(
            f"{name}, {curve}, {steps} steps, {row['plain_seconds']:.2f} s: the first call takes {first:.3f} times as long "
            f"(at most {worst:.3f}), later ones {later:.3f}; {row['first_message'][:110]}"
        )


if __name__ == "__main__":
    main()
