# SPDX-License-Identifier: Apache-2.0
"""ParaTAA: the counts of the authors' own code, the definitions of its sweeps, its safeguard, and what it refuses."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import EXACT, SHAPE, TABLES, chain, ends, gap, network, run, sweep, window_of
from torch import Tensor

from paradiff import Evaluator, Keyed, Recorded, Schedule, Table, parataa, quasi_newton, sample, sequential
from paradiff.methods import WindowMethod
from paradiff.methods.window.anderson import AndersonUpdate
from paradiff.methods.window.mixing import Anderson
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import ddim

CLOSED = ddim(Schedule.linear(), 50, spacing="trailing", set_alpha_to_one=False)  # lands on the first level, as theirs

# Rounds and evaluations of the authors' code at seeds 0 to 3 of the closed-form digits, float64, both tolerances 1e-3.
THEIRS: dict[tuple[int, int, int], list[tuple[int, int]]] = {  # by window, order and history
    (50, 50, 1): [(18, 456)] * 4,
    (50, 50, 2): [(11, 283), (11, 283), (11, 281), (11, 281)],
    (50, 50, 3): [(13, 290), (10, 273), (10, 275), (11, 279)],
    (50, 50, 5): [(15, 296), (13, 292), (10, 269), (12, 303)],
    (50, 8, 1): [(16, 424), (16, 425), (16, 425), (16, 425)],
    (50, 8, 2): [(14, 376), (15, 377), (15, 377), (15, 377)],
    (50, 8, 3): [(17, 448), (17, 449), (17, 449), (17, 449)],
    (10, 10, 2): [(18, 152)] * 4,
}


@pytest.mark.parametrize("case", THEIRS, ids=str)
def test_rounds_and_evaluations_are_those_of_the_authors_own_code(case: tuple[int, int, int]) -> None:
    window, order, history = case
    noise = Recorded((1, 8, 8), [torch.Generator().manual_seed(seed) for seed in range(4)])
    method = parataa(window, 1e-3, order=order, history=history)
    found = sample(digits().denoiser(CLOSED), CLOSED, noise, method, dtype=torch.float64)
    assert [(e.rounds, e.evaluations) for e in found.error_estimates] == THEIRS[case]


@pytest.mark.parametrize("order", [1, 2, 5, 12])
@pytest.mark.parametrize("name", ["ddim", "euler", "ddpm large"])  # of one step, which predict the noise
def test_a_plain_sweep_takes_k_steps_with_the_outputs_of_the_states_before_it(name: str, order: int) -> None:
    table, noise = TABLES[name], Keyed(SHAPE)
    window = window_of(table, parataa(order=order, history=1), noise)
    window.x.add_(torch.randn(window.x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    states, steps = window.x.clone(), table.steps
    outputs = network(table.scale[:-1].view(-1, 1, 1) * states[:-1], table.t[:-1])
    noises = noise.draw(0, range(steps)).double()
    wanted = []
    for n in range(steps):
        x = states[max(n + 1 - order, 0)]
        for i in range(max(n + 1 - order, 0), n + 1):
            x = table.a[i, 0] * x + table.b[i, 0] * outputs[i] + table.c[i] * noises[i]
        wanted.append(x)
    sweep(window)
    assert gap(ends(window), torch.stack(wanted)) < EXACT


def mixed(table: Table, residuals: list[Tensor], states: list[Tensor], order: int, ridge: float) -> Tensor:
    """The mixed states of equation (2) of anderson.py, node by node, of all sweeps' states and residuals `[W, ...]`."""
    system = torch.eye(table.steps, dtype=torch.float64)
    for n in range(table.steps - 1):
        system[n + 1, n] = -table.a[n + 1, 0]
    reach = torch.linalg.inv(system).triu(1 - order)
    changes = [torch.einsum("np,p...->n...", reach, r).flatten(1) for r in residuals]
    dr = torch.stack([b - a for a, b in pairwise(changes)], 1)
    dx = torch.stack([(b - a).flatten(1) for a, b in pairwise(states)], 1)
    found = []
    for n in range(table.steps):
        columns = dr[: n + 1].transpose(0, 1).flatten(1)
        gram = columns @ columns.T + ridge * torch.eye(len(columns), dtype=torch.float64)
        weights = torch.linalg.solve(gram, columns @ changes[-1][: n + 1].flatten())
        found.append((states[-1].flatten(1)[n] + changes[-1][n] - weights @ (dx[n] + dr[n])).view(SHAPE))
    return torch.stack(found)


@pytest.mark.parametrize("order", [3, 12])
def test_sweeps_are_mixed_by_least_squares_over_the_nodes_before(order: int) -> None:
    table = TABLES["ddim"]
    window = window_of(table, parataa(tolerance=0.0, order=order, history=3, ridge=0.1))
    states, residuals = [], []
    for _ in range(3):
        before = ends(window).clone()
        sweep(window)
        states.append(before)
        residuals.append(window.phi - before)
    wanted = mixed(table, residuals, states, order, 0.1)
    assert gap(ends(window)[3:], wanted[3:]) < EXACT
    assert (
        gap(ends(window)[:3], window.phi[:3]) < EXACT
    )  # the safeguard: two nodes are exact, the third is the first that is not
    assert gap(ends(window)[2], wanted[2]) > 1e-6


