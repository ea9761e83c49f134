# SPDX-License-Identifier: Apache-2.0
"""The solver returns the sequential chain's sample, whatever the method, the window and the company, and counts what it did."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import (
    EXACT,
    METHODS,
    SHAPE,
    STEPS,
    TABLES,
    WINDOWS,
    arbitrary,
    chain,
    chains,
    fitted,
    gap,
    network,
    run,
)
from torch import Tensor

from paradiff import (
    Evaluator,
    Keyed,
    Schedule,
    Table,
    auto,
    chords,
    collocation,
    jacobi,
    paradigms,
    parasolver,
    parataa,
    quasi_deer,
    quasi_newton,
    sample,
    sequential,
    solve,
    srds,
)
from paradiff.chain import Clip
from paradiff.chain.slope import freeze_clean_data
from paradiff.methods import WindowMethod
from paradiff.models.exact import digits
from paradiff.samplers import ddim, ddpm, dpmpp_2m, heun
from paradiff.solver import Method, drive
from paradiff.solver.protocol import Round

each_table = pytest.mark.parametrize("name", TABLES)


def longest(method: WindowMethod) -> int:
    """Rounds of a sweep: the longest sub-interval."""
    return method.stride if isinstance(method.stride, int) else max(method.stride)


@each_table
@pytest.mark.parametrize("samples", [1, 3])
def test_window_one_is_the_sequential_sampler_and_its_counts_are_the_closed_forms(name: str, samples: int) -> None:
    table = TABLES[name]
    steps = 2 * ((STEPS + 1) // 2) - 1 if name == "heun" else STEPS
    found = run(table, sequential(), samples=samples)
    assert gap(found.sample, chains(network, table, Keyed(SHAPE, 0, samples))) < EXACT
    assert (found.rounds, found.evaluations) == (steps, steps * samples)
    assert [(c.rounds, c.evaluations) for c in found.error_estimates] == [(steps, steps)] * samples
    assert (found.residual, found.estimated_error) == (0, 0)
    assert found.message == "exact: every node was reached by the chain's own steps"


@each_table
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_table_reaches_the_chain_in_no_more_sweeps_than_steps(name: str, method: str) -> None:
    table = TABLES[name]
    wanted = chain(network, table, Keyed(SHAPE))[-1]
    given = METHODS[method](table)
    for window in WINDOWS if given.window is None else (1,):
        now = fitted(given, table, window)
        found = run(table, now)
        assert gap(found.sample[0], wanted) < EXACT, f"window {window}"
        assert found.rounds <= table.steps if longest(now) == 1 else found.rounds <= len(now.edges(table)) * longest(now)


class From(Keyed):
    """Keyed noise that begins at given states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__(tuple(states.shape[1:]), 0, len(states))
        self.states = states

    def start(self, sample: int) -> Tensor:
        return self.states[sample]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [sequential(), parasolver(4), quasi_newton(), collocation(), srds()], ids=str)
def test_a_start_that_is_not_finite_is_named_and_not_the_model(method: Method, value: float) -> None:
    noise, table = Keyed(SHAPE, 0, 2), TABLES["ddim"]
    states = torch.stack([noise.start(k) for k in range(2)])
    states[1].view(-1)[0] = value
    sentence = "sample 1 begins at a state that holds NaN or infinity, which no method follows: give "
    with pytest.raises(ValueError, match=f"{sentence}a finite start"):
        sample(network, table, noise, method, start=states, check="off")
    with pytest.raises(ValueError, match=f"{sentence}noise that begins at a finite state"):
        sample(network, table, From(states), method, check="off")


FOLLOWING = [
    sequential(),
    parasolver(4),
    quasi_newton(),
    collocation(),
    chords(cores=3),
    quasi_deer(),
    parataa(),
    paradigms(),
    quasi_newton(tolerance=0.0),
]


@pytest.mark.parametrize("method", FOLLOWING, ids=str)
def test_a_start_that_overflows_is_named_and_not_the_model(method: Method) -> None:
    noise, table = Keyed(SHAPE, 0, 2), ddim(Schedule.scaled_linear(), 20)
    states = torch.stack([noise.start(k) for k in range(2)])
    states[1] *= 1e20
    size = f"{float(states[1].double().square().mean().sqrt()):.2g}"
    for part in (table, table[2:] if method == quasi_newton() else table):
        with pytest.raises(ValueError, match="the chain's first level is 1 for data of mean square 1") as met:
            sample(network, part, noise, method, start=states, check="off")
        told = f"sample 1 begins at a state of root mean square {size}, and its square overflows torch.float32 after"
        assert told in str(met.value)
        assert str(met.value).endswith(": give a start of about that size")


