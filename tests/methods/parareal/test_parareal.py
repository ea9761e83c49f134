# SPDX-License-Identifier: Apache-2.0
"""SRDS against a textbook Parareal loop, the planner's edges, and what is refused, each refusal by its sentence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from problems import EXACT, SHAPE, STEPS, TABLES, chain, gap, network
from torch import Tensor

from paradiff import Keyed, Schedule, Solution, Table, sample, sequential, srds
from paradiff.chain.slope import Slope, freeze_clean_data, identity, shifted
from paradiff.methods import PararealMethod, WindowMethod
from paradiff.methods.parareal.options import Choice, StopRule
from paradiff.methods.parareal.options import Ordering as Order
from paradiff.samplers import ddim, ddpm, dpmpp_2m, flow_euler, heun

each_schedule = pytest.mark.parametrize("order", ["pipelined", "batched"])

# -- textbook Parareal -------------------------------------------------------------------------------------------------


def estimate(table: Table, i: int, x: Tensor) -> Tensor:
    """The clean-data estimate at node i."""
    m = network((table.scale[i] * x)[None], table.t[i : i + 1])[0]
    if table.prediction == "epsilon":
        return (x - table.sigma[i] * m) / table.alpha[i]
    if table.prediction == "flow":
        return x - table.sigma[i] * m
    assert table.prediction == "sample"
    return m


def factors(table: Table, i: int, j: int) -> tuple[float, float]:
    """Factors of x and of D in one step of the sampler from node i to node j: the posterior mean of DDPM, or DDIM, which
    DPM-Solver++ of order one, Euler's method and rectified flow are too."""
    alpha, sigma, to, noise_to = (float(v) for v in (table.alpha[i], table.sigma[i], table.alpha[j], table.sigma[j]))
    if table.name == "ddpm":
        beta = 1 - (alpha / to) ** 2
        return alpha * noise_to**2 / (to * sigma**2), to * beta / sigma**2
    return noise_to / sigma, to - alpha * noise_to / sigma


def gathered(table: Table, noise: Keyed, i: int, j: int) -> Tensor:
    """The noise that DDPM's steps from i to j leave in the state at j: each adds its own to what it shrinks."""
    total = torch.zeros(noise.shape, dtype=torch.float64)
    for n in range(i, j):
        deviation = 0.0
        if table.name == "ddpm":
            beta = 1 - float(table.alpha[n] / table.alpha[n + 1]) ** 2
            deviation = math.sqrt(beta) * float(table.sigma[n + 1] / table.sigma[n])
        total = factors(table, n, n + 1)[0] * total + deviation * noise.draw(0, range(n, n + 1))[0].double()
    return total


