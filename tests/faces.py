# SPDX-License-Identifier: Apache-2.0
"""The library's functions called with arguments of every kind: each call has to give a result, or one sentence.

    python tests/faces.py --examples 2000

`FACES` lists the functions, with what fits each argument; what does not is the same for all.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paradiff
from paradiff import samplers
from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.chain.correlated import Correlated
from paradiff.errors import shown
from paradiff.methods.window.corrector import underdamped_langevin
from paradiff.planning.latency import LatencyCurve
from paradiff.samplers.continuum import continuum
from paradiff.samplers.process import rectified_flow, variance_exploding, variance_preserving
from paradiff.samplers.schedule import Schedule, fractional_times, karras_ratios, spaced_times
from paradiff.solver import Evaluator, Solution

LONGEST = 1500
"""Characters of a sentence."""

SCHEDULE = Schedule.linear(50)
TABLE = samplers.ddim(SCHEDULE, 6)
STOCHASTIC = samplers.ddpm(SCHEDULE, 6)
SHAPE = (2, 3)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network of which every row is its own."""
    return torch.tanh(x) * 0.5


def wrong(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network whose outputs have another shape."""
    return x[..., :1]


class Odd:
    """An object without a short representation."""

    def __repr__(self) -> str:
        return "Odd(\n" + "x" * 1000


BAD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**6, 2**31, 2**63, -(2**63), 10**18, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e308, 5e-324]),
    st.text(max_size=5),
    st.sampled_from(["auto", "ddim", "x" * 5000, "\n", "\udc80"]),
    st.binary(max_size=3),
    st.lists(st.integers(-2, 9), max_size=5),
    st.lists(st.one_of(st.floats(), st.text(max_size=2), st.none()), max_size=3),
    st.sampled_from(
        [(), {}, {"a": 1}, {1}, [[1, 2], [3]], [[]], 1j, Decimal(3), Fraction(1, 2), ..., NotImplemented, object, int]
    ),
    st.sampled_from(
        [np.float64(0.5), np.int64(3), np.float64("nan"), np.array(3), np.array([0, 4]), np.bool_(True), np.zeros(0)]
    ),
    st.sampled_from(
        [torch.tensor(3), torch.tensor([0.5]), torch.zeros(0), torch.tensor(math.nan), torch.zeros(2, 3), torch.float32]
    ),
    st.sampled_from(
        [SCHEDULE, TABLE, model, Odd(), Odd, Path("nowhere"), range(3), slice(3), lambda: None, torch.device("cpu")]
    ),
)
"""What fits few arguments; of each kind the numbers that are out of range, too."""

BOOL = st.booleans()
SMALL = st.integers(1, 6)
SOME = st.sampled_from([1, 2, np.int64(3), 6])
POSITIVE = st.sampled_from([0.01, 0.5, 1.0, 2, np.float32(0.25), 1e-3])
SPACING = st.sampled_from(["leading", "trailing", "linspace"])
PREDICTION = st.sampled_from(["epsilon", "sample", "v"])
CLIP = st.sampled_from([None, Clip(1.0), DynamicThreshold(0.9, 1.0)])
WINDOW = st.sampled_from([None, 1, 3, 6])
SLOPE = st.sampled_from([paradiff.slopes.identity, paradiff.slopes.zero, paradiff.slopes.shifted(0.5)])
TABLES = st.sampled_from(
    [TABLE, STOCHASTIC, samplers.heun(SCHEDULE, 4), samplers.flow_euler(6), samplers.dpmpp_2m(SCHEDULE, 6)]
)


@dataclass(frozen=True)
class Face:
    """A function, and strategies of what fits its arguments; those of `rest` may be left out."""

    call: Callable[..., Any]
    needed: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)


STEP = {"schedule": st.just(SCHEDULE), "steps": SOME}
SHARED = {"spacing": SPACING, "offset": st.sampled_from([0, 1]), "prediction": PREDICTION}

FACES: dict[str, Face] = {
    "Schedule": Face(Schedule, {"betas": st.sampled_from([[0.1, 0.2], torch.full((9,), 0.1), np.full(4, 0.2)])}),
    "Schedule.linear": Face(
        Schedule.linear, {}, {"train_steps": st.integers(2, 50), "start": POSITIVE, "end": POSITIVE, "rescale_zero_snr": BOOL}
    ),
    "Schedule.scaled_linear": Face(
        Schedule.scaled_linear,
        {},
        {"train_steps": st.integers(2, 50), "start": POSITIVE, "end": POSITIVE, "rescale_zero_snr": BOOL},
    ),
    "Schedule.cosine": Face(
        Schedule.cosine, {}, {"train_steps": st.integers(2, 50), "max_beta": POSITIVE, "rescale_zero_snr": BOOL}
    ),
    "spaced_times": Face(
        spaced_times, {"train_steps": st.just(50), "steps": SOME, "spacing": SPACING}, {"offset": st.sampled_from([0, 1])}
    ),
    "fractional_times": Face(
        fractional_times, {"train_steps": st.just(50), "steps": SOME, "spacing": SPACING}, {"offset": st.sampled_from([0, 1])}
    ),
    "karras_ratios": Face(karras_ratios, {"low": POSITIVE, "high": POSITIVE, "steps": SOME}, {"rho": POSITIVE}),
    "flow_sigmas": Face(samplers.schedule.flow_sigmas, {"steps": SOME}, {"shift": POSITIVE, "train_steps": st.just(50)}),
    "uniform_grid": Face(
        samplers.uniform_grid, {"start": POSITIVE, "stop": POSITIVE, "blocks": SMALL, "steps": SMALL}, {"clean": BOOL}
    ),
    "log_snr_grid": Face(
        samplers.log_snr_grid, {"start": POSITIVE, "stop": POSITIVE, "blocks": SMALL, "steps": SMALL}, {"clean": BOOL}
    ),
    "paper_grid": Face(
        samplers.paper_grid, {"blocks": SMALL, "step": POSITIVE, "stop": POSITIVE}, {"length": POSITIVE, "clean": BOOL}
    ),
    "Grid": Face(samplers.Grid, {"u": st.just([3.0, 1.0, 0.0]), "edges": st.sampled_from([[0, 2], [0, 1, 2]])}),
    "continuum": Face(continuum, {"table": TABLES, "target": st.sampled_from(["ode", "sde"])}, {"steps": st.integers(2, 40)}),
    "ddim": Face(
        samplers.ddim,
        STEP,
        SHARED
        | {"eta": st.sampled_from([0, 0.5, 1]), "set_alpha_to_one": BOOL, "clip": CLIP, "clipped_epsilon": BOOL}
        | {"landing": st.sampled_from(["next", "stride"])},
    ),
    "ddpm": Face(samplers.ddpm, STEP, SHARED | {"variance": st.sampled_from(["fixed_small", "fixed_large"]), "clip": CLIP}),
    "dpmpp_2m": Face(
        samplers.dpmpp_2m,
        STEP,
        SHARED
        | {"karras": BOOL, "lower_order_final": BOOL, "final": st.sampled_from(["zero", "sigma_min"]), "clip": CLIP}
        | {"restarts": st.sampled_from([(), (1,), [0]])},
    ),
    "euler": Face(samplers.euler, STEP, SHARED | {"karras": BOOL, "final": st.sampled_from(["zero", "sigma_min"])}),
    "euler_ancestral": Face(samplers.euler_ancestral, STEP, SHARED),
    "heun": Face(samplers.heun, STEP, SHARED | {"karras": BOOL, "clip": CLIP}),
    "flow_euler": Face(samplers.flow_euler, {"steps": SOME}, {"shift": POSITIVE, "train_steps": st.just(50)}),
    "with_jumps": Face(
        samplers.with_jumps,
        {"table": st.sampled_from([TABLE, STOCHASTIC]), "jump_length": st.sampled_from([1, 3, 5])},
        {"jump_n_sample": SMALL},
    ),
    "repaint": Face(
        samplers.repaint,
        {"schedule": st.just(SCHEDULE), "steps": st.sampled_from([6, 7]), "jump_length": st.sampled_from([1, 3, 5])},
        {"jump_n_sample": SMALL, "eta": st.sampled_from([0, 0.5, 1]), "clip": CLIP},
    ),
    "exponential_integrator": Face(
        samplers.exponential_integrator,
        {"process": st.just(variance_preserving(SCHEDULE)), "grid": st.just(samplers.uniform_grid(0.4, 0.01, 2, 3))},
        {"form": st.sampled_from(["score", "epsilon", "clean"]), "volatility": st.sampled_from([0, 1, 0.5])}
        | {"prediction": PREDICTION, "times": st.sampled_from(["real", "nearest"]), "clip": CLIP},
    ),
    "variance_preserving": Face(variance_preserving, {"schedule": st.just(SCHEDULE)}),
    "variance_exploding": Face(variance_exploding, {"lowest": POSITIVE, "highest": POSITIVE}),
    "rectified_flow": Face(rectified_flow, {}, {"train_steps": SOME}),
    "Keyed": Face(
        paradiff.Keyed,
        {"shape": st.sampled_from([SHAPE, (1,), [2]])},
        {"seed": st.sampled_from([0, 7, [1, 2]]), "samples": SMALL},
    ),
    "Recorded": Face(
        paradiff.Recorded,
        {"shape": st.sampled_from([SHAPE, (1,)]), "generator": st.builds(lambda: torch.Generator().manual_seed(3))},
        {"samples": SMALL, "dtype": st.sampled_from([torch.float32, torch.float64])},
    ),
    "Correlated.autoregressive": Face(
        Correlated.autoregressive,
        {"noise": st.just(paradiff.Keyed(SHAPE)), "correlation": st.sampled_from([0, 0.5, -0.5])},
        {"axis": st.sampled_from([0, 1])},
    ),
    "Correlated.power_law": Face(
        Correlated.power_law,
        {"noise": st.just(paradiff.Keyed(SHAPE)), "exponent": st.sampled_from([0, 1, -1.5])},
        {"axes": st.sampled_from([(0,), [1], (0, 1)])},
    ),
    "Correlated.scaled": Face(
        Correlated.scaled,
        {"noise": st.just(paradiff.Keyed(SHAPE)), "deviations": st.sampled_from([torch.ones(3), torch.ones(2, 1)])},
    ),
    "Correlated": Face(
        Correlated,
        {"noise": st.just(paradiff.Keyed(SHAPE)), "covariance": st.sampled_from([torch.eye(6), lambda z: 2 * z])},
    ),
    "shifted": Face(paradiff.slopes.shifted, {"variance": POSITIVE}),
    "Clip": Face(Clip, {"limit": POSITIVE}),
    "DynamicThreshold": Face(DynamicThreshold, {"ratio": POSITIVE, "maximum": POSITIVE}),
    "underdamped_langevin": Face(underdamped_langevin, {"steps": SMALL}, {"sweeps": SMALL}),
    "jacobi": Face(paradiff.jacobi, {}, {"window": WINDOW, "tolerance": POSITIVE}),
    "paradigms": Face(paradiff.paradigms, {}, {"window": WINDOW, "tolerance": POSITIVE}),
    "parasolver": Face(
        paradiff.parasolver,
        {},
        {"window": WINDOW, "tolerance": POSITIVE, "stride": st.sampled_from([1, 2, [2, 4]]), "warmup": st.sampled_from([0, 1])}
        | {"slope": SLOPE, "rule": st.sampled_from(["error", "change"])},
    ),
    "quasi_newton": Face(
        paradiff.quasi_newton,
        {},
        {
            "window": WINDOW,
            "tolerance": POSITIVE,
            "secants": SMALL,
            "neighbours": SMALL,
            "slope": SLOPE,
            "warmup": st.sampled_from([0, 1]),
        },
    ),
    "chords": Face(
        paradiff.chords,
        {},
        {
            "cores": SMALL,
            "tolerance": POSITIVE,
            "starts": st.sampled_from([None, [0, 2]]),
            "answers": st.sampled_from([None, 1]),
        }
        | {"rule": st.sampled_from(["error", "change"])},
    ),
    "quasi_deer": Face(
        paradiff.quasi_deer,
        {},
        {"window": WINDOW, "tolerance": POSITIVE, "probes": SMALL, "warmup": st.sampled_from([0, 1])},
    ),
    "parataa": Face(
        paradiff.parataa,
        {},
        {"window": WINDOW, "tolerance": POSITIVE, "order": WINDOW, "history": WINDOW, "noise_tolerance": POSITIVE}
        | {"ridge": POSITIVE},
    ),
    "srds": Face(
        paradiff.srds,
        {},
        {"blocks": st.sampled_from([None, 2, [0, 3, 6]]), "coarse": st.sampled_from(["one step", "two step", 2])}
        | {
            "ordering": st.sampled_from(["pipelined", "batched"]),
            "tolerance": POSITIVE,
            "iterations": st.sampled_from([None, 1]),
        }
        | {"rule": st.sampled_from(["error", "change", "sample", "image"]), "window": WINDOW, "rows": WINDOW},
    ),
    "collocation": Face(
        paradiff.collocation,
        {},
        {"nodes": st.sampled_from(["auto", 4, [0, 3]]), "window": WINDOW, "tolerance": POSITIVE, "order": st.integers(0, 3)}
        | {"shift": st.sampled_from(["auto", 0.25]), "secants": SMALL, "max_nodes": WINDOW, "exact": BOOL}
        | {"target": st.sampled_from(["chain", "ode", "sde"]), "warm_start": st.none(), "control": st.none()},
    ),
    "piadm_sde": Face(
        paradiff.piadm_sde,
        {"blocks": st.sampled_from([1, 2, [0, 6]])},
        {"sweeps": st.sampled_from([None, 2]), "tolerance": st.sampled_from([None, 0.1]), "stagger": st.sampled_from([None, 1])}
        | {"slope": SLOPE, "carry": BOOL, "window": WINDOW},
    ),
    "piadm_ode": Face(
        paradiff.piadm_ode,
        {"blocks": st.sampled_from([1, 2, [0, 6]])},
        {"sweeps": st.sampled_from([None, 2]), "corrector": st.sampled_from([None, underdamped_langevin(2, 2)])},
    ),
    "Evaluator": Face(
        Evaluator,
        {"denoiser": st.just(model)},
        {"max_rows": st.sampled_from([None, 1, 3]), "device": st.just("cpu"), "dtype": st.just(torch.float32)}
        | {"conditioning": st.sampled_from([None, {"y": torch.zeros(2, 3)}])},
    ),
    "sample": Face(
        paradiff.sample,
        {"denoiser": st.sampled_from([model, model, wrong]), "table": TABLES}
        | {
            "noise": st.just(paradiff.Keyed(SHAPE, samples=2)),
            "method": st.sampled_from([paradiff.parasolver(), paradiff.srds()]),
        },
        {"start": st.sampled_from([None, torch.zeros(2, *SHAPE)]), "dtype": st.sampled_from([torch.float32, torch.float64])}
        | {"observer": st.sampled_from([None, lambda _: True]), "check": st.sampled_from(["first", "every", "off"])},
    ),
    "compare": Face(
        paradiff.compare,
        {"denoiser": st.sampled_from([model, model, wrong, Evaluator(model, max_rows=3)]), "table": TABLES}
        | {
            "noise": st.sampled_from([paradiff.Keyed(SHAPE, samples=2), paradiff.Recorded(SHAPE, torch.Generator(), 2)]),
            "methods": st.sampled_from(
                [
                    [paradiff.parasolver(), paradiff.srds()],
                    {"mine": paradiff.jacobi(2)},
                    [paradiff.chords(3)],
                    [paradiff.collocation(), paradiff.piadm_sde(2)],
                ]
            ),
        },
        {
            "rivals": st.sampled_from(
                [None, {"other": samplers.ddim(SCHEDULE, 3)}, {"own": (samplers.euler(SCHEDULE, 3), model)}]
            ),
            "curve": st.sampled_from([None, LatencyCurve({1: 1.0, 4: 1.5})]),
        }
        | {"alone": BOOL, "unit": st.sampled_from([None, 1.0, 2])},
    ),
    "calibrate": Face(
        paradiff.calibrate,
        {"model": st.sampled_from([model, model, wrong, Evaluator(model, max_rows=3)]), "chain": TABLES}
        | {
            "method": st.sampled_from([paradiff.parasolver(), paradiff.srds(), paradiff.collocation(), paradiff.auto()]),
            "shape": st.just(SHAPE),
        },
        {"seeds": st.sampled_from([range(3), [5, 2, 9, 4]]), "coverage": st.sampled_from([0.5, 0.7])},
    ),
    "LatencyCurve": Face(LatencyCurve, {"points": st.sampled_from([{1: 1.0, 4: 1.5}, {1: 2}])}),
    "LatencyCurve.of_text": Face(LatencyCurve.of_text, {"text": st.sampled_from(["1:1,2:1.1", "1:0.5"])}),
    "solve": Face(
        lambda **given: next(paradiff.solve(**given)),
        {"table": TABLES, "noise": st.just(paradiff.Keyed(SHAPE, samples=2)), "method": st.just(paradiff.parasolver())},
        {"device": st.just("cpu"), "dtype": st.just(torch.float32)},
    ),
}


def fitting(face: Face) -> st.SearchStrategy[dict[str, Any]]:
    """Calls of a function whose arguments fit, each by itself."""
    return st.fixed_dictionaries(dict(face.needed), optional=dict(face.rest))


def arguments(face: Face) -> st.SearchStrategy[dict[str, Any]]:
    """Calls of a function: most arguments fit, up to two do not."""
    names = st.lists(st.sampled_from(sorted({**face.needed, **face.rest})), unique=True, max_size=2)
    odd = names.flatmap(lambda chosen: st.fixed_dictionaries(dict.fromkeys(chosen, BAD)))
    return st.builds(lambda fit, other: fit | other, fitting(face), odd)


def complaint(error: ValueError) -> str:
    """What is wrong with an error's sentence; empty if nothing is."""
    text = str(error)
    if type(error) is not ValueError:
        return f"{type(error).__name__}: {text}"
    if not text or "\n" in text:
        return f"{text!r} is not one line"
    if " at 0x" in text:
        return f"{text!r} shows an address"
    return f"{len(text)} characters" if len(text) > LONGEST else ""


def check(face: Face, given: Mapping[str, Any]) -> None:
    """Makes a call.

    Raises:
        AssertionError: If it fails otherwise than by one sentence, or returns a sample that is no numbers.
    """
    call = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
    begin = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = face.call(**given)
    except ValueError as error:
        wrong = complaint(error)
        if wrong:
            raise AssertionError(f"{call}: {wrong}") from error
        return
    except Exception as error:
        raise AssertionError(f"{call}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - begin < 20, f"{call}: took {time.monotonic() - begin:.0f} s"
    str(found), repr(found)
    if isinstance(found, Solution):
        assert found.sample.isfinite().all(), f"{call}: the sample is not finite"


def fuzz(name: str, examples: int) -> None:
    """Makes that many calls of one function, the same at each time."""
    face = FACES[name]

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(arguments(face))
    def calls(chosen: dict[str, Any]) -> None:
        check(face, chosen)

    calls()


def main(given: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description="Call the library's functions with arguments of every kind.")
    parser.add_argument("--examples", type=int, default=2000, help="calls of each function")
    parser.add_argument("names", nargs="*", help="functions; all by default")
    asked = parser.parse_args(given)
    failed = 0
    for name in asked.names or FACES:
        try:
            fuzz(name, asked.examples)
            print(f"{name}: {asked.examples} calls")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found = getattr(error, "exceptions", [error])  # a group, where calls failed in several ways
            for one in found:
                print(f"{name}: {str(one)[:600]}")
            failed += len(found)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
