# SPDX-License-Identifier: Apache-2.0
"""The same generator gives the same image as diffusers' own sequential run, by scheduler loops and by whole pipelines."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from problems import gap
from torch import Tensor

from paradiff import Recorded, Schedule, Table, paradigms, parasolver, sample
from paradiff.chain import Clip
from paradiff.methods import WindowMethod
from paradiff.samplers import ddim, ddpm, euler_ancestral

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def unet() -> diffusers.UNet2DModel:
    """A small network with random weights."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    model.conv_out.weight.data *= 2
    return model


def denoiser_of(unet: diffusers.UNet2DModel) -> object:
    return lambda x, t: unet(x, t).sample


def schedule_of(scheduler: diffusers.SchedulerMixin) -> Schedule:
    return Schedule(scheduler.betas.double())


SCHEDULERS = {
    "ddpm": (diffusers.DDPMScheduler, lambda s, n: ddpm(schedule_of(s), n, clip=Clip()), {}),
    "ddim": (
        lambda: diffusers.DDIMScheduler(prediction_type="v_prediction"),
        lambda s, n: ddim(schedule_of(s), n, eta=1.0, prediction="v", clip=Clip()),
        {"eta": 1.0},
    ),
    "euler_ancestral": (
        lambda: diffusers.EulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
        lambda s, n: euler_ancestral(schedule_of(s), n, prediction="v"),
        {},
    ),
}


def scheduler_loop(unet: object, scheduler: object, steps: int, generator: object, samples: int, options: dict) -> Tensor:
    """The loop of every pipeline."""
    scheduler.set_timesteps(steps)
    x = randn_tensor((samples, *SHAPE), generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        m = unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(m, t, x, generator=generator, **options).prev_sample
    return x


def sources(kind: str) -> torch.Generator | list[torch.Generator]:
    made = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return made if kind == "each" else made[0]


def recorded(kind: str) -> Recorded:
    return Recorded(SHAPE, sources(kind), samples=None if kind == "each" else 2)


TIGHT = {"parasolver": parasolver(10, 1e-6), "strides": parasolver(5, 1e-6, stride=2), "paradigms": paradigms(10, 0.0)}

# Float32 on both sides: 50 steps that each round to 6e-8, and diffusers keeps its levels in float32, where ours are float64.
# DDIM is run with v prediction: a random network that predicts epsilon makes a chain that enlarges roundings to 1e-4, which
# the plain loop in float32 itself shows against the same loop in float64.
FLOAT32 = 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["shared", "each"])
@pytest.mark.parametrize("method", TIGHT.values(), ids=TIGHT)
def test_a_schedulers_own_loop_gives_the_same_sample(
    name: str, kind: str, method: WindowMethod, unet: diffusers.UNet2DModel
) -> None:
    made, table_of, options = SCHEDULERS[name]
    scheduler = made()
    wanted = scheduler_loop(unet, scheduler, 50, sources(kind), 2, options)
    found = sample(denoiser_of(unet), table_of(scheduler, 50), recorded(kind), method)
    assert gap(found.sample, wanted) < FLOAT32
    assert found.rounds < 50 or method is not TIGHT["parasolver"]


def image_of(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", ["shared", "each"])
@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_a_pipeline_gives_the_same_image(eta: float | None, kind: str, unet: diffusers.UNet2DModel) -> None:
    if eta is None:
        scheduler, options = diffusers.DDPMScheduler(), {}
        made = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
        table: Table = ddpm(schedule_of(scheduler), 40, clip=Clip())
    else:
        scheduler, options = diffusers.DDIMScheduler(prediction_type="v_prediction"), {"eta": eta}
        made = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
        table = ddim(schedule_of(scheduler), 40, eta=eta, prediction="v", clip=Clip())
    made.set_progress_bar_config(disable=True)
    images = made(batch_size=2, generator=sources(kind), num_inference_steps=40, output_type="np", **options).images
    wanted = torch.from_numpy(images).permute(0, 3, 1, 2)
    found = sample(denoiser_of(unet), table, recorded(kind), parasolver(10, 1e-6))
    assert gap(image_of(found.sample), wanted) < FLOAT32
    assert wanted.std() > 0.05  # Not a blank image, on which all would agree.


def test_another_seed_gives_another_image(unet: diffusers.UNet2DModel) -> None:
    table = ddpm(schedule_of(diffusers.DDPMScheduler()), 40, clip=Clip())
    images = [sample(denoiser_of(unet), table, recorded(kind), parasolver(10)).sample for kind in ("shared", "each")]
    assert gap(*images) > 0.1
