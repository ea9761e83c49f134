# SPDX-License-Identifier: Apache-2.0
"""Every method on a device that is not the CPU: the same sample, with few waits for the device and few copies.

The device's kernels are the CPU's, so samples in float64 may differ by the order of sums at most, as between any two runs
(`EXACT` of problems.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import double
import pytest
import torch
from problems import EXACT, METHODS, SHAPE, TABLES, fitted, gap, network
from torch import Tensor

import paradiff
from paradiff import Evaluator, Keyed, Recorded, Solution, Table
from paradiff.chain import Noise
from paradiff.methods.window.corrector import underdamped_langevin
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler_ancestral
from paradiff.solver import Batch, Method, drive, solve
from paradiff.solver.identity import identity_of
from paradiff.solver.protocol import EditedOutputs
from paradiff.solver.solution import Status

ROUNDED = 64 * torch.finfo(torch.float32).eps
"""What states in float32 may differ by, relative to the largest: sums of a few terms in another order, at each of 12 nodes."""
COPIES = 16
"""Copies between host and device that a round may make, for any window: indices, coefficients, noises, numbers."""


def on(device: str, denoiser: Callable[..., Tensor], table: Table, method: Method, noise: Noise, **options: object) -> Solution:
    return paradiff.sample(Evaluator(denoiser, device=device), table, noise, method, **{"dtype": torch.float64, **options})


def beside(
    table: Table, method: Method, noise: Callable[[], Noise], denoiser: Callable[..., Tensor] = network, **options: object
) -> tuple[Solution, double.Counts]:
    """A run on the device, seen to give what one on the CPU gives; and what was counted in it, without a check of rows."""
    wanted = on("cpu", denoiser, table, method, noise(), check="off", **options)
    with double.counting() as counts:
        found = on("pseudo", denoiser, table, method, noise(), check="off", **options)
    assert found.sample.device.type == "pseudo"
    assert gap(found.sample.cpu(), wanted.sample) < EXACT
    assert (found.rounds, found.evaluations) == (wanted.rounds, wanted.evaluations)
    return found, counts


def within_budget(found: Solution, counts: double.Counts, waits: int, samples: int, ends: int = 0) -> None:
    """Waits a round, beside those at each sample's end, and copies a round."""
    assert counts.waits <= waits * found.rounds + ends * samples, f"too many waits:\n{counts}"
    assert counts.blocking == 0, f"copies that block:\n{counts}"
    assert counts.copies <= COPIES * samples * found.rounds, f"too many copies:\n{counts}"