def test_a_model_that_returns_nan_is_named_where_another_sample_begins_far_out() -> None:
    noise, table = Keyed(SHAPE, 0, 2), TABLES["ddim"]
    states = torch.stack([noise.start(k) for k in range(2)])
    states[1] *= 1e6

    def faulty(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x.abs() < 100).flatten(1).all(1).view(-1, *[1] * (x.ndim - 1)), torch.nan, network(x, t))

    with pytest.raises(ValueError, match=r"sample 0 is not finite after node 0 .*: the model returned NaN or infinity"):
        sample(faulty, table, noise, quasi_newton(), start=states, check="off")


def test_a_sub_interval_that_splits_a_two_stage_step_still_waits_for_the_state_before_it() -> None:
    # Nodes 9 ... 11 begin at a predicted state, on which the last step does not depend when epsilon is frozen; the state
    # before it, on which it does, lies in the neighbour.
    table = heun(Schedule.scaled_linear(), 6)
    found = run(table, parasolver(tolerance=0.0, stride=3, warmup=0, slope=freeze_clean_data))
    assert gap(found.sample[0], chain(network, table, Keyed(SHAPE))[-1]) < EXACT


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_strides_of_a_multistep_sampler_refer_to_the_chain_and_restarts_to_the_restarted_one(stride: int) -> None:
    method = parasolver(tolerance=0.0, stride=stride, window=2)
    plain = dpmpp_2m(Schedule.linear(), 16)
    again = dpmpp_2m(Schedule.linear(), 16, restarts=[5, 9])
    references = [chain(network, table, Keyed(SHAPE))[-1] for table in (plain, again)]
    for table, wanted in zip((plain, again), references, strict=True):
        assert gap(run(table, method).sample[0], wanted) < EXACT
    assert gap(*references) > 1e-4  # The restarts make another chain, ten orders above rounding.


def paired(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    """A network with conditioning: one number a sample."""
    return network(x + shift.view(-1, 1, 1).to(x.dtype), t)


SHIFTS = torch.tensor([0.0, 1.0, -0.7, 0.4], dtype=torch.float64)
LOOSE = {"jacobi": jacobi(), "paradigms": paradigms(6), "parasolver": parasolver(6), "strides": parasolver(3, stride=4)}


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun", "ddim clipped"])
@pytest.mark.parametrize("method", LOOSE)
def test_a_sample_does_not_depend_on_chunks_or_on_its_neighbours(name: str, method: str) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, [5, 6, 7, 8])
    method = LOOSE[method] if table.steps == STEPS else dataclasses.replace(LOOSE[method], stride=1)

    def solved(noise: Keyed, shifts: Tensor, rows: int | None) -> Tensor:
        evaluator = Evaluator(paired, conditioning={"shift": shifts}, max_rows=rows)
        return sample(evaluator, table, noise, method, dtype=torch.float64).sample

    together = solved(noise, SHIFTS, None)
    # The tolerance is loose, so that the same sweeps must be taken and the same nodes passed; a network of single entries may
    # round differently in other places of a batch, by 1e-16 an entry.
    for rows in (1, 3, 7):
        assert gap(solved(noise, SHIFTS, rows), together) < EXACT
    for k, seed in enumerate([5, 6, 7, 8]):
        assert gap(solved(Keyed(SHAPE, [seed]), SHIFTS[k : k + 1], None)[0], together[k]) < EXACT


def test_a_slow_sample_does_not_hold_back_its_neighbours() -> None:
    # Sample 1 has a network that is constant, and so converges at once; sample 0 does not.
    def uneven(x: Tensor, t: Tensor, quiet: Tensor) -> Tensor:
        return torch.where(quiet.view(-1, 1, 1), 0.1, network(5 * x, t))

    table = ddim(Schedule.linear(), 50)
    evaluator = Evaluator(uneven, conditioning={"quiet": torch.tensor([False, True])})
    found = sample(evaluator, table, Keyed(SHAPE, samples=2), parasolver(10), dtype=torch.float64)
    slow, quick = found.error_estimates
    assert quick.rounds < slow.rounds == found.rounds
    assert slow.evaluations + quick.evaluations == found.evaluations == evaluator.evaluations


