# SPDX-License-Identifier: Apache-2.0
"""The values that users hold: what they show of themselves, that they pickle, and that == answers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import tiny_unet
from problems import TABLES

import paradiff
from paradiff import (
    Evaluator,
    Keyed,
    Method,
    Policy,
    Recorded,
    Schedule,
    Table,
    by_row,
    chords,
    collocation,
    explain,
    from_scheduler,
    jacobi,
    models,
    paradigms,
    parallelize,
    parasolver,
    parataa,
    piadm_ode,
    piadm_sde,
    plan,
    quasi_deer,
    quasi_newton,
    sample,
    sequential,
    slopes,
    srds,
)
from paradiff.chain import Clip, Correlated, DynamicThreshold
from paradiff.chain.slope import Slope, resolve
from paradiff.methods import Blocks, ForwardProbes
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.corrector import underdamped_langevin
from paradiff.methods.window.method import WindowMethod
from paradiff.models.policy_unet import PolicyUNet
from paradiff.planning import Calibration, Effectivity, LatencyCurve, Theory, compare
from paradiff.samplers import Grid, ddim
from paradiff.samplers.process import variance_preserving
from paradiff.solver import (
    Batch,
    Deadline,
    EditedOutputs,
    ErrorBound,
    Preview,
    Previews,
    Problem,
    Query,
    Ranks,
    Round,
    Rows,
    Status,
)

SHAPE = (2, 3)


def recorded(seed: int = 0, **options: Any) -> Recorded:
    return Recorded(SHAPE, torch.Generator().manual_seed(seed), **options)


VALUES: dict[str, Any] = {
    **TABLES,
    "schedule": Schedule.linear(),
    "keyed": Keyed(SHAPE, 3, samples=2),
    "keyed by seeds": Keyed(SHAPE, [3, 1]),
    "recorded": recorded(samples=2),
    "correlated": Correlated.autoregressive(Keyed(SHAPE, 3), 0.5),
    "recorded from two": Recorded(SHAPE, [torch.Generator().manual_seed(s) for s in (0, 1)], dtype=torch.float64),
}
DIFFERENT: list[Any] = [
    *TABLES.values(),
    Schedule.linear(),
    Schedule.cosine(),
    Keyed(SHAPE),
    Keyed(SHAPE, 1),
    Keyed(SHAPE, samples=2),
    Keyed((3, 2)),
    recorded(),
    recorded(1),
    recorded(samples=2),
    recorded(dtype=torch.float64),
    Recorded((3, 2), torch.Generator().manual_seed(0)),
    slopes.shifted(0.5),
    slopes.shifted(0.25),
    slopes.zero,
    "ddim",
    None,
]
SLOPES: dict[str, Slope] = {
    "zero": slopes.zero,
    "identity": slopes.identity,
    "freeze_epsilon": slopes.freeze_epsilon,
    "freeze_clean_data": slopes.freeze_clean_data,
    "shifted": slopes.shifted(0.5),
}


@pytest.fixture(scope="module")
def digits() -> models.Model:
    return models.load("digits")


@pytest.mark.parametrize("name", VALUES)
def test_a_value_survives_pickling_and_copying(name: str) -> None:
    value = VALUES[name]
    for other in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert other == value
        assert hash(other) == hash(value)
        assert repr(other) == repr(value)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_shows_itself_in_at_most_three_lines(name: str) -> None:
    shown = repr(VALUES[name])
    assert len(shown.splitlines()) <= 3
    assert max(map(len, shown.splitlines())) < 200
    assert "tensor" not in shown
    assert "object at" not in shown


def test_values_that_differ_are_unequal_whatever_they_are() -> None:
    for i, one in enumerate(DIFFERENT):
        for j, other in enumerate(DIFFERENT):
            assert (one == other) is (i == j), (one, other)


def test_a_table_is_equal_to_one_made_again_and_to_no_other() -> None:
    table = ddim(Schedule.linear(), 12)
    assert ddim(Schedule.linear(), 12) == table
    for changes in (
        {"name": "other"},
        {"t": table.t + 1},
        {"c": table.c + 1e-12},
        {"clip": Clip(2.0)},
        {"start_scale": 2.0},
        {"exact_variance": False},
    ):
        assert dataclasses.replace(table, **changes) != table


def test_a_table_shows_what_it_is() -> None:
    assert repr(ddim(Schedule.linear(), 50, clip=Clip(1.0))) == (
        "Table 'ddim': 50 steps, band 1, deterministic, epsilon prediction, clean data limited by Clip(limit=1.0)\n"
        "  times 980 to 0, signal 0.00768 to 1, noise 1 to 0\n"
        "  levels and coefficients agree"
    )


def test_noises_and_schedules_show_what_they_are() -> None:
    assert repr(Keyed(SHAPE, 3, samples=2)) == "Keyed noise: 2 of shape (2, 3), seed 3"
    assert repr(Keyed(SHAPE, [7, 3, 5])) == "Keyed noise: 3 of shape (2, 3), 3 seeds, 3 to 7"
    assert repr(recorded(samples=2)) == "Recorded noise: 2 of shape (2, 3), torch.float32, from one generator on cpu"
    assert repr(Schedule.linear()) == ("Schedule of 1000 training times: betas 0.0001 to 0.02, noise over signal 0.01 to 157.4")


def test_a_table_leaves_behind_what_was_derived_from_it() -> None:
    table = ddim(Schedule.linear(), 12)
    small = len(pickle.dumps(table))
    assert table.cached(("kept",), lambda: lambda: None) is not None
    assert (len(table.restarts), float(table.p[0])) == (13, pytest.approx(1 / float(table.alpha[0])))
    assert len(pickle.dumps(table)) == small


@pytest.mark.parametrize("drawn", [0, 9])
def test_recorded_noise_draws_the_same_after_pickling(drawn: int) -> None:
    noise = recorded(samples=2)
    wanted = noise.draw(1, range(drawn, 30))
    fresh = recorded(samples=2)
    if drawn:
        fresh.draw(0, range(drawn))
    other = pickle.loads(pickle.dumps(fresh))
    assert torch.equal(other.draw(1, range(drawn, 30)), wanted)
    assert torch.equal(other.start(1), noise.start(1))


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_and_methods_with_them_pickle(name: str) -> None:
    slope = pickle.loads(pickle.dumps(SLOPES[name]))
    assert slope == SLOPES[name]
    table = TABLES["ddim"]
    assert torch.equal(resolve(slope, table), resolve(SLOPES[name], table))
    assert pickle.loads(pickle.dumps(parasolver(slope=slope))) == parasolver(slope=slope)


def test_a_slope_shows_its_variance() -> None:
    assert repr(slopes.shifted(0.5)) == "shifted(0.5)"


def test_a_table_read_off_a_scheduler_survives_pickling() -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(thresholding=True, clip_sample=False)
    scheduler.set_timesteps(10)
    table = from_scheduler(scheduler)
    assert pickle.loads(pickle.dumps(table)) == table
    assert len(repr(table).splitlines()) == 3


def test_a_model_shows_itself_and_pickles(digits: models.Model) -> None:
    assert repr(digits).splitlines()[0].startswith("Model 'digits': samples of shape (1, 8, 8), ")
    assert len(repr(digits).splitlines()) == 2
    other = pickle.loads(pickle.dumps(digits))
    assert (digits == digits, digits == other, hash(digits) == hash(digits)) == (True, False, True)
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor([3, 4])
    assert torch.equal(other(x, t), digits(x, t))
    assert isinstance(other.table("ddim", 5), Table)


class Odd:
    """A slope that can be neither compared nor hashed."""

    def __call__(self, table: Table) -> torch.Tensor:
        return slopes.zero(table)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")


METHODS: dict[str, tuple[Callable[[], Method], str]] = {
    "sequential": (sequential, "sequential(slope=zero, window=1, predictor='copy', tolerance=0.0)"),
    "jacobi": (jacobi, "jacobi(slope=zero)"),
    "paradigms": (paradigms, "paradigms(predictor='copy', tolerance=0.1, rule='change')"),
    "parasolver": (parasolver, "parasolver()"),
    "window": (lambda: parasolver(32, 0.01), "parasolver(window=32, tolerance=0.01)"),
    "tensor": (lambda: parasolver(slope=torch.ones(1000, 1)), "parasolver(slope=slope of 1000x1)"),
    "numpy": (lambda: parasolver(np.int64(32), np.float64(0.5)), "parasolver(window=32, tolerance=0.5)"),  # pyright: ignore[reportArgumentType]
    "lambda": (lambda: parasolver(slope=lambda table: table.a), "parasolver(slope=lambda)"),
    "odd": (lambda: parasolver(slope=Odd()), "parasolver(slope=Odd)"),
    "strides": (lambda: parasolver(stride=[1, 2]), "parasolver(stride=(1, 2))"),
    "many strides": (lambda: parasolver(stride=[2] * 500), "parasolver(stride=(2, 2, 2, 2, ..., 2, 2, 2, 2: 500 numbers))"),
    "quasi_newton": (quasi_newton, "quasi_newton(slope=shifted(0.25), secants=3)"),
    "srds": (srds, "srds()"),
    "srds edges": (lambda: srds([0, 20]), "srds(blocks=(0, 20))"),
    "srds table": (lambda: srds(coarse=TABLES["ddim"]), "srds(coarse=ddim of 12 steps)"),
    "srds slope": (lambda: srds(coarse=torch.ones(20)), "srds(coarse=slope of 20)"),
    "collocation": (collocation, "collocation()"),
    "collocation nodes": (lambda: collocation([0, 3, 9], order=1), "collocation(nodes=(0, 3, 9), order=1)"),
    "parataa": (
        lambda: parataa(10, order=8),
        "parataa(slope=freeze_epsilon, window=10, predictor='held', tolerance=0.001, rule='residual', "
        "anderson=Anderson(order=8),\n"
        "    noise_tolerance=0.001)",
    ),
    "quasi_deer": (lambda: quasi_deer(16), "quasi_deer(window=16)"),
    "chords": (lambda: chords(4, answers=2), "chords(cores=4, answers=2)"),
    "chords starts": (lambda: chords(starts=[0, 4]), "chords(cores=2, starts=(0, 4))"),
    "piadm_sde": (
        lambda: piadm_sde([0, 20], stagger=2),
        "piadm_sde(blocks=Blocks(count=(0, 20), stagger=2), chains='stochastic')",
    ),
    "piadm_ode": (
        lambda: piadm_ode(4, 3, underdamped_langevin(4)),
        "piadm_ode(slope=freeze_epsilon, predictor='copy', tolerance=0.0, rule='sweeps', sweeps=3, blocks=Blocks(count=4),\n"
        "    corrector=Corrector(steps=4, sweeps=4), chains='deterministic')",
    ),
    "control": (
        lambda: WindowMethod("mine", control=WindowControl(first_theta=0.9)),
        "mine(control=WindowControl(first_theta=0.9))",
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_shows_the_call_that_makes_it(name: str) -> None:
    make, wanted = METHODS[name]
    assert repr(make()) == wanted
    assert len(wanted.splitlines()) <= 3


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_compared_and_hashed_without_an_error(name: str) -> None:
    one, two = METHODS[name][0](), METHODS[name][0]()
    assert (one == two) is (name not in ("lambda", "odd"))
    assert one == one
    assert one != "parasolver"
    assert len({one, two}) == (1 if one == two else 2)
    for other in METHODS:
        assert (METHODS[other][0]() == one) is (other == name and one == two)


def test_methods_with_tensors_are_equal_by_their_numbers() -> None:
    slope = torch.ones(40, 1)
    assert parasolver(slope=slope) == parasolver(slope=slope.clone())
    for other in (2 * slope, slope[:, 0], slope.double(), slopes.zero):
        assert parasolver(slope=other) != parasolver(slope=slope)


def test_lists_and_tuples_make_equal_methods() -> None:
    assert parasolver(stride=[1, 2]) == parasolver(stride=(1, 2))
    assert srds([0, 20]) == srds((0, 20))
    assert piadm_sde([0, 20]) == piadm_sde((0, 20))
    assert collocation([0, 20]) == collocation((0, 20))
    assert srds(range(3)).blocks == (0, 1, 2)


# -- every public class ------------------------------------------------------------------------------------------------

ROOMS = ("", ".chain", ".methods", ".models", ".pipelines", ".planning", ".samplers", ".solver")
CLASSES = {
    value
    for module in (importlib.import_module(f"paradiff{room}") for room in ROOMS)
    for value in (getattr(module, name) for name in module.__all__)
    if inspect.isclass(value) and value.__module__.startswith("paradiff.") and not getattr(value, "_is_protocol", False)
}


def seen(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network."""
    return 0.1 * x


