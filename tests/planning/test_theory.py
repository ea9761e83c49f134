# SPDX-License-Identifier: Apache-2.0
"""Parameters from the theorems: their formulas by hand, what they cost, what is refused, and a run with them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from problems import network
from torch import Tensor

import paradiff.planning.theory
from paradiff import Evaluator, Keyed, sample, solve
from paradiff.chain.slope import freeze_epsilon
from paradiff.models.exact import Mixture
from paradiff.planning import Theory
from paradiff.samplers import exponential_integrator, ornstein_uhlenbeck
from paradiff.solver import Batch, drive
from paradiff.solver.solution import Status

Kind = Literal["sde", "ode"]
MAKERS: dict[Kind, Callable[..., Theory]] = {"sde": partial(Theory, "sde"), "ode": partial(Theory, "ode")}
each_kind = pytest.mark.parametrize("kind", MAKERS)


# -- the formulas ------------------------------------------------------------------------------------------------------


def test_the_parameters_of_the_sde_are_those_computed_by_hand() -> None:
    found = Theory("sde", 2, 0.5)
    h = 0.2784645427610738  # Lambert's W(1/e): h e^h = 1/e
    assert found.length == pytest.approx(h, rel=1e-14)
    assert found.blocks == 8  # ln(2/0.25) = 2.08 in blocks of 0.278
    assert found.horizon == pytest.approx(8 * h)
    assert found.width == 5  # h/epsilon for epsilon = 0.25/(2 T) = 0.0561, rounded up
    assert found.step == pytest.approx(h / 5)
    assert found.sweeps == 5  # ln(2 T/0.25) + 2 = 4.88, rounded up
    assert found.early_stop == 0.125
    assert found.last_block == 15  # ln(h/0.125)/ln(1 + h/5) = 14.8
    assert found.steps == 7 * 5 + 15
    assert found.bytes == 10 * 5 * 2 * 4
    assert found.corrector is None


def test_the_parameters_of_the_ode_are_those_computed_by_hand() -> None:
    found = Theory("ode", 64, 0.1, lipschitz=2.0, itemsize=8)
    h = found.length
    assert 4 * h * math.exp(h) == pytest.approx(math.exp(-1), rel=1e-14)
    assert h == pytest.approx(0.0845163, abs=1e-7)
    assert found.blocks == 104  # ln(6400) = 8.764 in blocks of 0.0845
    assert found.horizon == pytest.approx(8.78970, abs=1e-5)
    assert found.width == 60  # h/epsilon for epsilon = 0.1/(8 T) = 0.001422: 59.4
    assert found.sweeps == 13  # ln(64 T/0.01) + 2 = 12.9
    assert found.early_stop == pytest.approx(0.01 / 64)
    assert found.last_block == 4471  # ln(h/eta)/ln(1 + h/60) = 6.2932/0.0014076
    assert found.steps == 103 * 60 + 4471
    assert found.bytes == 10 * 60 * 64 * 8
    # Steps of 0.1/(8 sqrt(2)) for a length of 1/sqrt(2), ln(6400) sweeps, friction sqrt(8 L) = 4.
    corrector = found.corrector
    assert corrector is not None
    assert (corrector.steps, corrector.sweeps, corrector.lipschitz) == (80, 9, 2.0)
    assert corrector.friction == pytest.approx(4.0)
    assert corrector.step == pytest.approx(0.0125 / math.sqrt(2))


@pytest.mark.parametrize("dimension", [1, 2, 17, 784])
@pytest.mark.parametrize("accuracy", [0.9, 0.3, 0.05])
@pytest.mark.parametrize("lipschitz", [1.0, 3.0])
def test_the_terms_of_the_guarantees_are_at_most_delta_squared(dimension: int, accuracy: float, lipschitz: float) -> None:
    for kind, make in MAKERS.items():
        t = make(dimension, accuracy, lipschitz=lipschitz)
        square, slack = accuracy**2, 1 + 1e-9
        assert dimension * math.exp(-t.horizon) <= square * slack
        discretised = t.step * t.horizon if kind == "sde" else (t.step * t.horizon) ** 2
        assert dimension * discretised <= square * slack
        assert dimension * t.early_stop <= square * slack
        assert t.early_stop < t.length
        # As many sweeps as shrink an error of d T to delta^2 at a factor of e, and two to spare but for rounding.
        assert dimension * max(t.horizon, 1) * math.exp(2 - t.sweeps) <= square * slack
        assert dimension * max(t.horizon, 1) * math.exp(3 - t.sweeps) > square
        assert lipschitz**2 * t.length * math.exp(t.length) == pytest.approx(math.exp(-1))
        assert t.width * t.step == pytest.approx(t.length)
        assert t.horizon - t.length < math.log(dimension / square) or t.blocks == 1
        assert t.bytes == paradiff.planning.theory.HELD * t.width * dimension * 4


@each_kind
@pytest.mark.parametrize(("dimension", "accuracy"), [(1, 0.999), (1, 0.3), (2, 0.5), (3, 0.3), (8, 0.4), (30, 0.7)])
@pytest.mark.parametrize("lipschitz", [1.0, 1.7])
def test_the_grid_has_the_steps_that_are_announced(kind: Kind, dimension: int, accuracy: float, lipschitz: float) -> None:
    found = MAKERS[kind](dimension, accuracy, lipschitz=lipschitz)
    grid = found.grid()
    assert grid.steps == found.steps
    assert grid.blocks == found.blocks
    assert grid.longest == max(found.last_block, found.width if found.blocks > 1 else 0)
    assert float(grid.u[0]) == pytest.approx(found.horizon)
    assert float(grid.u[-1]) == pytest.approx(found.early_stop)
    widths = grid.u[:-1] - grid.u[1:]
    assert float(widths.max()) <= found.step * (1 + 1e-9)


@each_kind
def test_more_accuracy_costs_more(kind: Kind) -> None:
    found = [MAKERS[kind](16, accuracy) for accuracy in (0.9, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)]
    for less, more in itertools.pairwise(found):
        assert more.blocks >= less.blocks
        assert more.sweeps >= less.sweeps
        assert more.steps > less.steps
        assert more.width > less.width
        assert more.bytes > less.bytes
        assert more.step < less.step
        assert more.early_stop < less.early_stop
    # The orders in delta, up to logarithms: M like delta^-2 for the SDE and delta^-1 for the ODE.
    gain = math.log(found[-1].width / found[-3].width) / math.log(10)
    assert gain == pytest.approx(2 if kind == "sde" else 1, abs=0.3)


@each_kind
def test_more_dimensions_cost_the_orders_of_the_theorems(kind: Kind) -> None:
    small, large = (MAKERS[kind](d, 0.1) for d in (100, 10_000))
    gain = math.log(large.bytes / small.bytes) / math.log(100)
    assert gain == pytest.approx(2 if kind == "sde" else 1.5, abs=0.15)
    rounds = [t.blocks * t.sweeps for t in (small, large)]
    assert rounds[1] < 3 * rounds[0]  # squared logarithms


# -- the method --------------------------------------------------------------------------------------------------------

TARGET = Mixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), torch.tensor([0.2, 0.3]))


@pytest.mark.parametrize(("kind", "accuracy"), [("sde", 0.5), ("sde", 0.3), ("ode", 0.5), ("ode", 0.2)])
def test_the_method_runs_and_comes_near_the_sequential_sample(kind: Kind, accuracy: float) -> None:
    theory = MAKERS[kind](2, accuracy)
    table = exponential_integrator(ornstein_uhlenbeck(), theory.grid(), volatility=float(kind == "sde"))
    method, noise, denoiser = theory.method(), Keyed((2,), 0, 6), TARGET.denoiser(table)
    found = sample(denoiser, table, noise, method, dtype=torch.float64)
    corrector = None if method.corrector is None else dataclasses.replace(method.corrector, sweeps=method.corrector.steps)
    whole = dataclasses.replace(method, sweeps=table.steps, corrector=corrector)
    wanted = sample(denoiser, table, noise, whole, dtype=torch.float64).sample
    error = float((found.sample - wanted).square().sum(1).mean().sqrt())
    assert error <= accuracy
    if theory.width <= theory.sweeps:
        assert found.status is Status.EXACT
    else:
        assert found.rounds < table.steps + (0 if corrector is None else theory.blocks * corrector.steps)
        assert 0 < error < 0.1 * accuracy
        one = sample(denoiser, table, noise, dataclasses.replace(method, sweeps=1), dtype=torch.float64).sample
        assert float((one - wanted).square().sum(1).mean().sqrt()) > 3 * error


@each_kind
def test_the_method_is_the_paper_s_and_holds_no_more_than_announced(kind: Kind) -> None:
    theory = MAKERS[kind](3, 0.5)
    method, grid = theory.method(), theory.grid()
    assert (method.slope, method.predictor, method.rule, method.sweeps) == (freeze_epsilon, "copy", "sweeps", theory.sweeps)
    assert (method.window, method.corrector) == (theory.width, theory.corrector)
    assert method.blocks is not None
    assert method.blocks.count == tuple(grid.edges)
    table = exponential_integrator(ornstein_uhlenbeck(), grid, volatility=float(kind == "sde"))
    swept, corrected = [0], [0]

    def outputs(batch: Batch) -> Tensor:
        of = swept if len(batch.nodes) == 1 or batch.nodes[0] != batch.nodes[-1] else corrected
        of.append(len(batch.nodes))
        return network(batch.x, batch.t)

    drive(solve(table, Keyed((3,)), method), outputs, check="off")
    assert max(swept) == theory.width
    assert max(corrected) == (0 if theory.corrector is None else theory.corrector.steps - 1)


def test_the_methods_are_for_their_own_chains() -> None:
    for kind, make in MAKERS.items():
        theory = make(2, 0.5)
        table = exponential_integrator(ornstein_uhlenbeck(), theory.grid(), volatility=float(kind == "ode"))
        evaluator = Evaluator(network)
        with pytest.raises(ValueError, match=rf"piadm_{kind} is for"):
            sample(evaluator, table, Keyed((2,)), theory.method())
        assert evaluator.rounds == 0


@each_kind
def test_it_says_what_is_the_paper_s_and_what_is_ours(kind: Kind) -> None:
    theory = MAKERS[kind](2, 0.5)
    said = str(theory).splitlines()
    assert said[0] == f"PIADM-{kind.upper()} for d = 2, delta = 0.5, L = 1"
    for name in ("T =", "h =", "epsilon =", "K ="):
        (line,) = [line for line in said[1:] if line.strip().startswith(name)]
        assert "the paper's" in line
        assert "ours" in line
    assert any(line.strip().startswith("eta = 0.125") and "ours" in line for line in said)
    assert f"steps = {theory.steps}, {theory.bytes:.3g} bytes of states" in said[7]
    assert ("corrector: 3 steps of 0.354, 3 sweeps" in said[-1]) == (kind == "ode")


# -- memory ------------------------------------------------------------------------------------------------------------


def refusal(kind: Kind, dimension: int, accuracy: float, memory: float, itemsize: int = 4) -> str:
    with pytest.raises(ValueError, match=r"states of \d+ numbers need .* bytes; .* are given") as refused:
        MAKERS[kind](dimension, accuracy, memory=memory, itemsize=itemsize)
    return str(refused.value)


@each_kind
@pytest.mark.parametrize("dimension", [2, 10, 100, 3072])
@pytest.mark.parametrize("accuracy", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01])
def test_what_the_refusal_names_fits_the_memory(kind: Kind, dimension: int, accuracy: float, share: float) -> None:
    wanted = MAKERS[kind](dimension, accuracy)
    memory, per_state = share * wanted.bytes, paradiff.planning.theory.HELD * dimension * 4
    assert MAKERS[kind](dimension, accuracy, memory=wanted.bytes).width == wanted.width
    said = refusal(kind, dimension, accuracy, memory)
    assert said.startswith(
        f"{wanted.width} states of {dimension} numbers need {wanted.bytes:.3g} bytes; {memory:.3g} are given"
    )
    if memory < per_state:
        assert said.endswith(f"less than one state takes ({per_state:.3g}): give more")
        return
    window = re.search(r"a window of (\d+) nodes", said)
    assert window is not None
    assert int(window[1]) * per_state <= memory < (int(window[1]) + 1) * per_state
    length = re.search(r"blocks of length ([-+.e\d]+) \((\d+) of them\)", said)
    assert length is not None
    assert float(length[1]) == pytest.approx(int(window[1]) * wanted.step, rel=6e-3)
    assert int(window[1]) * wanted.step * int(length[2]) >= wanted.horizon * (1 - 1e-9)
    named = re.search(r"an accuracy of ([-+.e\d]+),", said)
    if named is None:
        assert said.endswith("no accuracy below 1 does")
        with pytest.raises(ValueError, match="are given"):
            MAKERS[kind](dimension, 0.999, memory=memory)
        return
    coarser = MAKERS[kind](dimension, float(named[1]), memory=memory)  # is not refused
    assert coarser.bytes <= memory
    assert MAKERS[kind](dimension, 0.99 * float(named[1])).bytes > memory  # and little more accuracy would have been


def test_larger_numbers_take_more_memory() -> None:
    four, eight = (Theory("sde", 5, 0.3, itemsize=size) for size in (4, 8))
    assert eight.bytes == 2 * four.bytes
    assert "give more" not in refusal("sde", 5, 0.3, four.bytes, itemsize=8)


# -- what is refused ---------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 0.5), {}, "the dimension is 0; it must be at least 1"),
        ((-3, 0.5), {}, "the dimension is -3; it must be at least 1"),
        ((2, 0.0), {}, r"the accuracy delta is 0.0; it must lie between 0 and 1"),
        ((2, 1.0), {}, r"the accuracy delta is 1.0; it must lie between 0 and 1"),
        ((2, -0.1), {}, r"the accuracy delta is -0.1; it must lie between 0 and 1"),
        ((2, math.nan), {}, r"the accuracy delta is nan; it must lie between 0 and 1"),
        ((2, 0.5), {"lipschitz": 0.9}, "the Lipschitz constant is 0.9; it must be finite and at least 1"),
        ((2, 0.5), {"lipschitz": math.inf}, "the Lipschitz constant is inf; it must be finite and at least 1"),
        ((2, 0.5), {"lipschitz": math.nan}, "the Lipschitz constant is nan; it must be finite and at least 1"),
        ((2, 0.5), {"itemsize": 2}, r"a number of 2 bytes was asked for; states are float32 \(4\) or float64 \(8\)"),
        ((2, 0.5), {"memory": 0.0}, "0 are given, less than one state takes"),
    ],
)
def test_values_out_of_range_are_refused(
    kind: Kind, arguments: tuple[int, float], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MAKERS[kind](*arguments, **options)


@pytest.mark.parametrize("dimension", [1, 50, 10**6])
@pytest.mark.parametrize("accuracy", [0.999, 0.3, 1e-3])
@pytest.mark.parametrize("lipschitz", [1.0, 10.0, 1e4])
def test_the_corrector_of_the_theory_is_stable_everywhere(dimension: int, accuracy: float, lipschitz: float) -> None:
    found = Theory("ode", dimension, accuracy, lipschitz=lipschitz).corrector
    assert found is not None
    assert found.step is not None
    assert found.sweeps <= found.steps
    length = 1 / math.sqrt(lipschitz)
    assert length * (1 - 1e-9) <= found.steps * found.step < length + found.step
