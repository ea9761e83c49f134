# SPDX-License-Identifier: Apache-2.0
"""The corrector against quadrature of its equation, a plain loop, and the law that it must keep; faults, each shown to be
seen."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
from problems import EXACT, SHAPE, TABLES, gap, network, run
from torch import Tensor

import paradiff.methods.window.corrector
from paradiff import Evaluator, Keyed, Table, piadm_ode, sample, solve
from paradiff.chain import Noise
from paradiff.chain.prediction import clean_coefficients
from paradiff.chain.slope import freeze_clean_data
from paradiff.chain.step import Step
from paradiff.methods import Blocks, Corrector, WindowMethod, underdamped_langevin
from paradiff.methods.window.corrector import Correction, _coefficients, noise_factors
from paradiff.models.exact import Mixture
from paradiff.samplers import exponential_integrator, ornstein_uhlenbeck, paper_grid
from paradiff.samplers.process import signal_and_noise
from paradiff.solver import Batch, Denoiser, WindowRecord, drive

SEEN = 1e-3
DETERMINISTIC = [name for name, table in TABLES.items() if not table.stochastic]
GRID = paper_grid(3, 0.2, 0.05)
OU = exponential_integrator(ornstein_uhlenbeck(), GRID, volatility=0.0)  # 27 steps; noise is left at its end
PAIRS = [(2.83, 0.25), (0.3, 0.4), (10.0, 0.05), (1.0, 2.0)]


# -- the coefficients --------------------------------------------------------------------------------------------------


def quadrature(friction: float, length: float, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equation (1) with a frozen score, d(X, P) = (A (X, P) + (0, s)) dtau + (0, sqrt(2 gamma)) dB: the propagator, the factor
    of s and the covariance of the noise after `length`, by matrix exponentials and Gauss-Legendre points."""
    drift = torch.tensor([[0.0, 1.0], [0.0, -friction]], dtype=torch.float64)
    points, weights = np.polynomial.legendre.leggauss(count)
    points, weights = (points + 1) * length / 2, weights * length / 2
    flows = torch.stack([torch.linalg.matrix_exp(drift * float(tau)) for tau in points]).numpy()
    force = np.einsum("t,ti->i", weights, flows[:, :, 1])
    noise = 2 * friction * np.einsum("t,ti,tj->ij", weights, flows[:, :, 1], flows[:, :, 1])
    return torch.linalg.matrix_exp(drift * length).numpy(), force, noise


def from_quadrature(friction: float, length: float) -> float:
    """Check: the largest difference to quadrature of any coefficient, and of the covariance beside its own size."""
    flow, force, noise = quadrature(friction, length)
    decay, reach, push = _coefficients(friction, length)
    first, second, third = noise_factors(friction, length)
    found = np.array([[second**2 + third**2, first * second], [first * second, first**2]])
    size = np.sqrt(np.outer(noise.diagonal(), noise.diagonal()))
    gaps = [
        np.abs(flow - [[1, reach], [0, decay]]).max(),
        np.abs(force - [push, reach]).max(),
        (np.abs(noise - found) / size).max(),
    ]
    return float(max(gaps))


@pytest.mark.parametrize(("friction", "length"), PAIRS)
def test_coefficients_and_noise_are_those_of_quadrature(friction: float, length: float) -> None:
    assert from_quadrature(friction, length) < 1e-10


def test_steps_as_short_as_the_theory_asks_still_have_their_noise() -> None:
    # The variance of X is of the order of length^3, a difference of numbers of the order of length.
    for length in (1e-2, 1e-3, 1e-4):
        assert from_quadrature(2.83, length) < 1e-13 / length**2