@pytest.mark.parametrize("clip", [Clip(0.3), None])
def test_freezing_clean_data_is_quick_on_clipped_and_free_chains(clip: Clip | None) -> None:
    target, free = digits(), ddpm(Schedule.linear(), 100)
    table = dataclasses.replace(free, clip=clip)
    method = parasolver(tolerance=1e-3, slope=freeze_clean_data)
    found = sample(target.denoiser(free), table, Keyed((1, 8, 8)), method, dtype=torch.float64)
    wanted = chain(target.denoiser(free), table, Keyed((1, 8, 8)))[-1]
    # The tolerance is in the root mean square of an estimate; single pixels are allowed ten times as much.
    assert gap(found.sample[0], wanted) < 1e-2
    assert found.rounds <= 30  # Far below 100: about 15 in practice.


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("method", LOOSE)
def test_history_rounds_and_evaluations_add_up(name: str, method: str) -> None:
    table, method = TABLES[name], LOOSE[method]
    intervals, seen = len(method.edges(table)) - 1, []
    evaluator = Evaluator(network)
    found = sample(evaluator, table, Keyed(SHAPE, samples=3), method, dtype=torch.float64, observer=seen.append)
    assert (found.rounds, found.evaluations) == (evaluator.rounds, evaluator.evaluations)
    assert found.rounds == max(c.rounds for c in found.error_estimates) == max(s.round for s in found.history) == len(seen)
    assert found.evaluations == sum(c.evaluations for c in found.error_estimates)
    assert [record for round in seen for record in round.records] == found.history
    for k, error_estimate in enumerate(found.error_estimates):
        sweeps = [s for s in found.history if s.sample == k]
        passed = [s.passed for s in sweeps]
        assert sum(passed) == intervals
        assert [s.first for s in sweeps] == [sum(passed[:i]) for i in range(len(sweeps))]
        assert all(1 <= s.passed <= len(s.change) for s in sweeps)
        assert error_estimate.rounds == max(s.round for s in sweeps)
        if longest(method) == 1:
            assert error_estimate.evaluations == sum(len(s.change) for s in sweeps)
            assert error_estimate.rounds == len(sweeps)
        largest = max([0.0, *(change for s in sweeps for change in s.change[: s.passed - 1])])
        assert error_estimate.residual == pytest.approx(largest, rel=1e-12)


def test_an_observer_is_called_each_round() -> None:
    heard: list[Round] = []
    found = run(TABLES["ddpm"], parasolver(2, 0.0, stride=3), observer=heard.append)
    assert len(heard) == found.rounds
    assert [record for round in heard for record in round.records] == found.history
    assert any(not round.records for round in heard)  # A sweep of three rounds ends in its third.


@each_table
def test_a_given_start_takes_the_place_of_the_noise(name: str) -> None:
    table = TABLES[name]
    start = torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, *SHAPE)
    found = run(table, parasolver(tolerance=0.0), samples=2, start=start)
    for k in range(2):
        wanted = chain(network, table, Keyed(SHAPE, 0, 2), k, start[k])[-1]
        assert gap(found.sample[k], wanted) < EXACT


@each_table
def test_float32_states_reach_the_sample_to_float32_accuracy(name: str) -> None:
    found = run(TABLES[name], parasolver(tolerance=0.0), samples=2, dtype=torch.float32)
    assert found.sample.dtype == torch.float32
    # 12 steps with coefficients up to 30 on roundings of 6e-8.
    assert gap(found.sample, chains(network, TABLES[name], Keyed(SHAPE, 0, 2))) < 1e-4


def test_a_method_that_assumes_a_wild_slope_is_slower_but_not_wrong() -> None:
    table = TABLES["ddpm"]
    wild = WindowMethod("", lambda table: 2 * arbitrary(table), tolerance=0.0)
    # Products of slopes above 1 enlarge roundings.
    assert gap(run(table, wild).sample[0], chain(network, table, Keyed(SHAPE))[-1]) < 1e-10


def test_the_solver_is_a_generator_that_evaluates_nothing() -> None:
    table, method = TABLES["ddpm"], paradigms(4, 0.0)
    solver = solve(table, Keyed(SHAPE, samples=2), method, dtype=torch.float64)
    batch = next(solver)
    assert batch.x.shape == (8, *SHAPE)
    assert batch.nodes.tolist() == [0, 1, 2, 3] * 2
    assert batch.samples.tolist() == [0] * 4 + [1] * 4
    assert batch.t.dtype == torch.int64  # DDPM's times are whole.
    assert torch.equal(batch.t, table.t[batch.nodes].long())
    solver.close()
    found = drive(solve(table, Keyed(SHAPE, 0, 2), method, dtype=torch.float64), lambda batch: network(batch.x, batch.t))
    assert gap(found.sample, chains(network, table, Keyed(SHAPE, 0, 2))) < EXACT


