# SPDX-License-Identifier: Apache-2.0
"""Secants: the correction is the documented model's, sweep by sweep, it never costs exactness, and it saves rounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import EXACT, SHAPE, SLOPES, TABLES, Stacked, arbitrary, chain, gap, network, run, sweep, window_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import paradiff.methods.window.solver
import paradiff.methods.window.update
from paradiff import Evaluator, Keyed, Schedule, Table, parasolver, quasi_newton, sample, solve
from paradiff.chain.slope import resolve, shifted
from paradiff.methods import WindowMethod
from paradiff.methods.secant import DAMPING, LastPair, Reach, Secants, Symmetry
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.solver import WindowSolver
from paradiff.methods.window.update import SecantUpdate
from paradiff.samplers import ddim, dpmpp_2m
from paradiff.solver import drive
from paradiff.solver.solution import Status

FINE = 2.0**-52
NEAR = 0.4  # damping of the pairs of nodes before
SLOPE = shifted(0.25)  # the one that quasi_newton corrects by default


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["ddpm", "ddim clipped", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("neighbours", [1, 3, 64])
def test_pairs_of_neighbours_cost_no_exactness(name: str, neighbours: int) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, seed=2)
    found = sample(network, table, noise, quasi_newton(window=6, tolerance=0.0, neighbours=neighbours), dtype=torch.float64)
    assert gap(found.sample[0], chain(network, table, noise)[-1]) < EXACT


def test_pairs_of_neighbours_are_those_of_the_nodes_before() -> None:
    states = [random(5, 6, seed=k) for k in range(2)]
    outputs = [random(5, 6, seed=10 + k) for k in range(2)]
    secants = Secants(1, FINE, False, neighbours=2)
    for x, m in zip(states, outputs, strict=True):
        secants.observe(x, m)
    dx, dm = secants._pairs_of(1, 3)
    for kept, values in ((dx, states[1] - states[0]), (dm, outputs[1] - outputs[0])):
        assert torch.equal(kept[:, 0, 0], values[1:4])
        assert torch.equal(kept[:, 1, 0], values[0:3])
        assert torch.equal(kept[1:, 2, 0], values[0:2])
        assert not kept[0, 2].any()


def modelled(dx: list[Tensor], dm: list[Tensor], d: Tensor, near: int = 0) -> tuple[Tensor, Tensor]:
    """DX y and DM y of methods/secant.py at one node, flat states `[d]`, from its pairs that are not zero, the last `near` of
    which are those of nodes before."""
    own = len(dx) - near
    pairs = [(k, x, m) for k, (x, m) in enumerate(zip(dx, dm, strict=True)) if bool(x.any())]
    if not pairs:
        return torch.zeros_like(d), torch.zeros_like(d)
    columns, answers = (torch.stack([pair[place] for pair in pairs], dim=1) for place in (1, 2))
    damping = torch.tensor([DAMPING if k < own else NEAR for k, _, _ in pairs], dtype=d.dtype)
    gram = columns.T @ columns
    y = torch.linalg.solve(gram + torch.diag(damping * torch.diag(gram)), columns.T @ d)
    return columns @ y, answers @ y


def looped(r: Tensor, a: Tensor, b: Tensor, s: Tensor, dx: Tensor, dm: Tensor, near: int = 0) -> Tensor:
    """Changes `[W, d]` of the nodes after the first, one by one: a step with outputs that change by equation (1).

    Args:
        r: `[W, d]` residuals.
        a: `[W, P]` the step's coefficients of states.
        b: `[W, P]` of outputs.
        s: `[W]` slopes of the outputs.
        dx: `[W, k, d]` pairs.
        dm: `[W, k, d]` pairs.
        near: How many of the k, the last ones, are those of nodes before.
    """
    d, m = [torch.zeros_like(r[0])], []
    for n in range(len(r)):
        along, answer = modelled(list(dx[n]), list(dm[n]), d[n], near)
        m.append(s[n] * d[n] + answer - s[n] * along)
        d.append(r[n] + sum(a[n, j] * d[n - j] + b[n, j] * m[n - j] for j in range(min(a.shape[1], n + 1))))
    return torch.stack(d[1:])


@pytest.mark.parametrize("band", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("none", [False, True], ids=["all pairs", "some pairs zero"])
@pytest.mark.parametrize("neighbours", [0, 2])
def test_the_correction_is_that_of_a_plain_loop_over_nodes(
    band: int, k: int, members: int, none: bool, neighbours: int
) -> None:
    width, size = 7, 5
    a, b = 0.5 * random(width, band, seed=1), 0.5 * random(width, band, seed=2)
    s, r = random(width, seed=3), random(width, members, size, seed=4)
    states, outputs = (random(k + 1, width, members, size, seed=seed).cumsum(0) for seed in (5, 6))
    if none:
        states[1:, 2] = states[0, 2]  # a node that never moves
        states[1:, 4] = torch.where(torch.arange(members)[:, None] == 0, states[:1, 4], states[1:, 4])  # one member's
        states[2:, 5] = states[1, 5]  # and one that moves once
    secants = Secants(k, FINE, members > 1, neighbours=neighbours, damping=NEAR)
    for x, m in zip(states, outputs, strict=True):
        secants.observe(*((x, m) if members > 1 else (x[:, 0], m[:, 0])))

    slope, state, output = (torch.zeros(width, width, dtype=torch.float64) for _ in range(3))
    for n in range(width):
        for j in range(min(band, n + 1)):
            state[n, n - j], output[n, n - j] = a[n, j], b[n, j]
            if n > j:
                slope[n, n - j - 1] = a[n, j] + b[n, j] * s[n - j]
            state[n, n - j] -= a[n, j] + b[n, j] * s[n - j]
    carry = torch.linalg.inv(torch.eye(width, dtype=torch.float64) - slope)
    change = (carry @ r.flatten(1)).view_as(r)
    found = change + secants.correction(change if members > 1 else change[:, 0], [Reach(carry @ state, carry @ output)])[
        0
    ].view_as(change)

    dx, dm = (v.diff(dim=0).flip(0) for v in (states, outputs))  # the newest first, [k, W, b, d]
    back = range(1, neighbours + 1)
    dx, dm = (torch.cat([v, *(torch.cat([0 * v[:, :j], v[:, : width - j]], 1) for j in back)]) for v in (dx, dm))
    for i in range(members):
        expected = looped(r[:, i], a, b, s, dx[:, :, i].transpose(0, 1), dm[:, :, i].transpose(0, 1), neighbours * k)
        # Triangular systems of 21 unknowns in float64; changes reach 1e3 or so, and the difference is beside the largest.
        assert gap(found[:, i], expected) < 1e-10
    assert gap(found, change) > 0.1  # the pairs matter


@pytest.mark.parametrize("name", ["ddim", "ddim eta", "ddim clipped", "heun", "dpmpp_2m", "flow_euler"])
@pytest.mark.parametrize(("slope", "stretch"), [("shifted", 8), ("arbitrary", 8), ("shifted", 3), ("arbitrary", 1)])
def test_sweeps_of_a_sliding_window_are_those_of_the_documented_equations(
    name: str, slope: str, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paradiff.methods.window.update, "PAIRED", stretch)  # the same, however the window is cut
    table, noise, k = TABLES[name], Keyed(SHAPE), 2
    g = resolve(SLOPES[slope], table)
    window = window_of(table, quasi_newton(8, tolerance=0.0, secants=k, slope=SLOPES[slope]), noise)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    outputs: dict[int, Tensor] = {}
    settled = {0: window.final.clone()}
    for count in range(1, 5):
        lo, hi, h = window.lo, window.hi, window.setup.history
        old = settled | {lo + i: window.x[h + i].clone() for i in range(hi - lo + 1)}
        for n in range(lo, hi):
            x = old[n][None]
            m = table.convert(torch.tensor([n]), x, network(table.scale[n] * x, table.t[n : n + 1]))[0]
            outputs[n] = m
            seen.setdefault(n, []).append((old[n].flatten(), m.flatten()))
        d = {n: torch.zeros(math.prod(SHAPE), dtype=torch.float64) for n in range(lo + 1)}
        beyond: dict[int, tuple[Tensor, Tensor]] = {}
        for n in range(lo, hi):
            pairs = [(x - w, m - v) for (w, v), (x, m) in zip(seen[n], seen[n][1:], strict=False)][-k:]
            dx, dm = [p[0] for p in pairs], [p[1] for p in pairs]
            beyond[n] = modelled(dx, dm, d[n])
            phi = table.c[n] * noise.draw(0, range(n, n + 1))[0].double()
            new = torch.zeros_like(d[n])
            for j in range(min(table.band, n + 1)):
                phi = phi + table.a[n, j] * old[n - j] + table.b[n, j] * outputs[n - j]
                new = new + g[n, j] * d[n - j]
                if n - j in beyond:
                    along, answer = beyond[n - j]
                    new = new + (table.a[n, j] - g[n, j]) * along + table.b[n, j] * answer
            d[n + 1] = new + (phi - old[n + 1]).flatten()
        norms = sweep(window)
        for n in range(lo, hi):
            # As EXACT of problems.py, times the condition of pairs that point the same way, up to 1/DAMPING.
            assert gap(window.x[h + n + 1 - lo].flatten(), old[n + 1].flatten() + d[n + 1]) < 1e-9, (count, n)
        settled |= {n: window.x[h + n - lo].clone() for n in range(lo, hi + 1)}
        window.advance(norms, count)
        assert window.lo == lo + 1  # one node a sweep at tolerance 0, unless a change is 0 exactly


def affine(table: Table, size: int, rank: int, strength: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A network whose clean-data estimate is the slope's own, plus a matrix of low rank that differs from node to node."""
    steps = table.steps
    u, v = random(steps, size, rank, seed=1) / size**0.5, random(1, size, rank, seed=2) / size**0.5
    matrix = strength * u @ v.mT
    shift = random(steps, size, seed=3)
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    g = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)

    def network(x: Tensor, t: Tensor) -> Tensor:
        i = (table.t[None] - t[:, None]).abs().argmin(1)
        x = x / table.scale[i, None]
        clean = g[i, None] * x + shift[i] + (matrix[i] @ x[:, :, None])[:, :, 0]
        return (clean - table.p[i, None] * x) / table.q[i, None]

    return network


