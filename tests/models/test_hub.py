# SPDX-License-Identifier: Apache-2.0
"""Models: what is loaded, that its tables are the chains of diffusers' schedulers, and that its images are theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging
from pipelines import DIGITS, save_pipeline, tiny_unet
from scheduler_walks import gap_to_scheduler

from paradiff import Recorded, models, sample
from paradiff.methods import presets as methods
from paradiff.models.files import is_pixel, locate
from paradiff.models.pixel import SCHEDULERS, Model, load, table_of

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

# -- loading -----------------------------------------------------------------------------------------------------------


def test_the_bundled_model_is_ready_to_sample() -> None:
    level = logging.get_verbosity()
    model = load("digits")
    assert logging.get_verbosity() == level
    assert (model.name, model.shape) == ("digits", (1, 8, 8))
    assert not model.unet.training
    assert not any(p.requires_grad for p in model.unet.parameters())
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 990])
    rows = torch.cat([model(x[k : k + 1], t[k : k + 1]) for k in range(3)])
    # Float32; a batch of another size is summed in another order.
    torch.testing.assert_close(model(x, t), rows, rtol=1e-4, atol=1e-5)


def test_a_folder_is_loaded_as_the_bundled_model_is() -> None:
    bundled, folder = load("digits"), load(str(DIGITS))
    assert bundled.config == folder.config
    for one, other in zip(bundled.unet.parameters(), folder.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_networks_dtype_is_the_one_asked_for(tiny: Path) -> None:
    model = load(str(tiny), dtype=torch.bfloat16)
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}


def test_a_sample_need_not_be_square(tmp_path: Path) -> None:
    model = load(str(save_pipeline(tmp_path / "model", tiny_unet(3, sample_size=(8, 16)))))
    assert model.shape == (3, 8, 16)
    assert model(torch.randn(2, 3, 8, 16), torch.tensor([3, 4])).shape == (2, 3, 8, 16)


def test_a_failed_load_leaves_the_verbosity_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("not json")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_text("")
    level = logging.get_verbosity()
    with pytest.raises(ValueError, match="could not be loaded"):
        load(str(tmp_path))
    assert logging.get_verbosity() == level


def test_a_model_is_a_bundled_one_a_folder_or_a_hub_id(tiny: Path) -> None:
    assert locate("digits") == (str(DIGITS), True)
    assert locate(str(tiny)) == (str(tiny), True)
    assert locate("google/ddpm-church-256") == ("google/ddpm-church-256", False)


UNET, SCHEDULER = ["diffusers", "UNet2DModel"], ["diffusers", "DDIMScheduler"]
INDEXES: dict[str, tuple[bool, dict[str, object]]] = {
    "pixels": (True, {"unet": UNET, "scheduler": SCHEDULER}),
    "with a component that is null": (True, {"unet": UNET, "scheduler": SCHEDULER, "vae": [None, None]}),
    "with an autoencoder": (False, {"unet": UNET, "scheduler": SCHEDULER, "vqvae": ["diffusers", "VQModel"]}),
    "conditioned": (False, {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": SCHEDULER}),
    "without a scheduler": (False, {"unet": UNET, "scheduler": [None, None]}),
    "empty": (False, {}),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_pixel_pipeline_is_known_by_its_components(name: str) -> None:
    wanted, index = INDEXES[name]
    assert is_pixel({"_class_name": "DDPMPipeline", "_diffusers_version": "0.32.0"} | index) is wanted


# -- tables ------------------------------------------------------------------------------------------------------------

ALL = frozenset(SCHEDULERS)
VP = frozenset({"ddpm", "ddim"})
CONFIGS: dict[str, tuple[frozenset[str], dict[str, object]]] = {
    "leading": (ALL, {"timestep_spacing": "leading"}),
    "leading, offset 1": (ALL, {"timestep_spacing": "leading", "steps_offset": 1}),
    "trailing": (ALL, {"timestep_spacing": "trailing"}),
    "trailing, offset unused": (ALL, {"timestep_spacing": "trailing", "steps_offset": 1}),
    "linspace": (ALL, {"timestep_spacing": "linspace"}),
    "the class's own": (ALL, {}),
    "v": (ALL, {"prediction_type": "v_prediction"}),
    "clean data": (VP | {"dpmpp_2m"}, {"prediction_type": "sample"}),
    "scaled linear": (ALL, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (ALL, {"beta_schedule": "squaredcos_cap_v2"}),
    "trained betas": (ALL, {"trained_betas": torch.linspace(1e-3, 0.3, 60).tolist(), "num_train_timesteps": 60}),
    "400 training times": (ALL, {"num_train_timesteps": 400, "beta_end": 0.04}),
    "clipped": (VP | {"heun"}, {"clip_sample": True, "clip_sample_range": 0.6}),
    "thresholded": (
        VP | {"dpmpp_2m"},
        {"thresholding": True, "clip_sample": False, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    ),
    "thresholded and clipped": (VP, {"thresholding": True, "clip_sample": True, "sample_max_value": 1.2}),
    "zero snr": (
        VP | {"euler", "dpmpp_2m"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ),
    "karras": (frozenset({"euler", "heun", "dpmpp_2m"}), {"use_karras_sigmas": True}),
    "to the first level": (frozenset({"ddim"}), {"set_alpha_to_one": False}),
    "to the first ratio": (frozenset({"euler", "dpmpp_2m"}), {"final_sigmas_type": "sigma_min"}),
    "no lower order": (frozenset({"dpmpp_2m"}), {"lower_order_final": False}),
    "large variance": (frozenset({"ddpm"}), {"variance_type": "fixed_large"}),
}
UNCLIPPED = {"clip_sample": False}


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "sampler"), [(n, s) for n, (which, _) in CONFIGS.items() for s in sorted(which)])
def test_a_table_is_the_chain_of_the_scheduler_with_that_config(name: str, sampler: str, steps: int) -> None:
    config = UNCLIPPED | CONFIGS[name][1]
    for eta in (0.0, 0.7) if sampler == "ddim" else (0.0,):
        scheduler = SCHEDULERS[sampler].from_config(config)
        # Their own levels, float32, in float64: a scheduler that computed with them would lose 1e-5 in rounding alone.
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.set_timesteps(steps)
        table = table_of(config, sampler, steps, eta=eta)
        options = {"eta": eta} if sampler == "ddim" else {}
        assert gap_to_scheduler(table, scheduler, every=sampler != "ddpm", **options) < 1e-6


def test_the_config_of_one_class_serves_the_others() -> None:
    config = dict(load("digits").config)
    for sampler, made in SCHEDULERS.items():
        table, scheduler = table_of(config, sampler, 10), made.from_config(config)
        scheduler.set_timesteps(10)
        assert table.t[:-1].tolist() == pytest.approx([float(t) for t in scheduler.timesteps], abs=1e-3)


def test_a_saved_scheduler_of_another_class_is_read(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    model = load(str(save_pipeline(tmp_path / "model", scheduler=scheduler)))
    wanted = table_of(scheduler.config, "ddim", 10)
    assert torch.equal(model.table("ddim", 10).b, wanted.b)
    assert wanted.sigma[-1] > 0


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "a learned variance": ("ddpm", {"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
    "a learned variance, plain": ("ddpm", {"variance_type": "learned"}, "variance_type = 'learned'"),
    "exponential": ("euler", {"use_exponential_sigmas": True}, "use_exponential_sigmas = True"),
    "exponential, heun": ("heun", {"use_exponential_sigmas": True}, "use_exponential_sigmas = True"),
    "beta": ("dpmpp_2m", {"use_beta_sigmas": True}, "use_beta_sigmas = True"),
    "flow": ("dpmpp_2m", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "use_flow_sigmas = True"),
    "lambdas": ("dpmpp_2m", {"use_lu_lambdas": True}, "use_lu_lambdas = True"),
    "euler at final": ("dpmpp_2m", {"euler_at_final": True}, "euler_at_final = True"),
    "sde": ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}, r"algorithm_type = 'sde-dpmsolver\+\+'"),
    "order 3": ("dpmpp_2m", {"solver_order": 3}, "solver_order = 3"),
    "order 1": ("dpmpp_2m", {"solver_order": 1}, "solver_order = 1"),
    "solver": ("dpmpp_2m", {"solver_type": "heun"}, "solver_type = 'heun'"),
    "lambda": ("dpmpp_2m", {"lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1"),
    "interpolation": ("euler", {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
    "continuous": (
        "euler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 700.0},
        "timestep_type = 'continuous'|sigma_m.. = ",
    ),
    "bounds": ("euler", {"sigma_min": 0.1}, "sigma_min = 0.1"),
    "flow prediction": ("dpmpp_2m", {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'; it must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_a_table_is_refused_by_name(name: str) -> None:
    sampler, config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        table_of(UNCLIPPED | config, sampler, 10)


def test_an_option_of_another_class_is_no_reason_to_refuse() -> None:
    # A DDIM chain knows nothing of learned variances or solver orders, and diffusers' scheduler ignores them.
    config = UNCLIPPED | {"variance_type": "learned_range", "solver_order": 3, "use_karras_sigmas": True}
    assert torch.equal(table_of(config, "ddim", 10).b, table_of(UNCLIPPED, "ddim", 10).b)


def test_eta_belongs_to_ddim() -> None:
    with pytest.raises(ValueError, match=r"eta is 0\.5, but sampler 'heun' has no eta; give it with sampler 'ddim'"):
        table_of(UNCLIPPED, "heun", 10, eta=0.5)


def test_an_unknown_sampler_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        table_of(UNCLIPPED, "huen", 10)


# -- the images of diffusers' own pipelines ----------------------------------------------------------------------------

# Steps, window, and how close a run of tolerance 1e-6 comes: diffusers computes the coefficients of its DDPM steps in
# float32, which over 1000 of them is worth about 1e-5 in the image.
PIPELINES = {
    "ddim 50": (diffusers.DDIMPipeline, "ddim", 50, None),
    "ddpm 100": (diffusers.DDPMPipeline, "ddpm", 100, 32),
    "ddpm 1000": (diffusers.DDPMPipeline, "ddpm", 1000, 32),
}
SEEDS = (0, 1, 2)
DEFAULT, TIGHT = 4e-3, 1e-5


@pytest.fixture(scope="module")
def digits() -> Model:
    return load("digits")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_bundled_model_gives_the_images_of_the_plain_pipeline(name: str, digits: Model) -> None:
    kind, sampler, steps, window = PIPELINES[name]
    pipeline = kind.from_pretrained(DIGITS, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    table = digits.table(sampler, steps)
    for seed in SEEDS[:1] if steps == 1000 else SEEDS:
        generator = torch.Generator().manual_seed(seed)
        images = pipeline(batch_size=1, generator=generator, num_inference_steps=steps, output_type="np").images
        wanted = 2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1
        assert wanted.std() > 0.5
        for method, most in ((methods.parasolver(window), DEFAULT), (methods.parasolver(window, 1e-6), TIGHT)):
            noise = Recorded(digits.shape, [torch.Generator().manual_seed(seed)])
            found = sample(digits, table, noise, method)
            error = (found.sample.clamp(-1, 1) - wanted).square().mean().sqrt()
            assert error < most, f"seed {seed}, {method.tolerance:g}"
            assert found.rounds < steps
            if most == DEFAULT:
                assert found.rounds < steps / 3


@pytest.mark.parametrize("model", [5, None, "", True, ["digits"]])
@pytest.mark.parametrize("make", [models.load, models.load_pipeline])
def test_what_names_no_model_is_refused(make: Any, model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"the model is .*; it must be the name of a bundled one, a folder in diffusers' pipeline"
    ):
        make(model)


def test_a_folder_may_be_given_as_a_path(tiny: Path) -> None:
    assert load(tiny).name == load(str(tiny)).name == str(tiny)
