# SPDX-License-Identifier: Apache-2.0
"""The problems and chains that methods are measured on, by name: closed forms, trained digits, trained text networks with
guidance, flow matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.noise import Recorded
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown, require_whole
from paradiff.methods.piadm import piadm_ode, piadm_sde
from paradiff.methods.presets import collocation, jacobi, parasolver, quasi_newton, srds
from paradiff.models.exact import Mixture, digits
from paradiff.models.pipeline import load_pipeline
from paradiff.models.pixel import load
from paradiff.samplers.flow import flow_euler
from paradiff.samplers.scheduler.probe import from_scheduler
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.protocol import Method

GUIDANCE = 4.0
"""The guidance scale of the text networks."""

PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow circle",
    "a blue square right of a red triangle",
    "a yellow circle below a green square",
    "a red triangle above a blue circle",
    "a green circle right of a yellow triangle",
    "a blue circle left of a green square",
    "a yellow square below a red circle",
)
"""The prompts of the text networks, which seeds take in turn."""

TRAINING = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": False}
"""The noise schedule of the closed forms, as a config of diffusers."""

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "two_stage_sde": ("KDPM2AncestralDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_3m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
}
"""Chains by name: the scheduler class of diffusers, and the options in which it differs from the model's config."""

RIVALS = ("dpmpp_2m", "unipc", "unipc_karras", "dpmpp_3m_karras")
"""Sequential solvers of higher order, which a user would take instead."""

FLOW = "flow"
"""The chain of flow matching: Euler's steps."""


@dataclass(frozen=True, eq=False)
class Family:
    """A network and its data.

    Attributes:
        denoiser: The network for a table, a function of states, times and conditioning.
        table: The table of a chain's name and number of steps.
        shape: Shape of one sample.
        unit: What errors are divided by; None for the standard deviation of the sequential samples.
        conditioning: The conditioning of some seeds, by name, a row each.
    """

    denoiser: Callable[[Table], Callable[..., Tensor]]
    table: Callable[[str, int], Table]
    shape: tuple[int, ...]
    unit: float | None = 1.0
    conditioning: Callable[[Sequence[int]], Mapping[str, Tensor]] = lambda seeds: {}

    def evaluator(self, table: Table, seeds: Sequence[int]) -> Evaluator:
        """The network with the conditioning of some seeds."""
        return Evaluator(self.denoiser(table), conditioning=dict(self.conditioning(seeds)))

    def noise(self, seeds: Sequence[int]) -> Recorded:
        """The draws of plain calls with these seeds."""
        return Recorded(self.shape, [torch.Generator().manual_seed(seed) for seed in seeds])


def mixture(size: int) -> Mixture:
    """Eight Gaussians in a box of -1 ... 1."""
    generator = torch.Generator().manual_seed(size)
    means = 2 * torch.rand(8, size, generator=generator, dtype=torch.float64) - 1
    weights = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    variances = 0.01 + 0.04 * torch.rand(8, generator=generator, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, variances)


@made_at_home
def of_scheduler(config: Mapping[str, Any], name: str, steps: int) -> Table:
    """The table of a chain of diffusers with a model's config."""
    if name == FLOW:
        raise ValueError("the chain 'flow' is that of flow matching, and the model's config is one of diffusion")
    refuse_unknown("the chain", name, [*SCHEDULERS])
    kind, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind).from_config(dict(config), **options)
    scheduler.set_timesteps(steps)
    return from_scheduler(scheduler)


def _exact(target: Any, shape: tuple[int, ...]) -> Family:
    """A family whose network is optimal for its data."""

    def table(name: str, steps: int) -> Table:
        return flow_euler(steps) if name == FLOW else of_scheduler(TRAINING, name, steps)

    return Family(target.denoiser, table, shape)


def _digits() -> Family:
    model = load("digits")
    return Family(lambda table: model, lambda name, steps: of_scheduler(model.config, name, steps), model.shape)


def _text() -> Family:
    """The U-Net that follows prompts, in its latents."""
    pipe: Any = load_pipeline("shapes")
    with torch.inference_mode():
        wanted, empty = pipe.encode_prompt([*PROMPTS], "cpu", 1, True)
    return _guided(pipe, pipe.unet, {"wanted": wanted, "empty": empty.expand_as(wanted)})


