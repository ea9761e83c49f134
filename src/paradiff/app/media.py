"""What a pipeline call gives, as tensors and as files: pictures, the frames of a video, sound."""

from __future__ import annotations

import wave
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Output:
    """What one pipeline call gave.

    Attributes:
        pictures: `[K, C, H, W]` pictures or frames, -1 to 1; None where there are none.
        sound: `[C, T]` sound, -1 to 1; None where there is none.
        rate: Samples a second of the sound.
    """

    pictures: Tensor | None
    sound: Tensor | None
    rate: int

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
        """Writes `name.png` and `name.wav`, as far as there are pictures and sound."""
        sheet = self.sheet()
        if sheet is not None:
            sheet.save(folder / f"{name}.png", format="PNG")
        if self.sound is not None:
            levels = (self.sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy().astype("<i2")
            with wave.open(str(folder / f"{name}.wav"), "wb") as file:
                file.setnchannels(levels.shape[1])
                file.setsampwidth(2)
                file.setframerate(self.rate)
                file.writeframes(levels.tobytes())


def read_output(result: Any, pipeline: Any) -> Output:
    """Reads what a pipeline called with `output_type="np"` returned.

    Raises:
        ValueError: If it is neither pictures nor frames nor sound.
    """
    fields = dict(result) if isinstance(result, Mapping) else {"images": result[0]}
    given = {name: _array(value) for name, value in fields.items() if value is not None}
    sound = next((given.pop(name) for name in SOUND if given.get(name) is not None), None)
    shown = next(iter(given.values()), None)
    title = f"the {type(pipeline).__name__}"
    if shown is None and sound is None:
        raise ValueError(
            f"{title} returned {', '.join(fields) or 'nothing'}, which is neither pictures nor sound; call it from Python"
        )
    if shown is not None:
        if shown.ndim not in (3, 4, 5) or shown.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"{title} returned an array of shape {tuple(shown.shape)}; this command saves pictures [n, height, width, "
                "channels] and sound: call it from Python"
            )
        shown = 2 * shown.reshape(-1, *shown.shape[-3:]).permute(0, 3, 1, 2) - 1
    if sound is not None:
        if sound.ndim > 3 or (sound.ndim > 1 and len(sound) != 1):
            raise ValueError(
                f"{title} returned sound of shape {tuple(sound.shape)}; this command saves one piece a seed: ask for one"
            )
        sound = sound.reshape(-1, sound.shape[-1])
    return Output(shown, sound, 0 if sound is None else _rate(pipeline))


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
