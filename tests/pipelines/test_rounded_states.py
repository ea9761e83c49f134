# SPDX-License-Identifier: Apache-2.0
"""Loops whose states are rounded: how far the plain call's sample may be is told, of states of 16 bits and of huge levels."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import pytest
import torch
from tiny import CASES
from torch import nn

from paradiff import Method, collocation, paradigms, parallelize, parasolver, quasi_newton, sequential, srds
from paradiff.solver import Status

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' own
CALL: dict[str, Any] = {"num_inference_steps": 20}
TOLD = re.compile(r"rounds its states to (b?float16) in each step, .* may differ by ([\d.e+-]+) more than is told")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sd_euler_ancestral", "sd_dpmpp_2m"])
def test_the_plain_calls_sample_is_as_near_as_is_told(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    plain = case.run(case.make().to(dtype), 3, **CALL).float()
    with parallelize(pipe := case.make().to(dtype), parasolver(window=6)) as run:
        found = case.run(pipe, 3, **CALL).float()
    report = run.report
    said = [match for match in map(TOLD.search, report.warnings) if match is not None]
    assert [match[1] for match in said] == [str(dtype).removeprefix("torch.")]
    error = float((found - plain).square().mean().sqrt())
    assert 2 * report.error_estimate.estimated_error < error  # which is why it is told
    assert error <= 2 * report.error_estimate.estimated_error + float(said[0][2])


def test_nothing_is_told_of_states_of_32_bits() -> None:
    with parallelize(pipe := CASES["sd"].make(), parasolver(window=6)) as run:
        CASES["sd"].run(pipe, 3, **CALL)
    assert not [note for note in run.report.warnings if TOLD.search(note)]


EXTREME = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("method", [parasolver(window=6), quasi_newton()])
@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_dynamic_cfg"])
def test_what_a_loop_rounds_by_itself_is_told(name: str, method: Method) -> None:
    """Its scheduler's results are float32, and it casts them to the network's dtype."""
    case, options = CASES[name], {"output_type": "latent"}
    plain = case.run(case.make().to(torch.bfloat16), 5, **options).double()
    with parallelize(pipe := case.make().to(torch.bfloat16), method) as run:
        found = case.run(pipe, 5, **options).double()
    said = [match for match in map(TOLD.search, run.report.warnings) if match is not None]
    assert [match[1] for match in said] == ["bfloat16"]
    error = float((found - plain).square().mean().sqrt())
    assert 2 * run.report.error_estimate.estimated_error < error < float(said[0][2]) < 10 * error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_chains_of_huge_levels_make_of_states_of_16_bits_is_told(dtype: torch.dtype) -> None:
    """A first step from a signal level of 1/10,000: the sample is its rounding, and a step's own is far less."""
    case, steps = CASES["sd"], {"num_inference_steps": 8}
    pipes = [case.make().to(dtype) for _ in range(2)]
    for pipe in pipes:
        pipe.scheduler = diffusers.PNDMScheduler(**EXTREME, timestep_spacing="trailing")
    plain = case.run(pipes[0], 3, **steps).double()
    with parallelize(pipes[1], parasolver(window=6)) as run:
        found = case.run(pipes[1], 3, **steps).double()
    said = [float(match[2]) for match in map(TOLD.search, run.report.warnings) if match is not None]
    error = float((found - plain).square().mean().sqrt())
    assert 50 * torch.finfo(dtype).eps * float(plain.square().mean().sqrt()) < error < said[0] < 10 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [quasi_newton(), srds(), collocation(), sequential(), paradigms(tolerance=0.0)])
def test_chains_of_huge_levels_tell_what_rounding_leaves(method: Method, dtype: torch.dtype) -> None:
    """A state of noise level 20,000 becomes one of 2 in one step, whose rounding the next one multiplies by 4,000."""
    case, steps = CASES["sd"], {"num_inference_steps": 4}
    pipes = [case.make().to(dtype) for _ in range(2)]
    for pipe in pipes:
        pipe.scheduler = diffusers.HeunDiscreteScheduler(**EXTREME)
    plain = case.run(pipes[0], 3, **steps)
    with parallelize(pipes[1], method, dtype=dtype) as run:
        found = case.run(pipes[1], 3, **steps)
    report, error = run.report, float((found - plain).square().mean().sqrt())
    told = report.error_estimate.estimated_error
    if dtype == torch.float64:
        assert error < 1e-6
        assert told < 0.01
        assert "rounding" not in report.message
    else:
        assert 1 < error <= told < 10 * error
        assert report.status is not Status.EXACT
        assert "rounding in float32" in report.message


