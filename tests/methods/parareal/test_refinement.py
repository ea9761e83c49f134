# SPDX-License-Identifier: Apache-2.0
"""methods/parareal/stopping.py: when a run stops, what it certifies, and how far its samples are from the sequential ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from problems import EXACT, SHAPE, TABLES, gap, mixture, network
from torch import Tensor

from paradiff import Keyed, Schedule, Solution, Table, sample, sequential, srds
from paradiff.chain.sensitivity import noise_units, scatter, sensitivity
from paradiff.methods import PararealMethod
from paradiff.methods.parareal.coarse import propagator_mismatch
from paradiff.methods.parareal.control import PararealControl
from paradiff.methods.parareal.options import Ordering as Order
from paradiff.methods.parareal.options import StopRule
from paradiff.methods.parareal.stopping import BlockRun, StoppingRule
from paradiff.models.exact import Empirical, Gaussian, Mixture, digits
from paradiff.models.pixel import SCHEDULERS, Model, load
from paradiff.samplers import ddim, ddpm, euler, euler_ancestral, flow_euler, heun
from paradiff.solver import Denoiser, PararealRecord

each_order = pytest.mark.parametrize("order", ["pipelined", "batched"])
BLOCKS = 6  # of 5 steps: long enough for the coarse sweep to keep ahead
LONG = {"ddim": ddim(Schedule.linear(), 30), "ddpm": ddpm(Schedule.linear(), 30, prediction="sample")}
PICTURE = (3, 2, 2)


def solved(table: Table, method: PararealMethod, shape: Sequence[int] = SHAPE, seed: int | Sequence[int] = 0) -> Solution:
    """Samples in float64."""
    return sample(network, table, Keyed(shape, seed), method, dtype=torch.float64)


@cache
def forced(name: str, order: Order, shape: tuple[int, ...] = SHAPE) -> list[Solution]:
    """The runs with 0, 1 ... B forced iterations."""
    return [solved(LONG[name], srds(BLOCKS, ordering=order, iterations=k), shape) for k in range(BLOCKS + 1)]


def iterations(found: Solution) -> int:
    """The iteration of the last value that the last edge got."""
    values = [value for wave in found.history if isinstance(wave, PararealRecord) for value in wave.values]
    last = max(edge for edge, _, _ in values)
    return max(level for edge, level, _ in values if edge == last)


pytestmark = pytest.mark.usefixtures("samples_of_any_size")


# -- rule `error` ------------------------------------------------------------------------------------------------------


@each_order
@pytest.mark.parametrize("name", LONG)
def test_the_error_rule_stops_at_the_first_estimate_within_tolerance(name: str, order: Order) -> None:
    exactly = PararealControl(early_share=0.0)  # no edge settles but exactly, so that runs are alike to the end
    estimates = [run.estimated_error for run in forced(name, order)]
    assert estimates[0] == math.inf  # nothing is known of a first value
    assert estimates[-1] == 0
    finite = [e for e in estimates if 0 < e < math.inf]
    assert len(finite) >= 3
    for wanted in (finite[0], finite[-1]):
        for factor, within in ((1 + 1e-9, True), (1 - 1e-9, False)):
            method = dataclasses.replace(srds(BLOCKS, ordering=order, tolerance=wanted * factor), control=exactly)
            found = solved(LONG[name], method)
            count = next(k for k, e in enumerate(estimates) if e <= wanted * factor)
            assert iterations(found) == count
            assert (found.estimated_error == wanted) or not within or count < estimates.index(wanted)
            assert gap(found.sample, forced(name, order)[count].sample) < EXACT
            assert found.rounds == forced(name, order)[count].rounds


@each_order
@pytest.mark.parametrize("name", LONG)
def test_a_value_that_did_not_change_enough_is_not_iterated_once_more_to_see_it(name: str, order: Order) -> None:
    # A rule on the sample's own change learns of an iteration's accuracy by making the next one; the estimate does not.
    wanted = forced(name, order)[-1].sample
    found = solved(LONG[name], srds(BLOCKS, ordering=order, tolerance=0.05))
    count = iterations(found)
    assert count < BLOCKS
    assert float((found.sample - wanted).square().mean().sqrt()) <= 0.05
    later = forced(name, order)[count + 1].sample
    assert float((later - found.sample).square().mean()) > 0


@pytest.mark.parametrize("name", TABLES)
@each_order
def test_an_exact_sample_is_certified_as_exact(name: str, order: Order) -> None:
    wanted = sample(network, TABLES[name], Keyed(SHAPE), sequential(), dtype=torch.float64).sample
    found = solved(TABLES[name], srds(3, "two step" if order == "pipelined" else 2, order, iterations=3))
    assert found.estimated_error == 0
    assert found.residual == 0
    assert found.message == "exact: every node was reached by the chain's own steps"
    assert gap(found.sample, wanted) < EXACT


@each_order
def test_fewer_iterations_than_blocks_are_not_called_exact(order: Order) -> None:
    found = forced("ddim", order)[2]
    assert found.message == "stopped: 2 iterations were made, as asked"
    assert found.estimated_error > 0
    assert found.residual > 0


@pytest.mark.parametrize(
    ("target", "name", "order"),
    [("gaussian", "ddim", "pipelined"), ("mixture", "ddim", "batched"), ("mixture", "ddpm", "pipelined")],
)
def test_a_tighter_tolerance_costs_more_rounds_and_lowers_the_true_error(target: str, name: str, order: Order) -> None:
    rounds, errors = [], []
    for tolerance in (1e-1, 1e-2, 1e-4):
        found, apart = measured(target, name, srds(10, ordering=order, tolerance=tolerance))
        rounds.append(found.rounds)
        errors.append(max(apart))
        assert found.estimated_error <= tolerance
        assert max(apart) <= tolerance
    assert rounds == sorted(rounds)
    assert rounds[0] < rounds[-1]
    assert errors[-1] < errors[0] / 10


# -- rules on the sample itself ----------------------------------------------------------------------------------------


def size(change: Tensor, rule: StopRule) -> float:
    """A change of the sample as the rule counts it."""
    return float(change.abs().mean() * 127.5 if rule == "image" else change.square().mean().sqrt())


@each_order
@pytest.mark.parametrize("rule", ["sample", "image"])
@pytest.mark.parametrize("name", LONG)
def test_the_sample_and_image_rules_stop_exactly_when_the_last_change_is_within_tolerance(
    name: str, rule: StopRule, order: Order
) -> None:
    runs = forced(name, order, PICTURE)
    change = [math.inf] + [size(b.sample - a.sample, rule) for a, b in itertools.pairwise(runs)]
    assert len({c for c in change if c > 1e-9}) >= 4
    for limit in (change[1], change[3]):
        for tolerance in (limit * (1 + 1e-6), limit * (1 - 1e-6)):
            if tolerance < 1e-9:  # changes of the size of roundings
                continue
            found = solved(LONG[name], srds(BLOCKS, ordering=order, rule=rule, tolerance=tolerance), PICTURE)
            count = next((k for k, c in enumerate(change) if c <= tolerance), BLOCKS)
            assert iterations(found) == count
            assert gap(found.sample, runs[count].sample) < EXACT


def test_a_picture_is_counted_in_grey_levels_and_a_state_in_its_own_units() -> None:
    runs = forced("ddim", "batched", PICTURE)
    change = runs[1].sample - runs[0].sample
    assert size(change, "image") == pytest.approx(float(change.abs().sum()) / 12 * 127.5)
    between = srds(BLOCKS, ordering="batched", rule="image", tolerance=size(change, "image") / 2)
    assert iterations(solved(LONG["ddim"], between, PICTURE)) > 1


# -- rule `change` -----------------------------------------------------------------------------------------------------


def settled(found: Solution) -> list[int]:
    """The last settled edge after each round."""
    return list(itertools.accumulate(wave.passed for wave in found.history))


def changes(found: Solution, edge: int) -> list[tuple[int, float]]:
    """Round and change of every value of an edge."""
    waves = [w for w in found.history if isinstance(w, PararealRecord)]
    return [(w.round, change) for w in waves for at, _, change in w.values if at == edge]


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("tolerance", [1.0, 0.1, 1e-3])
def test_every_edge_that_passes_by_its_change_is_within_its_unit(
    name: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[BlockRun] = []
    passes = StoppingRule.passes

    def seen(self: StoppingRule, run: BlockRun, size: float) -> bool:
        if found := passes(self, run, size):
            passed.append(run)
        return found

    monkeypatch.setattr(StoppingRule, "passes", seen)
    table = LONG[name]
    method = srds(BLOCKS, rule="change", tolerance=tolerance)
    found = solved(table, method)
    edges = method.edges(table)
    units = noise_units(table, edges).tolist()
    assert units[-1] == 0
    units[-1] = units[-2]  # the chain ends without noise
    assert all(run.change <= tolerance * units[run.block - 1] for run in passed)
    assert [run.block for run in passed] == sorted({run.block for run in passed})
    assert settled(found)[-1] == BLOCKS
    assert passed
    if tolerance == 1.0:  # the last edge passes too, and not because it no longer moves
        assert passed[-1].block == BLOCKS
        assert passed[-1].change > units[-1] / 10


@pytest.mark.parametrize("stuck", [2, 3, 5])
@pytest.mark.parametrize("name", LONG)
def test_nothing_behind_an_edge_that_does_not_converge_passes(name: str, stuck: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, passes = LONG[name], StoppingRule.passes
    free = solved(table, srds(BLOCKS, rule="change", tolerance=1e6))
    monkeypatch.setattr(StoppingRule, "passes", lambda self, run, size: run.block != stuck and passes(self, run, size))
    found = solved(table, srds(BLOCKS, rule="change", tolerance=1e6))
    rounds = [next(k for k, n in enumerate(settled(found), 1) if n >= edge) for edge in range(1, BLOCKS + 1)]
    assert rounds == sorted(rounds)
    # The stuck edge waits until it is exact: all of its block's five steps from an edge that was settled before.
    assert rounds[stuck - 1] > rounds[stuck - 2]
    assert all(r >= rounds[stuck - 1] for r in rounds[stuck:])
    # Others had all long had changes that would have let them pass.
    behind = [r for edge in range(stuck + 1, BLOCKS + 1) for r, change in changes(found, edge) if change < math.inf]
    assert min(behind) < rounds[stuck - 1]
    assert found.rounds > free.rounds


# -- each sample for itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LONG)
def test_a_batched_run_stops_once_every_edges_change_is_within_its_unit(name: str) -> None:
    units = noise_units(LONG[name], srds(BLOCKS).edges(LONG[name])).tolist()
    units[-1] = units[-2]
    waves = [wave for wave in forced(name, "batched")[-1].history if isinstance(wave, PararealRecord)]
    moved: dict[int, list[float]] = {}  # changes of an iteration in their edges' units
    for edge, level, change in (value for wave in waves for value in wave.values if value[0]):
        moved.setdefault(level, []).append(change / units[edge - 1])
    stops = set()
    for tolerance in (1e6, 1.0, 0.1, 0.01):
        found = iterations(solved(LONG[name], srds(BLOCKS, ordering="batched", rule="change", tolerance=tolerance)))
        assert found == next(level for level in sorted(moved) if max(moved[level]) <= tolerance)
        stops.add(found)
    assert 1 in stops
    assert len(stops) >= 3
    assert max(stops) < BLOCKS


@pytest.mark.parametrize(
    ("rule", "order"),
    [("error", "pipelined"), ("error", "batched"), ("sample", "pipelined"), ("change", "pipelined"), ("change", "batched")],
)
def test_each_sample_decides_for_itself(rule: StopRule, order: Order) -> None:
    table, target = CHAINS["ddim"], TARGETS["mixture"]
    method = srds(10, ordering=order, rule=rule, tolerance=0.3 if rule == "change" else 2e-3)
    denoiser, seeds = target.denoiser(table), [0, 1, 2]
    together = sample(denoiser, table, Keyed((16,), seeds), method, dtype=torch.float64)
    assert len({c.rounds for c in together.error_estimates}) > 1  # slow and fast ones
    for k, seed in enumerate(seeds):
        alone = sample(denoiser, table, Keyed((16,), [seed]), method, dtype=torch.float64)
        assert gap(together.sample[k], alone.sample[0]) < EXACT
        found, wanted = together.error_estimates[k], alone.error_estimates[0]
        assert (found.rounds, found.evaluations) == (wanted.rounds, wanted.evaluations)
        # Changes of size 1e-3 are differences of states of size 1, which round to 1e-16.
        assert found.estimated_error == pytest.approx(wanted.estimated_error, rel=1e-9)


# -- closed-form data and a trained model ------------------------------------------------------------------------------

TARGETS: dict[str, Gaussian | Mixture | Empirical] = {
    "gaussian": Gaussian(torch.linspace(-0.5, 0.5, 16), torch.logspace(-3, 0, 16)),
    "mixture": mixture(),
    "digits": digits(),
}
CHAINS: dict[str, Table] = {
    "ddim": ddim(Schedule.linear(), 100),
    "ddim eta 0.5": ddim(Schedule.linear(), 100, eta=0.5),
    "ddim eta 1": ddim(Schedule.linear(), 100, eta=1.0),
    "ddpm": ddpm(Schedule.linear(), 100),
    "euler": euler(Schedule.linear(), 100),
    "euler_ancestral": euler_ancestral(Schedule.linear(), 100),
    "heun": heun(Schedule.linear(), 50),
    "flow_euler": flow_euler(100),
    "flow_euler shifted": flow_euler(100, shift=3.0),
}
SEEDS = 3
TOLERANCE = srds().tolerance


def rms(found: Tensor, wanted: Tensor) -> list[float]:
    return (found - wanted).flatten(1).square().mean(1).sqrt().tolist()


@cache
def reference(target: str, name: str) -> Tensor:
    """The samples of the sequential chain."""
    table, denoiser, noise = setting(target, name)
    return sample(denoiser, table, noise, sequential(), dtype=torch.float64).sample


@cache
def setting(target: str, name: str) -> tuple[Table, Denoiser, Keyed]:
    table = CHAINS[name]
    return table, TARGETS[target].denoiser(table), Keyed((1, 8, 8) if target == "digits" else (16,), 0, SEEDS)


def measured(target: str, name: str, method: PararealMethod) -> tuple[Solution, list[float]]:
    """A run, and the error of every sample."""
    table, denoiser, noise = setting(target, name)
    found = sample(denoiser, table, noise, method, dtype=torch.float64)
    return found, rms(found.sample, reference(target, name))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *itertools.product(["mixture", "digits"], CHAINS),
        *itertools.product(["gaussian"], ["ddim", "ddpm", "heun", "flow_euler"]),
    ],
)
def test_the_estimate_covers_the_measured_error_at_the_default_tolerance(target: str, name: str) -> None:
    found, errors = measured(target, name, srds())
    for error_estimate, error in zip(found.error_estimates, errors, strict=True):
        # What is solved to rounding may be off by it.
        assert error <= error_estimate.estimated_error + EXACT
        assert error_estimate.estimated_error <= TOLERANCE
    assert found.rounds < 0.6 * CHAINS[name].steps


@pytest.mark.xfail(
    strict=True,
    reason="2 samples of 16, still deciding between data, err by 1.4 and 2.8 times their estimates: 6.3e-3 where 4.6e-3 was "
    "estimated, and 3.7e-3 where 1.3e-3 was",
)
def test_the_estimate_covers_short_stochastic_chains_on_digits() -> None:
    table, noise = ddpm(Schedule.linear(), 25), Keyed((1, 8, 8), 100, 16)
    denoiser = TARGETS["digits"].denoiser(table)
    wanted = sample(denoiser, table, noise, sequential(), dtype=torch.float64).sample
    found = sample(denoiser, table, noise, srds(), dtype=torch.float64)
    errors = rms(found.sample, wanted)
    assert all(e <= c.estimated_error + EXACT for e, c in zip(errors, found.error_estimates, strict=True))


@pytest.fixture(scope="module")
def trained() -> Model:
    return load("digits")


# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@torch.inference_mode()
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_trained_models_samples_are_within_the_default_tolerance(sampler: str, trained: Model) -> None:
    table, noise = trained.table(sampler, 50 if sampler == "heun" else 100), Keyed(trained.shape, 0, 2)
    wanted = sample(trained, table, noise, sequential()).sample
    found = sample(trained, table, noise, srds())
    # Against the tolerance: the estimate of a single sample may be too small on a trained model.
    assert max(rms(found.sample, wanted)) <= TOLERANCE
    assert found.estimated_error <= TOLERANCE
    assert found.rounds < 60
    assert wanted.std() > 0.3  # pictures, not blanks, on which all would agree


# -- its equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "decision"), [("ddim", 2.5), ("ddpm", 6.0)])
def test_every_value_of_a_run_follows_the_stated_equations(name: str, decision: float) -> None:
    """e, the estimate's sum and the residual, recomputed from the changes that the history lists."""
    table = LONG[name]
    method = srds(BLOCKS, ordering="batched", iterations=3)
    edges = method.edges(table)
    signal, noise = table.alpha[edges[:-1]] ** 2, table.sigma[edges[:-1]] ** 2
    w = signal / (signal + noise)
    h = (propagator_mismatch(table, method.propagator(table, edges), edges) * (0.3 + 4 * decision * w * (1 - w))).tolist()
    s = sensitivity(table)[edges].tolist()
    variance = [float(table.alpha[n] ** 2 / 4 + table.sigma[n] ** 2) for n in edges]
    found = solved(table, method)
    level = {(edge, p): change for w in found.history if isinstance(w, PararealRecord) for edge, p, change in w.values}
    error, total, residual, theta = {}, {}, {}, {}
    for p in range(4):
        error[0, p] = total[0, p] = residual[0, p] = level[0, p] = 0.0
        seen = predicted = 0.0
        for n in range(1, BLOCKS + 1):
            if p == 0:
                error[n, p] = total[n, p] = residual[n, p] = math.inf
                theta[n, p] = 1.0
                continue
            moved = h[n - 1] * level[n - 1, p]
            error[n, p] = math.sqrt(variance[n] / variance[n - 1]) * error[n - 1, p] + moved
            total[n, p] = total[n - 1, p] + s[n] * moved
            residual[n, p] = max(residual[n - 1, p], level[n - 1, p])
            theta[n, p] = theta[n, p - 1]
            if 0 < error[n, p - 1] < math.inf:
                seen += level[n, p] ** 2
                predicted += error[n, p - 1] ** 2
                theta[n, p] = max(math.sqrt(seen / predicted), 0.7 * theta[n, p - 1], 0.5)
    left = level[BLOCKS, 3] * min(level[BLOCKS, 3] / level[BLOCKS, 2], 1)
    counted = max(theta[BLOCKS, 3] * total[BLOCKS, 3], left)
    assert found.estimated_error == pytest.approx(1.75 * scatter(math.prod(SHAPE)) * counted, rel=1e-9)
    assert found.residual == pytest.approx(residual[BLOCKS, 3], rel=1e-9)
