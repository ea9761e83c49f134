# SPDX-License-Identifier: Apache-2.0
"""Further pipelines of diffusers, listed in docs/pipelines.md: each gives the plain call's result at a fine and at a coarse
tolerance, in the executor that its loop needs, or is called sequentially for the reason that is true of it. What is outside of
its loop is computed once.

A coarse tolerance shows what a fine one hides: a chain that takes all its rounds ends right whatever its windows held.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
from packaging.version import Version
from prologue import computed, outside
from tiny import FURTHER

from paradiff import parallelize, parasolver, quasi_newton

pytestmark = [
    pytest.mark.skipif(
        Version(diffusers.__version__) < Version("0.42"), reason="these calls are those of the newest diffusers"
    ),
    # What diffusers 0.42 itself does in a deprecated way.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),
]

PAGE = Path(__file__).parents[2] / "docs/pipelines.md"
METHODS = {"fine": parasolver(window=8, tolerance=1e-5), "coarse": quasi_newton(tolerance=1e-2)}
ROUNDING = 1e-5
"""Of the result's deviation, where that is above 1: float32, whose rounding differs with the rows of a network call."""


@dataclass(frozen=True)
class Expected:
    """How a case runs: its pipeline's class, its executor, and words of the reason where it is called sequentially."""

    kind: str
    executor: str
    reason: str = ""


EXPECTED = {
    "sd_sag": Expected(
        "StableDiffusionSAGPipeline", "sequential", "attn1.processor.attention_probs, on which later calls may depend"
    ),
    "sd_pix2pix": Expected("StableDiffusionInstructPix2PixPipeline", "vector"),
    "sd_upscale": Expected("StableDiffusionUpscalePipeline", "vector"),
    "sd_depth": Expected("StableDiffusionDepth2ImgPipeline", "vector"),
    "sd_ldm3d": Expected("StableDiffusionLDM3DPipeline", "vector"),
    "sd_adapter": Expected("StableDiffusionAdapterPipeline", "vector"),
    "sd_pag_img2img": Expected("StableDiffusionPAGImg2ImgPipeline", "vector"),
    "sd_pag_inpaint": Expected("StableDiffusionPAGInpaintPipeline", "lanes"),
    "sd_controlnet_img2img": Expected("StableDiffusionControlNetImg2ImgPipeline", "lanes"),
    "sd_controlnet_pag": Expected("StableDiffusionControlNetPAGPipeline", "lanes"),
    "lcm_img2img": Expected("LatentConsistencyModelImg2ImgPipeline", "vector"),
    "sd_panorama": Expected("StableDiffusionPanoramaPipeline", "sequential", "its scheduler steps several times in a pass"),
    "sdxl_img2img": Expected("StableDiffusionXLImg2ImgPipeline", "vector"),
    "sdxl_inpaint": Expected("StableDiffusionXLInpaintPipeline", "lanes"),
    "sdxl_pix2pix": Expected("StableDiffusionXLInstructPix2PixPipeline", "vector"),
    "sdxl_pag": Expected("StableDiffusionXLPAGPipeline", "vector"),
    "sdxl_controlnet": Expected("StableDiffusionXLControlNetPipeline", "lanes"),
    "sdxl_adapter": Expected("StableDiffusionXLAdapterPipeline", "lanes"),
    "bria": Expected("BriaPipeline", "vector"),
    "chroma": Expected("ChromaPipeline", "vector"),
    "chroma_img2img": Expected("ChromaImg2ImgPipeline", "vector"),
    "flux_img2img": Expected("FluxImg2ImgPipeline", "vector"),
    "flux_inpaint": Expected("FluxInpaintPipeline", "lanes"),
    "flux_fill": Expected("FluxFillPipeline", "vector"),
    "flux_kontext": Expected("FluxKontextPipeline", "vector"),
    "flux_control": Expected("FluxControlPipeline", "vector"),
    "flux2": Expected("Flux2Pipeline", "vector"),
    "flux2_klein": Expected("Flux2KleinPipeline", "vector"),
    "flux2_klein_kv": Expected("Flux2KleinKVPipeline", "lanes"),
    "flux2_klein_kv_reference": Expected("Flux2KleinKVPipeline", "sequential"),
    "hidream": Expected("HiDreamImagePipeline", "vector"),
    "hunyuan_image": Expected("HunyuanImagePipeline", "sequential"),
    "sd3_img2img": Expected("StableDiffusion3Img2ImgPipeline", "vector"),
    "sd3_inpaint": Expected("StableDiffusion3InpaintPipeline", "lanes"),
    "sd3_pag": Expected("StableDiffusion3PAGPipeline", "vector"),
    "sana_pag": Expected("SanaPAGPipeline", "vector"),
    "sana_sprint": Expected("SanaSprintPipeline", "sequential", "the second result of step"),
    "pixart_alpha": Expected("PixArtAlphaPipeline", "vector"),
    "pixart_pag": Expected("PixArtSigmaPAGPipeline", "vector"),
    "lumina": Expected("LuminaPipeline", "vector"),
    "lumina2": Expected("Lumina2Pipeline", "lanes"),
    "aura_flow": Expected("AuraFlowPipeline", "vector"),
    "cogview3": Expected("CogView3PlusPipeline", "lanes"),
    "cogview4": Expected("CogView4Pipeline", "vector"),
    "hunyuan_dit": Expected("HunyuanDiTPipeline", "vector"),
    "qwen_img2img": Expected("QwenImageImg2ImgPipeline", "vector"),
    "qwen_inpaint": Expected("QwenImageInpaintPipeline", "lanes"),
    "ovis": Expected("OvisImagePipeline", "vector"),
    "z_image_img2img": Expected("ZImageImg2ImgPipeline", "lanes"),
    "wan_vace": Expected("WanVACEPipeline", "vector"),
    "wan_image": Expected("WanImageToVideoPipeline", "vector"),
    "wan_video": Expected("WanVideoToVideoPipeline", "vector"),
    "sky_reels": Expected("SkyReelsV2Pipeline", "vector"),
    "cogvideox_image": Expected("CogVideoXImageToVideoPipeline", "lanes"),
    "cogvideox_video": Expected("CogVideoXVideoToVideoPipeline", "lanes"),
    "cogvideox_control": Expected("CogVideoXFunControlPipeline", "vector"),
    "allegro": Expected("AllegroPipeline", "vector"),
    "latte": Expected("LattePipeline", "vector"),
    "mochi": Expected("MochiPipeline", "vector"),
    "hunyuan15": Expected("HunyuanVideo15Pipeline", "lanes"),
    "hunyuan15_momentum": Expected("HunyuanVideo15Pipeline", "sequential"),
    "ltx_condition": Expected("LTXConditionPipeline", "sequential", "hands 'per_token_timesteps', a tensor"),
    "text_to_video": Expected("TextToVideoSDPipeline", "vector"),
    "video_to_video": Expected("VideoToVideoSDPipeline", "vector"),
    "animatediff_video": Expected("AnimateDiffVideoToVideoPipeline", "vector"),
    "animatediff_xl": Expected("AnimateDiffSDXLPipeline", "vector"),
    "kandinsky": Expected("KandinskyV22Pipeline", "vector"),
    "kandinsky_img2img": Expected("KandinskyV22Img2ImgPipeline", "vector"),
    "kandinsky_inpaint": Expected("KandinskyV22InpaintPipeline", "lanes"),
    "kandinsky_prior": Expected("KandinskyV22PriorPipeline", "lanes"),
    "cascade_prior": Expected("StableCascadePriorPipeline", "vector"),
    "cascade_decoder": Expected("StableCascadeDecoderPipeline", "vector"),
    "deep_floyd": Expected("IFPipeline", "sequential", "the network also predicts a variance"),
    "consistency": Expected("ConsistencyModelPipeline", "vector"),
    "consistency_times": Expected("ConsistencyModelPipeline", "sequential", "there the limit acts on the state itself"),
    "super_resolution": Expected("LDMSuperResolutionPipeline", "vector"),
    "ace_step": Expected("AceStepPipeline", "lanes"),
    "ace_step_guided": Expected("AceStepPipeline", "sequential"),
}