@pytest.mark.parametrize(("size", "rank", "strength", "most"), [(1, 1, 8.0, 7), (1, 2, 8.0, 7), (16, 1, 16.0, 14)])
def test_affine_networks_of_low_rank_beyond_the_slope_need_few_rounds(size: int, rank: int, strength: float, most: int) -> None:
    """A state of one number is known after two sweeps, but for the damping; in more dimensions the pairs have to find v."""
    table = ddim(Schedule.linear(), 40)
    denoiser, noise = affine(table, size, rank, strength), Keyed((size,))
    wanted = chain(denoiser, table, noise)[-1]
    plain, found = (
        sample(denoiser, table, noise, method, dtype=torch.float64)
        for method in (parasolver(tolerance=1e-6, slope=SLOPE), quasi_newton(tolerance=1e-6))
    )
    assert gap(plain.sample[0], wanted) < 1e-6  # the tolerance, which the estimate keeps far from
    assert gap(found.sample[0], wanted) < 1e-6
    assert found.rounds <= most
    assert plain.rounds >= 1.4 * found.rounds


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("slope", ["zero", "shifted", "arbitrary"])
def test_after_k_sweeps_the_first_k_nodes_are_exact(name: str, slope: str) -> None:
    table = TABLES[name]
    window = window_of(table, quasi_newton(tolerance=0.0, slope=SLOPES[slope]))
    wanted = chain(network, table, Keyed(SHAPE))
    for k in range(1, table.steps + 1):
        sweep(window)
        h = window.setup.history
        assert gap(window.x[h : h + k + 1], wanted[: k + 1]) < EXACT


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("width", "secants"), [(None, 3), (5, 1), (5, 3)])
def test_the_sample_is_the_sequential_one_at_tolerance_0(name: str, width: int | None, secants: int) -> None:
    table = TABLES[name]
    found = run(table, quasi_newton(width, 0.0, secants=secants), samples=2)
    for k in range(2):
        assert gap(found.sample[k], chain(network, table, Keyed(SHAPE, 0, 2), k)[-1]) < EXACT
    assert found.status is Status.EXACT
    assert found.rounds <= table.steps


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "flow_euler"])
def test_images_that_share_a_window_get_what_each_gets_alone(name: str) -> None:
    table, method = TABLES[name], quasi_newton(tolerance=0.0, slope=arbitrary)
    noise = Keyed(SHAPE, 0, 2)

    def swept(members: bool) -> list[Tensor]:
        setup = WindowSetup(table, method, torch.device("cpu"), torch.float64, members)
        shared = WindowSolver(setup, Stacked(noise), 0, None)
        states = []
        for _ in range(5):
            sweep(shared)
            states.append(shared.x.clone())
        return states

    together, mixed = swept(True), swept(False)
    for k in range(2):
        setup = WindowSetup(table, method, torch.device("cpu"), torch.float64)
        alone = WindowSolver(setup, noise, k, None)
        for states in together:
            sweep(alone)
            # Products of other sizes are summed in other orders; five sweeps enlarge 1e-16 by the condition of the pairs.
            assert gap(states[:, k], alone.x) < 1e-9
    assert gap(mixed[4], together[4]) > 1e-6  # one set of pairs for both would have given something else


