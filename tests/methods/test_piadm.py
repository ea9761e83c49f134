# SPDX-License-Identifier: Apache-2.0
"""PIADM against its formulas, the exact law of its iterates, and the plain loop; blocks, the diagonal schedule and what they
hold; faults, each shown to be seen."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from problems import EXACT, SHAPE, SLOPES, STEPS, TABLES, arbitrary, chain, chains, ends, gap, network, run, sweep, window_of
from torch import Tensor

import paradiff.chain.slope
import paradiff.methods.piadm
import paradiff.methods.window.solver
import paradiff.methods.window.update
import paradiff.samplers.exponential
from paradiff import Evaluator, Keyed, Solution, Table, piadm_ode, piadm_sde, sample, solve
from paradiff.chain import Noise
from paradiff.chain.slope import DATA_VARIANCE, Slope, freeze_clean_data, freeze_epsilon, identity, shifted
from paradiff.methods import Blocks, WindowMethod, underdamped_langevin
from paradiff.methods.window.fill import PredictedFill
from paradiff.methods.window.options import Chains, Predictor
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.solver import WindowSolver
from paradiff.methods.window.update import NewtonUpdate
from paradiff.models.exact import Mixture
from paradiff.planning import gaussian_law as law
from paradiff.planning.gaussian_law import Array
from paradiff.samplers import Grid, exponential_integrator, log_snr_grid, ornstein_uhlenbeck, paper_grid, uniform_grid
from paradiff.samplers.process import signal_and_noise
from paradiff.solver import Batch, Denoiser, WindowRecord, drive
from paradiff.solver.solution import Status

SEEN = 1e-3  # a planted fault: far above rounding, small beside any visible error
KINDS: dict[str, tuple[Callable[..., WindowMethod], float]] = {"sde": (piadm_sde, 1.0), "ode": (piadm_ode, 0.0)}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_table = pytest.mark.parametrize("name", TABLES)
GRID = paper_grid(3, 0.2, 0.05)  # blocks of 5, 5 and 17 steps


def fitting(table: Table) -> Callable[..., WindowMethod]:
    """The form of the method that is for the table's chain."""
    return piadm_sde if table.stochastic else piadm_ode


def ou_table(grid: Grid, kind: str, **options: object) -> Table:
    options = {"form": "score", "volatility": KINDS[kind][1], **options}
    return exponential_integrator(ornstein_uhlenbeck(), grid, **options)  # pyright: ignore[reportArgumentType]


# -- the paper's algorithms --------------------------------------------------------------------------------------------

WEIGHTS, VARIANCES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.05, 0.2, 0.1], dtype=torch.float64)
MEANS = 1.2 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MIXTURE = Mixture(WEIGHTS, MEANS, VARIANCES)


def score(y: Tensor, u: float) -> Tensor:
    """Gradient of the log-density of exp(-u/2) x0 + sqrt(1 - exp(-u)) eps for data of the mixture, at one state."""
    fade = math.exp(-u)
    spread = [fade * float(v) + 1 - fade for v in VARIANCES]
    apart = [math.sqrt(fade) * mean - y for mean in MEANS]
    logs = [
        math.log(float(w)) - float((a * a).sum()) / (2 * v) - a.numel() / 2 * math.log(v)
        for w, a, v in zip(WEIGHTS, apart, spread, strict=True)
    ]
    most = max(logs)
    shares = [math.exp(value - most) for value in logs]
    total = sum(shares)
    return sum((share / total / v * a for share, a, v in zip(shares, apart, spread, strict=True)), torch.zeros_like(y))


def textbook(grid: Grid, kind: str, sweeps: int, noise: Noise, k: int) -> list[list[Tensor]]:
    """PIADM in the language of scores: for every block the paths `[M+1, ...]` after each sweep, all M nodes evaluated in each,
    from a constant path; the next block begins at the end of the last."""
    u, y, found = grid.u.tolist(), noise.start(k).double(), []
    for first, last in itertools.pairwise(grid.edges):
        xi = [noise.draw(k, range(m, m + 1))[0].double() for m in range(first, last)]
        path, paths = [y] * (last - first + 1), []
        for _ in range(sweeps):
            scores = [score(path[m - first], u[m]) for m in range(first, last)]
            path = [y]
            for m in range(first, last):
                e = u[m] - u[m + 1]
                b = 2 * (math.exp(e / 2) - 1) if kind == "sde" else math.exp(e / 2) - 1
                c = math.sqrt(math.exp(e) - 1) if kind == "sde" else 0.0
                path.append(math.exp(e / 2) * path[-1] + b * scores[m - first] + c * xi[m - first])
            paths.append(torch.stack(path))
        found.append(paths)
        y = path[-1]
    return found