@pytest.mark.parametrize("fault", ["no covariance", "variance of P for half the step", "push"])
def test_wrong_coefficients_are_seen_by_quadrature(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "push":
        monkeypatch.setitem(globals(), "_coefficients", lambda g, e: (*_coefficients_of(g, e)[:2], e * e / 2))
    else:
        factors = noise_factors

        def wrong(friction: float, length: float) -> tuple[float, float, float]:
            first, second, third = factors(friction, length)
            if fault == "no covariance":
                return first, 0.0, math.hypot(second, third)
            return factors(friction, length / 2)[0], second, third

        monkeypatch.setitem(globals(), "noise_factors", wrong)
    assert from_quadrature(2.83, 0.25) > SEEN


_coefficients_of = _coefficients


# -- the plain loop ----------------------------------------------------------------------------------------------------


def langevin(
    denoiser: Denoiser, table: Table, node: int, x: Tensor, z: Tensor, steps: int, friction: float, length: float
) -> Tensor:
    """Equation (2), one step after another, written out: positions `[M+1, ...]` from `x`, with the draws `z` `[2M+1, ...]`."""
    e, g = length, friction
    decay = math.exp(-g * e)
    of_x = 2 / g * (e - 2 / g * (1 - decay) + (1 - decay**2) / (2 * g))
    both, of_p = (1 - decay) ** 2 / g, 1 - decay**2
    alpha, sigma = table.alpha[node], table.sigma[node]
    p, q = clean_coefficients(table.prediction, alpha, sigma)
    momentum, found = z[0], [x]
    for m in range(steps):
        clean = p * x + q * denoiser((table.scale[node] * x)[None], table.t[node : node + 1])[0]
        if table.clip is not None:
            clean = table.clip(clean[None])[0]
        s = (alpha * clean - x) / sigma**2
        xi_p = math.sqrt(of_p) * z[1 + m]
        xi_x = both / of_p * xi_p + math.sqrt(of_x - both**2 / of_p) * z[1 + steps + m]
        push, kick = (e - (1 - decay) / g) / g * s, (1 - decay) / g * s
        x, momentum = x + (1 - decay) / g * momentum + push + xi_x, decay * momentum + kick + xi_p
        found.append(x)
    return torch.stack(found)


def draws(noise: Noise, table: Table, block: int, steps: int, k: int = 0) -> Tensor:
    begin = table.steps + block * (2 * steps + 1)
    return noise.draw(k, range(begin, begin + 2 * steps + 1)).double()


def corrected_chain(
    table: Table,
    edges: list[int],
    steps: int,
    noise: Noise,
    k: int = 0,
    friction: float | None = None,
    length: float | None = None,
    denoiser: Denoiser = network,
) -> Tensor:
    """The plain loop of chain/table.py's equation (1), each block that ends in noise followed by the plain Langevin loop."""
    x, states, outputs = noise.start(k).double() * table.start_scale, [], []
    for i in range(table.steps):
        m = denoiser((table.scale[i] * x)[None], table.t[i : i + 1])[0]
        if table.clip is not None:
            assert table.clip_weight is not None
            clean = table.p[i] * x + table.q[i] * m
            m = m + table.clip_weight[i] * (table.clip(clean[None])[0] - clean)
        states.append(x)
        outputs.append(m)
        new = table.c[i] * noise.draw(k, range(i, i + 1))[0].double()
        for j in range(min(table.band, i + 1)):
            new = new + table.a[i, j] * states[i - j] + table.b[i, j] * outputs[i - j]
        x = new
        if i + 1 in edges and table.sigma[i + 1] > 0:
            root = float(1 / table.sigma[i + 1])  # sqrt(L)
            g = math.sqrt(8) * root if friction is None else friction
            e = 1 / (steps * root) if length is None else length
            x = langevin(denoiser, table, i + 1, x, draws(noise, table, edges.index(i + 1) - 1, steps, k), steps, g, e)[-1]
    return x


def afresh(table: Table, blocks: int) -> list[int]:
    """About so many blocks, their edges where the table starts afresh."""
    edges = Blocks(blocks).edges(table)
    return sorted({min(table.restarts, key=lambda node: abs(node - edge)) for edge in edges})


def to_plain_loop(name: str, blocks: int, steps: int = 4) -> float:
    """Check: two samples of the solver at tolerance 0 against the plain loops."""
    table = TABLES[name]
    edges, noise = afresh(table, blocks), Keyed(SHAPE, 0, 2)
    found = run(table, piadm_ode(edges, None, underdamped_langevin(steps, steps), tolerance=0.0), samples=2)
    return gap(found.sample, torch.stack([corrected_chain(table, edges, steps, noise, k) for k in range(2)]))


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_as_many_sweeps_as_steps_are_the_plain_loop(name: str, blocks: int) -> None:
    assert to_plain_loop(name, blocks) < EXACT


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_a_block_edge_that_a_step_reads_past_is_refused(name: str) -> None:
    table = TABLES[name]
    inner = next(node for node in range(table.steps) if node not in table.restarts)
    with pytest.raises(ValueError, match=rf"'{name}' reads past the block edge at node {inner}, to states from before"):
        piadm_ode([0, inner, table.steps], 2, underdamped_langevin()).edges(table)
    assert piadm_ode([0, inner, table.steps], 2).edges(table)


@pytest.mark.parametrize("sweeps", [None, 30])
def test_friction_and_step_are_those_given_and_paper_mode_has_the_same_chain(sweeps: int | None) -> None:
    corrector = underdamped_langevin(5, 9, friction=3.0, step=0.07)
    method = piadm_ode(GRID.edges, sweeps, corrector, tolerance=None if sweeps else 0.0)
    found = run(OU, method, samples=2)
    wanted = [corrected_chain(OU, list(GRID.edges), 5, Keyed(SHAPE, 0, 2), k, 3.0, 0.07) for k in range(2)]
    assert gap(found.sample, torch.stack(wanted)) < EXACT
    assert gap(found.sample, run(OU, piadm_ode(GRID.edges, sweeps, tolerance=None if sweeps else 0.0), samples=2).sample) > SEEN


@pytest.mark.parametrize("name", ["ddpm", "ddim eta"])
def test_stochastic_chains_may_be_corrected_too(name: str) -> None:
    table, noise = TABLES[name], Keyed(SHAPE)
    method = WindowMethod("", freeze_clean_data, tolerance=0.0, blocks=Blocks(3), corrector=underdamped_langevin(3, 3))
    found = run(table, method)
    assert gap(found.sample[0], corrected_chain(table, Blocks(3).edges(table), 3, noise)) < EXACT


@pytest.mark.parametrize("fault", ["noise of the block before", "no momentum", "step twice", "not clipped", "wrong node"])
def test_faults_are_seen_by_the_plain_loop(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ddim clipped"
    assert to_plain_loop(name, 4) < EXACT
    init = Correction.__init__

    def wrong(
        self: Correction, step: Step, corrector: Corrector, node: int, block: int, noise: Noise, sample: int, x: Tensor
    ) -> None:
        if fault == "not clipped":
            step = Step(dataclasses.replace(step.table, clip=None), step.device, step.dtype)
        block = max(block - 1, 0) if fault == "noise of the block before" else block
        init(self, step, corrector, node - (fault == "wrong node"), block, noise, sample, x)
        if fault == "no momentum":
            self._momentum = torch.zeros_like(self._momentum)
        if fault == "step twice":
            self._push = 2 * self._push

    monkeypatch.setattr(Correction, "__init__", wrong)
    assert to_plain_loop(name, 4) > SEEN


# -- its sweeps --------------------------------------------------------------------------------------------------------


def correction(steps: int, sweeps: int, table: Table = OU, node: int = 10, noise: Noise | None = None) -> Correction:
    """A corrector's run at a node, to be swept by hand, from a state of the size of the noise there."""
    noise = noise or Keyed(SHAPE)
    step = Step(table, torch.device("cpu"), torch.float64)
    start = torch.linspace(-1, 1, 6, dtype=torch.float64).view(SHAPE)
    return Correction(step, underdamped_langevin(steps, sweeps), node, 1, noise, 0, start)


@pytest.mark.parametrize(("table", "node"), [(OU, 10), (OU, 27), (TABLES["euler"], 6), (TABLES["flow_euler"], 4)])
def test_after_k_sweeps_the_first_k_points_are_exact(table: Table, node: int) -> None:
    steps = 7
    work = correction(steps, steps, table, node)
    root = float(1 / table.sigma[node])
    wanted = langevin(
        network, table, node, work.state, draws(Keyed(SHAPE), table, 1, steps), steps, math.sqrt(8) * root, 1 / steps / root
    )
    for k in range(1, steps + 1):
        query = work.ask()
        nodes, x = query.nodes, query.rows
        assert len(nodes) == len(x) == (1 if k == 1 else steps - k + 1)
        assert (nodes == node).all()
        before = work.state.clone()
        ended = work.tell(query, network(x, table.t[nodes])) is not None
        assert ended == (k == steps)
        assert gap(work._x[: k + 1], wanted[: k + 1]) < EXACT
        if k <= 2:  # later ones are almost exact as well
            assert gap(work._x[k + 1 :], wanted[k + 1 :]) > EXACT
        assert float(work.change) == pytest.approx(float((work.state - before).square().mean()), rel=1e-9)


@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_fewer_sweeps_are_the_picard_iterates(sweeps: int) -> None:
    steps, node = 6, 10
    work = correction(steps, sweeps)
    z, root = draws(Keyed(SHAPE), OU, 1, steps), float(1 / OU.sigma[node])
    frozen, ended = work.state.expand(steps + 1, *SHAPE), False
    for _ in range(sweeps):
        # The score is -m/sigma for a network that predicts epsilon: the plain loop, with the outputs at the last iterate.
        outputs = iter(network(frozen[:-1], OU.t[node].expand(steps)))
        replay = functools.partial(lambda outputs, x, t: next(outputs)[None], outputs)
        frozen = langevin(replay, OU, node, work._x[0], z, steps, math.sqrt(8) * root, 1 / steps / root)
        query = work.ask()
        ended = work.tell(query, network(query.rows, OU.t[query.nodes])) is not None
        assert gap(work._x, frozen) < EXACT
    assert ended
    if sweeps < steps:
        exact = langevin(network, OU, node, work._x[0], z, steps, math.sqrt(8) * root, 1 / steps / root)
        assert gap(work.state, exact[-1]) > EXACT


class Asked(Keyed):
    """Noise that notes the stretches of nodes that it is asked for."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0, samples: int = 1) -> None:
        super().__init__(shape, seed, samples)
        self.stretches: dict[int, list[range]] = {k: [] for k in range(samples)}

    def draw(self, sample: int, nodes: range) -> Tensor:
        self.stretches[sample].append(nodes)
        return super().draw(sample, nodes)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_its_noise_is_neither_the_chain_s_nor_another_block_s(name: str) -> None:
    table, noise, steps = TABLES[name], Asked(SHAPE, 0, 2), 5
    method = WindowMethod("", freeze_clean_data, tolerance=0.0, blocks=Blocks(4), corrector=underdamped_langevin(steps, 2))
    sample(network, table, noise, method)
    for stretches in noise.stretches.values():
        nodes = [node for stretch in stretches for node in stretch]
        assert len(nodes) == len(set(nodes))
        own = sorted((s for s in stretches if s.start >= table.steps), key=lambda s: s.start)
        assert [len(s) for s in own] == [2 * steps + 1] * 3  # no noise is left at the end
        chain_nodes = sorted(node for node in nodes if node < table.steps)
        assert chain_nodes == (list(range(table.steps)) if table.stochastic else [])


def batches(table: Table, method: WindowMethod, denoiser: Denoiser) -> list[list[int]]:
    """The nodes of every round of a lone sample."""
    found: list[list[int]] = []

    def outputs(batch: Batch) -> Tensor:
        found.append(batch.nodes.tolist())
        assert torch.equal(batch.t.double(), table.t[batch.nodes])
        return denoiser(batch.x, batch.t)

    drive(solve(table, Keyed(SHAPE), method, dtype=torch.float64), outputs, check="off")
    return found


@pytest.mark.parametrize(("steps", "sweeps"), [(5, 3), (5, 5), (5, 9), (1, 1), (4, 1)])
@pytest.mark.parametrize("ends_in_noise", [True, False])
def test_rows_and_rounds_are_the_closed_forms(steps: int, sweeps: int, ends_in_noise: bool) -> None:
    table = OU if ends_in_noise else TABLES["ddim"]
    edges = list(GRID.edges) if ends_in_noise else Blocks(3).edges(table)
    method = piadm_ode(edges, 2, underdamped_langevin(steps, sweeps))
    wanted: list[list[int]] = []
    for first, last in itertools.pairwise(edges):
        wanted += [list(range(first + k, last)) for k in range(min(2, last - first))]
        if table.sigma[last] > 0:
            wanted += [[last] * (1 if k == 1 else steps - k + 1) for k in range(1, min(sweeps, steps) + 1)]
    assert batches(table, method, network) == wanted
    found = run(table, method, samples=2)
    assert (found.rounds, found.evaluations) == (len(wanted), 2 * sum(map(len, wanted)))
    done = [s for s in found.history if isinstance(s, WindowRecord) and s.passed == 0]
    noisy = [edge for edge in edges[1:] if table.sigma[edge] > 0]
    assert [(s.sample, s.first, len(s.change)) for s in done] == [(k, edge, 1) for edge in noisy for k in range(2)]
    assert len(noisy) == (3 if ends_in_noise else 2)


# -- the law that it keeps ---------------------------------------------------------------------------------------------


def stationary(friction: float, length: float, variance: float) -> np.ndarray:
    """The covariance of (X, P) that equation (2) keeps on the score -X/variance: Sigma = F Sigma F' + Q."""
    decay, reach, push = _coefficients(friction, length)
    first, second, third = noise_factors(friction, length)
    step = np.array([[1 - push / variance, reach], [-reach / variance, decay]])
    factor = np.array([[second, third], [first, 0.0]])
    noise = (factor @ factor.T).flatten()
    return np.linalg.solve(np.eye(4) - np.kron(step, step), noise).reshape(2, 2)


@pytest.mark.parametrize("variance", [0.05, 1.0, 4.0])
def test_the_stationary_law_is_the_score_s_and_a_standard_normal(variance: float) -> None:
    wanted = np.diag([variance, 1.0])
    size = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    root = math.sqrt(1 / variance)
    # The scheme is of first order: half the step, half the error; none is larger than the step in units of 1/sqrt(L).
    errors = [
        float((np.abs(stationary(math.sqrt(8) * root, e / root, variance) - wanted) / size).max()) for e in (0.2, 0.1, 1e-3)
    ]
    assert errors[0] < 0.2
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 1e-3


class Basis:
    """Noise whose draws are basis vectors, one for each node from `begin` on; the first is left to the start."""

    def __init__(self, shape: tuple[int, int], begin: int) -> None:
        self.shape, self.samples, self.begin = shape, 1, begin

    def start(self, sample: int) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64)

    def draw(self, sample: int, nodes: range) -> Tensor:
        unit = torch.eye(self.shape[1], dtype=torch.float64)[[n - self.begin + 1 for n in nodes]]
        return unit[:, None].expand(-1, *self.shape).clone()


def kept(steps: int, length: float, share: float) -> Tensor:
    """The variance after the corrector beside the target's, begun at `share` of it, for three Gaussians: exact, as states hold
    the coefficients of the start and of every draw."""
    node, eigenvalues = 10, torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    alpha, sigma = float(OU.alpha[node]), float(OU.sigma[node])
    variance = alpha**2 * eigenvalues + sigma**2
    noise = Basis((3, 2 * steps + 2), OU.steps)
    start = torch.zeros(noise.shape, dtype=torch.float64)
    start[:, 0] = (share * variance).sqrt()
    step = Step(OU, torch.device("cpu"), torch.float64)
    work = Correction(step, underdamped_langevin(steps, steps, step=length), node, 0, noise, 0, start)
    while True:
        query = work.ask()
        if work.tell(query, sigma * query.rows / variance[:, None]) is not None:
            return work.state.square().sum(1) / variance


def test_a_state_of_the_right_law_keeps_it_and_another_comes_nearer() -> None:
    assert (kept(20, 0.02, 1.0) - 1).abs().max() < 0.02
    assert (kept(20, 0.1, 1.0) - 1).abs().max() < 0.1
    assert (kept(60, 0.1, 0.5) - 1).abs().max() < 0.15
    assert (kept(60, 0.1, 0.5) - 1).abs().max() < 0.5 * (kept(5, 0.1, 0.5) - 1).abs().max()


def test_a_fault_in_the_momentum_is_seen_by_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = noise_factors
    monkeypatch.setattr(paradiff.methods.window.corrector, "noise_factors", lambda g, e: tuple(2 * f for f in factors(g, e)))
    assert (kept(20, 0.1, 1.0) - 1).abs().max() > 0.3


def test_a_chain_with_the_corrector_keeps_the_variances_of_a_gaussian() -> None:
    grid = paper_grid(3, 0.02, 0.01)
    table = exponential_integrator(ornstein_uhlenbeck(), grid, volatility=0.0)
    eigenvalues = torch.tensor([[0.2], [0.5], [1.0], [2.0]], dtype=torch.float64)

    def gaussian(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v.view(-1, 1, 1) for v in signal_and_noise(t))
        return sigma * x / (alpha**2 * eigenvalues + sigma**2)

    method = piadm_ode(grid.edges, 6, underdamped_langevin(8, 4))
    found = sample(gaussian, table, Keyed((4, 4000)), method, dtype=torch.float64).sample[0]
    variance = table.alpha[-1] ** 2 * eigenvalues[:, 0] + table.sigma[-1] ** 2
    # 4000 entries: a standard deviation of 2.2 hundredths. The chain and the scheme are of first order in steps of 0.02, 1/8.
    assert (found.square().mean(1) / variance - 1).abs().max() < 0.12


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "the corrector's number of steps is 0; it must be a whole number, at least 1"),
        ({"sweeps": 0}, "the corrector's number of sweeps is 0; it must be a whole number, at least 1"),
        ({"sweeps": -3}, "the corrector's number of sweeps is -3; it must be a whole number, at least 1"),
        ({"friction": -1.0}, "the corrector's friction is -1.0; it must be a number, positive, and finite, or None"),
        ({"friction": 0.0}, "the corrector's friction is 0.0; it must be a number, positive, and finite, or None"),
        ({"step": -0.1}, "the corrector's step is -0.1; it must be a number, positive, and finite, or None"),
        ({"step": math.inf}, "the corrector's step is inf; it must be a number, positive, and finite, or None"),
        ({"lipschitz": math.nan}, "the corrector's lipschitz is nan; it must be a number, positive, and finite, or None"),
        ({"lipschitz": 0.0}, "the corrector's lipschitz is 0.0; it must be a number, positive, and finite, or None"),
        (
            {"friction": 1.0, "step": 10.0, "lipschitz": 1.0},
            r"the corrector's friction 1 and step 10 are unstable for the Lipschitz constant 1: a step grows [\d.]+ fold",
        ),
        ({"step": 1.0, "lipschitz": 1e3}, "friction 89.44 and step 1 are unstable for the Lipschitz constant 1000"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        underdamped_langevin(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("friction", [0.01, 0.1, 0.5, 1.0, 3.0, 30.0, 1e3])
@pytest.mark.parametrize("lipschitz", [0.5, 1.0, 1e4])
def test_the_step_that_the_refusal_names_is_stable(friction: float, lipschitz: float) -> None:
    with pytest.raises(ValueError, match="unstable") as refused:
        underdamped_langevin(friction=friction, step=1e4, lipschitz=lipschitz)
    named = re.search(r"give a step below about ([-+.e\d]+),", str(refused.value))
    assert named is not None
    underdamped_langevin(friction=friction, step=0.99 * float(named[1]), lipschitz=lipschitz)


@pytest.mark.parametrize("steps", [1, 2, 8, 100])
@pytest.mark.parametrize("lipschitz", [1e-3, 1.0, 1e6])
def test_the_defaults_are_stable_and_those_of_the_docstring(steps: int, lipschitz: float) -> None:
    friction, step = underdamped_langevin(steps, lipschitz=lipschitz).parameters(lipschitz)
    assert friction == pytest.approx(math.sqrt(8 * lipschitz))
    assert steps * step == pytest.approx(1 / math.sqrt(lipschitz))


def test_an_unstable_step_at_an_edge_is_refused_before_any_call() -> None:
    # Where noise is low the score may be steep: L = 1/sigma^2, which is 1.1 at the first edge and 21 at the end.
    evaluator = Evaluator(network)
    method = piadm_ode(GRID.edges, 2, underdamped_langevin(step=2.0))
    message = r"the corrector's friction 1\d\.\d+ and step 2 are unstable for the Lipschitz constant 20\.\d+: a step grows"
    with pytest.raises(ValueError, match=message):
        sample(evaluator, OU, Keyed(SHAPE), method)
    assert evaluator.rounds == 0
    # No corrector runs at the end of a chain without noise there, and no complaint is made about it.
    sample(network, TABLES["ddim"], Keyed(SHAPE), piadm_ode([0, 1, 12], 2, underdamped_langevin(step=2.0)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sweeps", [1, 3])
def test_an_output_that_is_not_finite_in_the_corrector_is_named(bad: float, sweeps: int) -> None:
    def broken(x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        # The chain never evaluates its last node; the corrector does.
        hit = (t == OU.t[-1]) & (k == 1)
        return torch.where(hit.view(-1, 1, 1), bad, network(x, t))

    evaluator = Evaluator(broken, conditioning={"k": torch.arange(3)})
    method = piadm_ode(GRID.edges, 2, underdamped_langevin(3, sweeps))
    message = (
        r"sample 1 is not finite after the correction at node 27 \(time 0\.05\): the model returned NaN or infinity, or the "
        r"corrector's step is too long for it; give its Lipschitz constant, or no corrector"
    )
    with pytest.raises(ValueError, match=message):
        sample(evaluator, OU, Keyed(SHAPE, samples=3), method, dtype=torch.float64)


@pytest.mark.parametrize("stagger", [1, 4])
def test_a_corrector_with_blocks_in_flight_is_refused(stagger: int) -> None:
    message = "a corrector was given to a method whose blocks do not end one after the other; it needs blocks in turn"
    with pytest.raises(ValueError, match=message):
        piadm_ode(3, 4, underdamped_langevin(), stagger=stagger)
    with pytest.raises(ValueError, match=message):
        WindowMethod("", corrector=underdamped_langevin())


def test_a_mixture_is_corrected_to_itself() -> None:
    # Both ways of sweeping give samples of a mixture of two narrow peaks: near one of the two.
    target = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), torch.tensor([0.01, 0.01]))
    grid = paper_grid(4, 0.05, 1e-3, clean=True)
    table = exponential_integrator(ornstein_uhlenbeck(), grid, volatility=0.0)
    found = sample(
        target.denoiser(table),
        table,
        Keyed((2,), 0, 50),
        piadm_ode(grid.edges, None, underdamped_langevin()),
        dtype=torch.float64,
    )
    far = torch.cdist(found.sample, target.means).amin(1)
    assert far.max() < 0.5
    assert 10 < int((found.sample[:, 0] > 0).sum()) < 40


def test_the_status_says_what_the_estimate_leaves_out() -> None:
    """A corrector of fewer sweeps than steps has an error of its own, which no estimate covers."""
    for sweeps, said in ((2, "; not in it: the corrector's 4 steps were swept 2 times, as asked"), (4, "")):
        found = run(OU, piadm_ode(GRID.edges, None, underdamped_langevin(4, sweeps)))
        assert found.message == f"converged: the estimated error of every sample is at most 0.004{said}"