class Textbook:
    """Parareal over plain lists. A block edge holds the state and, for samplers that read it, the state and the clean-data
    estimate of the node before.

    Args:
        table: DDIM, DDPM, rectified flow or DPM-Solver++(2M).
        edges: Block edges.
        nodes: Coarse nodes; the edges by default.
        extrapolates: Whether the coarse propagator extrapolates its estimate along the trend.
        slope: For the propagator without a network: the slope of every block.
    """

    def __init__(
        self,
        table: Table,
        edges: Sequence[int],
        nodes: Sequence[int] | None = None,
        extrapolates: bool = False,
        slope: Sequence[float] | None = None,
    ) -> None:
        self.table, self.edges, self.nodes = table, edges, edges if nodes is None else nodes
        self.extrapolates, self.slope, self.noise = extrapolates, slope, Keyed(SHAPE)

    def fine(self, block: int, start: list[Tensor]) -> list[Tensor]:
        """The chain's own steps over a block."""
        table, (x, *past) = self.table, start
        for i in range(self.edges[block], self.edges[block + 1]):
            clean = estimate(table, i, x)
            state, gain = factors(table, i, i + 1)
            led = clean
            if table.name == "dpmpp_2m" and 0 < i < table.steps - 1:
                h, h0 = (math.log(float(self.snr(n + 1) / self.snr(n))) for n in (i, i - 1))
                led = clean + h / (2 * h0) * (clean - past[1])
            past = [x, clean] if table.name == "dpmpp_2m" else []
            x = state * x + gain * led + gathered(table, self.noise, i, i + 1)
        return [x, *past]

    def snr(self, n: int) -> Tensor:
        return self.table.alpha[n] / self.table.sigma[n]

    def coarse(
        self, block: int, start: list[Tensor], before: Tensor | None, node: int | None
    ) -> tuple[list[Tensor], Tensor, int]:
        """The coarse steps over a block, from the estimate of the coarse step before and the node where that was made. Also
        returns its own last ones."""
        table, x, past = self.table, start[0], []
        nodes = [n for n in self.nodes if self.edges[block] <= n <= self.edges[block + 1]]
        for i, j in itertools.pairwise(nodes):
            clean = led = estimate(table, i, x)
            if self.extrapolates and before is not None and node is not None and j < table.steps:
                h, h0 = (math.log(float(self.snr(b) / self.snr(a))) for a, b in ((i, j), (node, i)))
                led = clean + min(h / (2 * h0), 0.5) * (clean - before)
            if table.name == "dpmpp_2m":  # the node before j, if the estimate was the same in all steps
                state, gain = factors(table, i, j - 1) if j - 1 > i else (1.0, 0.0)
                past = [state * x + gain * led, led]
            state, gain = factors(table, i, j)
            x = state * x + gain * led + gathered(table, self.noise, i, j)
            before, node = clean, i
        assert before is not None
        assert node is not None
        return [x, *past], before, node

    def sweep(self, x: list[list[Tensor]], fine: list[list[Tensor]], old: list[list[Tensor]]) -> list[list[Tensor]]:
        """The coarse propagator's values G from new edges, which are made on the way: `x` begins with the first one."""
        made: list[list[Tensor]] = []
        before, node = None, None
        for block in range(len(self.edges) - 1):
            new, before, node = self.coarse(block, x[block], before, node)
            made.append(new)
            if not fine:
                x.append(new)
            else:
                x.append([f + g - h for f, g, h in zip(fine[block], new, old[block], strict=True)])
        return made

    def __call__(self, iterations: int) -> Tensor:
        """The sample after some iterations."""
        blocks = len(self.edges) - 1
        first = [self.noise.start(0).double() * self.table.start_scale]
        if self.table.name == "dpmpp_2m":
            first += [first[0], first[0]]  # never read
        x = [first]
        if self.slope is not None:
            clean = estimate(self.table, 0, first[0])
            for i, j in itertools.pairwise(self.edges):
                state, gain = factors(self.table, i, j)
                x.append([state * x[-1][0] + gain * clean + gathered(self.table, self.noise, i, j)])
            for _ in range(iterations):
                fine, old, x = [self.fine(b, x[b]) for b in range(blocks)], x, [first]
                for b in range(blocks):
                    x.append([fine[b][0] + self.slope[b] * (x[b][0] - old[b][0])])
            return x[-1][0]
        coarse = self.sweep(x, [], [])
        for _ in range(iterations):
            fine, x = [self.fine(b, x[b]) for b in range(blocks)], [first]
            coarse = self.sweep(x, fine, coarse)
        return x[-1][0]


BOOK = {name: TABLES[name] for name in ("ddim", "ddpm", "flow_euler", "dpmpp_2m")}
EDGES = {"even": [0, 3, 6, 9, 12], "uneven": [0, 4, 7, 9, 12]}
# Blocks whose first edge is exact before the coarse sweep has passed the second one.
OVERTAKEN = {
    "a first block of one step": [0, 1, 5, 7, 12],
    "blocks of two steps": list(range(0, 13, 2)),
    "a short block between long ones": [0, 6, 7, 12],
}
each_book = pytest.mark.parametrize("name", BOOK)
each_edges = pytest.mark.parametrize("edges", EDGES)


def solved(table: Table, method: PararealMethod | WindowMethod) -> Solution:
    """One sample in float64."""
    return sample(network, table, Keyed(SHAPE), method, dtype=torch.float64)


@cache
def textbook(name: str, edges: tuple[int, ...], nodes: tuple[int, ...], iterations: int, extrapolates: bool = False) -> Tensor:
    """A textbook sample, which several tests share."""
    return Textbook(BOOK[name], edges, nodes, extrapolates)(iterations)


def to_textbook(name: str, edges: Sequence[int], iterations: int, order: Order, coarse: Choice = "one step") -> float:
    """Largest difference between the sample of `srds` after forced iterations and the textbook's."""
    nodes = edges if isinstance(coarse, str) else nodes_of(edges, coarse)
    found = solved(BOOK[name], srds(edges, coarse, order, iterations=iterations))
    return gap(found.sample[0], textbook(name, tuple(edges), tuple(nodes), iterations, coarse == "two step"))