STRONG = {"guidance_scale": 7.5, "num_inference_steps": 6}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_guidance_makes_of_networks_of_16_bits_is_told(name: str) -> None:
    """A step's output has 7.5 times the difference of two that are rounded each, and the chain takes differences of it."""
    case = CASES[name]
    pipes = [case.make().to(torch.bfloat16) for _ in range(2)]
    for pipe in pipes:
        pipe.scheduler = diffusers.DPMSolverSinglestepScheduler.from_config(pipe.scheduler.config, use_beta_sigmas=True)
    plain = case.run(pipes[0], 503, **STRONG).double()
    with parallelize(pipes[1], parasolver(window=6)) as run:
        found = case.run(pipes[1], 503, **STRONG).double()
    said = [float(match[2]) for match in map(TOLD.search, run.report.warnings) if match is not None]
    error = float((found - plain).square().mean().sqrt())
    assert error < said[0] < 10 * error


@pytest.mark.parametrize("method", [srds(tolerance=1e-3), quasi_newton(tolerance=1e-3)])
def test_a_schedulers_own_rounding_of_samples_that_stay_huge_is_told(method: Method) -> None:
    """The network takes no noise out, so that states of 20,000 enter a last step that divides by a level of 0.006."""
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
    with torch.no_grad():
        network[0].weight.copy_(torch.linspace(-0.4, 0.4, 16).view(4, 4, 1, 1))
        network[0].bias.copy_(torch.linspace(-0.2, 0.3, 4))

    @torch.no_grad()
    def loop(x: torch.Tensor, scheduler: diffusers.HeunDiscreteScheduler) -> torch.Tensor:
        scheduler.set_timesteps(15)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x).prev_sample
        return x

    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    made = [diffusers.HeunDiscreteScheduler(beta_schedule="squaredcos_cap_v2", use_beta_sigmas=True) for _ in range(2)]
    plain = loop(x, made[0])
    run = parallelize(loop, method)
    found, report = run(x, made[1]), run.report
    error, told = float((found - plain).square().mean().sqrt()), report.error_estimate.estimated_error
    assert report.executor == "vector"
    assert 0.5 < error <= told < 200 * error
    assert "rounding in float32" in report.message


class Small(nn.Module):
    """A network whose layers autocast rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 48), nn.Linear(48, 16)
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x) + torch.cos(torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1) / 300)))


OUTPUTS = re.compile(r"rounds what its outputs become to bfloat16 in each step, .* may differ by ([\d.e+-]+) more than is told")
SCHEDULERS = ["PNDMScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("casts", [True, False])
@torch.no_grad()
def test_what_a_step_makes_of_outputs_of_16_bits_is_told(name: str, seed: int, casts: bool) -> None:
    """As autocast makes them of a loop whose states have 32: that its rounds came to rest says nothing of it."""

    def made() -> tuple[Any, Small, Any]:
        scheduler, network = getattr(diffusers, name)(), Small()
        scheduler.set_timesteps(20)

        def loop(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for t in scheduler.timesteps:
                    v = network(scheduler.scale_model_input(x, t), t)
                    x = scheduler.step(v.float() if casts else v, t, x.float())[0]
            return x.float()

        return scheduler, network, loop

    scheduler, network, loop = made()
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    plain = loop(x.clone())
    scheduler, network, loop = made()
    run = parallelize(loop, quasi_newton(8), scheduler=scheduler, networks=[network])
    found = run(x.clone())
    report, error = run.report, float((found - plain).square().mean(1).sqrt().max())
    said = [float(match[1]) for match in map(OUTPUTS.search, report.warnings) if match is not None]
    assert report.executor != "sequential"
    assert len(said) == (not casts)
    assert error <= 2 * report.error_estimate.estimated_error + sum(said)
    assert sum(said) < 0.02 * float(plain.std())
