# SPDX-License-Identifier: Apache-2.0
"""methods/parareal/coarse.py: one coarse step is the fine chain with its clean-data estimate frozen, and the sampler's own long
step."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from problems import EXACT, SHAPE, TABLES, gap
from torch import Tensor

import paradiff.methods.parareal.coarse
from paradiff import Keyed, Schedule, Table
from paradiff.chain.slope import freeze_clean_data, identity
from paradiff.methods.parareal.coarse import between, of_table, one_step, propagator_mismatch, two_step
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun

# Intervals of one step, of several, and one longer than DRAWN is not needed: the chunking has a test of its own.
INTERVALS = {"even": [0, 3, 6, 9, 12], "uneven": [0, 1, 5, 7, 12], "whole": [0, 12], "single": list(range(13))}
each_table = pytest.mark.parametrize("name", TABLES)
each_intervals = pytest.mark.parametrize("intervals", INTERVALS)


def fitted(nodes: Sequence[int], table: Table) -> list[int]:
    """The nodes for a table of another number of steps: Heun's chain has 11."""
    return sorted({min(n, table.steps) for n in nodes})


# -- the long step of each sampler, from its own formula ---------------------------------------------------------------


def ddim_step(alpha: Tensor, sigma: Tensor, to: Tensor, noise_to: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of x and of D in x' = alpha' D + sigma' eps, eps = (x - alpha D)/sigma."""
    return noise_to / sigma, to - alpha * noise_to / sigma


def posterior(alpha: Tensor, sigma: Tensor, to: Tensor, noise_to: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of x and of D in the mean of q(x' | x, D), by Bayes' rule with precisions added up: x' has prior mean alpha' D
    and precision 1/sigma'^2, and x = r x' + s eps with r = alpha/alpha', s^2 = sigma^2 - r^2 sigma'^2."""
    r = alpha / to
    s = sigma**2 - r**2 * noise_to**2
    # precision 1/sigma'^2 + r^2/s = sigma^2/(s sigma'^2); multiplied through by s sigma'^2/sigma^2, which stays finite at 0
    return r * noise_to**2 / sigma**2, to * s / sigma**2


def euler_step(alpha: Tensor, sigma: Tensor, to: Tensor, noise_to: Tensor) -> tuple[Tensor, Tensor]:
    """x' = x + (sigma' - sigma) dx/dsigma, dx/dsigma = (x - D)/sigma."""
    rate = (noise_to - sigma) / sigma
    return 1 + rate, -rate


def flow_step(alpha: Tensor, sigma: Tensor, to: Tensor, noise_to: Tensor) -> tuple[Tensor, Tensor]:
    """x' = x + (s' - s) v, v = eps - D = (x - D)/s on the line alpha = 1 - s."""
    rate = (noise_to - sigma) / sigma
    return 1 + rate, -rate


LONG: dict[str, tuple[Table, Callable[..., tuple[Tensor, Tensor]]]] = {
    "ddim": (ddim(Schedule.linear(), 60), ddim_step),
    "ddim, sample prediction": (ddim(Schedule.cosine(), 60, prediction="sample"), ddim_step),
    "ddim from pure noise": (ddim(Schedule.linear(rescale_zero_snr=True), 60, spacing="trailing", prediction="v"), ddim_step),
    "ddim eta 1": (ddim(Schedule.linear(), 60, eta=1.0, prediction="v"), posterior),
    "ddpm": (ddpm(Schedule.linear(), 60), posterior),
    "euler": (euler(Schedule.scaled_linear(), 60), euler_step),
    "euler_ancestral": (euler_ancestral(Schedule.scaled_linear(), 60, prediction="v"), posterior),
    "flow_euler": (flow_euler(60, shift=3.0), flow_step),
}
LENGTHS = {"even": list(range(0, 61, 6)), "uneven": [0, 1, 2, 9, 33, 34, 50, 60], "whole": [0, 60]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", LONG)
def test_one_step_is_the_samplers_own_long_step(name: str, lengths: str) -> None:
    (table, formula), nodes = LONG[name], LENGTHS[lengths]
    alpha, sigma = table.alpha[nodes], table.sigma[nodes]
    state, clean = formula(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    found = one_step(table, nodes)
    # Up to 60 steps multiplied together; each rounds to 1e-16 of numbers of size 1.
    assert gap(found.state[:, 0], state) < EXACT
    assert gap(found.clean[:, 0], clean) < EXACT
    assert not found.extrapolation.any()
    assert found.slope is None


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", [name for name in LONG if LONG[name][0].stochastic])
def test_the_squared_noise_weights_add_up_to_the_posterior_variance(name: str, lengths: str) -> None:
    table, nodes = LONG[name][0], LENGTHS[lengths]
    found = one_step(table, nodes).weights[0].square()
    added = torch.stack([found[a:b].sum() for a, b in itertools.pairwise(nodes)])
    assert gap(added, table.posterior_variance(nodes)) < EXACT
    assert (added[0] > 1e-4) == (lengths != "whole")  # not a comparison of zeros; one step to clean data adds none


def test_partial_eta_does_not_compose_and_its_coarse_step_is_the_frozen_chain() -> None:
    # Between 0 and 1 the noise of one long step is not what the short ones add: the gap's is the fine chain's.
    table, nodes = ddim(Schedule.linear(), 60, eta=0.5), [0, 20, 40, 60]
    weights = one_step(table, nodes).weights[0, :20]
    long = 0.5 * float(table.posterior_variance(nodes)[0].sqrt())
    assert abs(float(weights.norm()) / long - 1) > 0.01


# -- the frozen chain, step by step ------------------------------------------------------------------------------------


def frozen(table: Table, noise: Keyed, left: int, right: int, x: Tensor, clean: Tensor) -> Tensor:
    """`[P, ...]` the states at `right` and the P - 1 nodes before it after the fine steps from `left`, with D = `clean` in
    all of them. States before `left` count as x, with the outputs that they had there if D was `clean`."""
    states = {left - j: x for j in range(table.band)}
    for i in range(left, right):
        new = table.c[i] * noise.draw(0, range(i, i + 1))[0].double()
        for j in range(table.band):
            source = i - j
            at = max(source, 0)  # a step that would read before the chain has coefficients zero there
            output = (clean - table.p[at] * states[source]) / table.q[at]
            new = new + table.a[i, j] * states[source] + table.b[i, j] * output
        states[i + 1] = new
    return torch.stack([states[right - j] for j in range(table.band)])


@each_table
@each_intervals
def test_a_coarse_step_is_the_fine_chain_with_its_estimate_frozen(name: str, intervals: str) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, 5)
    nodes = fitted(INTERVALS[intervals], table)
    coarse = one_step(table, nodes)
    x, clean = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for n, (left, right) in enumerate(itertools.pairwise(nodes)):
        found = coarse.state[n].view(-1, 1, 1) * x + coarse.clean[n].view(-1, 1, 1) * clean
        found += coarse.aggregate(noise, 0, n)
        assert gap(found, frozen(table, noise, left, right, x, clean)) < EXACT


@each_table
def test_the_aggregate_alone_is_what_noise_makes_of_nothing(name: str) -> None:
    table, noise, zero = TABLES[name], Keyed(SHAPE, 1), torch.zeros(SHAPE, dtype=torch.float64)
    coarse = one_step(table, nodes := fitted(INTERVALS["uneven"], table))
    sizes = []
    for n, (left, right) in enumerate(itertools.pairwise(nodes)):
        wanted = frozen(table, noise, left, right, zero, zero)
        assert gap(coarse.aggregate(noise, 0, n), wanted) < EXACT
        sizes.append(float(wanted.abs().max()))
    assert (max(sizes) > 0.01) == table.stochastic


def test_the_aggregates_of_samples_differ_and_belong_to_their_sample() -> None:
    table, noise = TABLES["ddpm"], Keyed(SHAPE, [4, 9])
    coarse = one_step(table, [0, 6, 12])
    for k, seed in enumerate([4, 9]):
        assert torch.equal(coarse.aggregate(noise, k, 0), coarse.aggregate(Keyed(SHAPE, seed), 0, 0))
    assert gap(coarse.aggregate(noise, 0, 0), coarse.aggregate(noise, 1, 0)) > 0.1


@pytest.mark.parametrize("drawn", [1, 2, 7, 59, 60, 1000])
@pytest.mark.parametrize("name", ["ddpm", "ddim eta 1", "euler_ancestral"])
def test_aggregates_add_up_whatever_is_drawn_at_once(name: str, drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, noise = LONG[name][0], Keyed(SHAPE, 3)
    coarse = one_step(table, [0, 41, 60])
    wanted = [coarse.aggregate(noise, 0, n) for n in (0, 1)]
    monkeypatch.setattr(paradiff.methods.parareal.coarse, "DRAWN", drawn)
    for n in (0, 1):
        assert gap(coarse.aggregate(noise, 0, n), wanted[n]) < EXACT


@pytest.mark.parametrize("drawn", [3, 8])
def test_at_most_so_many_noises_are_held_at_once(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[range] = []

    class Counted(Keyed):
        def draw(self, sample: int, nodes: range) -> Tensor:
            asked.append(nodes)
            return super().draw(sample, nodes)

    monkeypatch.setattr(paradiff.methods.parareal.coarse, "DRAWN", drawn)
    one_step(LONG["ddpm"][0], [0, 40, 60]).aggregate(Counted(SHAPE), 0, 1)
    assert max(len(nodes) for nodes in asked) == drawn
    assert [n for nodes in asked for n in nodes] == list(range(40, 60))


# -- two steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [dpmpp_2m(Schedule.linear(), 20), dpmpp_2m(Schedule.cosine(), 20, karras=True)])
def test_the_extrapolation_over_single_steps_is_that_of_dpm_solver(table: Table) -> None:
    # The table's D's are weighed by G (1 + r) and -G r, r = h/(2 h0); b carries a factor q.
    own, before = table.b[1:-1, 0] / table.q[1:-1], table.b[1:-1, 1] / table.q[:-2]
    extrapolation = -before / (own + before)
    found = two_step(table, range(21)).extrapolation
    assert gap(found[1:-1], extrapolation.clamp(max=0.5)) < 1e-9  # differences of logarithms that are close to each other
    assert extrapolation.min() < 0.45 or extrapolation.max() > 0.5  # the ratio is not one half throughout
    assert found[0] == found[-1] == 0


def test_the_extrapolation_is_half_the_ratio_of_lengths_in_log_snr_and_at_most_one_half() -> None:
    table, nodes = ddim(Schedule.linear(), 60), [0, 4, 30, 33, 50, 60]
    h = [math.log(table.alpha[n] / table.sigma[n]) for n in nodes[:-1]]
    lengths = [b - a for a, b in itertools.pairwise(h)]
    wanted = [0.0] + [min(b / a / 2, 0.5) for a, b in itertools.pairwise(lengths)] + [0.0]
    found = two_step(table, nodes)
    assert found.extrapolation.tolist() == pytest.approx(wanted, abs=1e-12)
    assert 0 < min(wanted[1:-1]) < 0.5 == max(wanted)
    assert torch.equal(found.state, one_step(table, nodes).state)
    assert torch.equal(found.clean, one_step(table, nodes).clean)


@pytest.mark.parametrize("name", ["ddim", "ddim pure noise", "ddpm", "euler", "heun", "flow_euler", "dpmpp_2m"])
def test_nothing_is_extrapolated_over_the_first_interval_or_one_beside_no_noise_or_no_signal(name: str) -> None:
    table = TABLES[name]
    nodes = fitted(INTERVALS["even"], table)
    extrapolation = two_step(table, nodes).extrapolation
    assert torch.isfinite(extrapolation).all()
    assert extrapolation[0] == 0
    assert table.sigma[-1] == 0
    assert extrapolation[-1] == 0
    blank = table.alpha[0] == 0
    assert (extrapolation[1] == 0) == blank  # the interval before it began at no signal, so it has no length to compare with
    assert (extrapolation[2:-1] > 0).all()
    assert (extrapolation <= 0.5).all()


def test_nothing_is_extrapolated_over_an_interval_without_length_in_log_snr() -> None:
    # The two stages of a Heun step share a level: an interval between them has length 0, and the next has nothing to divide by.
    table = TABLES["heun"]
    assert table.sigma[3] == table.sigma[4]
    extrapolation = two_step(table, [0, 2, 3, 4, 6, 11]).extrapolation
    assert torch.isfinite(extrapolation).all()
    assert extrapolation[2] == 0
    assert extrapolation[3] <= 0.5


# -- a slope -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow_euler", "euler_ancestral"])
def test_a_frozen_estimates_slope_is_the_coarse_steps_own_factor(name: str) -> None:
    table, nodes = TABLES[name], INTERVALS["uneven"]
    found = between(table, nodes, freeze_clean_data)
    assert found.slope is not None
    assert gap(found.slope, one_step(table, nodes).state[:, 0]) < EXACT
    assert torch.equal(found.clean, one_step(table, nodes).clean)
    one = between(table, nodes, identity).slope
    assert one is not None
    assert torch.equal(one, torch.ones(4, dtype=torch.float64))


# -- another table -----------------------------------------------------------------------------------------------------

# Trailing spacing visits every k-th time of the fine chain, the first one included: a chain of N/k steps lives on its nodes.
FINE, COARSE = 60, 12
SPACED: dict[str, Any] = {"spacing": "trailing"}


def short(sampler: Callable[..., Table], steps: int, **options: object) -> Table:
    """A table on 600 training times, which both numbers of steps divide."""
    return sampler(Schedule.linear(600), steps, **SPACED, **options)


def visited(fine: Table, coarse: Table) -> list[int]:
    """The fine nodes at the times of the coarse table."""
    return [int((fine.t[:-1] == t).nonzero()) for t in coarse.t[:-1]] + [fine.steps]


@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_a_table_of_fewer_steps_is_one_step_between_its_nodes(sampler: Callable[..., Table]) -> None:
    fine, few = short(sampler, FINE), short(sampler, COARSE)
    nodes = visited(fine, few)
    found, wanted = of_table(fine, few), one_step(fine, nodes)
    assert found.nodes == nodes
    assert gap(found.state, wanted.state) < EXACT
    assert gap(found.clean, wanted.clean) < EXACT
    # A DDPM step to clean data that begins above time 0 adds 1e-10, the floor on its variance, in both tables.
    assert gap(found.weights, wanted.weights) < 1e-9
    assert wanted.weights.any() == fine.stochastic


def test_a_coarse_tables_noise_is_scaled_to_its_own() -> None:
    fine, few = short(ddpm, FINE), short(ddim, COARSE, eta=0.5)
    nodes = visited(fine, few)
    found, full = of_table(fine, few).weights[0], one_step(fine, nodes).weights[0]
    for n, (left, right) in enumerate(itertools.pairwise(nodes)):
        assert float(found[left:right].norm()) == pytest.approx(float(few.c[n]), abs=1e-12)
        if right < FINE:  # the fine path, only smaller
            ratio = found[left:right] / full[left:right]
            assert gap(ratio, ratio[:1].expand_as(ratio)) < 1e-12
    assert found.norm() < 0.9 * full.norm()


def test_a_deterministic_coarse_table_under_a_stochastic_chain_adds_no_noise() -> None:
    found = of_table(short(ddpm, FINE), short(ddim, COARSE))
    assert not found.weights.any()


def test_both_stages_of_a_level_are_one_node_to_a_coarse_table() -> None:
    fine = heun(Schedule.linear(), 6)
    found = of_table(fine, euler(Schedule.linear(), 6))
    levels = fine.sigma[found.nodes]
    assert found.nodes[0] == 0
    assert found.nodes[-1] == fine.steps
    assert torch.equal(levels, euler(Schedule.linear(), 6).sigma)


def test_of_two_stages_at_a_level_a_coarse_table_takes_the_one_between_steps() -> None:
    fine = heun(Schedule.linear(), 6)
    assert of_table(fine, euler(Schedule.linear(), 6)).nodes == fine.restarts


@pytest.mark.parametrize(
    ("coarse", "message"),
    [
        (
            short(ddim, 7),
            r"node 1 of the coarse table 'ddim' \(alpha = .*, sigma = .*\) is no node of the fine table 'ddim'; the nearest is "
            r"node \d+ \(alpha = .*, sigma = .*\): give fine nodes as indices instead",
        ),
        (short(euler, 12), r"node 0 of the coarse table 'euler' .* is no node of the fine table 'ddim'"),
        (
            short(dpmpp_2m, 12),
            "the coarse table 'dpmpp_2m' has band 2; a coarse propagator is a one-step sampler",
        ),
        (short(heun, 12), "the coarse table 'heun' has band 2; a coarse propagator is a one-step sampler"),
        (
            short(ddpm, COARSE),
            r"the coarse table 'ddpm' adds noise between fine nodes \d+ and \d+, where 'ddim' adds none: both must take their "
            "noise from one path; give a deterministic coarse table",
        ),
    ],
)
def test_coarse_tables_that_do_not_fit_are_refused(coarse: Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_table(short(ddim, FINE), coarse)


def test_the_refusal_of_a_node_names_the_node() -> None:
    fine, few = short(ddim, FINE), short(ddim, COARSE)
    alpha, sigma = few.alpha.clone(), few.sigma.clone()
    alpha[5] = float(alpha[5]) * (1 + 1e-6)  # a hundred times what is still the same level
    sigma[5] = float((1 - alpha[5] ** 2).sqrt())
    nearest = visited(fine, few)[5]
    bent = dataclasses.replace(few, alpha=alpha, sigma=sigma, reached=None, exact_variance=True)
    with pytest.raises(ValueError, match=rf"node 5 of the coarse table 'ddim' .* the nearest is node {nearest} \("):
        of_table(fine, bent)


# -- the mismatch --------------------------------------------------------------------------------------------------------


MEASURED = {
    "ddim": ddim(Schedule.linear(), 240),
    "ddpm": ddpm(Schedule.linear(), 240),
    "euler": euler(Schedule.linear(), 240),
    "flow_euler": flow_euler(240),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_mismatch_falls_with_the_number_of_coarse_steps(name: str) -> None:
    table, edges = MEASURED[name], list(range(0, 241, 24))
    found = []
    for count in (1, 2, 4, 8, 24):
        nodes = [0] + [e + 24 * k // count for e in edges[:-1] for k in range(1, count + 1)]
        found.append(propagator_mismatch(table, one_step(table, nodes), edges))
    for more, fewer in itertools.pairwise(found):
        assert (fewer < more).all()
    # Steps of first order: eight times as many, an eighth of the mismatch, but for the last block, which ends at data.
    assert (found[3][:-1] < found[0][:-1] / 4).all()
    assert (found[3] > 1e-6).all()
    assert gap(found[-1], torch.zeros(10)) < EXACT  # the coarse steps are the fine ones


def answered(table: Table, nodes: Sequence[int], v: float) -> float:
    """How a change of the state passes through deterministic steps along `nodes`, for data of variance v at 0, of which
    D = alpha v x / (alpha^2 v + sigma^2)."""
    factor = 1.0
    for i, j in itertools.pairwise(nodes):
        alpha, sigma, to, noise_to = (
            float(level) for level in (table.alpha[i], table.sigma[i], table.alpha[j], table.sigma[j])
        )
        answer = alpha * v / (alpha**2 * v + sigma**2)
        factor *= to * answer + noise_to * (1 - alpha * answer) / sigma  # x' = alpha' D + sigma' (x - alpha D)/sigma
    return factor


def flowed(table: Table, left: int, right: int, v: float) -> float:
    """The same for the flow itself, which keeps the state over its own deviation."""
    return math.sqrt(float(table.alpha[right] ** 2 * v + table.sigma[right] ** 2) / spread(table, left, v))


def spread(table: Table, node: int, v: float) -> float:
    return float(table.alpha[node] ** 2 * v + table.sigma[node] ** 2)


# The maximum over 49 variances, an eighth of a decade apart, of a smooth curve: at most one per cent below that over 201.
VARIANCES = [10 ** (exponent / 33) for exponent in range(-132, 67)]


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("count", [1, 3])
def test_the_mismatch_is_what_gaussian_data_show_between_fine_and_coarse_steps(name: str, count: int) -> None:
    table, left, right = MEASURED[name], 120, 144
    nodes = [left + 24 * k // count for k in range(count + 1)]
    fine = [answered(table, range(left, right + 1), v) for v in VARIANCES]
    worst = max(abs(f - answered(table, nodes, v)) for f, v in zip(fine, VARIANCES, strict=True))
    found = float(propagator_mismatch(table, one_step(table, [0, *nodes, 240]), [0, left, right, 240])[1])
    assert 0.99 * worst <= found <= 1.01 * worst
    # The fine steps are not the flow: what is told from it here is more than the margins allow.
    flow = max(abs(flowed(table, left, right, v) - answered(table, nodes, v)) for v in VARIANCES)
    assert abs(flow / worst - 1) > 0.02


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_a_sampler_of_higher_order_and_a_led_propagator_are_measured_from_the_flow(name: str) -> None:
    makers: dict[str, Callable[..., Table]] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "heun": heun}
    table = makers[name](Schedule.linear(), 60)
    left, right = 20, 40
    edges = [0, left, right, table.steps]
    worst = max(abs(flowed(table, left, right, v) - answered(table, [left, right], v)) for v in VARIANCES)
    found = float(propagator_mismatch(table, (two_step if name == "ddim" else one_step)(table, edges), edges)[1])
    assert 0.99 * worst <= found <= 1.01 * worst
    steps = max(abs(answered(table, range(left, right + 1), v) - answered(table, [left, right], v)) for v in VARIANCES)
    assert abs(steps / worst - 1) > 0.02


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].band == 1])
def test_there_is_no_mismatch_where_the_coarse_step_is_the_fine_one(name: str) -> None:
    table, edges = TABLES[name], INTERVALS["uneven"]
    found = propagator_mismatch(table, one_step(table, edges), edges)
    assert float(found[0]) < EXACT  # a block of one step
    assert float(found[1:].min()) > 1e-6


def test_a_slopes_mismatch_is_that_of_the_slope() -> None:
    table, edges = MEASURED["ddim"], [0, 80, 160, 240]
    # D that does not answer is right for data of no width, and off by all of D's answer for wide data; 1 is off elsewhere.
    frozen_data, one = (propagator_mismatch(table, between(table, edges, s), edges) for s in (freeze_clean_data, identity))
    fine = [answered(table, range(81), float(v)) for v in torch.logspace(-4, 2, 49, dtype=torch.float64)]
    for found, slope in ((frozen_data, float(table.sigma[80] / table.sigma[0])), (one, 1.0)):
        assert float(found[0]) == pytest.approx(max(abs(f - slope) for f in fine), rel=1e-9)
    assert (propagator_mismatch(table, one_step(table, edges), edges) < frozen_data).all()


def test_every_block_has_its_mismatch_and_no_mismatch_is_nothing() -> None:
    for table in TABLES.values():
        edges = fitted(INTERVALS["uneven"], table)
        found = propagator_mismatch(table, two_step(table, edges), edges)
        assert found.shape == (len(edges) - 1,)
        assert (found > 0).all()
        assert torch.isfinite(found).all()
