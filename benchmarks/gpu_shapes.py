# SPDX-License-Identifier: Apache-2.0
"""Networks of the shapes that users run, with random weights: their times are those of trained ones.

They are built from the config classes of diffusers, without a hub. `tiny` ones have the same classes and a few weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from paradiff.models.pipeline import load_pipeline
from paradiff.models.pixel import load as load_pixels

TOKENS = 77
"""Of a prompt, by CLIP."""


@dataclass(frozen=True)
class Shape:
    """A network, and what it is called with.

    Attributes:
        name: As the results have it.
        state: Shape of one state.
        guided: Network rows of a state: 2 with classifier-free guidance.
        build: Makes the network; its arguments are whether it is tiny.
        given: Further arguments of a call with so many network rows, on a device in a dtype.
        by_name: Whether state and time are passed as keywords `hidden_states` and `timestep`.
    """

    name: str
    state: tuple[int, ...]
    guided: int
    build: Callable[[bool], nn.Module]
    given: Callable[[int, bool, dict[str, Any]], dict[str, Any]] = lambda rows, tiny, place: {}
    by_name: bool = False

    def sized(self, tiny: bool) -> tuple[int, ...]:
        """The shape of one state; of a tiny network, at most 8 in each direction of space."""
        if not tiny:
            return self.state
        return self.state if self.name.startswith("FLUX") else (self.state[0], *(min(8, side) for side in self.state[1:]))

    def network(self, device: torch.device, dtype: torch.dtype, tiny: bool) -> nn.Module:
        """The network, in evaluation mode."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return nn.Module.to(self.build(tiny), device, dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def call(
        self, network: Callable[..., Any], rows: int, tiny: bool, device: torch.device, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """A function that calls the network with so many states, guidance's rows besides, always in the same memory."""
        place = {"device": device, "dtype": dtype}
        many = rows * self.guided
        x = torch.randn(many, *self._packed(tiny), **place)
        t = torch.full((many,), 500.0, **place) if self.by_name else torch.full((many,), 500, device=device)
        given = self.given(many, tiny, place)

        def run() -> Tensor:
            if self.by_name:
                return network(hidden_states=x, timestep=t, return_dict=False, **given)[0]
            return network(x, t, return_dict=False, **given)[0]

        return run

    def _packed(self, tiny: bool) -> tuple[int, ...]:
        """The shape of a row as the network takes it: FLUX takes tokens of 2 x 2 latents."""
        channels, height, width = (*self.sized(tiny), 1, 1)[:3]
        if not self.name.startswith("FLUX"):
            return self.sized(tiny)
        return (16, 64) if tiny else (height * width // 4, 4 * channels)


def _church(tiny: bool) -> nn.Module:
    """google/ddpm-church-256."""
    if tiny:
        return diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return diffusers.UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    )


def _stable(tiny: bool) -> nn.Module:
    """Stable Diffusion 2."""
    small: dict[str, Any] = {
        "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4,
        "cross_attention_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    large: dict[str, Any] = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024}
    return diffusers.UNet2DConditionModel(use_linear_projection=True, **(small if tiny else large))


def _dit(side: int) -> Callable[[bool], nn.Module]:
    """DiT-XL/2."""

    def build(tiny: bool) -> nn.Module:
        size: dict[str, Any] = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": side}
        small: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
        return diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, **(small if tiny else size))

    return build


def _sd3(tiny: bool) -> nn.Module:
    """Stable Diffusion 3 medium."""
    large: dict[str, Any] = {
        "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
    }  # fmt: skip
    small: dict[str, Any] = {
        "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8,
        "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
    }  # fmt: skip
    return diffusers.SD3Transformer2DModel(in_channels=16, out_channels=16, patch_size=2, **(small if tiny else large))


