# SPDX-License-Identifier: Apache-2.0
"""SRDS's wavefront: its rounds, rows and memory are those of the dependency graph, and its sample is the sequential chain's."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from problems import EXACT, SHAPE, STEPS, TABLES, chain, chains, gap, host_reads, network
from simulation import simulate
from torch import Tensor

from paradiff import Evaluator, Keyed, Recorded, Schedule, Solution, Table, sample, sequential, solve, srds
from paradiff.methods import PararealMethod
from paradiff.methods.parareal.options import Ordering as Order
from paradiff.methods.parareal.options import StopRule
from paradiff.methods.parareal.pool import StatePool
from paradiff.methods.parareal.solver import PararealSetup, PararealSolver
from paradiff.samplers import ddim, dpmpp_2m
from paradiff.solver import Batch, Denoiser, PararealRecord, drive

each_table = pytest.mark.parametrize("name", TABLES)
ONE_STEP = [name for name in TABLES if TABLES[name].band == 1]


@functools.cache
def long_table(steps: int) -> Table:
    return ddim(Schedule.linear(max(1000, 2 * steps)), steps)


ORDERS: tuple[Order, ...] = ("pipelined", "batched")


def run(
    table: Table,
    method: PararealMethod,
    denoiser: Denoiser = network,
    samples: int = 1,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Solution:
    """A run in float64 on keyed noise."""
    return sample(denoiser, table, Keyed(SHAPE, 0, samples), method, start=start, dtype=dtype)


def waves(found: Solution, k: int = 0) -> list[PararealRecord]:
    """The rounds of sample k, in order."""
    return [w for w in found.history if isinstance(w, PararealRecord) and w.sample == k]


def rows_of(found: Solution) -> list[list[tuple[int, int]]]:
    """Block and iteration of every row of sample 0, sorted in each round."""
    return [sorted(w.rows) for w in waves(found)]


def lengths_of(method: PararealMethod, table: Table) -> list[int]:
    return [right - left for left, right in pairwise(method.edges(table))]


def edge_values(table: Table, method: PararealMethod, denoiser: Denoiser = network) -> dict[tuple[int, int], Tensor]:
    """Every value that sample 0's edges are given, by (edge, iteration), from a run stepped by hand."""
    setup = PararealSetup(table, method, torch.device("cpu"), torch.float64)
    front, values = PararealSolver(setup, Keyed(SHAPE), 0, None), {}
    while not front.done:
        query = front.ask()
        norms = front.tell(query, denoiser(query.rows, setup.t[query.nodes]))
        for made in front.updates:
            values[made.run.block, made.run.level] = front.runs.pool.states[made.run.start, 0].clone()
        front.advance(norms.tolist(), front.rounds + 1)
    return values


# Rounds and rows.


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize(
    ("steps", "pipelined", "batched"),
    [
        (25, (9, 13, 17), (15, 25, 35)),
        (100, (19, 28, 37), (30, 50, 70)),
        (1024, (63, 94, 125), (96, 160, 224)),
    ],
)
def test_rounds_and_widest_batch_are_the_closed_forms(
    steps: int, pipelined: tuple[int, ...], batched: tuple[int, ...], iterations: int
) -> None:
    table, blocks = long_table(steps), round(steps**0.5)
    length = steps // blocks
    wanted = {"pipelined": iterations * (length - 1) + blocks, "batched": blocks + iterations * (length + blocks)}
    assert wanted == {"pipelined": pipelined[iterations - 1], "batched": batched[iterations - 1]}
    for ordering in ORDERS:
        found = run(table, srds(blocks, ordering=ordering, iterations=iterations))
        assert found.rounds == wanted[ordering]
        # Blocks are as long as there are blocks, so that from one iteration on all of them run at once, and never more.
        assert max(len(w.rows) for w in waves(found)) == blocks
        if ordering == "batched":
            assert found.evaluations == blocks + iterations * (steps + blocks)


@pytest.mark.parametrize("blocks", [4, 6, 12])
@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
def test_short_chains_of_many_blocks_have_the_rows_of_their_overlapping_waves(blocks: int, iterations: int) -> None:
    # An iteration spans S = 4 blocks and begins in the block in which the one before it ends; the last spans a single one.
    found = run(long_table(4 * blocks), srds(blocks, iterations=iterations))
    assert found.rounds == 3 * iterations + blocks
    assert max(len(w.rows) for w in waves(found)) == min(blocks, 4 * iterations + 1)


