# SPDX-License-Identifier: Apache-2.0
"""quasi-DEER: its Newton step, the count with an exact diagonal, its probes in every form, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from pipelines import tiny_unet
from problems import EXACT, SHAPE, TABLES, chain, gap, network
from torch import Tensor

from paradiff import (
    Evaluator,
    Keyed,
    Recorded,
    Schedule,
    Solution,
    Table,
    chords,
    jacobi,
    parallelize,
    parataa,
    quasi_deer,
    quasi_newton,
    sample,
    sequential,
)
from paradiff.methods import ForwardProbes
from paradiff.methods.deer import solver as probed
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import ddim
from paradiff.solver import Batch, Status


def solved(table: Table, method: Any, samples: int = 1, **options: Any) -> Solution:
    return sample(network, table, Keyed(SHAPE, 0, samples), method, dtype=torch.float64, **options)


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of a function that acts entry by entry."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def recorded(seeds: range) -> Recorded:
    return Recorded((1, 8, 8), [torch.Generator().manual_seed(seed) for seed in seeds])


@pytest.mark.parametrize("window", [1, 2, 5, None])
@pytest.mark.parametrize("name", TABLES)
def test_at_tolerance_zero_every_table_has_the_chains_sample_in_no_more_rounds_than_steps(
    name: str, window: int | None
) -> None:
    table = TABLES[name]
    found = solved(table, quasi_deer(window, 0.0))
    assert gap(found.sample, chain(network, table, Keyed(SHAPE))[-1:]) < EXACT
    assert (found.status, found.rounds <= table.steps) == (Status.EXACT, True)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "ddpm thresholded"])  # its limit mixes a state's entries
def test_for_a_network_that_acts_entry_by_entry_one_sweep_is_newtons(name: str) -> None:
    table, states = TABLES[name], []
    solved(table, quasi_deer(tolerance=1e-12), observer=lambda round: states.append(round.states()[0]) or len(states) == 1)
    noise = Keyed(SHAPE)
    x0 = noise.start(0).double() * table.start_scale
    noises = noise.draw(0, range(table.steps)).double()

    def output(i: int, x: Tensor) -> Tensor:
        m = network((table.scale[i] * x)[None], table.t[i : i + 1])[0]
        if table.clip is not None:
            clean = table.p[i] * x + table.q[i] * m
            m = m + table.clip_weight[i] * (table.clip(clean[None])[0] - clean)
        return m

    old, new, outputs, slopes = [x0] * (table.steps + 1), [x0], [], []
    for i in range(table.steps):
        outputs.append(output(i, old[i]))
        slopes.append(slope(lambda x, i=i: output(i, x), old[i]))
        step = table.c[i] * noises[i]
        for j in range(min(table.band, i + 1)):
            step = step + table.a[i, j] * new[i - j]
            step = step + table.b[i, j] * (outputs[i - j] + slopes[i - j] * (new[i - j] - old[i - j]))
        new.append(step)
    # finite differences in float64 have about eight digits, and clipped entries may lie within a difference of the limit
    assert gap(states[0], new[-1]) < 1e-5


def test_it_converges_in_fewer_rounds_than_slopes_that_are_guessed() -> None:
    table = ddim(Schedule.linear(), 60)
    rounds = [solved(table, method).rounds for method in (quasi_deer(tolerance=1e-8), jacobi(tolerance=1e-8))]
    assert 2 * rounds[0] < rounds[1]


def test_with_an_exact_diagonal_the_sweeps_are_as_many_as_the_papers_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = torch.ones(1, 1, dtype=torch.int8)
    for _ in range(6):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])

    def orthogonal(low: int, high: int, size: tuple[int, ...], **options: Any) -> Tensor:
        """Signs of a Hadamard matrix: the mean of v * J v over all of its rows is the diagonal of J."""
        assert (low, high, size[0]) == (0, 2, 64)
        return ((signs.view(64, 1, 1, 8, 8) + 1) // 2).expand(size)

    monkeypatch.setattr(probed.torch, "randint", orthogonal)
    table = ddim(Schedule.linear(), 25, spacing="trailing")
    model, errors = digits().denoiser(table), []
    plain = sample(model, table, recorded(range(1)), sequential(), dtype=torch.float64).sample
    method = dataclasses.replace(quasi_deer(tolerance=1e-12, probes=64), divergence=1e30)

    def note(round: Any) -> None:
        errors.append(float((round.states() - plain).square().mean().sqrt()))

    sample(model, table, recorded(range(1)), method, dtype=torch.float64, observer=note, check="off")
    assert next(k for k in range(1, 20) if max(errors[k - 1 :]) < 4e-3) == 8


@pytest.mark.parametrize("probes", [1, 3])
def test_probes_by_forward_derivatives_find_the_same_sample_as_differences(probes: int) -> None:
    table, method = TABLES["ddim"], quasi_deer(tolerance=1e-6, probes=probes)
    found = sample(ForwardProbes(network), table, Keyed(SHAPE, 0, 2), method, dtype=torch.float64)
    plain = solved(table, method, samples=2)
    assert gap(found.sample, plain.sample) < 1e-6
    assert (found.rounds, found.evaluations) == (plain.rounds, plain.evaluations)


def test_forward_probes_are_linear_in_the_direction() -> None:
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = torch.cat([x, x + 0.5])
    nodes, t = torch.tensor([3, 4, 3, 4]), TABLES["ddim"].t[[3, 4, 3, 4]]
    found = ForwardProbes(network)(Batch(far, t, nodes, torch.zeros(4, dtype=torch.int64)))
    value = network(x, t[:2])
    assert gap(found, torch.cat([value, value + 0.5 * slope(lambda y: network(y, t[:2]), x)])) < EXACT


def test_probes_are_counted_and_a_window_of_one_node_has_none() -> None:
    table = TABLES["ddim"]
    found, alone = solved(table, quasi_deer(4, 1e-9, probes=2)), solved(table, quasi_deer(1))
    assert found.evaluations == found.error_estimates[0].evaluations
    swept = [len(record.change) for record in found.history]  # pyright: ignore[reportAttributeAccessIssue]
    assert found.evaluations == sum(w * (3 if w > 1 else 1) for w in swept)
    assert alone.evaluations == table.steps
    assert (quasi_deer(4, probes=2).width(table), quasi_deer(1).width(table)) == (12, 1)


def test_samples_are_the_same_in_company_and_from_run_to_run() -> None:
    table, method = TABLES["ddpm large"], quasi_deer(tolerance=1e-4)
    together, again = solved(table, method, samples=3), solved(table, method, samples=3)
    assert together == again
    assert gap(solved(table, method).sample[0], together.sample[0]) < EXACT


def test_a_diagonal_that_diverges_gives_way_to_plain_sweeps_and_the_status_says_so() -> None:
    table, method = TABLES["ddim"], quasi_deer(tolerance=1e-8)
    found = solved(table, dataclasses.replace(method, divergence=1e-9))  # every sweep counts as diverging
    assert found.message.endswith("; the diagonal Jacobian of sample 0 diverged, and plain sweeps went on in its place")
    assert gap(found.sample, chain(network, table, Keyed(SHAPE))[-1:]) < 1e-6
    assert "diverged" not in solved(table, method).message


def test_an_overflow_ends_the_diagonal() -> None:
    table = ddim(Schedule.linear(), 60)

    def steep(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t) + 0.05 * x**5

    found = sample(steep, table, Keyed(SHAPE), quasi_deer(tolerance=1e-6), dtype=torch.float64)
    assert gap(found.sample, chain(steep, table, Keyed(SHAPE))[-1:]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_on_the_trained_digits_stay_below_their_estimates_but_for_one_in_twelve(dtype: torch.dtype) -> None:
    model = load("digits")
    evaluator = Evaluator(model, dtype=torch.float32)
    for table, method in ((model.table("ddim", 25), quasi_deer()), (model.table("ddpm", 25), quasi_deer(8))):
        plain = sample(evaluator, table, recorded(range(500, 512)), sequential(), dtype=dtype).sample
        found = sample(evaluator, table, recorded(range(500, 512)), method, dtype=dtype)
        errors = (found.sample - plain).square().flatten(1).mean(1).sqrt().tolist()
        assert max(errors) > 1e-5
        ratios = sorted(error / e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))
        assert ratios[-2] <= 1
        assert ratios[-1] <= 3
        assert found.estimated_error <= 4e-3


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("method", [quasi_deer(tolerance=1e-6), parataa(tolerance=1e-6), chords(starts=[0, 1, 4])], ids=str)
def test_a_pipelines_loop_takes_several_states_at_a_node(method: Any, executor: Any) -> None:
    pipe = diffusers.DDIMPipeline(tiny_unet(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def image() -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(num_inference_steps=8, generator=draw, output_type="np").images)

    plain = image()
    with parallelize(pipe, method, executor=executor) as run:
        found = image()
    assert gap(found, plain) < 1e-4
    assert run.report.executor == executor


REFUSED: dict[str, Any] = {
    "probes is 0; it must be a whole number, at least 1": lambda: quasi_deer(probes=0),
    "the window is 0; it must be a whole number, at least 1": lambda: quasi_deer(0),
    "the window is 13; the chain has 12 sub-intervals": lambda: solved(TABLES["ddim"], quasi_deer(13)),
    "the tolerance is -1.0": lambda: quasi_deer(tolerance=-1.0),
    "divergence is 0": lambda: dataclasses.replace(quasi_deer(), divergence=0.0),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused_by_a_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


def test_at_equal_tolerance_it_takes_no_more_rounds_than_quasi_newton_but_more_rows() -> None:
    model, table = load("digits"), load("digits").table("ddim", 50)
    ours, theirs = (sample(model, table, recorded(range(500, 516)), method) for method in (quasi_newton(), quasi_deer()))
    mean, other = (sum(one.rounds for one in found.error_estimates) / 16 for found in (ours, theirs))
    assert other <= mean + 0.25  # 8.2 for both
    assert theirs.evaluations > 1.4 * ours.evaluations