def nodes_of(edges: Sequence[int], coarse: Choice) -> Sequence[int]:
    """Nodes of several coarse steps a block, or those given."""
    if not isinstance(coarse, int):
        assert isinstance(coarse, list)
        return coarse
    nodes = [0]
    for left, right in itertools.pairwise(edges):
        count = min(coarse, right - left)
        nodes += [left + math.floor((right - left) * k / count) for k in range(1, count + 1)]
    return nodes


@each_book
@each_edges
@each_schedule
@pytest.mark.parametrize("iterations", range(4))
def test_one_coarse_step_is_textbook_parareal(name: str, edges: str, order: Order, iterations: int) -> None:
    assert to_textbook(name, EDGES[edges], iterations, order) < EXACT


@each_schedule
@pytest.mark.parametrize("edges", OVERTAKEN)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_short_blocks_are_textbook_parareal_too(name: str, edges: str, order: Order) -> None:
    for iterations in range(min(4, len(OVERTAKEN[edges]))):
        assert to_textbook(name, OVERTAKEN[edges], iterations, order) < EXACT


@each_book
def test_iterations_of_the_textbook_differ_and_end_at_the_chain(name: str) -> None:
    # What makes the tests here able to fail: no two iterations are alike, and the last is the chain's own sample.
    edges = tuple(EDGES["even"])
    found = [textbook(name, edges, edges, k) for k in range(5)]
    assert all(gap(a, b) > 1e-8 for a, b in itertools.pairwise(found))
    assert gap(found[0], found[1]) > 1e-3
    assert gap(found[-1], chain(network, BOOK[name], Keyed(SHAPE))[-1]) < EXACT


SEVERAL: list[tuple[list[int], Choice]] = [
    ([0, 5, 9, 12], 2),
    ([0, 7, 12], 3),
    ([0, 5, 9, 12], [0, 1, 5, 8, 9, 12]),
]


@each_book
@each_schedule
@pytest.mark.parametrize(("edges", "coarse"), SEVERAL, ids=str)
def test_several_coarse_steps_are_textbook_parareal(name: str, edges: list[int], coarse: Choice, order: Order) -> None:
    for iterations in range(min(4, len(edges))):
        assert to_textbook(name, edges, iterations, order, coarse) < EXACT
    ends = tuple(edges)
    apart = gap(textbook(name, ends, tuple(nodes_of(edges, coarse)), 0), textbook(name, ends, ends, 0))
    assert apart > 1e-6  # more steps do something


@each_schedule
def test_coarse_steps_half_as_many_as_fine_ones_are_textbook_parareal_too(order: Order) -> None:
    for iterations in range(4):
        assert to_textbook("ddim", [0, 4, 8, 12], iterations, order, 2) < EXACT


@each_book
@each_edges
@each_schedule
def test_two_step_is_textbook_parareal_with_a_led_estimate(name: str, edges: str, order: Order) -> None:
    for iterations in range(4):
        assert to_textbook(name, EDGES[edges], iterations, order, "two step") < EXACT
    places = tuple(EDGES[edges])
    assert gap(textbook(name, places, places, 0, True), textbook(name, places, places, 0)) > 1e-6  # it matters


LINEAR: dict[str, tuple[Slope, Callable[[Table, int, int], float]]] = {
    "frozen": (freeze_clean_data, lambda table, i, j: factors(table, i, j)[0]),
    "identity": (identity, lambda table, i, j: 1.0),
    "halves": (torch.full((STEPS,), 0.5, dtype=torch.float64), lambda table, i, j: 0.5 ** (j - i)),
}


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow_euler"])
@pytest.mark.parametrize("slope", LINEAR)
@each_edges
def test_a_slope_is_textbook_parareal_with_a_linear_coarse_propagator(name: str, slope: str, edges: str) -> None:
    table, places, (given, factor) = BOOK[name], EDGES[edges], LINEAR[slope]
    book = Textbook(table, places, slope=[factor(table, i, j) for i, j in itertools.pairwise(places)])
    for iterations in (1, 2, 3):
        assert gap(solved(table, srds(places, given, iterations=iterations)).sample[0], book(iterations)) < EXACT