@pytest.mark.parametrize("name", FURTHER)
def test_gives_the_plain_calls_result(name: str) -> None:
    case, expected = FURTHER[name], EXPECTED[name]
    pipe = case.make()
    scheduler = pipe.scheduler
    assert type(pipe).__name__ == expected.kind
    plain, once = outside(pipe, lambda: case.run(pipe, 3))
    plain = plain.double()
    assert plain.isfinite().all()
    assert plain.std() > 0.05
    for method in METHODS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with parallelize(pipe, method) as run:
                found, calls = computed(pipe, once, lambda: case.run(pipe, 3))
        found = found.double()
        report, estimate = run.report, run.report.error_estimate
        assert (report.executor, pipe.scheduler) == (expected.executor, scheduler)
        told = 0.0 if estimate is None else estimate.estimated_error
        assert float((found - plain).square().mean().sqrt()) <= max(2 * told, ROUNDING * max(1.0, float(plain.std())))
        if expected.executor == "sequential":
            assert expected.reason in report.warnings[-1]
        else:
            assert report.steps == case.steps
            assert calls == once


def test_the_page_lists_the_pipelines_and_their_executors() -> None:
    """A pipeline with two cases has two executors where the cases differ."""
    ways: dict[str, set[str]] = {}
    for expected in EXPECTED.values():
        ways.setdefault(expected.kind, set()).add(expected.executor)
    assert set(EXPECTED) == set(FURTHER)
    assert len(ways) >= 40
    assert documented() == ways


def documented() -> dict[str, set[str]]:
    """The executors of each pipeline in the page's table; the reason for a sequential call follows the word."""
    table = PAGE.read_text(encoding="utf-8").partition("### Further pipelines")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w, ]+) \| ([^|]*) \|$", table, flags=re.MULTILINE)
    ways: dict[str, set[str]] = {}
    for names, text in rows:
        for name in names.split(", "):
            ways.setdefault(name, set()).update(way for way in ("vector", "lanes", "sequential") if way in text)
    return {name: found for name, found in ways.items() if name.endswith("Pipeline")}
