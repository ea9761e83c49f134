# SPDX-License-Identifier: Apache-2.0
"""Chains that jump back: the published loops with their known elements, and every method on them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from packaging.version import Version
from pipelines import tiny_unet
from torch import Tensor

from paradiff import (
    Keyed,
    Method,
    Recorded,
    Schedule,
    Table,
    collocation,
    parallelize,
    parasolver,
    parataa,
    quasi_newton,
    sample,
    sequential,
    srds,
)
from paradiff.chain import Clip, Correlated
from paradiff.chain.draws import Draws
from paradiff.models import Masked, load
from paradiff.samplers import alphafold3, ddim, ddpm, dpmpp_2m, edm, euler_ancestral, repaint, with_jumps

LINEAR, SHAPE = Schedule.linear(), (2, 6)
MASK = torch.arange(12).view(SHAPE) % 3 > 0
KNOWN = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
METHODS: dict[str, Method] = {
    "sequential": sequential(),
    "parasolver": parasolver(window=8, tolerance=0.0),
    "quasi_newton": quasi_newton(window=7, tolerance=0.0),
    "parataa": parataa(window=7, tolerance=0.0, noise_tolerance=0.0),
    "srds": srds(blocks=4, iterations=4),
    "collocation": collocation(tolerance=1e-9),
}


def net(x: Tensor, t: Tensor) -> Tensor:
    """Elements look at their neighbours, so that what is shown elsewhere matters."""
    return 0.5 * x + torch.tanh(0.5 * x.roll(1, -1)) + 0.1 * (t.to(x)[:, None, None] / 1000)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inpainting(table: Table) -> Masked:
    return Masked(table, Recorded(SHAPE, generator()), MASK, KNOWN, noised=True)


def published(steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The times of algorithm 1, as figure 9 of the paper draws them, with -1 for the clean datum."""
    jumps = {level: jump_n_sample - 1 for level in range(0, steps - jump_length, jump_length)}
    time, times = steps - 1, [steps - 1]
    while time >= 0:
        time -= 1
        times.append(time)
        if jumps.get(time, 0) > 0:
            jumps[time] -= 1
            times += [time + k for k in range(1, jump_length + 1)]
            time += jump_length
    return times