def test_fractional_times_reach_the_network_as_they_are() -> None:
    batch = next(solve(TABLES["euler"], Keyed(SHAPE), paradigms()))
    assert batch.t.dtype == torch.float64
    assert torch.equal(batch.t, TABLES["euler"].t[:-1])


@pytest.mark.parametrize(
    ("method", "status"),
    [
        (parasolver(tolerance=0.01), "converged: the estimated error of every sample is at most 0.01"),
        (paradigms(), "converged: every node passed with a change of at most 0.1 times its step's noise"),
        (parasolver(tolerance=0.0), "exact: every node was reached by the chain's own steps"),
        (parasolver(1), "exact: every node was reached by the chain's own steps"),
    ],
)
def test_the_status_is_a_sentence(method: WindowMethod, status: str) -> None:
    assert run(TABLES["ddim"], method).message == status


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_states_in_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"states were asked for in {dtype}; they are kept in float32 or float64"):
        run(TABLES["ddim"], parasolver(), dtype=dtype)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own, within jvp
@pytest.mark.parametrize("check", ["first", "off"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("method", [sequential, parasolver, collocation, auto])
def test_transforms_of_torch_around_a_run_are_refused(method: Callable[[], Method], transform: str, check: Any) -> None:
    """The plain loop within `grad` would have a derivative; samples have none, and a derivative of 0 would look like one."""

    def summed(weight: Tensor) -> Tensor:
        return sample(lambda x, t: weight * network(x, t), TABLES["ddpm"], Keyed(SHAPE), method(), check=check).sample.sum()

    given = {"grad": (torch.ones(()),), "vmap": (torch.ones(2),), "jvp": ((torch.ones(()),), (torch.ones(()),))}[transform]
    call = functools.partial(torch.func.jvp, summed) if transform == "jvp" else getattr(torch.func, transform)(summed)
    with pytest.raises(ValueError, match=r"within a transform of torch\.func .* sample outside of it"):
        call(*given)


def test_a_model_may_be_a_transform_of_torch() -> None:
    def alone(x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * torch.tanh(x) + 0.3 * torch.cos(t / 200) * torch.sin(x)

    def batched(x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * torch.tanh(x) + 0.3 * torch.cos(t / 200).view(-1, *[1] * (x.ndim - 1)) * torch.sin(x)

    wanted = sample(batched, TABLES["ddpm"], Keyed(SHAPE), parasolver())
    found = sample(torch.vmap(alone), TABLES["ddpm"], Keyed(SHAPE), parasolver())
    torch.testing.assert_close(found.sample, wanted.sample)
    assert found.rounds == wanted.rounds


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start has shape \(2, 3\); the noise has \(1, 2, 3\): samples, then one sample's"):
        run(TABLES["ddim"], parasolver(), start=torch.zeros(SHAPE))


def table_of(steps: int) -> Table:
    return ddim(Schedule.linear(), steps)


def test_a_chain_of_one_step_has_one_round() -> None:
    for method in (sequential(), jacobi(), paradigms(), parasolver(), parasolver(warmup=0)):
        assert run(table_of(1), method).rounds == 1


class OneMemory:
    """Noise that returns the same memory at every call."""

    samples, shape = 3, SHAPE

    def __init__(self) -> None:
        self.source = Keyed(SHAPE, 3, 3)
        self.first, self.drawn = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(2 * STEPS, *SHAPE, dtype=torch.float64)

    def start(self, sample: int) -> Tensor:
        return self.first.copy_(self.source.start(sample))

    def draw(self, sample: int, nodes: range) -> Tensor:
        return self.drawn[: len(nodes)].copy_(self.source.draw(sample, nodes))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("method", [sequential, parasolver, collocation, srds])
def test_noise_may_return_the_same_memory_at_every_call(method: Callable[[], Method], name: str) -> None:
    wanted = sample(network, TABLES[name], Keyed(SHAPE, 3, 3), method(), dtype=torch.float64)
    found = sample(network, TABLES[name], OneMemory(), method(), dtype=torch.float64)
    assert torch.equal(found.sample, wanted.sample)