def pipeline() -> diffusers.DDPMPipeline:
    return diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler())


def examples() -> list[Any]:
    """An object of every public class, all alike from one call to the next."""
    rounds: list[Round] = []
    table = ddim(Schedule.linear(), 6)
    solutions = [
        sample(seen, table, Keyed(SHAPE), method, observer=rounds.append)
        for method in (parasolver(4), srds(2), collocation(3, order=0), chords(2))
    ]
    run = parallelize(pipeline())
    run.pipeline.set_progress_bar_config(disable=True)
    run(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
    zeros = torch.zeros(2, *SHAPE)
    unet = tiny_unet()
    comparison = compare(seen, table, Keyed(SHAPE), {"srds": srds(2)})
    return [
        *(x for s in solutions for x in (s, s.history[0], s.error_estimates[0])),
        sample(seen, table, Keyed(SHAPE), quasi_newton(), keep_trajectory=True).trajectory,
        *(
            parasolver(),
            srds(),
            collocation(),
            chords(),
            quasi_deer(),
            ForwardProbes(seen),
            Blocks(2),
            underdamped_langevin(1, 2),
        ),
        *(
            Keyed(SHAPE),
            recorded(),
            Correlated.power_law(Keyed(SHAPE), 1.0),
            table,
            Schedule.linear(),
            Grid(torch.tensor([2.0, 1.0, 0.0]), [0, 2]),
        ),
        *(Clip(1.0), DynamicThreshold(0.9, 2.0), Status.EXACT, rounds[0], Deadline(5)),
        *(Previews(print), Preview(1, torch.zeros(1, 3), [0.1], 3, 0.5)),
        *(by_row(seen, table), Rows(torch.arange(1), torch.arange(1), zeros, by_row(seen, table))),
        *(Evaluator(seen), Problem(table=table, noise=Keyed(SHAPE)), EditedOutputs(zeros, zeros), Query(zeros[:, 0, 0], zeros)),
        Batch(zeros, torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)),
        models.Masked(table, Keyed(SHAPE), torch.ones(SHAPE).bool()),
        models.SelfConditioned(table, Keyed(SHAPE)),
        models.Folding(3, 8, 8, 2, 2, 1),
        models.Frames(table, Keyed((2, 3)), torch.eye(3).expand(1, 6, 3, 3)),
        *(models.Gaussian(torch.zeros(3), torch.ones(3)), models.Empirical(torch.eye(3))),
        models.Mixture(torch.ones(2) / 2, torch.eye(2), torch.ones(2)),
        models.Model("tiny", unet, dict(diffusers.DDPMScheduler().config)),
        models.PolicyModel("tiny", PolicyUNet(8, 2, 3, (8, 8)), dict(diffusers.DDPMScheduler().config)),
        *(models.Plane.drawn(0, 3), Policy(seen, table, SHAPE)),
        variance_preserving(Schedule.linear()),
        Theory("sde", 64, 0.1),
        *(comparison, comparison.rows[1], comparison.rows[1].samples[0], LatencyCurve({1: 1.0, 4: 1.4})),
        *(Calibration("ddim", "srds()", (0.1,) * 19, (0.2,) * 19), ErrorBound(0.5, 0.95, 19), Effectivity(2.0, 1.0, 0.0)),
        plan(seen, table, Keyed(SHAPE), curve=LatencyCurve({1: 1.0, 4: 1.4}), pilots=0),
        *(run, run.report, explain(run.pipeline, num_inference_steps=4), paradiff.ParallelInTimeConfig(executor="lanes")),
    ]


