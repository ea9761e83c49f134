# SPDX-License-Identifier: Apache-2.0
"""The pictures of a pipeline's states: previews of a call while it is solved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def pictures_of(pipeline: Any, states: Tensor) -> Tensor | None:
    """The pictures of states of a pipeline's loop, as its own decoder gives them; None where states have another form.

    States of pixels are pictures themselves. Latents `[b, C, h, w]` with the channels of the pipeline's `vae` are scaled as its
    configuration says and decoded; packed latents, videos and sound are left alone. A call of the decoder takes time and
    memory as at the call's end.

    Args:
        pipeline: The pipeline.
        states: `[b, C, h, w]` states, such as those of a preview's sample.

    Returns:
        `[b, C, H, W]` pictures from -1 to 1, float32.
    """
    if states.ndim != 4:
        return None
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        network = getattr(pipeline, "unet", None)
        pixels = states.shape[1] in (1, 3) and getattr(getattr(network, "config", None), "in_channels", None) == states.shape[1]
        return states.float().clamp(-1, 1) if pixels else None
    config = vae.config
    scale = getattr(config, "scaling_factor", None)
    if scale is None or getattr(config, "latent_channels", None) != states.shape[1]:
        return None
    shift = getattr(config, "shift_factor", None) or 0.0
    found = vae.decode(states.to(vae.device, vae.dtype) / scale + shift, return_dict=False)[0]
    return found.float().clamp(-1, 1) if isinstance(found, Tensor) and found.ndim == 4 else None