def tables_for(name: str) -> Iterable[str]:
    """Two tables in turn, so that each method meets both kinds of chains, and each table several methods."""
    first = 2 * list(METHODS).index(name)
    return [list(TABLES)[(first + k) % len(TABLES)] for k in (0, 7)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_its_sample_within_its_budget(name: str) -> None:
    for table in (TABLES[table] for table in tables_for(name)):
        method = fitted(METHODS[name](table), table, 5)
        found, counts = beside(table, method, lambda: Keyed(SHAPE, 3, 2))
        within_budget(found, counts, 1, 2, ends=int(name.startswith(("parataa", "quasi_deer"))))  # whether it fell back


@pytest.mark.parametrize("secants", [1, 3])
def test_pairs_of_a_multistep_sampler_wait_once_a_round(secants: int) -> None:
    method = paradiff.quasi_newton(window=6, tolerance=0.0, secants=secants)
    for table in (TABLES["dpmpp_2m restarted"], TABLES["heun"]):
        found, counts = beside(table, method, lambda: Keyed(SHAPE))
        within_budget(found, counts, 1, 1)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("max_rows", [None, 4])
def test_padded_calls_with_conditioning_wait_for_nothing(samples: int, max_rows: int | None) -> None:
    """Rows of one sample share one row of conditioning, those of two have copies; both are chosen on the host."""
    table, method = TABLES["ddpm"], paradiff.quasi_newton(window=6, tolerance=1e-6)
    rows, shapes = torch.linspace(0, 1, 4 * samples, dtype=torch.float64).view(samples, 2, 2), set[tuple[int, ...]]()

    def conditioned(x: Tensor, t: Tensor, y: Tensor, prefix: Tensor) -> Tensor:
        shapes.add((len(x), y.stride(0)) if len(x) > 1 else (1, 0))
        return network(x, t) + y.mean((1, 2))[:, None, None] + prefix.mean()

    def run(device: str, **options: bool) -> Solution:
        given = {"conditioning": {"y": rows.to(device)}, "shared": {"prefix": torch.ones(3).to(device)}}
        evaluator = Evaluator(conditioned, device=device, max_rows=max_rows, **given, **options)  # pyright: ignore[reportArgumentType]
        return paradiff.sample(evaluator, table, Keyed(SHAPE, 3, samples), method, dtype=torch.float64, check="off")

    wanted = run("cpu")
    shapes.clear()
    with double.counting() as counts:
        found = run("pseudo", pad=True)
    assert gap(found.sample.cpu(), wanted.sample) < EXACT
    assert len(shapes) <= 4
    assert counts.of("wait", under="solver/evaluator.py") == 0, counts
    assert counts.blocking <= 2  # the conditioning's own way to the device, in this test
    assert counts.waits - counts.blocking <= found.rounds + samples + 1, counts


CHAINS = {
    "ddim": ddim(paradiff.Schedule.linear(), 64),
    "ddpm": ddpm(paradiff.Schedule.linear(), 64),
    "dpmpp_2m": dpmpp_2m(paradiff.Schedule.linear(), 64),
    "euler_ancestral": euler_ancestral(paradiff.Schedule.scaled_linear(), 64),
}
FURTHER: dict[str, Callable[[], Method]] = {
    "srds": lambda: paradiff.srds(),
    "srds, two-step, in a window": lambda: paradiff.srds(window=4, coarse=2),
    "srds, batched": lambda: paradiff.srds(ordering="batched"),
    "collocation": lambda: paradiff.collocation(),
    "collocation, in a window": lambda: paradiff.collocation(window=8, tolerance=1e-2),
    "collocation, verified": lambda: paradiff.collocation(exact=True),
    "parasolver, stride 4": lambda: paradiff.parasolver(window=4, stride=4),
    "paradigms": lambda: paradiff.paradigms(window=16),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", FURTHER)
def test_long_chains_keep_within_their_budgets(name: str, chain: str) -> None:
    table, method = CHAINS[chain], FURTHER[name]()
    found, counts = beside(table, method, lambda: Keyed((4, 4)), mild)
    within_budget(found, counts, 2 if name.startswith("collocation") else 1, 1, ends=int(name.startswith("srds")))


def mild(x: Tensor, t: Tensor) -> Tensor:
    """The noise estimate of data of variance 1/4, bent a little."""
    level = (t.to(x.dtype) / 1000).view(-1, 1, 1)
    return x * level.sqrt() + 0.1 * torch.sin(3 * x) * (1 - level)


@pytest.mark.parametrize("device", ["cpu", "pseudo", "pseudo:1"])
@pytest.mark.parametrize("several", [False, True])
def test_recorded_noise_comes_from_generators_of_any_device(device: str, several: bool) -> None:
    def noise() -> Noise:
        made = [torch.Generator(device).manual_seed(seed) for seed in (4, 5)]
        return Recorded(SHAPE, made) if several else Recorded(SHAPE, made[0], 2)

    table = TABLES["ddpm"]
    wanted = torch.randn((2, *SHAPE), generator=torch.Generator(device).manual_seed(4), device=device)
    assert torch.equal(noise().start(0), wanted[0]) or several
    found, counts = beside(table, paradiff.quasi_newton(window=5, tolerance=0.0), noise)
    if device != "pseudo:1":  # the second device's noises are moved to the first, where states live
        within_budget(found, counts, 1, 2)
    else:
        assert counts.of("between devices") > 0


def test_a_call_that_runs_out_of_memory_is_made_in_parts() -> None:
    table, method, row = TABLES["ddim"], paradiff.parasolver(window=8, tolerance=0.0), 64 * 64 * 8
    most = 0

    def hungry(x: Tensor, t: Tensor) -> Tensor:
        nonlocal most
        torch.zeros(8 * x.numel(), dtype=x.dtype, device=x.device)  # what the network needs within
        most = max(most, len(x))
        return network(x, t)

    wanted = on("cpu", hungry, table, method, Keyed((64, 64)), check="off")
    evaluate = Evaluator(hungry, device="pseudo")
    most = 0
    with double.limited(70 * row):
        found = paradiff.sample(evaluate, table, Keyed((64, 64)), method, dtype=torch.float64, check="off")
    assert evaluate.max_rows is not None
    assert most <= evaluate.max_rows < 8
    assert gap(found.sample.cpu(), wanted.sample) < EXACT
    assert found.rounds == wanted.rounds
    with double.limited(12 * row), pytest.raises(torch.OutOfMemoryError, match="pseudo out of memory"):
        paradiff.sample(evaluate, table, Keyed((64, 64)), method, dtype=torch.float64, check="off")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision(dtype: torch.dtype) -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype
        return network(x.float(), t).to(dtype)

    table, method = TABLES["ddim"], paradiff.parasolver(window=5)
    samples = []
    for device in ("cpu", "pseudo"):
        evaluate = Evaluator(half, device=device, dtype=dtype, max_rows=3)
        samples.append(paradiff.sample(evaluate, table, Keyed(SHAPE), method).sample.cpu())
    assert gap(samples[1], samples[0]) < ROUNDED


def test_conditioning_may_stay_on_the_host() -> None:
    def conditioned(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x + y.to(x.device, x.dtype)[:, None, None], t)

    table, method, labels = TABLES["ddim"], paradiff.parasolver(window=5, tolerance=0.0), torch.tensor([0, 1])
    wanted = paradiff.sample(Evaluator(conditioned, conditioning={"y": labels}), table, Keyed(SHAPE, 0, 2), method)
    for place in ("cpu", "pseudo"):
        evaluate = Evaluator(conditioned, conditioning={"y": labels.to(place)}, device="pseudo")
        found = paradiff.sample(evaluate, table, Keyed(SHAPE, 0, 2), method)
        assert gap(found.sample.cpu(), wanted.sample) < ROUNDED
    with double.counting() as counts:
        paradiff.sample(evaluate, table, Keyed(SHAPE, 0, 2), method, check="off")
    assert counts.blocking == 0, str(counts)


def test_members_share_a_window_and_states_are_edited() -> None:
    """What pipelines ask of the solver: a batch of members with one window, and states that the caller changes."""
    table, found = TABLES["ddpm"], []
    for device in ("cpu", "pseudo"):
        noise = Keyed((2, *SHAPE), 1)
        solver = solve(table, noise, paradiff.quasi_newton(window=5), device=device, dtype=torch.float64, shared_window=True)

        def edited(batch: Batch) -> EditedOutputs:
            states, times = batch.x.clamp(-1.5, 1.5), batch.t.to(batch.x.device, non_blocking=True)
            return EditedOutputs(network(states.flatten(0, 1), times.repeat_interleave(2)).view_as(states), states)

        with double.counting() as counts:
            solution = drive(solver, edited, check="off")
        found.append(solution.sample.cpu())
        assert counts.waits <= solution.rounds + 2
    assert gap(found[1], found[0]) < EXACT


def test_a_start_an_observer_and_a_corrector() -> None:
    table = TABLES["exponential_ode"]
    method = paradiff.piadm_ode(3, corrector=underdamped_langevin(steps=3, sweeps=2), tolerance=0.0)
    found, counts = beside(table, method, lambda: Keyed(SHAPE), start=torch.ones(1, *SHAPE), observer=lambda round: False)
    within_budget(found, counts, 1, 1)
    stopped, _ = beside(TABLES["ddpm"], paradiff.srds(), lambda: Keyed(SHAPE), observer=lambda round: round.number == 3)
    assert stopped.status is Status.STOPPED


def test_rows_are_checked_on_the_device() -> None:
    def centred(x: Tensor, t: Tensor) -> Tensor:
        return network(x - x.mean(0), t)

    table, method = TABLES["ddim"], paradiff.parasolver(window=5)
    assert on("pseudo", network, table, method, Keyed(SHAPE)).checked_rows > 0
    with pytest.raises(ValueError, match="rows influence each other"):
        on("pseudo", centred, table, method, Keyed(SHAPE))

    def dropping(x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.dropout(network(x, t), 0.5)

    with pytest.raises(ValueError, match="draws random numbers"):
        on("pseudo", dropping, table, method, Keyed(SHAPE))


def test_what_a_model_consists_of_is_read_without_a_wait_and_its_values_are_compared_with_one() -> None:
    """Weights that are written through `.data`, of which torch counts no version, are seen to change."""
    model = torch.nn.Linear(4, 4).to("pseudo")
    with double.counting() as counts:
        before, same = identity_of(model), identity_of(model)
        assert before is not None
        assert same is not None
        assert before.same(same)
    assert not counts.lines
    assert before.alike(same)
    model.weight.data.mul_(1.01)
    after = identity_of(model)
    assert after is not None
    assert before.same(after)
    assert not before.alike(after)