@pytest.mark.parametrize("ordering", ORDERS)
def test_no_iteration_is_the_coarse_sweep_alone(ordering: Order) -> None:
    found = run(long_table(20), srds(5, ordering=ordering, iterations=0))
    assert (found.rounds, found.evaluations) == (5, 5)


def cases(seed: int, count: int) -> list[tuple[list[int], int, int, int | None]]:
    """Random lengths from 1 on, iterations, coarse steps and row bounds."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        blocks, coarse = draw.randint(1, 6), draw.choice([1, 1, 1, 2, 3])
        bound = draw.choice([None, *range(1, blocks + 1)])
        least = draw.choice([1, 1, 2, 4])
        lengths = [least + draw.choice([0, 0, 1, 2, 4]) for _ in range(blocks)]
        found.append((lengths, draw.randint(0, blocks), coarse, bound))
    return found


def assert_rows_are_simulated(lengths: list[int], iterations: int, coarse: int, bound: int | None) -> None:
    edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    found = run(long_table(edges[-1]), srds(edges, coarse, iterations=iterations, rows=bound))
    wanted = simulate(lengths, iterations, coarse, bound)
    assert rows_of(found) == wanted, f"lengths {lengths}, {iterations} iterations, coarse {coarse}, at most {bound} rows"
    assert found.rounds == len(wanted)
    assert found.evaluations == sum(len(rows) for rows in wanted)


@pytest.mark.parametrize("bound", [None, *range(1, 6)])
def test_no_row_is_wasted_in_equal_blocks(bound: int | None) -> None:
    for iterations in (0, 1, 2, 5):
        assert_rows_are_simulated([5] * 5, iterations, 1, bound)


@pytest.mark.parametrize("part", range(4))
def test_no_row_is_wasted_in_blocks_of_any_length(part: int) -> None:
    for case in cases(part, 20):
        assert_rows_are_simulated(*case)


@pytest.mark.parametrize("lengths", [[1] * 6, [1, 4, 4, 4], [4, 1, 4, 1, 4], [2] * 5, [4, 4, 1, 1, 1], [2, 3], [1]], ids=str)
def test_no_row_is_wasted_in_blocks_of_one_or_two_steps(lengths: list[int]) -> None:
    blocks = len(lengths)
    for iterations in range(blocks + 1):
        for bound in (None, 1, 2, blocks):
            assert_rows_are_simulated(lengths, iterations, 1, bound)
        assert_rows_are_simulated(lengths, iterations, 2, None)


def test_batched_rows_are_sweeps_with_barriers() -> None:
    for lengths in ([4] * 4, [2, 5, 1]):
        edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        for iterations in range(len(lengths) + 1):
            for coarse in (1, 2):
                found = run(long_table(edges[-1]), srds(edges, coarse, "batched", iterations=iterations))
                assert rows_of(found) == simulate(lengths, iterations, coarse, ordering="batched")


@pytest.mark.parametrize("blocks", [2, 3, 4, 6])
def test_with_one_row_a_round_there_are_as_many_rounds_as_rows(blocks: int) -> None:
    found = run(long_table(24), srds(blocks, iterations=2, rows=1))
    assert found.rounds == found.evaluations
    assert max(len(w.rows) for w in waves(found)) == 1


def evaluated(table: Table, method: PararealMethod) -> Counter[tuple[int, bytes]]:
    """How often every state was evaluated at every node."""
    seen: Counter[tuple[int, bytes]] = Counter()

    def outputs(batch: Batch) -> Tensor:
        seen.update((node, x.numpy().tobytes()) for node, x in zip(batch.nodes.tolist(), batch.x, strict=True))
        return network(batch.x, batch.t)

    drive(solve(table, Keyed(SHAPE), method, dtype=torch.float64), outputs, check="off")
    return seen


@pytest.mark.parametrize("name", ONE_STEP)
def test_no_state_at_the_start_of_a_block_is_evaluated_twice(name: str) -> None:
    table = TABLES[name]
    for blocks, iterations in ((3, 1), (4, 2)):
        edges = srds(blocks).edges(table)
        counts = [
            {n: c for (n, _), c in evaluated(table, srds(blocks, ordering=s, iterations=iterations)).items() if n in edges}
            for s in ORDERS
        ]
        assert max(counts[0].values()) == 1
        assert max(counts[1].values()) > 1, "the batched ordering shares nothing, so nothing was shown"


# The sample.


@each_table
def test_as_many_iterations_as_blocks_reach_the_chain_in_no_more_rounds_than_steps(name: str) -> None:
    table = TABLES[name]
    wanted = chain(network, table, Keyed(SHAPE))[-1]
    for blocks in (1, 4, 5, table.steps):
        found = run(table, srds(blocks, iterations=blocks))
        assert gap(found.sample[0], wanted) < EXACT, f"{blocks} blocks"
        assert found.rounds <= table.steps
        if table.steps % blocks == 0 and table.restarts == list(range(table.steps + 1)):
            assert found.rounds == table.steps
        assert found.message == "exact: every node was reached by the chain's own steps"
        assert (found.estimated_error, found.residual) == (0, 0)
        if blocks <= 4:
            batched = run(table, srds(blocks, ordering="batched", iterations=blocks))
            assert gap(batched.sample[0], wanted) < EXACT, f"{blocks} blocks"


@each_table
@pytest.mark.parametrize("blocks", [5, STEPS])
def test_the_exact_sample_has_the_bits_of_the_sequential_one(name: str, blocks: int) -> None:
    # One row a network call: a batch of another size may round single entries differently.
    table, blocks = TABLES[name], min(blocks, TABLES[name].steps)
    alone = [
        sample(Evaluator(network, max_rows=1), table, Keyed(SHAPE), method, dtype=torch.float64).sample
        for method in (sequential(), srds(blocks, iterations=blocks))
    ]
    assert torch.equal(*alone)


@each_table
def test_both_orderings_give_the_same_sample_after_every_number_of_iterations(name: str) -> None:
    table = TABLES[name]
    # Blocks of one or two steps are among them, whose first edges are exact before the coarse sweep has passed the next ones.
    short = [0, 1, 5, 6, 9, table.steps]
    for blocks, numbers in ((1, [1]), (4, [0, 2, 4]), (6, [3]), (table.steps, [2]), (short, [1, 3])):
        for iterations in numbers:
            pair = [run(table, srds(blocks, ordering=s, iterations=iterations)).sample for s in ORDERS]
            assert gap(*pair) < EXACT, f"{blocks} blocks, {iterations} iterations"


@each_table
@pytest.mark.parametrize("ordering", ORDERS)
def test_after_p_iterations_the_first_p_edges_are_exact(name: str, ordering: Order) -> None:
    table = TABLES[name]
    method = srds(4, ordering=ordering, iterations=4)
    edges, states = method.edges(table), chain(network, table, Keyed(SHAPE))
    values = edge_values(table, method)
    assert {(n, n) for n in range(1, 5)} <= set(values)
    for (n, p), value in values.items():
        if p >= n:
            assert gap(value, states[edges[n]]) < EXACT, f"edge {n} after {p} iterations"
    # The first guess of the last edge is far from it: ten orders above rounding.
    assert gap(values[4, 0], states[edges[4]]) > 1e-4


@each_table
@pytest.mark.parametrize("rule", ["error", "change"])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_every_window_reaches_the_chain_at_a_tight_tolerance(name: str, rule: StopRule, window: int) -> None:
    table = TABLES[name]
    found = run(table, srds(4, window=window, rule=rule, tolerance=1e-9))
    # What is left after the tolerance's 1e-9 has been met, in single entries of six and in units of up to 1e2 (sigma).
    assert gap(found.sample[0], chain(network, table, Keyed(SHAPE))[-1]) < 1e-7
    if window == 1:
        assert found.rounds == found.evaluations == table.steps
        assert gap(found.sample[0], chain(network, table, Keyed(SHAPE))[-1]) < EXACT
    blocks = [{block for block, _ in w.rows} for w in waves(found)]
    assert max(max(b) - min(b) for b in blocks) < window


@pytest.mark.parametrize("name", ["ddpm", "ddim eta", "euler_ancestral"])
@pytest.mark.parametrize("blocks", [3, 5])
def test_recorded_draws_give_the_chain_of_these_draws(name: str, blocks: int) -> None:
    table, noise = TABLES[name], Recorded(SHAPE, torch.Generator().manual_seed(11), 2)
    wanted = chains(network, table, noise)
    for iterations in (None, blocks):
        method = srds(blocks, iterations=iterations, tolerance=1e-9)
        found = sample(network, table, noise, method, dtype=torch.float64)
        assert gap(found.sample, wanted) < 1e-8  # Tolerance 1e-9 in the root mean square of six entries.
    assert gap(chains(network, table, Keyed(SHAPE, 0, 2)), wanted) > 1e-2  # Other draws make another chain.


@pytest.mark.parametrize("blocks", [2, 3, 4, [0, 3, 6, 12, 16], 16])
def test_a_multistep_history_travels_with_the_edge_and_restarts_refer_to_the_restarted_chain(blocks: int | list[int]) -> None:
    method = srds(blocks)
    plain = dpmpp_2m(Schedule.linear(), 16)
    count = len(method.edges(plain)) - 1
    again = dpmpp_2m(Schedule.linear(), 16, restarts=method.edges(plain)[1:-1])
    references = [chain(network, table, Keyed(SHAPE))[-1] for table in (plain, again)]
    for table, wanted in zip((plain, again), references, strict=True):
        assert gap(run(table, srds(method.edges(plain), iterations=count)).sample[0], wanted) < EXACT
        assert gap(run(table, srds(blocks, tolerance=1e-10)).sample[0], wanted) < 1e-8
    assert gap(*references) > 1e-4  # The restarts make another chain, ten orders above rounding.


# Memory and speculation.


def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[Table, PararealMethod], tuple[int, int]]:
    """A function that runs a method and returns the most states that were held at once, and the size of the pool."""
    most: Counter[str] = Counter()
    take = StatePool.take

    def counted(pool: StatePool) -> int:
        slot = take(pool)
        most["held"] = max(most["held"], len(pool.states) - len(pool.free))
        most["pool"] = max(most["pool"], len(pool.states))
        return slot

    def measure(table: Table, method: PararealMethod) -> tuple[int, int]:
        most.clear()
        run(table, method)
        return most["held"], most["pool"]

    monkeypatch.setattr(StatePool, "take", counted)
    return measure


@pytest.mark.parametrize("window", [1, 2, 6])
@pytest.mark.parametrize("rule", ["error", "change"])
def test_memory_is_of_the_size_of_the_window(window: int, rule: StopRule, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = held(monkeypatch)
    found = [measure(long_table(4 * blocks), srds(blocks, window=window, rule=rule, tolerance=1e-6)) for blocks in (12, 36)]
    # A block of the window runs two solves of three states each (start, running state, coarse end) while iterations overlap,
    # and a third one now and then.
    assert max(states for states, _ in found) <= 8 * window, found
    assert max(pool for _, pool in found) <= 8 * window + 4, found


@pytest.mark.parametrize("blocks", [4, 8, 16])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_without_a_window_three_states_a_block_are_held(blocks: int, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states, pool = held(monkeypatch)(long_table(4 * blocks), srds(blocks, iterations=iterations))
    # Start, running state and coarse end; where iterations meet, a new start is made before the old one is given back.
    assert states <= 3 * blocks + 4
    assert pool == 4 * blocks + 2


@pytest.mark.parametrize("method", [srds(4), srds(4, window=2), srds(4, rows=2), srds(4, rule="change"), srds(4, iterations=3)])
@each_table
def test_blocks_before_a_settled_edge_have_no_rows(name: str, method: PararealMethod) -> None:
    found = run(TABLES[name], method, samples=2)
    for k in range(2):
        settled = 0
        for wave in waves(found, k):
            assert wave.passed >= 0
            assert min(block for block, _ in wave.rows) >= settled
            settled += wave.passed
        assert settled == 4
        assert sum(len(w.rows) for w in waves(found, k)) == found.error_estimates[k].evaluations
        assert len(waves(found, k)) == found.error_estimates[k].rounds


def quick_and_slow(x: Tensor, t: Tensor, quiet: Tensor) -> Tensor:
    """A network that is constant for some samples, which so converge at once."""
    return torch.where(quiet.view(-1, 1, 1), 0.1, network(5 * x, t))


def test_speculation_stops_when_the_answer_of_a_sample_is_known() -> None:
    table, quiet = long_table(48), torch.tensor([False, True])
    batches: list[Batch] = []

    def outputs(batch: Batch) -> Tensor:
        batches.append(batch)
        return quick_and_slow(batch.x, batch.t, quiet[batch.samples])

    found = drive(solve(table, Keyed(SHAPE, samples=2), srds(8), dtype=torch.float64), outputs, check="off")
    slow, quick = found.error_estimates
    # A constant network makes the coarse step exact, and one iteration shows it.
    assert quick.rounds <= 2 * 5 + 8
    assert quick.rounds < slow.rounds == found.rounds == len(batches)
    for number, batch in enumerate(batches, start=1):
        assert (1 in batch.samples) == (number <= quick.rounds)
        assert len(batch.nodes) > 0
    final = {w.sample: w for w in found.history}
    for k, error_estimate in enumerate(found.error_estimates):
        assert final[k].round == error_estimate.rounds
        assert final[k].values[-1][0] == 8, "the last round of a sample makes its answer"
    assert gap(found.sample, torch.stack([w.final for w in _alone(table, quiet)])) < EXACT


def _alone(table: Table, quiet: Tensor) -> list[PararealSolver]:
    """Both samples, each stepped by hand."""
    setup, fronts = PararealSetup(table, srds(8), torch.device("cpu"), torch.float64), []
    for k in range(2):
        front = PararealSolver(setup, Keyed(SHAPE, samples=2), k, None)
        while not front.done:
            query = front.ask()
            norms = front.tell(query, quick_and_slow(query.rows, setup.t[query.nodes], quiet[[k] * len(query.nodes)]))
            front.advance(norms.tolist(), front.rounds)
        fronts.append(front)
    return fronts


# The generator's protocol.


def paired(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    """A network with conditioning: one number a sample."""
    return network(x + shift.view(-1, 1, 1).to(x.dtype), t)


SHIFTS = torch.tensor([0.0, 1.0, -0.7], dtype=torch.float64)
LOOSE = {
    "pipelined": srds(4),
    "batched": srds(4, ordering="batched"),
    "window": srds(4, window=2),
    "change": srds(4, rule="change"),
    "sample": srds(4, rule="sample"),
    "rows": srds(4, rows=3),
    "forced": srds(4, iterations=2),
    "two step": srds(4, "two step"),
}


@pytest.mark.parametrize("name", ["ddpm thresholded", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("method", LOOSE)
def test_a_sample_does_not_depend_on_chunks_or_on_its_neighbours(name: str, method: str) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, [5, 6, 7])

    def solved(noise: Keyed, shifts: Tensor, rows: int | None) -> Solution:
        evaluator = Evaluator(paired, conditioning={"shift": shifts}, max_rows=rows)
        return sample(evaluator, table, noise, LOOSE[method], dtype=torch.float64)

    together = solved(noise, SHIFTS, None)
    # The tolerance is loose, so that the same iterations must be made and the same edges settled; a network of single entries
    # may round differently in other places of a batch, by 1e-16 an entry.
    chunked = solved(noise, SHIFTS, 2)
    assert gap(chunked.sample, together.sample) < EXACT
    assert chunked.rounds == together.rounds
    for k, seed in ((0, 5), (2, 7)):
        alone = solved(Keyed(SHAPE, [seed]), SHIFTS[k : k + 1], None)
        assert gap(alone.sample[0], together.sample[k]) < EXACT
        assert (alone.rounds, alone.evaluations) == (
            together.error_estimates[k].rounds,
            together.error_estimates[k].evaluations,
        )


@each_table
def test_the_row_bound_does_not_change_the_sample_of_forced_iterations(name: str) -> None:
    table = TABLES[name]
    free = run(table, srds(4, iterations=2))
    for rows in (1, 3):
        bound = run(table, srds(4, iterations=2, rows=rows))
        assert gap(bound.sample, free.sample) < EXACT
        assert max(len(w.rows) for w in waves(bound)) <= rows
        assert bound.rounds >= free.rounds


def test_the_solver_is_a_generator_that_evaluates_nothing() -> None:
    table, method = TABLES["ddpm"], srds(4, iterations=4)
    solver = solve(table, Keyed(SHAPE, samples=2), method, dtype=torch.float64)
    batch = next(solver)
    assert batch.x.shape == (2, *SHAPE)  # Only the first block's start is known.
    assert batch.nodes.tolist() == [0, 0]
    assert batch.samples.tolist() == [0, 1]
    assert batch.t.dtype == torch.int64  # DDPM's times are whole.
    batch = solver.send(network(batch.x, batch.t))
    assert batch.samples.tolist() == [0, 0, 1, 1]
    assert sorted(batch.nodes[:2].tolist()) == [1, 3]  # Its second fine step, and the second block's first.
    solver.close()

    def outputs(batch: Batch) -> Tensor:
        assert torch.equal(batch.t, table.t[batch.nodes].long())
        return network(batch.x, batch.t)

    found = drive(solve(table, Keyed(SHAPE, samples=2), method, dtype=torch.float64), outputs, check="off")
    assert gap(found.sample, chains(network, table, Keyed(SHAPE, 0, 2))) < EXACT


@each_table
def test_a_given_start_takes_the_place_of_the_noise(name: str) -> None:
    table = TABLES[name]
    start = torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, *SHAPE)
    found = run(table, srds(4, iterations=4), samples=2, start=start)
    for k in range(2):
        assert gap(found.sample[k], chain(network, table, Keyed(SHAPE, 0, 2), k, start[k])[-1]) < EXACT


@each_table
@pytest.mark.parametrize("ordering", ORDERS)
def test_float32_states_reach_the_sample_to_float32_accuracy(name: str, ordering: Order) -> None:
    found = run(TABLES[name], srds(4, ordering=ordering, iterations=4), samples=2, dtype=torch.float32)
    assert found.sample.dtype == torch.float32
    # 12 steps with coefficients up to 30 on roundings of 6e-8.
    assert gap(found.sample, chains(network, TABLES[name], Keyed(SHAPE, 0, 2))) < 1e-4


@pytest.mark.parametrize("method", LOOSE)
@pytest.mark.parametrize("name", ["ddpm thresholded", "dpmpp_2m", "heun"])
def test_the_host_reads_the_states_at_most_once_a_round(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = host_reads(monkeypatch)
    found = run(TABLES[name], LOOSE[method], samples=2, dtype=torch.float32)
    assert set(+reads) == {"tolist", "__float__"}
    assert reads["__float__"] <= len(found.error_estimates)  # the size of each sample, once it is there
    assert reads["tolist"] <= found.rounds


# What is not finite.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
@pytest.mark.parametrize("method", [srds(4, iterations=4), srds(4), srds(4, window=3), srds(4, rows=2)])
def test_states_off_the_chain_that_fail_do_not_hurt_the_exact_chain(bad: float, method: PararealMethod) -> None:
    table, failed = long_table(16), []
    states = chain(network, table, Keyed(SHAPE))
    limit = float(states.abs().max()) * (1 + 1e-9)

    def fails(x: Tensor, t: Tensor) -> Tensor:
        hit = x.abs().amax((1, 2), keepdim=True) > limit
        failed.append(bool(hit.any()))
        return torch.where(hit, bad, network(x, t))

    found = run(table, method, fails)
    assert any(failed), "every state was on the chain's side of the limit, so nothing was shown"
    # By the rule the error is at most the tolerance, root mean square; a single entry of six may hold all of it.
    assert gap(found.sample[0], states[-1]) < (method.tolerance * 6**0.5 if method.iterations is None else EXACT)


def broken(table: Table, node: int, bad: float) -> Evaluator:
    """A network that fails at one node of sample 1."""

    def fails(x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        hit = (t.double() == table.t[node]) & (k == 1)
        return torch.where(hit.view(-1, 1, 1), bad, network(x, t))

    return Evaluator(fails, conditioning={"k": torch.arange(3)})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("method", [srds(4, iterations=4), srds(4), srds(4, window=2), srds(4, rows=1), srds(1)])
def test_an_output_that_is_not_finite_on_the_chain_is_named(name: str, bad: float, method: PararealMethod) -> None:
    table, node = TABLES[name], 5
    # The block that holds the node; heun's nodes 5 and 6 share their time, and both are hit.
    first = max(edge for edge in method.edges(table) if edge <= node)
    message = rf"sample 1 is not finite after the block from node {first} \(time {float(table.t[first]):g}\), .* the model"
    with pytest.raises(ValueError, match=message):
        sample(broken(table, node, bad), table, Keyed(SHAPE, samples=3), method, dtype=torch.float64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "method",
    [srds(4, ordering="batched", iterations=4), srds(4, ordering="batched"), srds(4, iterations=1), srds(4, iterations=0)],
)
def test_no_sample_that_is_not_finite_is_returned(method: PararealMethod, bad: float) -> None:
    # Here nothing, or nothing that the coarse sweep has not spoilt, is walked by the chain's own steps, so no block is named.
    table = TABLES["ddpm"]
    node = 0 if method.iterations == 0 else 5
    count = r"\d" if method.iterations is None else method.iterations
    with pytest.raises(ValueError, match=rf"sample 1 is not finite after {count} iterations: the model returned NaN"):
        sample(broken(table, node, bad), table, Keyed(SHAPE, samples=3), method, dtype=torch.float64)