@each_kind
@pytest.mark.parametrize("sweeps", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_paper_mode_is_the_textbook_iterate_for_iterate(kind: str, sweeps: int, prediction: str) -> None:
    table, noise = ou_table(GRID, kind, prediction=prediction), Keyed(SHAPE, 4)
    method, denoiser = KINDS[kind][0](GRID.edges, sweeps), MIXTURE.denoiser(table)
    window, seen = window_of(table, method, noise), 0
    for (first, last), paths in zip(itertools.pairwise(GRID.edges), textbook(GRID, kind, sweeps, noise, 0), strict=True):
        for number, path in enumerate(paths, start=1):
            if window.lo < last:  # else all nodes have become exact, and later sweeps change nothing
                assert window.lo == first + number - 1
                norms = sweep(window, denoiser)
                assert gap(ends(window), path[window.lo - first + 1 :]) < EXACT
                window.advance(norms, number)
                seen += 1
            else:
                assert gap(path[-1], paths[last - first - 1][-1]) < EXACT
        assert window.lo == last
    assert window.done
    assert gap(window.final, textbook(GRID, kind, sweeps, noise, 0)[-1][-1][-1]) < EXACT
    assert seen == sum(min(sweeps, b - a) for a, b in itertools.pairwise(GRID.edges))


def to_textbook(kind: str = "sde", sweeps: int = 3, source: Callable[..., Keyed] = Keyed, window: int | None = None) -> float:
    """Check: two samples against the textbook's, one after the other."""
    table = ou_table(GRID, kind)
    method = KINDS[kind][0](GRID.edges, sweeps, window=window)
    found = sample(MIXTURE.denoiser(table), table, source(SHAPE, 0, 2), method, dtype=torch.float64).sample
    noise = source(SHAPE, 0, 2)
    return gap(found, torch.stack([textbook(GRID, kind, sweeps, noise, k)[-1][-1][-1] for k in range(2)]))


@each_kind
def test_a_wrong_factor_of_the_score_is_seen_by_the_textbook(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_textbook(kind) < EXACT
    step = paradiff.samplers.exponential._step

    def wrong(form: str, v: float, u: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, clean, c = step(form, v, u, alpha, sigma)  # pyright: ignore[reportArgumentType]
        factor = 0.5 if v else 2.0  # the SDE with the ODE's b, and the other way round
        return state + (1 - factor) * clean / alpha[:-1], factor * clean, c

    monkeypatch.setattr(paradiff.samplers.exponential, "_step", wrong)
    assert to_textbook(kind) > SEEN


def test_a_wrong_slope_is_seen_by_the_textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paradiff.methods.piadm, "freeze_epsilon", lambda table: 1.01 * freeze_epsilon(table))
    assert to_textbook() > SEEN


def test_a_window_slid_a_node_too_far_is_seen_by_the_textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = WindowSolver.advance

    def wrong(self: WindowSolver, norms: list[float], round: int) -> WindowRecord:
        self.ages[:2] = [99] * len(self.ages[:2])
        return advance(self, norms, round)

    monkeypatch.setattr(WindowSolver, "advance", wrong)
    assert to_textbook() > SEEN


def test_a_block_begun_at_the_wrong_node_is_seen_by_the_textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = WindowSolver.advance

    def wrong(self: WindowSolver, norms: list[float], round: int) -> WindowRecord:
        if min(self.ages) >= 3 and len(self.ages) > 1:
            self.x[-1] = self.x[-2]
        return advance(self, norms, round)

    monkeypatch.setattr(WindowSolver, "advance", wrong)
    assert to_textbook() > SEEN


class InCallOrder(Keyed):
    """The fault: every draw is the next of one generator, whichever sample and node ask."""

    def __init__(self, shape: tuple[int, ...], seed: int, samples: int) -> None:
        super().__init__(shape, seed, samples)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, sample: int, nodes: range) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=self.generator) for _ in nodes])


def test_noise_drawn_in_call_order_is_seen_by_the_textbook() -> None:
    assert to_textbook(source=Keyed) < EXACT
    assert to_textbook(source=InCallOrder) > SEEN


def test_one_sweep_more_or_fewer_is_seen_by_the_textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = WindowSolver._sweep

    def older(self: WindowSolver, phi: Tensor) -> Tensor:
        norms = swept(self, phi)
        self.ages = [age + (age == 1) for age in self.ages]
        return norms

    monkeypatch.setattr(WindowSolver, "_sweep", older)
    assert to_textbook() > SEEN


# -- as many sweeps as steps -------------------------------------------------------------------------------------------


def edges_of(table: Table, count: int | str) -> list[int]:
    return Blocks(table.steps if isinstance(count, str) else count).edges(table)


@each_table
@pytest.mark.parametrize("count", [1, 2, 3, "steps"])
def test_as_many_sweeps_as_steps_of_a_block_are_the_sequential_chain(name: str, count: int | str) -> None:
    table = TABLES[name]
    edges = edges_of(table, count)
    longest = max(b - a for a, b in itertools.pairwise(edges))
    wanted = chains(network, table, Keyed(SHAPE))
    for sweeps in {longest, table.steps}:
        for window in (None, 3):
            found = run(table, fitting(table)(edges, sweeps, window=window))
            assert gap(found.sample, wanted) < EXACT, f"{sweeps} sweeps, window {window}"
            assert found.message == "exact: every node was reached by the chain's own steps"
            assert found.rounds == table.steps
    # A window narrower than a block needs no more sweeps than it is wide.
    narrow = run(table, fitting(table)(edges, 3, window=3))
    assert gap(narrow.sample, wanted) < EXACT
    assert narrow.status is Status.EXACT