def _flux(tiny: bool) -> nn.Module:
    """FLUX.1 dev."""
    small: dict[str, Any] = {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return diffusers.FluxTransformer2DModel(guidance_embeds=True, **(small if tiny else {}))


def _policy(tiny: bool) -> nn.Module:
    """A diffusion policy's U-Net over actions in time, of about 60 million weights."""
    widths = (8, 16) if tiny else (256, 512, 1024)
    return diffusers.UNet1DModel(
        in_channels=14, out_channels=14, block_out_channels=widths, layers_per_block=1, act_fn="mish",
        use_timestep_embedding=True, time_embedding_type="positional", flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("DownResnetBlock1D",) * len(widths), up_block_types=("UpResnetBlock1D",) * (len(widths) - 1),
        mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", downsample_each_block=False,
    )  # fmt: skip


def _of_clip(width: int) -> Callable[[int, bool, dict[str, Any]], dict[str, Any]]:
    return lambda rows, tiny, place: {"encoder_hidden_states": torch.randn(rows, TOKENS, 8 if tiny else width, **place)}


def _of_class(rows: int, tiny: bool, place: dict[str, Any]) -> dict[str, Any]:
    return {"class_labels": torch.full((rows,), 7, device=place["device"])}


def _of_sd3(rows: int, tiny: bool, place: dict[str, Any]) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(rows, 8 if tiny else 333, 8 if tiny else 4096, **place),
        "pooled_projections": torch.randn(rows, 8 if tiny else 2048, **place),
    }


def _of_flux(tokens: int) -> Callable[[int, bool, dict[str, Any]], dict[str, Any]]:
    def given(rows: int, tiny: bool, place: dict[str, Any]) -> dict[str, Any]:
        side, text = (4, 8) if tiny else (int(tokens**0.5), 512)
        grid = torch.zeros(side, side, 3, **place)
        grid[..., 1] += torch.arange(side, device=place["device"])[:, None]
        grid[..., 2] += torch.arange(side, device=place["device"])[None]
        return {
            "encoder_hidden_states": torch.randn(rows, text, 8 if tiny else 4096, **place),
            "pooled_projections": torch.randn(rows, 8 if tiny else 768, **place),
            "img_ids": grid.view(-1, 3),
            "txt_ids": torch.zeros(text, 3, **place),
            "guidance": torch.full((rows,), 3.5, **place),
        }

    return given


def _of_shapes(rows: int, tiny: bool, place: dict[str, Any]) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(rows, 16, 64, **place)}


SHAPES = (
    Shape("DDPM U-Net, 256x256 pixels", (3, 256, 256), 1, _church),
    Shape("Stable Diffusion 2, 512x512", (4, 64, 64), 2, _stable, _of_clip(1024)),
    Shape("Stable Diffusion 2, 768x768", (4, 96, 96), 2, _stable, _of_clip(1024)),
    Shape("DiT-XL/2, 256x256", (4, 32, 32), 2, _dit(32), _of_class),
    Shape("DiT-XL/2, 512x512", (4, 64, 64), 2, _dit(64), _of_class),
    Shape("SD3 medium, 512x512", (16, 64, 64), 2, _sd3, _of_sd3, by_name=True),
    Shape("SD3 medium, 1024x1024", (16, 128, 128), 2, _sd3, _of_sd3, by_name=True),
    Shape("FLUX.1, 512x512", (16, 64, 64), 1, _flux, _of_flux(1024), by_name=True),
    Shape("FLUX.1, 1024x1024", (16, 128, 128), 1, _flux, _of_flux(4096), by_name=True),
    Shape("diffusion policy, 16 actions", (14, 16), 1, _policy),
    Shape("bundled digits, 8x8 pixels", (1, 8, 8), 1, lambda tiny: load_pixels("digits", device="cpu").unet),
    Shape("bundled shapes", (4, 8, 8), 2, lambda tiny: load_pipeline("shapes").unet, _of_shapes),
)
"""The shapes, in the order in which a GPU day measures them."""
