# SPDX-License-Identifier: Apache-2.0
"""Tables that are made while torch's default device is another: the same ones, on the CPU.

`meta` stands for any other device. Its tensors have no numbers, so that nothing could be made of one by chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from test_probe_schedulers import CASES, pytestmark
from torch import Tensor

from paradiff import Schedule, Table, samplers
from paradiff.chain.table import equal
from paradiff.models.exact import Gaussian
from paradiff.models.pixel import load
from paradiff.models.plane import Plane
from paradiff.models.policy import load_policy
from paradiff.planning import Theory
from paradiff.samplers import (
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    exponential_integrator,
    flow_euler,
    from_scheduler,
    heun,
    log_snr_grid,
    ornstein_uhlenbeck,
    paper_grid,
    rectified_flow,
    uniform_grid,
    variance_exploding,
    variance_preserving,
)
from paradiff.samplers.continuum import continuum
from paradiff.samplers.schedule import zero_snr_betas

assert pytestmark  # what diffusers says of itself is passed over here, too

S = Schedule.linear
MADE: dict[str, Callable[[], Any]] = {
    "Schedule": S,
    "Schedule.scaled_linear": Schedule.scaled_linear,
    "Schedule.cosine": lambda: Schedule.cosine(rescale_zero_snr=True),
    "Schedule, betas of the default device": lambda: Schedule([0.1, 0.2, 0.3]),  # pyright: ignore[reportArgumentType]
    "zero_snr_betas": lambda: zero_snr_betas(S().betas),
    "ddim": lambda: ddim(S(), 10),
    "ddim, stride": lambda: ddim(S(), 9, eta=0.5, landing="stride", spacing="linspace", set_alpha_to_one=False),
    "ddpm": lambda: ddpm(S(), 10),
    "ddpm, large": lambda: ddpm(S(), 10, variance="fixed_large", spacing="trailing"),
    "dpmpp_2m": lambda: dpmpp_2m(S(), 10),
    "dpmpp_2m, karras": lambda: dpmpp_2m(S(), 10, karras=True, restarts=(4,)),
    "euler": lambda: euler(S(), 10),
    "euler, karras": lambda: euler(S(), 10, karras=True, final="sigma_min"),
    "euler_ancestral": lambda: euler_ancestral(S(), 10),
    "heun": lambda: heun(S(), 10, spacing="leading"),
    "edm": lambda: samplers.edm(6, s_churn=3.0, preconditioned=True),
    "edm, midpoint": lambda: samplers.edm(6, solver="midpoint", s_churn=3.0),
    "dpmpp_2s": lambda: samplers.dpmpp_2s(6, eta=1.0),
    "alphafold3": lambda: samplers.alphafold3(10),
    "with_noise_scale": lambda: samplers.with_noise_scale(ddpm(S(), 10), 0.6),
    "with_jumps": lambda: samplers.with_jumps(ddpm(S(), 10), jump_length=3, jump_n_sample=2),
    "repaint": lambda: samplers.repaint(S(), 10, jump_length=3, jump_n_sample=2, eta=0.5),
    "flow_euler": lambda: flow_euler(10, shift=3.0),
    "Grid": lambda: samplers.Grid([3.0, 2.0, 1.0], [0, 2]).u,  # pyright: ignore[reportArgumentType]
    "uniform_grid": lambda: uniform_grid(5.0, 0.1, 2, 3).u,
    "log_snr_grid": lambda: log_snr_grid(5.0, 0.1, 2, 3, clean=True).u,
    "paper_grid": lambda: paper_grid(3, 0.2, 0.1).u,
    "exponential_integrator, ornstein_uhlenbeck": lambda: exponential_integrator(ornstein_uhlenbeck(), paper_grid(3, 0.2, 0.1)),
    "rectified_flow": lambda: exponential_integrator(rectified_flow(), log_snr_grid(5.0, 0.1, 2, 3, clean=True), form="clean"),
    "variance_exploding": lambda: exponential_integrator(variance_exploding(0.01, 50.0), uniform_grid(5.0, 0.1, 2, 3)),
    "variance_preserving": lambda: exponential_integrator(
        variance_preserving(S()), uniform_grid(5.0, 0.1, 2, 3), times="nearest", form="epsilon"
    ),
    "continuum, ode": lambda: continuum(ddim(S(), 20), "ode", 50),
    "continuum, sde": lambda: continuum(euler_ancestral(S(), 20), "sde", 50),
    "Table": lambda: ddim(S(), 10).restarts,
    "Theory": lambda: Theory("sde", 64, 0.1).grid().u,
    "of a bundled model": lambda: load("digits", device="cpu").table("ddim", 10),
    "of a bundled model, exponential": lambda: load("digits", device="cpu").exponential("exponential_ode", 10),
    "of the bundled policy": lambda: load_policy("points-policy", device="cpu").table("ddpm", 10),
    "Plane.drawn": lambda: Plane.drawn(0, 3).after(torch.zeros(3, 2, device="cpu")).observation,
}


@contextlib.contextmanager
def elsewhere(way: str) -> Iterator[None]:
    """Makes `meta` the default device, in one of the ways that torch has."""
    if way == "with":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def parts(made: Any) -> list[Any]:
    """Everything in a table or a schedule."""
    return list(vars(made).values()) if isinstance(made, Table | Schedule) else [made]


@pytest.mark.parametrize("way", ["set", "with"])
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_is_the_same_and_on_the_cpu(name: str, way: str) -> None:
    wanted = MADE[name]()
    with elsewhere(way):
        found = MADE[name]()
    assert all(part.is_cpu for part in parts(found) if isinstance(part, Tensor))
    assert equal(found, wanted)


def test_every_factory_is_tried() -> None:
    tried = " ".join([*MADE, "Process", "from_scheduler"])
    assert [name for name in samplers.__all__ if name not in tried] == []


@pytest.mark.parametrize("name", CASES)
def test_a_schedulers_table_is_the_same(name: str) -> None:
    kind, steps, kwargs, options = CASES[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
    scheduler.set_timesteps(steps)
    with elsewhere("set"):
        try:
            found = from_scheduler(scheduler, **kwargs)
        except ValueError as refusal:
            found = str(refusal)
    try:
        wanted = from_scheduler(scheduler, **kwargs)
    except ValueError as refusal:
        wanted = str(refusal)
    assert found == wanted


def test_a_closed_form_network_keeps_its_tables_levels_on_the_cpu() -> None:
    table, target = ddim(S(), 10), Gaussian(torch.zeros(3), torch.ones(3))
    with elsewhere("set"):
        network = target.denoiser(table)
    x = torch.ones(2, 3)
    assert torch.equal(network(x, table.t[:2]), target.denoiser(table)(x, table.t[:2]))