def textbook(steps: int, jump_length: int, jump_n_sample: int) -> tuple[Tensor, int]:
    """RePaint on DDPM (Ho et al. 2020, algorithm 2), every `1000 // steps`-th time, and its network calls."""
    bars = torch.cat(
        [torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)[:: 1000 // steps], torch.ones(1)]
    )
    own, calls = generator(), 0
    draw = lambda: randn_tensor((1, *SHAPE), generator=own)[0].double()  # noqa: E731
    x, times = draw(), published(steps, jump_length, jump_n_sample)
    for time, after in itertools.pairwise(times):
        bar, other = float(bars[time]), float(bars[after])
        if after > time:
            x = math.sqrt(other / bar) * x + math.sqrt(1 - other / bar) * draw()
            continue
        epsilon = net(x[None], torch.tensor([time * (1000 // steps)]))[0]
        calls += 1
        beta = 1 - bar / other
        mean = (x - beta / math.sqrt(1 - bar) * epsilon) / math.sqrt(1 - beta)
        z = draw()
        known = math.sqrt(other) * KNOWN + math.sqrt(1 - other) * z
        x = torch.where(MASK, mean + math.sqrt(beta * (1 - other) / (1 - bar)) * z, known)
    return x, calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("jumps", [(10, 3, 3), (12, 5, 2), (9, 8, 2), (8, 2, 1)])
def test_a_chain_with_jumps_is_the_papers_loop(jumps: tuple[int, int, int], method: str) -> None:
    steps, length, times = jumps
    table = with_jumps(ddpm(LINEAR, steps), jump_length=length, jump_n_sample=times)
    masked = inpainting(table)
    found = sample(masked.model(net), table, masked.kept(), METHODS[method], dtype=torch.float64)
    wanted, calls = textbook(steps, length, times)
    assert table.steps == calls
    torch.testing.assert_close(masked.placed(found.sample)[0], wanted, rtol=1e-6, atol=1e-6)


def scheduled(scheduler: diffusers.RePaintScheduler, steps: int, length: int, times: int) -> Tensor:
    """The loop of RePaintPipeline, in float64."""
    scheduler.set_timesteps(steps, length, times)
    own = generator()
    x = randn_tensor((1, *SHAPE), generator=own).double()
    last = int(scheduler.timesteps[0]) + 1
    for t in scheduler.timesteps.tolist():
        if t < last:
            output = net(x, torch.tensor([t])).float()
            x = scheduler.step(output, t, x, KNOWN[None], (~MASK)[None].double(), own)[0]
        else:
            x = scheduler.undo_step(x.float(), last, own).double()
        last = t
    return x[0]


@pytest.mark.skipif(
    Version(diffusers.__version__).release[:2] == (0, 32),
    reason="diffusers 0.32 alone scales the noise of known elements by its variance",
)
@pytest.mark.parametrize("clip", [None, Clip(1.0)], ids=["free", "clipped"])
@pytest.mark.parametrize("case", [(10, 3, 3, 0.0), (12, 5, 2, 1.0), (50, 10, 2, 0.5), (1000, 600, 1, 1.0)])
def test_a_repaint_chain_is_that_of_diffusers_scheduler(case: tuple[int, int, int, float], clip: Clip | None) -> None:
    steps, length, times, eta = case
    table = repaint(LINEAR, steps, eta=eta, jump_length=length, jump_n_sample=times, clip=clip)
    scheduler = diffusers.RePaintScheduler(eta=eta, clip_sample=clip is not None)
    masked = inpainting(table)
    found = sample(masked.model(net), masked.table, masked.kept(), quasi_newton(window=20, tolerance=0.0), dtype=torch.float64)
    wanted = scheduled(scheduler, steps, length, times)
    torch.testing.assert_close(masked.placed(found.sample)[0], wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The preprocess method is deprecated:FutureWarning")
def test_diffusers_pipeline_is_called_plainly_with_its_reason_and_its_picture_is_found_in_parallel() -> None:
    scheduler = diffusers.RePaintScheduler(clip_sample=False)
    unet = tiny_unet()
    size = unet.config["sample_size"]
    shape = (unet.config["in_channels"], size, size)
    pipe = diffusers.RePaintPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand((1, *shape), generator=generator(7)) * 2 - 1
    hidden = torch.zeros(1, *shape, dtype=torch.bool)
    hidden[..., size // 2 :] = True
    call = {"image": image, "mask_image": (~hidden).float(), "num_inference_steps": 8, "jump_length": 2, "jump_n_sample": 2}
    plain = pipe(**call, generator=generator(), output_type="np", return_dict=False)[0]
    run = parallelize(pipe, quasi_newton())
    with pytest.warns(RuntimeWarning, match="its passes leave t_last to the next one"):
        found = run(**call, generator=generator(), output_type="np").images
    assert (found == plain).all()
    table = repaint(LINEAR, 8, jump_length=2, jump_n_sample=2)
    masked = Masked(table, Recorded(shape, generator()), hidden, image, noised=True)
    solution = sample(masked.model(lambda x, t: unet(x, t).sample), table, masked.kept(), quasi_newton(tolerance=1e-4))
    picture = (masked.placed(solution.sample) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert solution.rounds < table.steps
    assert float((picture - torch.from_numpy(plain)).abs().max()) < 1e-3


def test_a_slice_goes_on_with_the_known_elements_of_its_chain() -> None:
    table = with_jumps(ddpm(LINEAR, 10), jump_length=3, jump_n_sample=2)
    masked = inpainting(table)
    whole = masked.placed(sample(masked.model(net), table, masked.kept(), sequential(), dtype=torch.float64).sample)
    begin = 6
    head = inpainting(table[:begin])
    reached = sample(head.model(net), table[:begin], head.kept(), sequential(), dtype=torch.float64).sample
    rest = inpainting(table[begin:])
    found = sample(rest.model(net), table[begin:], rest.kept(), parasolver(tolerance=0.0), start=reached, dtype=torch.float64)
    torch.testing.assert_close(rest.placed(found.sample), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "noise", [Keyed(SHAPE, 3), Correlated.autoregressive(Keyed(SHAPE, 3), 0.9, axis=1)], ids=["white", "ar"]
)
def test_keyed_noise_shows_known_elements_at_the_level_that_a_jump_reaches(noise: Keyed | Correlated) -> None:
    """Also where that is not the level of the next node, as with diffusers' jumps."""
    table = repaint(LINEAR, 100, eta=1.0, jump_length=10, jump_n_sample=3)
    seen: list[Tensor] = []

    def spied(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[0])
        return net(x, t)

    masked = Masked(table, noise, MASK, KNOWN, noised=True)
    sample(masked.model(spied), table, masked.kept(), sequential(), check="off")
    level = torch.cat([torch.tensor([[0.0, 1.0]]), table.reached[:-1]])
    known = ~MASK
    own = torch.stack([(x.double() - a * KNOWN) / s for x, (a, s) in zip(seen, level, strict=True)])[:, known]
    assert float(own.std()) == pytest.approx(1, abs=0.05)
    assert float(own.mean()) == pytest.approx(0, abs=0.1)
    pair = float(torch.corrcoef(own.T)[0, 1])  # elements 0 and 3 of the first row
    assert pair == pytest.approx(0.9**3 if isinstance(noise, Correlated) else 0, abs=0.12)
    jumped = (table.c > 0) & ((table.reached[:, 1] - table.sigma[1:]).abs() > 1e-4)
    assert bool(jumped.any())


def test_two_samples_of_keyed_noise_do_not_share_what_they_are_shown() -> None:
    """A sample is the same beside others as by itself, whatever its place."""
    table = with_jumps(ddpm(LINEAR, 10), jump_length=3, jump_n_sample=2)

    def drawn(seeds: list[int]) -> Tensor:
        masked = Masked(table, Keyed(SHAPE, seeds), MASK, KNOWN, noised=True)
        return masked.placed(sample(masked.model(net), table, masked.kept(), sequential(), dtype=torch.float64).sample)

    both, one = drawn([4, 9]), drawn([9])
    torch.testing.assert_close(both[1], one[0], rtol=0, atol=1e-12)
    assert float((both[0] - both[1])[MASK].abs().max()) > 0.1


def test_collocation_leaves_jumps_to_the_window_method_and_says_why() -> None:
    table = with_jumps(ddpm(LINEAR, 30, prediction="sample"), jump_length=5, jump_n_sample=2)
    masked = Masked(table, Keyed(SHAPE), MASK, KNOWN)
    found = sample(masked.model(net), table, masked.kept(), collocation())
    assert "the signal-to-noise ratio does not rise from node" in found.message
    plain = sample(masked.model(net), table, masked.kept(), sequential())
    assert float((found.sample - plain.sample).abs().max()) < 4e-3
    for target in ("ode", "sde"):
        with pytest.raises(ValueError, match="goes back up to more noise at node 9"):
            sample(lambda x, t: torch.tanh(x), table, Keyed(SHAPE), collocation(target=target))


def test_half_a_digit_is_inpainted_within_its_estimates() -> None:
    digits = load("digits")
    table = with_jumps(digits.table("ddpm", 30), jump_length=5, jump_n_sample=3)
    noise = Recorded(digits.shape, [generator(s) for s in (60, 61)])
    hidden = torch.zeros(digits.shape, dtype=torch.bool)
    hidden[:, 4:] = True
    masked = Masked(table, noise, hidden, torch.full(digits.shape, -1.0), noised=True)
    plain = masked.placed(sample(masked.model(digits), table, masked.kept(), sequential(), check="off").sample)
    for method in (quasi_newton(window=32), parasolver(window=32), srds()):
        found = sample(masked.model(digits), table, masked.kept(), method, check="off")
        errors = (masked.placed(found.sample) - plain)[:, hidden].square().mean(1).sqrt().tolist()
        assert found.rounds < 0.75 * table.steps
        assert all(e <= told.estimated_error for e, told in zip(errors, found.error_estimates, strict=True)), method.name


def test_a_chain_with_jumps_draws_in_the_dtype_of_its_table() -> None:
    """A scheduler that draws in single precision whatever its states are of, as recorded."""
    table = ddpm(Schedule.linear(), 20, clip=None)
    shape = (4, 6)  # as many numbers of one dtype have other bits than those of the other
    counts, terms = (1,) * 20, tuple(((k, 1.0),) if c > 0 else () for k, c in enumerate(table.c.tolist()))
    own = Draws("SingleScheduler", counts, terms, dtypes=((torch.float64, torch.float32),))
    for base, dtype in ((table, torch.float64), (dataclasses.replace(table, draws=own), torch.float32)):
        jumps = with_jumps(base, jump_length=3, jump_n_sample=2)
        noise = Recorded(shape, generator(), dtype=torch.float64).along(jumps.draws)
        loop = generator()
        torch.randn((1, *shape), generator=loop, dtype=torch.float64)  # the start's own
        wanted = torch.randn((1, *shape), generator=loop, dtype=dtype)
        torch.testing.assert_close(noise.draw(0, range(1)).double(), wanted.double())


def test_jumps_that_are_none_are_refused() -> None:
    table = ddpm(LINEAR, 10)
    for call, what in (
        (lambda: with_jumps(None), "the table is None; jumps are those of a whole chain"),  # type: ignore[arg-type]
        (lambda: with_jumps(dpmpp_2m(LINEAR, 10), jump_length=2), "reads one step back"),
        (lambda: with_jumps(table[3:], jump_length=2), "jumps are those of a whole chain"),
        (
            lambda: with_jumps(table),
            "jump_length is 10; it must be a whole number, at least 1 and at most 9, the steps of the chain",
        ),
        (lambda: with_jumps(table, jump_length=0), "jump_length is 0"),
        (lambda: with_jumps(table, jump_length=2, jump_n_sample=0), "jump_n_sample is 0"),
        (lambda: with_jumps(table, jump_length=2.5), "jump_length is 2.5"),  # type: ignore[arg-type]
        (lambda: with_jumps(ddpm(LINEAR, 1), jump_length=1), "a chain of one step has no room for jumps"),
        (lambda: with_jumps(edm(8, solver="euler", s_churn=4.0), jump_length=2), "draws its noise as EDM does"),
        (lambda: with_jumps(with_jumps(table, jump_length=2), jump_length=2), "draws its noise as RePaint does"),
        (lambda: repaint(LINEAR, 10), "jump_length is 10"),
        (lambda: repaint(LINEAR, 20, eta=2.0), "eta is 2.0"),
    ):
        with pytest.raises(ValueError, match=what):
            call()
    assert with_jumps(euler_ancestral(LINEAR, 10), jump_length=2, jump_n_sample=2).steps > 10
    assert with_jumps(ddim(LINEAR, 10), jump_length=2, jump_n_sample=2).stochastic
    assert not alphafold3(4).draws.given  # type: ignore[union-attr]
