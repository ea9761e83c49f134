# SPDX-License-Identifier: Apache-2.0
"""Unconditional pixel models in diffusers' pipeline format: a bundled one by name, a folder, or a hub id.

`load` reads a `UNet2DModel` and a scheduler config, as `DDPMPipeline` and `DDIMPipeline` save them; pipeline.py reads all other
pipelines. A model knows how to make the table that a diffusers scheduler class would walk with its config, so that the
sequential chain is that of the plain pipeline call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor

from paradiff import samplers
from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.chain.home import made_at_home
from paradiff.chain.prediction import Prediction
from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_whole, refuse_unknown, require_whole, shown
from paradiff.models.files import components, folder_of, is_pixel, loading, read_index
from paradiff.models.network import check_values, load_network
from paradiff.models.shared import shared_network
from paradiff.samplers.exponential import Form, exponential_integrator
from paradiff.samplers.grid import log_snr_grid, uniform_grid
from paradiff.samplers.process import Process, level_of, variance_preserving
from paradiff.samplers.schedule import MOST_TIMES, SMALLEST_ALPHA_BAR, Schedule
from paradiff.solver.machine import Machine

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v"}
SCHEDULERS: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
"""The sampler names, and the diffusers classes whose chains they are."""

EXPONENTIAL = {"exponential_sde": 1.0, "exponential_ode": 0.0}
"""Exponential integrators (samplers/exponential.py) on the levels of a model's schedule, and their volatility."""

GRIDS = {"log-snr": log_snr_grid, "uniform": uniform_grid}

ONLY: dict[str, tuple[Any, ...]] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "euler_at_final": (False,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "variance_type": ("fixed_small", "fixed_large", None),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "algorithm_type": ("dpmsolver++",),
    "lambda_min_clipped": (-float("inf"),),
}
"""Options of scheduler configs of which only these values have a table here."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network, its scheduler's config, and the shape of one sample. Models are compared by identity.

    Attributes:
        name: As the user gave it.
        unet: The network, in evaluation mode.
        config: The config of the scheduler that came with it.
    """

    name: str
    unet: UNet2DModel
    config: Mapping[str, Any]

    def __repr__(self) -> str:
        count = sum(weight.numel() for weight in self.unet.parameters())
        kind = self.config.get("_class_name", "a scheduler")
        prediction = self.config.get("prediction_type", "epsilon")
        return (
            f"Model {self.name!r}: samples of shape {self.shape}, {count / 1e6:.3g} million weights, {self.unet.dtype} on "
            f"{self.unet.device}\n"
            f"  {prediction} prediction, trained with {kind} at {self.config.get('num_train_timesteps', 'its')} times"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample: channels, height, width."""
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config["in_channels"], height, width

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoiser: the network's output for states `[R, C, H, W]` at times `[R]`."""
        return self.unet(x, t, return_dict=False)[0]

    def table(self, sampler: str, steps: int, *, eta: float = 0.0) -> Table:
        """The table of a sampler on this model's schedule, with every option of its config.

        Args:
            sampler: `ddpm`, `ddim`, `euler`, `euler_ancestral`, `heun` or `dpmpp_2m`.
            steps: Number of steps.
            eta: Share of the DDPM noise that `ddim` adds, 0 to 1.

        Raises:
            ValueError: If the sampler is unknown, the schedule cannot give the steps, or the config has an option that has
                no table here.
        """
        return table_of(self.config, sampler, steps, eta=eta)

    @made_at_home
    def process(self) -> Process:
        """The noising process that the network was trained on (samplers/process.py)."""
        return variance_preserving(_schedule_of(SCHEDULERS["ddpm"].from_config(dict(self.config))))

    @made_at_home
    def exponential(self, sampler: str, steps: int, *, grid: str = "log-snr", form: Form = "clean") -> Table:
        """An exponential integrator from the model's noisiest level to its cleanest, and on to the clean-data estimate.

        Args:
            sampler: `exponential_sde` or `exponential_ode`.
            steps: Number of steps, the last one included; at least 2.
            grid: `log-snr` or `uniform` levels (samplers/grid.py).
            form: What is frozen over a step (samplers/exponential.py).

        Raises:
            ValueError: If an option is unknown, or there are fewer than two steps.
        """
        refuse_unknown("sampler", sampler, list(EXPONENTIAL))
        refuse_unknown("grid", grid, list(GRIDS))
        if not is_whole(steps):
            raise ValueError(f"the number of steps is {shown(steps)}; it must be a whole number, at least 2")
        if steps < 2:
            raise ValueError(
                f"{steps} steps were asked of {sampler}; it needs at least 2, the last being to the clean-data estimate"
            )
        config = SCHEDULERS["ddpm"].from_config(dict(self.config)).config
        process = self.process()
        start = min(process.highest, float(level_of(torch.tensor(1 / SMALLEST_ALPHA_BAR - 1).sqrt())))
        levels = GRIDS[grid](start, process.lowest, 1, steps - 1, clean=True)
        prediction = _prediction_of(config)
        volatility = EXPONENTIAL[sampler]
        return exponential_integrator(
            process, levels, form=form, volatility=volatility, prediction=prediction, clip=_clip_of(config)
        )


@made_at_home
def table_of(config: Mapping[str, Any], sampler: str, steps: int, *, eta: float = 0.0) -> Table:
    """The table that a diffusers scheduler class walks with a config: see `Model.table`."""
    refuse_unknown("sampler", sampler, list(SCHEDULERS))
    check_values(SCHEDULERS[sampler], config, "the scheduler's config")
    if config.get("num_train_timesteps") is not None:
        require_whole("num_train_timesteps of the scheduler's config", config["num_train_timesteps"], 2, most=MOST_TIMES)
    scheduler = SCHEDULERS[sampler].from_config(dict(config))
    found = scheduler.config
    for option, known in ONLY.items():
        if option in found and found[option] not in known and option in SCHEDULERS[sampler]().config:
            raise ValueError(
                f"the scheduler's config has {option} = {found[option]!r}, which has no table here; {sampler} needs "
                f"{' or '.join(repr(k) for k in known)}"
            )
    prediction = _prediction_of(found)
    if eta and sampler != "ddim":
        raise ValueError(f"eta is {eta:g}, but sampler {sampler!r} has no eta; give it with sampler 'ddim'")
    schedule = _schedule_of(scheduler)
    spacing = found["timestep_spacing"]
    make: Callable[..., Table] = partial(
        getattr(samplers, sampler),
        schedule,
        steps,
        spacing=spacing,
        offset=found["steps_offset"] if spacing == "leading" else 0,
        prediction=prediction,
    )
    clip = _clip_of(found)
    karras = found.get("use_karras_sigmas", False)
    final = found.get("final_sigmas_type", "zero")
    if sampler == "ddpm":
        return make(variance=found["variance_type"], clip=clip)
    if sampler == "ddim":
        return make(eta=eta, clip=clip, set_alpha_to_one=found["set_alpha_to_one"], landing="stride")
    if sampler == "dpmpp_2m":
        return make(karras=karras, final=final, lower_order_final=found["lower_order_final"], clip=clip)
    if sampler == "heun":
        return make(karras=karras, clip=clip)
    return make(karras=karras, final=final) if sampler == "euler" else make()


def scheduler_config(model: str, folder: Path, parts: Mapping[str, tuple[str, str]]) -> Mapping[str, Any]:
    """The config of a model's scheduler.

    Args:
        model: As the user gave it.
        folder: Its folder.
        parts: Its components.

    Raises:
        ValueError: If it cannot be read, or is that of a scheduler without betas.
    """
    with loading(model):
        config = DDPMScheduler.load_config(folder, subfolder="scheduler")
    kind = getattr(diffusers, parts["scheduler"][1], None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(
            f"model_index.json of {model!r} names {parts['scheduler'][1]!r} as its scheduler, which is none of diffusers; save "
            "the pipeline again"
        )
    if not isinstance(config, dict) or not {"beta_schedule", "trained_betas"} & set(config):
        raise ValueError(
            f"{model!r} has a {parts['scheduler'][1]}, whose config has no betas; this command needs a scheduler on a "
            "schedule of betas, such as DDPMScheduler or DDIMScheduler"
        )
    check_values(DDPMScheduler, config, f"scheduler/scheduler_config.json of {model!r}")
    return config


def _schedule_of(scheduler: Any) -> Schedule:
    alpha_bar = scheduler.alphas_cumprod.double()  # the scheduler's own rounding: a chain is sensitive to it
    if scheduler.config.get("rescale_betas_zero_snr"):
        alpha_bar[-1] = 0  # some schedulers put 2^-24 there, as `Schedule.ratio` does
    return Schedule(1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]]))