@pytest.fixture(scope="module")
def two() -> list[list[Any]]:
    return [examples(), examples()]


def test_every_public_class_has_an_example(two: list[list[Any]]) -> None:
    assert {type(value) for value in two[0]} == CLASSES - {Ranks}  # which needs a process group: tests/solver/test_sharded.py


def test_every_public_object_is_compared_without_an_error(two: list[list[Any]]) -> None:
    """By its values where these can be compared at all, else by identity; its docstring then says so."""
    for one, other in zip(*two, strict=True):
        assert one == one
        assert one != None  # noqa: E711
        assert (one == other) in (True, False)
        own = type(one).__eq__ is not object.__eq__ or isinstance(one, Status)
        assert own or "compared by identity" in " ".join((inspect.getdoc(type(one)) or "").split()), type(one)


def test_every_public_object_pickles(two: list[list[Any]]) -> None:
    for value in two[0]:
        again = pickle.loads(pickle.dumps(value))
        assert type(again) is type(value)
        if type(value).__eq__ is not object.__eq__ and not isinstance(value, Round):
            assert again == value


def test_a_run_that_is_enabled_says_why_it_does_not_pickle() -> None:
    with parallelize(pipeline()) as run, pytest.raises(ValueError, match=r"this run is enabled; call disable\(\) before"):
        pickle.dumps(run)