@each_table
def test_after_k_sweeps_the_first_k_nodes_of_each_block_are_exact(name: str) -> None:
    table = TABLES[name]
    edges = edges_of(table, 3)
    states = chain(network, table, Keyed(SHAPE))
    window = window_of(table, fitting(table)(edges, table.steps))
    for first, last in itertools.pairwise(edges):
        assert (window.lo, window.hi) == (first, last)
        for k in range(1, last - first + 1):
            norms = sweep(window)
            assert gap(ends(window)[:k], states[first + 1 : first + 1 + k]) < EXACT, f"block from {first}, {k} sweeps"
        window.ages = [table.steps] * len(window.ages)
        window.advance(norms, 1)
    assert window.done


@each_table
@pytest.mark.parametrize("sweeps", [1, 3, 7])
@pytest.mark.parametrize("count", [1, 3, "steps"])
def test_rounds_and_evaluations_in_turn_are_the_closed_forms(name: str, count: int | str, sweeps: int) -> None:
    table = TABLES[name]
    edges = edges_of(table, count)
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    found = run(table, fitting(table)(edges, sweeps), samples=2)
    assert found.rounds == sum(min(sweeps, m) for m in lengths)
    rows = sum(m - j for m in lengths for j in range(min(sweeps, m)))
    assert [(c.rounds, c.evaluations) for c in found.error_estimates] == [(found.rounds, rows)] * 2
    if sweeps < max(lengths):
        assert found.message == f"stopped: every node was swept {sweeps} times, as asked"
    swept: dict[int, int] = dict.fromkeys(range(1, table.steps + 1), 0)
    for record in found.history:
        assert isinstance(record, WindowRecord)
        if record.sample == 0:
            for node in range(record.first + 1, record.first + 1 + len(record.change)):
                swept[node] += 1
    assert swept == {n: min(sweeps, n - a) for a, b in itertools.pairwise(edges) for n in range(a + 1, b + 1)}


# -- the exact law of the iterates -------------------------------------------------------------------------------------


class Basis:
    """Noise whose draws are basis vectors: a state `[E, M+1]` holds, for each eigenvalue, its coefficients on x[0] and z."""

    def __init__(self, eigenvalues: int, steps: int) -> None:
        self.shape, self.samples = (eigenvalues, steps + 1), 1

    def start(self, sample: int) -> Tensor:
        return torch.eye(self.shape[1], dtype=torch.float64)[0].expand(self.shape).clone()

    def draw(self, sample: int, nodes: range) -> Tensor:
        unit = torch.eye(self.shape[1], dtype=torch.float64)[[n + 1 for n in nodes]]
        return unit[:, None].expand(-1, *self.shape).clone()


def measured(grid: Grid, kind: str, method: WindowMethod, eigenvalues: list[float]) -> tuple[Array, Solution]:
    """The weights `[M+1, E]` of the solver's own sample on x[0] and z, for Gaussian data, and the run."""
    table = ou_table(grid, kind)

    def denoiser(x: Tensor, u: Tensor) -> Tensor:
        _, sigma = signal_and_noise(u)
        variance = torch.from_numpy(law.ou_variance(u.numpy(), eigenvalues))
        return (sigma[:, None] / variance)[:, :, None] * x

    found = sample(denoiser, table, Basis(len(eigenvalues), grid.steps), method, dtype=torch.float64)
    return found.sample[0].T.numpy(), found


PRINTED = {
    1.0: ["4.1e-01", "7.2e-02", "5.9e-03", "2.7e-04", "8.1e-06", "1.6e-07"],
    0.1: ["6.6e-01", "1.9e-01", "2.6e-02", "2.0e-03", "9.4e-05", "3.1e-06"],
}


def test_one_unit_block_has_the_printed_coupled_errors() -> None:
    grid, eigenvalues = uniform_grid(2, 1, 1, 64), list(PRINTED)
    exact = law.ou_chain(grid.u.numpy(), eigenvalues, stochastic=True)
    sequential, _ = measured(grid, "sde", piadm_sde(1, 64), eigenvalues)
    np.testing.assert_allclose(sequential, law.sequential_weights(exact), rtol=0, atol=1e-12)
    for sweeps in range(1, 7):
        weights, _ = measured(grid, "sde", piadm_sde(1, sweeps), eigenvalues)
        np.testing.assert_allclose(weights, law.picard_weights(exact, (0, 64), sweeps), rtol=0, atol=1e-10)
        errors = law.coupled_error(weights, sequential, law.ou_variance(2.0, eigenvalues))  # begun at the marginal
        assert [f"{e:.1e}" for e in errors] == [PRINTED[value][sweeps - 1] for value in eigenvalues]


