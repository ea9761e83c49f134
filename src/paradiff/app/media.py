# SPDX-License-Identifier: Apache-2.0
"""What a pipeline call gives, as tensors and as files: pictures, the frames of a video, sound."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paradiff.app import plots

SOUND = ("audios", "audio")
RATES = (("vae", "sampling_rate"), ("vocoder", "output_sampling_rate"), ("vocoder", "sampling_rate"))
"""Components, and where they keep the samples a second of the sound that they make."""

FRAMES_A_SECOND = 10
"""Of a video whose pipeline names no number of its own, as diffusers' `export_to_video` has it."""

EXTRAS = {"video": ("imageio", "imageio_ffmpeg"), "sound": ("soundfile",)}
"""Optional dependency groups of this package, and the modules that each brings."""


@dataclass(frozen=True)
class Output:
    """What one pipeline call gave.

    Attributes:
        pictures: `[K, C, H, W]` pictures or frames, -1 to 1; None where there are none.
        sound: `[C, T]` sound, -1 to 1; None where there is none.
        rate: Samples a second of the sound.
        fps: Frames a second where the pictures are a video's frames; 0 where they are single pictures.
    """

    pictures: Tensor | None
    sound: Tensor | None
    rate: int
    fps: float = 0

    @property
    def data(self) -> Tensor:
        """The pictures, or the sound where there are none."""
        data = self.sound if self.pictures is None else self.pictures
        assert data is not None
        return data

    def sheet(self) -> Image.Image | None:
        """The picture, or a contact sheet where there are several."""
        if self.pictures is None:
            return None
        return plots.to_image(self.pictures[0]) if len(self.pictures) == 1 else plots.grid(self.pictures)

    def save(self, folder: Path, name: str) -> None:
        """Writes `name.png`, `name.mp4` and `name.wav`, as far as there are pictures, frames of a video, and sound.

        A video's PNG is the contact sheet of its frames. Where the extra that writes a format is not installed, a warning
        names it, and the other files are written.
        """
        sheet = self.sheet()
        if sheet is not None:
            sheet.save(folder / f"{name}.png", format="PNG")
        if self.pictures is not None and self.fps and _can_write("video", folder / f"{name}.mp4"):
            import imageio  # pyright: ignore[reportMissingImports]  (optional)

            frames: list[Any] = [np.asarray(plots.to_image(frame).convert("RGB")) for frame in self.pictures]
            # 4:2:0 video has even sides: a macro block of 2 enlarges odd ones by a pixel, and leaves all others as they are.
            imageio.mimwrite(folder / f"{name}.mp4", frames, fps=self.fps, macro_block_size=2)
        if self.sound is not None and _can_write("sound", folder / f"{name}.wav"):
            import soundfile  # pyright: ignore[reportMissingImports]  (optional)

            levels = (self.sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy()
            soundfile.write(folder / f"{name}.wav", levels, self.rate, subtype="PCM_16")


def _can_write(extra: str, path: Path) -> bool:
    """Whether an optional dependency group is installed; a warning names the group and the file that needs it where not."""
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        warnings.warn(
            f"{path.name} is not written, because {' and '.join(missing)} is not installed; install what is missing by "
            f"pip install 'paradiff[{extra}]'",
            stacklevel=3,
        )
    return not missing


def read_output(result: Any, pipeline: Any) -> Output:
    """Reads what a pipeline called with `output_type="np"` returned.

    Raises:
        ValueError: If it is neither pictures nor frames nor sound, or empty.
    """
    fields = dict(result) if isinstance(result, Mapping) else {"images": result[0]}
    given = {name: _array(value) for name, value in fields.items() if value is not None}
    sound = next((given.pop(name) for name in SOUND if given.get(name) is not None), None)
    name, shown = next(iter(given.items()), ("", None))
    title = f"the {type(pipeline).__name__}"
    if shown is None and sound is None:
        raise ValueError(
            f"{title} returned {', '.join(fields) or 'nothing'}, which is neither pictures nor sound; call it from Python"
        )
    for kind, value in (("pictures", shown), ("sound", sound)):
        if value is not None and value.numel() == 0:
            raise ValueError(
                f"{title} returned {kind} of shape {tuple(value.shape)}, without an entry; ask for a larger size, or a longer "
                "piece"
            )
    video = False
    if shown is not None:
        if shown.ndim not in (3, 4, 5) or shown.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"{title} returned an array of shape {tuple(shown.shape)}; this command saves pictures [n, height, width, "
                "channels] and sound: call it from Python"
            )
        video = name == "frames" or shown.ndim == 5
        shown = 2 * shown.reshape(-1, *shown.shape[-3:]).permute(0, 3, 1, 2) - 1
    if sound is not None:
        if sound.ndim > 3 or (sound.ndim > 1 and len(sound) != 1):
            raise ValueError(
                f"{title} returned sound of shape {tuple(sound.shape)}; this command saves one piece a seed: ask for one"
            )
        sound = sound.reshape(-1, sound.shape[-1])
    return Output(shown, sound, 0 if sound is None else _rate(pipeline), _fps(pipeline) if video else 0)


def _array(value: Any) -> Tensor | None:
    """Numbers as a float tensor; pictures of PIL from 0 to 1; None for anything else."""
    if isinstance(value, Image.Image):
        levels = torch.from_numpy(np.array(value)).float() / 255
        return levels[..., None] if levels.ndim == 2 else levels
    if isinstance(value, list | tuple):
        parts = [_array(part) for part in value]
        known = [part for part in parts if part is not None]
        return torch.stack(known) if parts and len(known) == len(parts) and len({p.shape for p in known}) == 1 else None
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value)
    return value.float().cpu() if isinstance(value, Tensor) and value.is_floating_point() else None


def _rate(pipeline: Any) -> int:
    for part, name in RATES:
        component = getattr(pipeline, part, None)
        rate = getattr(component, name, None) or getattr(getattr(component, "config", None), name, None)
        if rate:
            return int(rate)
    raise ValueError(
        f"the {type(pipeline).__name__} made sound, but does not say how many samples a second; call it from Python"
    )


def _fps(pipeline: Any) -> float:
    """Frames a second: the default of the call's `frame_rate` or `fps` where the pipeline has one."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    given = (parameters[name].default for name in ("frame_rate", "fps") if name in parameters)
    return next((value for value in given if isinstance(value, int | float)), FRAMES_A_SECOND)