def _prediction_of(config: Mapping[str, Any]) -> Prediction:
    if config["prediction_type"] not in PREDICTIONS:
        raise ValueError(
            f"the scheduler's config has prediction_type = {config['prediction_type']!r}; it must be one of "
            f"{', '.join(PREDICTIONS)}"
        )
    return PREDICTIONS[config["prediction_type"]]


def _clip_of(config: Mapping[str, Any]) -> Clip | DynamicThreshold | None:
    if config.get("thresholding"):
        return DynamicThreshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return Clip(config["clip_sample_range"]) if config.get("clip_sample") else None


def load(
    model: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    machine: Machine | None = None,
) -> Model:
    """Loads a model.

    Args:
        model: `digits`, a folder in diffusers' pipeline format, or a hub id.
        device: Where the network goes.
        dtype: The network's dtype.
        machine: This machine's ranks, of which one reads the weights (shared.py); None where each process reads them.

    Raises:
        ValueError: If the folder is no pipeline, its weights are not safetensors, or the pipeline is of another kind.
    """
    with nullcontext() if machine is None else machine.in_turn():
        folder = folder_of(model)
    model = os.fspath(model)
    index = read_index(model)
    parts = components(index)
    if not is_pixel(index):
        raise ValueError(
            f"{model!r} holds a {index['_class_name']}; this command samples unconditional pixel pipelines, made of a "
            "UNet2DModel and a scheduler (DDPMPipeline, DDIMPipeline)"
        )
    config = scheduler_config(model, folder, parts)
    read = partial(load_network, model, UNet2DModel, folder, "unet", dtype)
    unet = cast(UNet2DModel, read() if machine is None else shared_network(read, UNet2DModel, folder / "unet", device, machine))
    size = unet.config["sample_size"]
    if not (is_whole(size) and size > 0) and not (are_whole(size) and len(size) == 2 and min(size) > 0):
        raise ValueError(
            f"unet/config.json of {model!r} has sample_size = {shown(size)}; it must be a number of pixels, or height and width"
        )
    torch.nn.Module.to(unet, torch.device(device))
    return Model(model, unet.eval().requires_grad_(False), config)
