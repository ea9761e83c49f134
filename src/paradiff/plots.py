"""Pictures: samples as PNG files, and the trace of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from paradiff.solution import Sweep

PIXELS = 96  # a small sample is enlarged to about this many pixels in the grid


def to_image(sample: Tensor) -> Image.Image:
    """One sample `[C, H, W]` with data in -1 ... 1 as an 8-bit picture.

    Raises:
        ValueError: If it has neither one channel nor three.
    """
    levels = ((sample.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu().numpy()
    if levels.shape[0] not in (1, 3):
        raise ValueError(f"a sample has {levels.shape[0]} channels; a picture has 1 (grey) or 3 (colour)")
    return Image.fromarray(levels[0] if levels.shape[0] == 1 else levels.transpose(1, 2, 0))


def grid(samples: Tensor) -> Image.Image:
    """All samples `[B, C, H, W]` in one picture, row by row, small ones enlarged without smoothing."""
    tiles = [to_image(s) for s in samples]
    zoom = max(1, PIXELS // max(tiles[0].size))
    width, height = (zoom * side for side in tiles[0].size)
    columns = int(np.ceil(np.sqrt(len(tiles))))
    rows = int(np.ceil(len(tiles) / columns))
    gap = max(2, width // 24)
    sheet = Image.new(
        tiles[0].mode, (gap + columns * (width + gap), gap + rows * (height + gap)), 255 if tiles[0].mode == "L" else "white"
    )
    for k, tile in enumerate(tiles):
        place = (gap + (k % columns) * (width + gap), gap + (k // columns) * (height + gap))
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def save_trace(history: Sequence[Sweep], sample: int, nodes: int, path: Path, title: str) -> None:
    """Draws one sample's run: the change of every node in every round, and the front of final nodes.

    Args:
        history: A solution's history.
        sample: Which sample.
        nodes: Number of nodes after the first (of sub-intervals).
        path: Where the PNG goes.
        title: The figure's title.
    """
    sweeps = [s for s in history if s.sample == sample]
    change = np.full((nodes + 1, sweeps[-1].round), np.nan)
    front = np.zeros(sweeps[-1].round + 1)
    for sweep in sweeps:
        end = sweep.first + len(sweep.change)
        change[sweep.first + 1 : end + 1, sweep.round - 1] = sweep.change
        front[sweep.round :] = sweep.first + sweep.passed
    positive = change[np.isfinite(change) & (change > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1.0)
    low = max(low, high * 1e-6)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(
        np.clip(change, low, None),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, sweeps[-1].round + 0.5, -0.5, nodes + 0.5),
        norm=LogNorm(low, high if high > low else low * 10),
        cmap="viridis",
    )
    axes.step(np.arange(len(front)) + 0.5, front, where="post", color="tab:red", label="final up to here")
    axes.set(xlabel="round", ylabel="node (0 noise, last the sample)", title=title)
    axes.legend(loc="upper left")
    figure.colorbar(picture, ax=axes, label="RMS change of the node in the round")
    figure.savefig(path, dpi=120, format="png")
