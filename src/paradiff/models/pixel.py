"""Models in diffusers' pipeline format: a bundled one by name, a folder, or a hub id.

`load` reads unconditional pixel pipelines, a `UNet2DModel` and a scheduler config, as `DDPMPipeline` and `DDIMPipeline` save
them; pipeline.py reads all others. A model knows how to make the table that a diffusers scheduler class would walk with
its config, so that the sequential chain is that of the plain pipeline call.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from paradiff import samplers
from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.chain.prediction import Prediction
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown
from paradiff.samplers.exponential import Form, exponential_integrator
from paradiff.samplers.grid import log_snr_grid, uniform_grid
from paradiff.samplers.process import Process, level_of, variance_preserving
from paradiff.samplers.schedule import SMALLEST_ALPHA_BAR, Schedule

BUNDLED = Path(__file__).parent / "bundled"
INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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


@dataclass(frozen=True)
class Model:
    """A network, its scheduler's config, and the shape of one sample.

    Attributes:
        name: As the user gave it.
        unet: The network, in evaluation mode.
        config: The config of the scheduler that came with it.
    """

    name: str
    unet: UNet2DModel
    config: Mapping[str, Any]

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

    def process(self) -> Process:
        """The noising process that the network was trained on (samplers/process.py)."""
        return variance_preserving(_schedule_of(SCHEDULERS["ddpm"].from_config(dict(self.config))))

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


def table_of(config: Mapping[str, Any], sampler: str, steps: int, *, eta: float = 0.0) -> Table:
    """The table that a diffusers scheduler class walks with a config: see `Model.table`."""
    refuse_unknown("sampler", sampler, list(SCHEDULERS))
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


def load(model: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Loads a model.

    Args:
        model: `digits`, a folder in diffusers' pipeline format, or a hub id.
        device: Where the network goes.
        dtype: The network's dtype.

    Raises:
        ValueError: If the folder is no pipeline, its weights are not safetensors, or the pipeline is of another kind.
    """
    source, local = locate(model)
    if local:
        check_weights(Path(source), "unet")
    with loading(model):
        index = DiffusionPipeline.load_config(source)
        index = index if isinstance(index, dict) else {}
        kind, parts = index.get("_class_name", "unknown"), components(index)
        if not is_pixel(index):
            raise ValueError(
                f"{model!r} holds a {kind}; this command samples unconditional pixel pipelines, made of a UNet2DModel and a "
                "scheduler (DDPMPipeline, DDIMPipeline)"
            )
        config = DDPMScheduler.load_config(source, subfolder="scheduler")
        if not isinstance(config, dict) or not {"beta_schedule", "trained_betas"} & set(config):
            raise ValueError(
                f"{model!r} has a {parts['scheduler'][1]}, whose config has no betas; this command needs a scheduler on a "
                "schedule of betas, such as DDPMScheduler or DDIMScheduler"
            )
        unet = UNet2DModel.from_pretrained(
            source, subfolder="unet", use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=dtype
        )
    torch.nn.Module.to(unet, torch.device(device))
    return Model(model, unet.eval().requires_grad_(False), config)


def locate(model: str) -> tuple[str, bool]:
    """Where a model is: its folder or its hub id, and whether it is a folder.

    Raises:
        ValueError: If it is neither the name of a bundled model, nor a pipeline's folder, nor of the form of a hub id.
    """
    folder = BUNDLED / model if (BUNDLED / model / INDEX).is_file() else Path(model)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"the folder {str(folder)!r} is no pipeline: it has no {INDEX}; give a folder that a diffusers pipeline's "
                "save_pretrained wrote"
            )
        return str(folder), True
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "~", "/")):
        bundled = ", ".join(sorted(p.name for p in BUNDLED.iterdir() if p.is_dir())) if BUNDLED.is_dir() else "none"
        raise ValueError(
            f"{model!r} is no model: give a bundled one ({bundled}), a folder in diffusers' pipeline format, or a hub id "
            "such as google/ddpm-church-256"
        )
    return model, False


def read_index(model: str) -> dict[str, Any]:
    """What a model's `model_index.json` says: the pipeline's class, and library and class of every component.

    Raises:
        ValueError: If there is no such model, or its index cannot be read.
    """
    source, _ = locate(model)
    with loading(model):
        index = DiffusionPipeline.load_config(source)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{model!r} could not be loaded: its {INDEX} names no pipeline class; save the pipeline again")
    return index


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every component that an index names; those that are null are left out."""
    pairs = {k: part for k, part in index.items() if isinstance(part, list | tuple) and len(part) == 2 and k[0] != "_"}
    return {name: (str(part[0]), str(part[1])) for name, part in pairs.items() if part[1]}


def is_pixel(index: Mapping[str, Any]) -> bool:
    """Whether an index is that of an unconditional pixel pipeline, made of a `UNet2DModel` and a scheduler."""
    parts = components(index)
    return set(parts) == {"unet", "scheduler"} and parts["unet"][1] == "UNet2DModel"


def check_weights(folder: Path, part: str) -> None:
    """Refuses a component whose weights are not safetensors.

    Raises:
        ValueError: If there are none in `folder/part`.
    """
    if list((folder / part).glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in (folder / part).glob("*") if p.suffix in PICKLES)
    given = f"its weights are {pickles[0]}, a pickle, which can run code when it is read" if pickles else "it has no weights"
    raise ValueError(
        f"the folder {str(folder)!r} holds no safetensors weights in {part}/: {given}; save the pipeline again with "
        "safe_serialization=True"
    )


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Keeps diffusers quiet, and makes one sentence of what cannot be read.

    Raises:
        ValueError: If something within cannot be loaded.
    """
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: weights that do not fit the network
        first = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise ValueError(f"{model!r} could not be loaded: {first}") from error
    finally:
        diffusers_logging.set_verbosity(level)