def test_a_slope_without_an_iteration_is_its_first_values() -> None:
    table, places = BOOK["ddim"], EDGES["even"]
    book = Textbook(table, places, slope=[0.0] * 4)
    assert gap(solved(table, srds(places, freeze_clean_data, iterations=0)).sample[0], book(0)) < EXACT


@each_schedule
@pytest.mark.parametrize("make", [ddim, ddpm])
def test_a_coarse_table_is_textbook_parareal_between_its_nodes(make: Callable[..., Table], order: Order) -> None:
    fine, few = (make(Schedule.linear(600), n, spacing="trailing", prediction="sample") for n in (12, 4))
    book = Textbook(fine, [0, 3, 6, 9, 12])
    for iterations in range(4):
        wanted = book(iterations)
        for blocks in (None, 4):
            found = solved(fine, srds(blocks, few, order, iterations=iterations))
            # A floor of 1e-10 on the deviation of a DDPM step to clean data.
            assert gap(found.sample[0], wanted) < 1e-9


# -- the planner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 25, 50, 100, 199, 1000])
@pytest.mark.parametrize("iterations", [None, 1, 3, 7])
def test_the_planner_takes_the_nearest_whole_number_to_its_root(steps: int, iterations: int | None) -> None:
    table = flow_euler(steps)
    orders: dict[Order, int] = {"pipelined": steps * (2 if iterations is None else iterations), "batched": steps}
    for order, product in orders.items():
        blocks = len(srds(ordering=order, iterations=iterations).edges(table)) - 1
        nearest = min(range(product + 2), key=lambda b: abs(b - math.sqrt(product)))
        assert blocks == max(1, min(nearest, steps))


def test_no_forced_iteration_is_planned_as_one() -> None:
    assert len(srds(iterations=0).edges(flow_euler(100))) == len(srds(iterations=1).edges(flow_euler(100))) == 11


@pytest.mark.parametrize("steps", [12, 50, 97])
def test_blocks_are_balanced_and_the_longer_ones_come_first(steps: int) -> None:
    table = flow_euler(steps)
    for blocks in [*range(1, 13), steps]:
        edges = srds(blocks).edges(table)
        lengths = [b - a for a, b in itertools.pairwise(edges)]
        assert (edges[0], edges[-1], len(lengths)) == (0, steps, blocks)
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)


def test_edges_of_a_two_stage_sampler_fall_between_its_steps() -> None:
    table = heun(Schedule.linear(), 25)
    for blocks in (None, *range(1, 26)):
        edges = srds(blocks).edges(table)
        assert all(e % 2 == 0 for e in edges[:-1])
        assert edges[-1] == table.steps == 49
        steps = [math.ceil((b - a) / 2) for a, b in itertools.pairwise(edges)]
        assert max(steps) - min(steps) <= 1
        assert steps == sorted(steps, reverse=True)
    assert len(srds(40).edges(table)) == 41  # more blocks than two-stage steps: between the stages too


@pytest.mark.parametrize("blocks", [2, 3, 5, 12])
def test_a_multistep_samplers_blocks_are_balanced_over_its_steps(blocks: int) -> None:
    # Its chain never starts afresh, so that every node will do.
    edges = srds(blocks).edges(TABLES["dpmpp_2m"])
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    assert len(lengths) == blocks
    assert max(lengths) - min(lengths) <= 1


def test_a_multistep_samplers_blocks_are_planned_from_its_steps() -> None:
    for method in (srds(), srds(10)):
        assert method.edges(dpmpp_2m(Schedule.linear(), 50)) == list(range(0, 51, 5))


def test_edges_that_the_user_gives_are_taken_as_they_are() -> None:
    for edges in ([0, 12], [0, 1, 2, 11, 12], list(range(13)), (0, 7, 12)):
        assert srds(edges).edges(TABLES["ddpm"]) == list(edges)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_coarse_table_without_blocks_makes_a_block_of_each_step(name: str) -> None:
    make = {"ddim": ddim, "ddpm": ddpm}[name]
    fine, few = (make(Schedule.linear(600), n, spacing="trailing") for n in (60, 12))
    assert srds(coarse=few).edges(fine) == list(range(0, 61, 5))