@pytest.mark.parametrize(("strength", "tolerance"), [(2.0, 4e-4), (5.0, 3e-4), (10.0, 1.5e-4)])
def test_a_stiff_network_takes_fewer_rounds_than_the_slope_alone_at_no_larger_error(strength: float, tolerance: float) -> None:
    table, size = ddim(Schedule.linear(), 40), 16
    mix = random(size, size, seed=2) / size**0.5

    def stiff(x: Tensor, t: Tensor) -> Tensor:
        i = (table.t[None] - t[:, None]).abs().argmin(1)
        return (torch.tanh(strength * x @ mix.T) - table.p[i, None] * x) / table.q[i, None]

    wanted = chain(stiff, table, Keyed((size,)))[-1]

    def solved(method: WindowMethod) -> tuple[int, float]:
        found = sample(stiff, table, Keyed((size,)), method, dtype=torch.float64)
        return found.rounds, float((found.sample[0] - wanted).square().mean().sqrt())

    rounds, error = solved(parasolver(tolerance=7.5e-3, slope=SLOPE))
    fewer, smaller = solved(quasi_newton(tolerance=tolerance))
    assert fewer < rounds
    assert smaller <= error < 4e-3  # the tolerance
    fewest, largest = solved(quasi_newton())
    assert fewest <= fewer
    assert largest < 4e-3