FLIGHT = uniform_grid(3.5, 0.5, 5, 9)
EIGENVALUES = [0.1, 0.6, 1.0, 3.0]


def off_the_law(kind: str, sweeps: int, stagger: int | None, carry: bool, variance: float | None = None) -> float:
    """Check: weights and rounds of the solver against those of planning/gaussian_law.py; infinite if the rounds differ."""
    slope = None if variance is None else shifted(variance)
    method = KINDS[kind][0](FLIGHT.edges, sweeps, stagger=stagger, carry=carry, slope=slope)
    weights, found = measured(FLIGHT, kind, method, EIGENVALUES)
    levels, edges = FLIGHT.u.numpy(), tuple(FLIGHT.edges)
    g = 0.0 if variance is None else -1 / law.ou_variance(levels[:-1], [variance])
    exact = law.ou_chain(levels, EIGENVALUES, stochastic=kind == "sde", slope=g)
    wanted = law.picard_weights(exact, edges, sweeps, stagger=stagger, carry=carry)
    if found.rounds != law.rounds(edges, sweeps, stagger):
        return math.inf
    return float(np.abs(weights - wanted).max() / max(1.0, np.abs(wanted).max()))


@each_kind
@pytest.mark.parametrize("variance", [None, 0.5])
@pytest.mark.parametrize("sweeps", [1, 3, 6])
def test_the_diagonal_schedule_has_the_exact_law(kind: str, sweeps: int, variance: float | None) -> None:
    assert off_the_law(kind, sweeps, None, True, variance) < 1e-10
    for stagger in (1, 2, 3):
        if stagger <= sweeps:
            for carry in (True, False):
                assert off_the_law(kind, sweeps, stagger, carry, variance) < 1e-10, (stagger, carry)