def test_coarse_steps_share_a_block_evenly_and_are_no_more_than_its_own() -> None:
    table = TABLES["ddim"]
    for coarse, nodes in ((1, [0, 5, 6, 12]), (2, [0, 2, 5, 6, 9, 12]), (100, list(range(13)))):
        assert srds([0, 5, 6, 12], coarse).propagator(table, [0, 5, 6, 12]).nodes == nodes


def test_the_tolerance_has_a_default_for_each_rule() -> None:
    rules: dict[StopRule, float] = {"error": 4e-3, "change": 0.1, "sample": 4e-3, "image": 0.1}
    for rule, tolerance in rules.items():
        assert srds(rule=rule).tolerance == tolerance
        assert srds(rule=rule, tolerance=0.3).tolerance == 0.3
    assert srds() == PararealMethod()


# -- what is refused ---------------------------------------------------------------------------------------------------

UNKNOWN = "it must be 'one step', 'two step', a number of steps, fine nodes, a table or a slope"
SLIDES = "which looks at the end of the chain; a window slides by rule 'error' or 'change'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks is 0; give a whole number of at least 1 block, the edges of the blocks, or None"),
        ({"blocks": -4}, "blocks is -4; give a whole number of at least 1 block"),
        ({"ordering": "eager"}, "ordering is 'eager'; it must be one of pipelined, batched"),
        ({"rule": "residual"}, "rule is 'residual'; it must be one of error, change, sample, image"),
        ({"coarse": "three step"}, f"coarse is 'three step'; {UNKNOWN}"),
        ({"coarse": 0}, "coarse is 0 steps a block; it must be at least 1"),
        ({"coarse": -1}, "coarse is -1 steps a block; it must be at least 1"),
        (
            {"tolerance": 0.0},
            r"the tolerance is 0.0; it must be a number, positive, and finite \(for the exact sample force as many",
        ),
        ({"tolerance": -1e-3}, "the tolerance is -0.001; it must be a number, positive, and finite"),
        ({"tolerance": math.inf}, "the tolerance is inf; it must be a number, positive, and finite"),
        ({"tolerance": math.nan}, "the tolerance is nan; it must be a number, positive, and finite"),
        ({"iterations": -1}, "iterations is -1; it must be a whole number, at least 0, or None"),
        ({"window": 0}, "window is 0; it must be a whole number, at least 1, or None"),
        ({"rows": 0}, "rows is 0; it must be a whole number, at least 1, or None"),
        ({"window": 2, "iterations": 3}, f"window was given with iterations, {SLIDES}"),
        ({"window": 2, "iterations": 0}, f"window was given with iterations, {SLIDES}"),
        ({"window": 2, "rule": "sample"}, f"window was given with rule 'sample', {SLIDES}"),
        ({"window": 2, "rule": "image"}, f"window was given with rule 'image', {SLIDES}"),
        (
            {"window": 2, "ordering": "batched"},
            "window was given with the batched ordering, which has none; use ordering='pipelined'",
        ),
        (
            {"rows": 2, "ordering": "batched"},
            "rows was given with the batched ordering, which has none; use ordering='pipelined'",
        ),
        (
            {"coarse": identity, "ordering": "batched"},
            "the coarse propagator is a slope, which has no sweep to batch; use ordering='pipelined'",
        ),
        ({"coarse": torch.ones(12), "ordering": "batched"}, "the coarse propagator is a slope, which has no sweep to batch"),
        (
            {"coarse": freeze_clean_data, "window": 2},
            "window was given with a coarse propagator that is a slope; parasolver with a stride, a slope and a window is that",
        ),
    ],
)
@pytest.mark.parametrize("make", [srds, PararealMethod])
def test_values_out_of_range_and_contradictions_are_refused(
    make: Callable[..., PararealMethod], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


RISE = "they must rise from 0 to 12, the chain's number of steps"
FIT = "they must be rising nodes of the table, from 0 to 12"
TWELFTH = ddim(Schedule.linear(), 12, spacing="trailing")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (srds(13), "13 blocks were asked for; the chain has 12 steps: give at most 12"),
        (srds([0, 12, 5]), rf"the block edges are \[0, 12, 5\]; {RISE}"),
        (srds([0, 5, 5, 12]), rf"the block edges are \[0, 5, 5, 12\]; {RISE}"),
        (srds([0, 7, 5, 12]), rf"the block edges are \[0, 7, 5, 12\]; {RISE}"),
        (srds([1, 5, 12]), rf"the block edges are \[1, 5, 12\]; {RISE}"),
        (srds([0, 5, 11]), rf"the block edges are \[0, 5, 11\]; {RISE}"),
        (srds([0, 5, 13]), rf"the block edges are \[0, 5, 13\]; {RISE}"),
        (srds([0]), rf"the block edges are \[0\]; {RISE}"),
        (srds([]), rf"the block edges are \[\]; {RISE}"),
        (
            srds([0, 5, 12], [0, 4, 12]),
            r"the block edge 5 is no node of the coarse propagator, whose fine nodes are \[0, 4, 12\]; every block edge must "
            "be one of them",
        ),
        (srds([0, 5, 12], [5, 12]), r"the block edge 0 is no node of the coarse propagator, whose fine nodes are \[5, 12\]"),
        (srds([0, 5, 12], [0, 5, 13]), rf"the coarse nodes are \[0, 5, 13\]; {FIT}"),
        (srds([0, 5, 12], [-1, 0, 5, 12]), rf"the coarse nodes are \[-1, 0, 5, 12\]; {FIT}"),
        (srds([0, 5, 12], [0, 5, 5, 12]), rf"the coarse nodes are \[0, 5, 5, 12\]; {FIT}"),
        (srds([0, 5, 12], [0, 12, 5]), rf"the coarse nodes are \[0, 12, 5\]; {FIT}"),
        (
            srds(4, ddim(Schedule.linear(), 5, spacing="trailing")),
            "node 1 of the coarse table 'ddim' .* is no node of the fine",
        ),
        (
            srds(coarse=ddpm(Schedule.linear(), 6, spacing="trailing")),
            "the coarse table 'ddpm' adds noise between fine nodes 0",
        ),
        (
            srds(coarse=dpmpp_2m(Schedule.linear(), 6)),
            "the coarse table 'dpmpp_2m' has band 2; a coarse propagator is a one-step",
        ),
        (
            srds([0, 5, 12], ddim(Schedule.linear(), 6, spacing="trailing")),
            "the block edge 5 is no node of the coarse propagator",
        ),
        (srds(4, iterations=5), "5 iterations were asked for; 4 blocks are exact after 4: give at most that"),
        (srds(4, window=5), "the window is 5; there are 4 blocks: give at most that, or None"),
        (
            srds(4, torch.ones(11)),
            r"the slope has shape \(11, 1\); table 'ddim' has 12 steps and band 1, so it must be \[12\] or",
        ),
    ],
)
def test_a_method_that_does_not_fit_the_table_is_refused(method: PararealMethod, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solved(TWELFTH, method)


def test_the_image_rule_wants_pictures() -> None:
    message = (
        r"rule 'image' counts grey levels of pictures, \[1 or 3, height, width\], but a sample has shape \(2, 3\); use rule "
        "'sample', which measures the change in the state's own units"
    )
    with pytest.raises(ValueError, match=message):
        solved(TWELFTH, srds(rule="image"))
    for shape in ((2, 3), (3, 3, 3, 3), (2, 8, 8), (16,)):
        with pytest.raises(ValueError, match="rule 'image' counts grey levels"):
            srds(rule="image").check_shape(shape)
    for shape in ((1, 8, 8), (3, 4, 6)):
        srds(rule="image").check_shape(shape)
    srds(rule="sample").check_shape((2, 3))


def test_a_coarse_table_that_begins_later_than_the_chain_is_refused() -> None:
    # Leading spacing: the first time of the shorter chain is below that of the longer one.
    fine, few = ddim(Schedule.linear(600), 60), ddim(Schedule.linear(600), 12)
    for method in (srds(coarse=few), srds(12, few)):
        with pytest.raises(ValueError, match="the coarse table 'ddim' runs from fine node 4 to 60; it must run from 0 to 60"):
            solved(fine, method)


@pytest.mark.parametrize("coarse", ["one step", "two step", 2, [0, 6, 9, 12], shifted(0.4)])
def test_one_block_or_as_many_iterations_as_blocks_is_the_chain(coarse: Choice) -> None:
    for table in (TABLES["ddpm"], TABLES["dpmpp_2m"]):
        wanted = solved(table, sequential()).sample
        assert gap(solved(table, srds([0, 6, 12], coarse, iterations=2)).sample, wanted) < EXACT
        assert gap(solved(table, srds([0, 12], coarse, iterations=1)).sample, wanted) < EXACT