def _flow() -> Family:
    """The transformer of flow matching that follows prompts, in its latents."""
    pipe: Any = load_pipeline("shapes-flow")
    prompts = [*PROMPTS]
    with torch.inference_mode():
        found = pipe.encode_prompt(prompts, prompts, prompts, device="cpu", do_classifier_free_guidance=True)
    return _guided(pipe, pipe.transformer, dict(zip(("wanted", "empty", "pooled", "pooled_empty"), found, strict=True)))


def _guided(pipe: Any, network: Any, rows: Mapping[str, Tensor]) -> Family:
    """A network with classifier-free guidance."""

    def guided(x: Tensor, t: Tensor, wanted: Tensor, empty: Tensor, **pooled: Tensor) -> Tensor:
        more = {"pooled_projections": torch.cat([pooled["pooled_empty"], pooled["pooled"]])} if pooled else {}
        both = network(
            torch.cat([x, x]),
            timestep=torch.cat([t, t]),
            encoder_hidden_states=torch.cat([empty, wanted]),
            return_dict=False,
            **more,
        )[0]
        without, within = both.chunk(2)
        return without + GUIDANCE * (within - without)

    def table(name: str, steps: int) -> Table:
        if "pooled" not in rows:
            return of_scheduler(pipe.scheduler.config, name, steps)
        refuse_unknown("the chain", name, [FLOW])
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return from_scheduler(scheduler)

    def conditioning(seeds: Sequence[int]) -> dict[str, Tensor]:
        return {name: value[[seed % len(PROMPTS) for seed in seeds]] for name, value in rows.items()}

    size = network.config.sample_size
    return Family(lambda table: guided, table, (network.config.in_channels, size, size), None, conditioning)


FAMILIES: dict[str, Callable[[], Family]] = {
    "closed-form-digits": lambda: _exact(digits(), (1, 8, 8)),
    "mixture-2": lambda: _exact(mixture(2), (2,)),
    "mixture-64": lambda: _exact(mixture(64), (64,)),
    "mixture-512": lambda: _exact(mixture(512), (512,)),
    "digits": _digits,
    "shapes": _text,
    "shapes-flow": _flow,
}
"""The families by name."""

LENGTHS: dict[str, tuple[int, ...]] = {
    "ddpm": (100, 1000),
    "ddim": (25, 50, 100, 1000),
    "dpmpp_2m": (25, 50),
    "heun": (18, 40),
    "two_stage_sde": (18, 40),
    FLOW: (28, 50),
}
"""The chains of the harness, and their numbers of steps."""

WINDOWS: tuple[int | None, ...] = (2, 3, 4, 8, 16, 32, None)
"""Most rows of a round; None for the whole chain."""


@cache
def family(name: str) -> Family:
    """A family by its name, made once.

    Raises:
        ValueError: If there is none of this name.
    """
    refuse_unknown("the problem", name, [*FAMILIES])
    return FAMILIES[name]()


def chains(name: str) -> list[tuple[str, int]]:
    """The chains of a family, with their steps."""
    kinds = [FLOW] if name == "shapes-flow" else [*LENGTHS]
    if name in ("digits", "shapes"):
        kinds.remove(FLOW)
    return [(kind, steps) for kind in kinds for steps in LENGTHS[kind]]


def contestants(table: Table, window: int | None) -> dict[str, Callable[[float], Method]]:
    """Every method that fits a chain, as a function of its tolerance, with at most `window` rows of a sample in a round.

    Args:
        table: The chain.
        window: Most rows; None for no bound.
    """
    if window is not None:
        require_whole("the window", window, 1, ", or None for the whole chain")
    blocks = max(2, table.steps // 40)
    piadm = piadm_sde if table.stochastic else piadm_ode
    return {
        "jacobi": lambda tolerance: jacobi(window, tolerance),
        "parasolver": lambda tolerance: parasolver(window, tolerance),
        "quasi_newton": lambda tolerance: quasi_newton(window, tolerance),
        "srds": lambda tolerance: srds(tolerance=tolerance, rows=window),
        "collocation": lambda tolerance: collocation(window=window, tolerance=tolerance),
        piadm.__name__: lambda tolerance: piadm(blocks, tolerance=tolerance, window=window),
    }