@pytest.mark.parametrize("fault", ["opened late", "carried regardless", "filled from the block's start", "a slope off"])
def test_faults_of_the_diagonal_schedule_are_seen_by_the_law(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carry = fault != "carried regardless"
    assert off_the_law("sde", 6, 2, carry, 0.5) < 1e-10
    if fault == "opened late":
        reach = WindowSolver._reach

        def late(self: WindowSolver) -> int:
            ages, self.ages = self.ages, [age - 1 for age in self.ages]
            found = reach(self)
            self.ages = ages
            return found

        monkeypatch.setattr(WindowSolver, "_reach", late)
    elif fault == "carried regardless":
        original = WindowSetup.__init__

        def init(self: WindowSetup, table: Table, method: WindowMethod, *rest: object) -> None:
            original(self, table, method, *rest)  # pyright: ignore[reportArgumentType]
            self.slope = shifted(0.5)(table)

        monkeypatch.setattr(WindowSetup, "__init__", init)
    elif fault == "filled from the block's start":
        fill = PredictedFill.__call__

        def wrong(self: PredictedFill, steps: slice, x: Tensor, noises: Tensor) -> tuple[Tensor, Tensor]:
            return fill(self, steps, torch.cat([x[:-1], x[:1]]), noises)

        monkeypatch.setattr(PredictedFill, "__call__", wrong)
    else:
        inverse = paradiff.chain.slope.inverse
        monkeypatch.setattr(paradiff.chain.slope, "inverse", lambda rows: inverse(1.01 * rows))
    assert off_the_law("sde", 6, 2, carry, 0.5) > 1e-8


# -- blocks in flight --------------------------------------------------------------------------------------------------


@each_table
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("stagger", [1, 3])
def test_blocks_in_flight_reach_the_sequential_sample(name: str, stagger: int, carry: bool) -> None:
    table = TABLES[name]
    wanted = chains(network, table, Keyed(SHAPE))
    for window in (None, 5):
        for method in (
            fitting(table)(3, tolerance=0.0, stagger=stagger, carry=carry, window=window),
            fitting(table)(3, table.steps, stagger=stagger, carry=carry, window=window),
        ):
            found = run(table, method)
            assert gap(found.sample, wanted) < EXACT
            assert found.status is Status.EXACT
            assert found.rounds <= table.steps


@each_table
@pytest.mark.parametrize("sweeps", [1, 2, 3])
def test_a_stagger_of_all_sweeps_takes_the_blocks_in_turn(name: str, sweeps: int) -> None:
    table = TABLES[name]
    wanted = run(table, fitting(table)(3, sweeps), samples=2)
    for stagger in (sweeps, sweeps + 4):
        for carry in (True, False):
            found = run(table, fitting(table)(3, sweeps, stagger=stagger, carry=carry), samples=2)
            assert gap(found.sample, wanted.sample) < EXACT
            assert (found.rounds, found.evaluations) == (wanted.rounds, wanted.evaluations)


@each_kind
def test_changes_that_do_not_cross_the_edges_make_another_sample(kind: str) -> None:
    table, make = ou_table(GRID, kind), KINDS[kind][0]
    one, other = (run(table, make(GRID.edges, 3, stagger=1, carry=carry)).sample for carry in (True, False))
    assert gap(one, other) > SEEN


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_nothing_crosses_the_edges_of_multistep_tables_either(name: str) -> None:
    # These tables' steps read two states, so that the rows of two nodes refer to an edge.
    table, edge = TABLES[name], 6
    window = window_of(table, piadm_ode([0, edge, table.steps], 9, stagger=1, carry=False, slope=arbitrary))
    norms = sweep(window)
    window.advance(norms, 1)
    place = edge - window.lo + window.setup.history
    before = window.x.clone()
    sweep(window)
    # The changes of the second block are those of a block whose start does not change, equation (1) of chain/slope.py.
    residual = window.phi[edge - window.lo :] - before[place + 1 :]
    slope, changes = arbitrary(table), []
    for i, r in enumerate(residual):
        earlier = [slope[edge + i, j] * changes[i - 1 - j] for j in range(2) if i - 1 - j >= 0]
        changes.append(r + sum(earlier, torch.zeros_like(r)))
    assert gap(window.x[place + 1 :], before[place + 1 :] + torch.stack(changes)) < EXACT
    assert gap(window.x[place], before[place]) > SEEN  # its start did change


@pytest.mark.parametrize(("sweeps", "stagger"), [(6, 1), (6, 3), (8, 2), (10, 2), (6, 6), (11, 1), (12, 1), (5, 2)])
def test_the_status_says_exact_only_of_the_sequential_sample(sweeps: int, stagger: int) -> None:
    table = TABLES["ddpm"]
    for edges in ([0, 6, STEPS], [0, 4, 8, STEPS], [0, 2, STEPS], [0, 9, STEPS]):
        found = run(table, piadm_sde(edges, sweeps, stagger=stagger))
        exact = gap(found.sample[0], chain(network, table, Keyed(SHAPE))[-1]) < EXACT
        assert (found.status is Status.EXACT) == exact, edges


# -- the library's mode ------------------------------------------------------------------------------------------------


@each_table
@pytest.mark.parametrize("slope", SLOPES)
def test_at_tolerance_zero_every_slope_gives_the_sequential_sample(name: str, slope: str) -> None:
    table = TABLES[name]
    wanted = chain(network, table, Keyed(SHAPE))[-1]
    cases: list[tuple[int, int | None, Predictor | None]]
    cases = [(1, None, None), (3, None, "copy"), (3, None, None), (3, 2, "linear"), (4, 1, None)]
    for count, stagger, start in cases:
        method = fitting(table)(count, slope=SLOPES[slope], predictor=start, tolerance=0.0, stagger=stagger)
        found = run(table, method)
        assert gap(found.sample[0], wanted) < EXACT, (count, stagger, start)
        assert found.status is Status.EXACT
        assert found.estimated_error == 0


MIXED = log_snr_grid(6.0, 1e-3, 4, 30)


@cache
def mixed(kind: str, form: str) -> tuple[Table, Denoiser, Tensor]:
    """A chain of 120 steps on the mixture, and the sequential samples of four."""
    table = ou_table(MIXED, kind, form=form)
    denoiser = MIXTURE.denoiser(table)
    return table, denoiser, chains(denoiser, table, Keyed(SHAPE, 0, 4))


@pytest.mark.usefixtures("samples_of_any_size")
@each_kind
@pytest.mark.parametrize("form", ["score", "epsilon", "clean"])
@pytest.mark.parametrize("stagger", [None, 2])
def test_tolerances_are_kept_and_paid_for_in_rounds(kind: str, form: str, stagger: int | None) -> None:
    table, denoiser, wanted = mixed(kind, form)
    rounds, errors = [], []
    for tolerance in (None, 2e-4, 2e-6):
        method = KINDS[kind][0](MIXED.edges, tolerance=tolerance, stagger=stagger)
        found = sample(denoiser, table, Keyed(SHAPE, 0, 4), method, dtype=torch.float64)
        allowed = 4e-3 if tolerance is None else tolerance
        error = (found.sample - wanted).flatten(1).square().mean(1).sqrt()
        assert error.max() <= allowed
        assert found.message == f"converged: the estimated error of every sample is at most {allowed:g}"
        assert [0 < c.estimated_error <= allowed for c in found.error_estimates] == [True] * 4
        assert all(e <= c.estimated_error for e, c in zip(error.tolist(), found.error_estimates, strict=True))
        assert found.residual > 0
        rounds.append(found.rounds)
        errors.append(float(error.max()))
    assert rounds == sorted(set(rounds)), "a tighter tolerance must cost rounds"
    assert errors == sorted(set(errors), reverse=True), "and lower the error"
    assert rounds[0] <= 24  # far below 120
    assert rounds[-1] < table.steps / 3


def test_the_two_modes_have_their_own_defaults() -> None:
    paper, ours = piadm_sde(4, 6), piadm_sde(4)
    assert (paper.slope, paper.predictor, paper.rule, paper.sweeps, paper.tolerance) == (freeze_epsilon, "copy", "sweeps", 6, 0)
    assert (ours.slope, ours.predictor, ours.rule, ours.sweeps, ours.tolerance) == (identity, "clean", "error", None, 4e-3)
    table, smooth = TABLES["ddim"], piadm_ode(4).slope
    assert callable(smooth)
    assert torch.equal(smooth(table), shifted(DATA_VARIANCE)(table))
    assert (paper.chains, piadm_ode(4).chains) == ("stochastic", "deterministic")
    assert piadm_sde(4, 6, slope=shifted(0.1), predictor="clean").predictor == "clean"
    assert piadm_ode(4, 6).corrector is None


# -- the linear part ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("form", ["score", "epsilon", "clean"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_the_linear_part_is_one_switch(form: str, v: float, prediction: str) -> None:
    u = MIXED.u
    table = ou_table(MIXED, "sde", form=form, volatility=v, prediction=prediction)
    alpha, sigma, h = (-u / 2).exp(), (1 - (-u).exp()).sqrt(), u[:-1] - u[1:]
    grow, push = (h / 2).exp(), (1 + v * v) * ((h / 2).exp() - 1)
    r = sigma / alpha
    frozen = {
        "score": grow - push / sigma[:-1] ** 2,
        "epsilon": grow - (1 + v * v) * alpha[1:] * (r[:-1] - r[1:]) / sigma[:-1],
        "clean": sigma[1:] / sigma[:-1] * (r[1:] / r[:-1]) ** (v * v),
    }[form]
    # Near u = 0 the output's slope of 1/alpha - p is a small difference; where it matters it is of size 1.
    assert gap(freeze_epsilon(table)[:, 0], grow) < 1e-10
    assert gap(freeze_epsilon(table)[:, 0], alpha[1:] / alpha[:-1]) < 1e-10
    assert gap(freeze_clean_data(table)[:, 0], frozen) < 1e-10
    far, near = (shifted(variance)(table)[:, 0] for variance in (1e9, 1e-9))
    assert gap(far, grow) < 1e-6 < gap(shifted(1.0)(table)[:, 0], grow)
    assert gap(near, frozen) < 1e-5 < gap(shifted(1.0)(table)[:, 0], frozen)


def test_the_linear_part_of_a_chain_that_ends_in_clean_data() -> None:
    grid = paper_grid(2, 0.1, 0.01, clean=True)
    for form in ("score", "epsilon", "clean"):
        table = ou_table(grid, "sde", form=form)
        assert gap(freeze_epsilon(table)[:, 0], ((grid.u[:-1] - grid.u[1:]) / 2).exp()) < 1e-10
        assert freeze_clean_data(table)[-1, 0] == pytest.approx(0, abs=1e-12)


# -- float32 -----------------------------------------------------------------------------------------------------------


def test_one_long_block_in_float32_stays_finite_or_says_what_to_do() -> None:
    grid = paper_grid(1, 12 / 200, 1e-3, length=12.0)
    table = ou_table(grid, "sde")

    def steep(factor: float, slope: Slope | None = None) -> Solution:
        return sample(lambda x, t: factor * x, table, Keyed(SHAPE), piadm_sde(1, 10, slope=slope))

    tame = steep(10.0)
    assert tame.sample.isfinite().all()
    largest = [max(s.change) for s in tame.history if isinstance(s, WindowRecord)]
    assert max(largest) > 1e15, "the iterates were not huge"
    assert all(map(math.isfinite, largest))
    message = (
        r"sample 0 overflowed torch\.float32 at node \d+, \d+ sweeps after its block began: sweeps with this linear part "
        r"expand before they converge; use shorter blocks, a slope that stays bounded \(freeze_clean_data, shifted\)"
    )
    with pytest.raises(ValueError, match=message):
        steep(300.0)
    # What the message names does help.
    bounded = steep(10.0, slope=freeze_clean_data)
    assert max(max(s.change) for s in bounded.history if isinstance(s, WindowRecord)) < 1e-4 * max(largest)


def test_an_overflow_without_a_number_of_sweeps_is_salvaged() -> None:
    grid = paper_grid(1, 12 / 60, 1e-2, length=12.0)
    table = ou_table(grid, "sde")
    found = sample(lambda x, t: torch.tanh(300 * x), table, Keyed(SHAPE), piadm_sde(1, slope=lambda t: 40 + 0 * t.a))
    assert any(math.inf in s.change for s in found.history if isinstance(s, WindowRecord))
    assert found.sample.isfinite().all()


# -- neighbours and chunks ---------------------------------------------------------------------------------------------


def exact_network(x: Tensor, t: Tensor) -> Tensor:
    """Sums, products and quotients alone, which are rounded alike at every place of a batch."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return 0.6 * x / (1 + 0.3 * x * x) + 0.1 * t / (1 + t * t)


COMPANY: dict[str, tuple[str, Callable[[], WindowMethod]]] = {
    "paper": ("ddpm", lambda: piadm_sde(3, 2)),
    "paper, ode": ("dpmpp_2m", lambda: piadm_ode(3, 2)),
    "tolerance": ("ddpm", lambda: piadm_sde(2, tolerance=0.3)),
    "diagonal": ("ddim eta", lambda: piadm_sde(4, 3, stagger=1)),
    "diagonal, tolerance, window": ("ddpm", lambda: piadm_sde(4, tolerance=0.1, stagger=2, carry=False, window=5)),
    "corrector": ("euler", lambda: piadm_ode(3, 2, underdamped_langevin(4, 2))),
    "corrector, tolerance": ("heun", lambda: piadm_ode([0, 4, 8, 11], None, underdamped_langevin(3, 3), tolerance=1e-3)),
}


@pytest.mark.parametrize("case", COMPANY)
def test_samples_are_bit_for_bit_those_of_lone_runs(case: str) -> None:
    name, make = COMPANY[case]
    table, seeds = TABLES[name], [5, 6, 7, 8]
    for dtype in (torch.float64, torch.float32):
        together = sample(exact_network, table, Keyed(SHAPE, seeds), make(), dtype=dtype)
        for k, seed in enumerate(seeds):
            alone = sample(exact_network, table, Keyed(SHAPE, [seed]), make(), dtype=dtype)
            assert torch.equal(alone.sample[0], together.sample[k])
            assert alone.error_estimates[0] == together.error_estimates[k]
        for rows in (1, 3, 7):
            evaluator = Evaluator(exact_network, max_rows=rows)
            chunked = sample(evaluator, table, Keyed(SHAPE, seeds), make(), dtype=dtype)
            assert torch.equal(chunked.sample, together.sample)
            assert chunked.rounds == together.rounds == evaluator.rounds


# -- what a window holds -----------------------------------------------------------------------------------------------


class Asked(Keyed):
    """Noise that notes which nodes it is asked for, in order."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0, samples: int = 1) -> None:
        super().__init__(shape, seed, samples)
        self.nodes: dict[int, list[int]] = {k: [] for k in range(samples)}

    def draw(self, sample: int, nodes: range) -> Tensor:
        self.nodes[sample] += nodes
        return super().draw(sample, nodes)


@pytest.mark.parametrize("stagger", [None, 1, 3])
@pytest.mark.parametrize("sweeps", [None, 1, 3, 20])
@pytest.mark.parametrize("width", [1, 4, 7, None])
def test_no_batch_and_no_draw_reaches_beyond_the_window(width: int | None, sweeps: int | None, stagger: int | None) -> None:
    table, noise = ou_table(GRID, "sde"), Asked(SHAPE, 0, 2)
    denoiser = MIXTURE.denoiser(table)
    widths: list[int] = []

    def outputs(batch: Batch) -> Tensor:
        for k in range(2):
            nodes = batch.nodes[batch.samples == k].tolist()
            if not nodes:
                continue
            widths.append(len(nodes))
            assert nodes == list(range(nodes[0], nodes[0] + len(nodes)))
            block = max(i for i, edge in enumerate(GRID.edges) if edge <= nodes[0])
            if stagger is None:
                assert nodes[-1] < GRID.edges[block + 1]
            # Every node of the window has its noise, once and in turn, and none after it does.
            assert noise.nodes[k] == list(range(nodes[-1] + 1))
        return denoiser(batch.x, batch.t)

    method = piadm_sde(GRID.edges, sweeps, stagger=stagger, window=width)
    drive(solve(table, noise, method, dtype=torch.float64), outputs, check="off")
    assert noise.nodes == {k: list(range(table.steps)) for k in range(2)}
    if width is not None:
        assert max(widths) <= width
    elif stagger is None:
        assert max(widths) == GRID.longest


def test_a_window_wider_than_asked_is_seen() -> None:
    table = ou_table(GRID, "sde")

    def widest(extra: int) -> int:
        widths: list[int] = []

        def outputs(batch: Batch) -> Tensor:
            widths.append(len(batch.nodes))
            return network(batch.x, batch.t)

        drive(solve(table, Keyed(SHAPE), piadm_sde(GRID.edges, 3, window=4 + extra)), outputs, check="off")
        return max(widths)

    assert widest(0) == 4 < widest(1)


@each_table
@pytest.mark.parametrize("slope", ["freeze_epsilon", "arbitrary"])
def test_stretches_do_not_change_the_sweep(name: str, slope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES[name]
    methods = [
        fitting(table)(count, sweeps, slope=SLOPES[slope], stagger=stagger, tolerance=None if sweeps else 1e-2)
        for count, sweeps, stagger in ((1, 3, None), (2, 2, None), (2, 3, 1), (1, None, None))
    ]
    wanted = [run(table, method) for method in methods]
    states = chain(network, table, Keyed(SHAPE))
    for stretch in (2, 3):
        monkeypatch.setattr(paradiff.methods.window.update, "STRETCH", stretch)
        for method, whole in zip(methods, wanted, strict=True):
            found = run(table, method)
            assert gap(found.sample, whole.sample) < EXACT
            assert found.rounds == whole.rounds
        window = window_of(table, fitting(table)(1, table.steps, slope=SLOPES[slope]))
        for k in range(1, table.steps + 1):
            sweep(window)
            assert gap(ends(window)[:k], states[1 : k + 1]) < EXACT


def test_a_stretch_that_hands_nothing_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    table, method = TABLES["ddpm"], piadm_sde(1, 3)
    wanted = run(table, method).sample
    monkeypatch.setattr(paradiff.methods.window.update, "STRETCH", 3)
    assert gap(run(table, method).sample, wanted) < EXACT
    carried = NewtonUpdate.carried

    def apart(self: NewtonUpdate, lo: int, hi: int, phi: Tensor, residual: Tensor) -> Tensor:
        parts = []
        for begin in range(0, len(phi), 3):
            part = slice(begin, min(begin + 3, len(phi)))
            parts.append(carried(self, lo + part.start, lo + part.stop, phi[part], residual[part]))
        return torch.cat(parts)

    monkeypatch.setattr(NewtonUpdate, "carried", apart)
    assert gap(run(table, method).sample, wanted) > SEEN


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [piadm_sde, piadm_ode])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 2, "sweeps": 0}, "sweeps is 0; it must be a whole number, at least 1"),
        ({"blocks": 2, "sweeps": -1}, "sweeps is -1; it must be a whole number, at least 1"),
        (
            {"blocks": 2, "sweeps": 3, "tolerance": 0.1},
            r"piadm_(sde|ode) got sweeps = 3 and tolerance = 0.1; a fixed number of sweeps heeds no tolerance: give one",
        ),
        ({"blocks": 2, "sweeps": 3, "tolerance": 0.0}, "sweeps = 3 and tolerance = 0.0"),
        ({"blocks": 0}, "0 blocks were asked for; give at least 1, or the nodes of their edges"),
        ({"blocks": -2}, "-2 blocks were asked for; give at least 1"),
        ({"blocks": [0]}, r"the block edges are \[0\]; they must rise from 0 to the last node"),
        ({"blocks": []}, r"the block edges are \[\]; they must rise from 0"),
        ({"blocks": [1, 12]}, r"the block edges are \[1, 12\]; they must rise from 0"),
        ({"blocks": [0, 5, 5, 12]}, "they must rise from 0 to the last node, so that no block is shorter than a step"),
        (
            {"blocks": 2, "stagger": 0},
            "the stagger is 0; it must be a whole number, at least 1 sweep, or None for blocks in turn",
        ),
        ({"blocks": 2, "carry": False}, "carry is False without a stagger; blocks in turn have no neighbour to carry to"),
        ({"blocks": 2, "window": 0}, "the window is 0; it must be a whole number, at least 1"),
        ({"blocks": 2, "tolerance": -1.0}, "the tolerance is -1.0; it must be a number, 0 or more, and finite"),
        ({"blocks": 2, "tolerance": math.inf}, "the tolerance is inf; it must be a number, 0 or more, and finite"),
        ({"blocks": 2, "predictor": "warm"}, "predictor is 'warm'; it must be one of copy, held, linear, clean"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[..., WindowMethod], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def other_kind(chains: Chains) -> WindowMethod:
    return piadm_sde(2, 3) if chains == "stochastic" else piadm_ode(2, 3)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "ddim",
            other_kind("stochastic"),
            "piadm_sde is for stochastic chains; table 'ddim' is deterministic: use the method's",
        ),
        ("ddpm", other_kind("deterministic"), "piadm_ode is for deterministic chains; table 'ddpm' is stochastic: use the"),
        ("ddpm", piadm_sde(13), "13 blocks were asked of a chain of 12 steps; .* give at most 12"),
        ("ddpm", piadm_sde([0, 5, 11]), "the last block edge is 11; the chain ends at node 12"),
        ("ddpm", piadm_sde(2, 3, window=13), "the window is 13; the chain has 12 sub-intervals"),
    ],
)
def test_methods_that_do_not_fit_the_table_are_refused_before_any_call(name: str, method: WindowMethod, message: str) -> None:
    evaluator = Evaluator(network)
    with pytest.raises(ValueError, match=message):
        sample(evaluator, TABLES[name], Keyed(SHAPE), method)
    assert evaluator.rounds == 0


def test_blocks_with_strides_or_a_warm_up_are_refused() -> None:
    for options in ({"stride": 2}, {"warmup": 1}):
        with pytest.raises(ValueError, match=r"blocks were given with a stride of .*: leave stride at 1 and warmup at 0"):
            dataclasses.replace(piadm_sde(2, 3), **options)


def test_an_output_that_is_not_finite_is_named_in_paper_mode() -> None:
    table = TABLES["ddpm"]

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t.double() == table.t[7]).view(-1, 1, 1), torch.nan, network(x, t))

    with pytest.raises(ValueError, match=r"sample 0 (is not finite|overflowed)"):
        sample(broken, table, Keyed(SHAPE), piadm_sde(3, 4))