def test_the_safeguard_leaves_all_nodes_alone_up_to_the_first_above_its_bound() -> None:
    table = TABLES["ddim"]
    method = parataa(tolerance=1e-3, history=2)
    window, plain = window_of(table, method), window_of(table, dataclasses.replace(method, anderson=Anderson(history=1)))
    for _ in range(4):
        plain.x = window.x.clone()
        before = ends(window).clone()
        sweep(window)
        sweep(plain)
    residual = (window.phi - before).flatten(1).square().mean(1).sqrt()
    first = int((residual > 1e-3).nonzero()[0])
    assert first > 1
    assert torch.equal(ends(window)[: first + 1], ends(plain)[: first + 1])
    assert not torch.equal(ends(window)[first + 1], ends(plain)[first + 1])


@pytest.mark.parametrize(("tolerance", "noise_tolerance"), [(1e-2, 0.0), (0.0, 0.3)])
def test_a_node_passes_by_either_tolerance(tolerance: float, noise_tolerance: float) -> None:
    table = TABLES["ddpm large"]
    found = run(table, parataa(tolerance=tolerance, noise_tolerance=noise_tolerance))
    strict = run(table, parataa(tolerance=0.0))
    assert found.rounds < strict.rounds
    assert strict.message == "exact: every node was reached by the chain's own steps"
    assert found.message.startswith(
        f"converged: every node passed with a residual of at most {tolerance:g}, or {noise_tolerance:g} times its step's noise"
    )


def test_a_mixing_that_diverges_gives_way_to_plain_sweeps_and_the_status_says_so() -> None:
    table, method = TABLES["ddim"], parataa(tolerance=1e-6)
    diverging = dataclasses.replace(method, anderson=Anderson(divergence=1e-9))  # every sweep counts as diverging
    found, plain = run(table, diverging, samples=2), run(table, parataa(tolerance=1e-6, history=1), samples=2)
    assert torch.equal(found.sample, plain.sample)
    assert (found.rounds, found.evaluations) == (plain.rounds, plain.evaluations)
    assert found.message.endswith("; the Anderson mixing of samples 0, 1 diverged, and plain sweeps went on in its place")
    assert "diverged" not in run(table, method, samples=2).message


def test_an_overflow_ends_the_mixing() -> None:
    def steep(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t) + 0.05 * x**5

    table = ddim(Schedule.linear(), 60)
    found = run(table, parataa(tolerance=1e-6), steep)
    assert "the Anderson mixing of sample 0 diverged" in found.message
    assert gap(found.sample, chain(steep, table, Keyed(SHAPE))[-1:]) < 1e-3


def test_members_that_share_a_window_are_mixed_each_by_themselves() -> None:
    table = TABLES["ddim"]
    setup = window_of(table, parataa(tolerance=0.0)).setup
    setup.step.shared_window = True
    together, apart = AndersonUpdate(setup), [AndersonUpdate(setup) for _ in range(2)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        phi, old = (torch.randn(table.steps, 2, 6, generator=draw, dtype=torch.float64) for _ in range(2))
        found = together(0, table.steps, phi, old)
        for k, one in enumerate(apart):
            assert gap(found[:, k : k + 1], one(0, table.steps, phi[:, k : k + 1], old[:, k : k + 1])) < EXACT


REFUSED: dict[str, Any] = {
    "the order is 9 nodes, the window has 8": lambda: parataa(8, order=9),
    "the history is 5 sweeps, and a window of 4 nodes is exact after 4": lambda: parataa(4, history=5),
    "the history is 13 sweeps, and a window of 12 nodes": lambda: run(TABLES["ddim"], parataa(history=13)),
    "secants is 3 and an Anderson mixing was given; each is an acceleration of its own: give one": lambda: dataclasses.replace(
        quasi_newton(), anderson=Anderson()
    ),
    "an Anderson mixing was given with a stride of 2": lambda: WindowMethod("mine", stride=2, anderson=Anderson()),
    "an Anderson mixing was given with sweeps = 3": lambda: WindowMethod("mine", rule="sweeps", sweeps=3, anderson=Anderson()),
    "noise_tolerance is 0.1 with rule 'error'": lambda: WindowMethod("mine", noise_tolerance=0.1),
    "the predictor is 'held', whose window ends where nothing": lambda: WindowMethod("mine", stride=2, predictor="held"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_options_that_contradict_each_other_are_refused(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        REFUSED[sentence]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_on_the_trained_digits_stay_below_their_estimates(dtype: torch.dtype) -> None:
    model = load("digits")
    table, evaluator = model.table("ddim", 25), Evaluator(model, dtype=torch.float32)
    noise = Recorded((1, 8, 8), [torch.Generator().manual_seed(seed) for seed in range(500, 508)])
    plain = sample(evaluator, table, noise, sequential(), dtype=dtype).sample
    for method in (parataa(), parataa(8, 1e-2, order=4)):
        found = sample(evaluator, table, noise, method, dtype=dtype)
        errors = (found.sample - plain).square().flatten(1).mean(1).sqrt().tolist()
        assert max(errors) > 1e-6
        assert all(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))


def test_previews_of_a_narrow_window_are_states_that_were_evaluated() -> None:
    seen = []
    run(TABLES["ddim"], parataa(4), observer=lambda round: seen.append(float(round.states().abs().max())))
    assert min(seen) > 0