def test_iterates_that_repeat_exactly_leave_the_pairs_and_everything_finite() -> None:
    width, size = 4, 3
    first, second = random(2, width, size, seed=1), random(2, width, size, seed=2)
    lower = torch.tril(torch.ones(width, width, dtype=torch.float64))
    change = random(width, size, seed=3)
    still = Secants(2, FINE, False)
    for _ in range(4):
        still.observe(first[0], first[1])
    assert torch.equal(still.correction(change, [Reach(lower, lower)])[0], torch.zeros_like(change))
    moved = Secants(2, FINE, False)
    moved.observe(first[0], first[1])
    moved.observe(second[0], second[1])
    before = moved.correction(change, [Reach(lower, lower)])[0]
    assert before.abs().max() > 0.1
    for _ in range(3):
        moved.observe(second[0], second[1])
        assert torch.equal(moved.correction(change, [Reach(lower, lower)])[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_that_does_not_answer_to_its_state_is_solved_without_nan(dtype: torch.dtype) -> None:
    table = TABLES["ddim"]
    for tolerance in (0.0, 1e-3):
        found = run(table, quasi_newton(tolerance=tolerance), lambda x, t: torch.full_like(x, 0.3), dtype=dtype)
        wanted = chain(lambda x, t: torch.full_like(x, 0.3), table, Keyed(SHAPE))[-1]
        # Roundings of 12 steps, or the tolerance of states of size 100.
        assert gap(found.sample[0], wanted) < max(tolerance / 100, 1e-5 if dtype == torch.float32 else EXACT)
        assert all(math.isfinite(c) for s in found.history for c in s.change)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("kind", ["all", "last"])
def test_a_node_without_pairs_is_lent_those_of_the_last_node_that_has_some(kind: str) -> None:
    way, other = random(2, 1, 3, seed=1)
    answers = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0], dtype=torch.float64)  # of each node of the chain
    lower = torch.tril(torch.ones(3, 3, dtype=torch.float64))
    change = torch.zeros(3, 1, 3, dtype=torch.float64)

    def answered(lends: bool, first: Tensor) -> Tensor:
        """What is known of how nodes 2, 3 and 4 answer to a change of node 2: of the nodes before, only node 1 moved."""
        secants = LastPair(FINE, False, lends) if kind == "last" else Secants(2, FINE, False, lends=lends)
        states = random(5, 3, seed=4)
        for moved in (0.0, 1.0):
            now = states.clone()
            now[1] += moved * way[0]
            secants.observe(now[:3], answers[:3, None] * now[:3])
        secants.advance(2)
        secants.observe(states[2:], answers[2:, None] * states[2:])
        return secants.corrections(change + first, [Reach(0 * lower, 0 * lower)], begin=0, first=first[0])[2][:, 0]

    assert not answered(False, way[None]).any()
    assert gap(answered(True, way[None])[0], 3.0 * way[0]) < 0.05 * gap(3.0 * way[0], torch.zeros(3))
    across = other - way * (other @ way.T) / way.square().sum()
    assert answered(True, across[None]).abs().max() < EXACT


class Lendings(TorchDispatchMode):
    """Counts how often a window looks for the nodes whose pairs others are lent."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.cummax.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [quasi_newton(window=6, tolerance=1e-4), parasolver(window=6, tolerance=1e-4)])
def test_pairs_are_lent_once_a_sweep(method: WindowMethod) -> None:
    """Carried errors and what leaves the window both ask for them. In the window of a whole chain none are lent."""
    table, noise = ddim(Schedule.linear(), 40), Keyed(SHAPE, seed=1)
    with Lendings() as lendings:
        found = sample(network, table, noise, method, check="off")
    # The first sweep has no pairs yet, and the last one's need not be kept for another.
    assert found.rounds - 2 <= lendings.count <= found.rounds
    with Lendings() as lendings:
        sample(network, table, noise, dataclasses.replace(method, window=40), check="off")
    assert lendings.count == 0


def test_a_change_below_the_resolution_is_no_pair() -> None:
    states, change = random(4, 3, seed=1), random(4, 3, seed=3)
    lower = torch.tril(torch.ones(4, 4, dtype=torch.float64))

    def corrects(moved: float, resolution: float) -> bool:
        secants = Secants(1, resolution, False)
        secants.observe(states, states)
        secants.observe((1 + moved) * states, (1 + 3 * moved) * states)
        return bool(secants.correction(change, [Reach(lower, lower)])[0].any())

    for resolution in (FINE, torch.finfo(torch.float16).eps):  # a change has to be 64 times the resolution
        assert not corrects(60 * resolution, resolution)
        assert corrects(70 * resolution, resolution)


def test_the_resolution_of_the_networks_outputs_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    table, noise = ddim(Schedule.linear(), 30), Keyed(SHAPE)

    def solved(method: WindowMethod, resolution: float | None) -> list[Any]:
        solver = solve(table, noise, method, dtype=torch.float64, resolution=resolution)
        return [s.change for s in drive(solver, lambda batch: 2 * network(3 * batch.x, batch.t)).history]

    plain = solved(parasolver(tolerance=1e-6, slope=SLOPE), None)
    # A state that changes by less than 1000 times itself tells nothing: no pair is ever taken.
    coarse = solved(quasi_newton(tolerance=1e-6), 1e3)
    assert [len(c) for c in coarse] == [len(c) for c in plain]
    for a, b in zip(coarse, plain, strict=True):
        assert gap(torch.tensor(a), torch.tensor(b)) < EXACT
    assert len(solved(quasi_newton(tolerance=1e-6), FINE)) < len(plain)

    told: list[float] = []

    class Spy(Secants):
        def __init__(
            self,
            pairs: int,
            resolution: float,
            shared_window: bool,
            symmetry: Symmetry | None,
            neighbours: int,
            damping: float,
            lends: bool,
        ) -> None:
            told.append(resolution)
            super().__init__(pairs, resolution, shared_window, symmetry, neighbours, damping, lends)

    monkeypatch.setattr(paradiff.methods.window.update, "Secants", Spy)
    sample(network, table, noise, quasi_newton())
    sample(network, table, noise, quasi_newton(), dtype=torch.float64)
    sample(Evaluator(network, dtype=torch.bfloat16), table, noise, quasi_newton())
    assert told == [torch.finfo(d).eps for d in (torch.float32, torch.float64, torch.bfloat16)]


def test_a_window_that_overflowed_begins_with_new_pairs() -> None:
    table = dpmpp_2m(Schedule.linear(), 40)
    window = window_of(table, quasi_newton(12, tolerance=0.0))
    for count in range(1, 4):
        norms = sweep(window)
        window.advance(norms, count)
    assert isinstance(window.update, SecantUpdate)
    assert window.update.secants is not None
    first, pairs = window.lo, window.update.secants
    query = window.ask()
    m = network(query.rows, window.setup.t[query.nodes])
    m[5:] = torch.inf
    norms = window.tell(query, m)
    assert norms is not None
    passed = window.advance(norms.tolist(), 4)
    assert passed.change[0] == math.inf
    assert passed.first == first
    assert window.update.secants is None
    count = 4
    while not window.done:
        norms = sweep(window)
        assert window.update.secants is not pairs
        count += 1
        window.advance(norms, count)
    assert gap(window.final, chain(network, table, Keyed(SHAPE))[-1]) < EXACT


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: quasi_newton(secants=-1), "secants is -1; it must be a whole number, at least 0"),
        (
            lambda: WindowMethod("", stride=2, secants=1),
            "secants is 1 with a stride of 2; .* 0 where sub-intervals have several steps",
        ),
        (lambda: WindowMethod("", stride=[1, 2], secants=3), r"secants is 3 with a stride of \(1, 2\)"),
        (lambda: quasi_newton(0), "the window is 0; it must be a whole number, at least 1"),
        (lambda: quasi_newton(tolerance=-1.0), "the tolerance is -1.0; it must be a number, 0 or more"),
    ],
)
def test_bad_values_are_named(make: Callable[[], WindowMethod], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_no_pairs_is_parasolver_with_the_same_slope() -> None:
    table = TABLES["ddim"]
    found, plain = run(table, quasi_newton(tolerance=1e-4, secants=0)), run(table, parasolver(tolerance=1e-4, slope=SLOPE))
    assert torch.equal(found.sample, plain.sample)
    assert found.rounds == plain.rounds
