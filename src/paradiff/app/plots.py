# SPDX-License-Identifier: Apache-2.0
"""Pictures: samples as PNG files, and the trace of a run: the parts of the chain by round, as the records show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import PolyCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from paradiff.solver.records import Record, Trace

PIXELS = 96  # a small sample is enlarged to about this many pixels in the grid
IDLE = "0.9"  # light grey, unlike any colour of viridis


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


@dataclass(frozen=True)
class Column:
    """One round of a sample's run, as its record shows it."""

    round: int
    passed: int
    trace: Trace


def save_history(history: Sequence[Record], sample: int, parts: int, path: Path, title: str) -> None:
    """Draws one sample's run into a PNG file.

    Args:
        history: A solution's history.
        sample: Which sample.
        parts: Number of parts of the chain that the records are about.
        path: Where the PNG goes.
        title: The figure's title.
    """
    draw([entry for entry in history if entry.sample == sample], parts, title).savefig(path, dpi=120, format="png")


def draw(records: Sequence[Record], parts: int, title: str) -> Figure:
    """One sample's run, in the way that its first record is to be shown; records that are about other parts are left out.

    Args:
        records: The records of one sample, in order.
        parts: Number of parts of the chain that they are about.
        title: The figure's title.
    """
    columns = [Column(record.round, record.passed, record.trace()) for record in records]
    first = columns[0].trace
    own = [column for column in columns if column.trace.axis == first.axis]
    return {"logarithmic": _logarithmic, "counted": _counted, "marked": _marked}[first.scale](own, parts, title)


def _marked(columns: Sequence[Column], _: int, title: str) -> Figure:
    """A mark at every cell, and below it the curves."""
    names = list(columns[0].trace.curves)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots(1 + bool(names), 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(names)])[:, 0]
    rounds = [column.round for column in columns for _ in column.trace.cells]
    places = [place for column in columns for place, _ in column.trace.cells]
    axes[0].scatter(rounds, places, s=9, marker="s", color="tab:blue", linewidths=0)
    axes[0].set(ylabel=columns[0].trace.axis, title=title)
    axes[-1].set(xlabel="round")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for name in names:
        values = [(column.round, column.trace.curves[name]) for column in columns]
        shown = [(round, value) for round, value in values if 0 < value < float("inf")]
        axes[-1].plot([round for round, _ in shown], [value for _, value in shown], marker=".", label=name)
    if names:
        axes[-1].set(ylabel="RMS", yscale="log")
        axes[-1].legend(loc="upper right", fontsize="small")
    return figure


def _logarithmic(columns: Sequence[Column], parts: int, title: str) -> Figure:
    """A picture of the cells' numbers in logarithmic colours, and the front of what is final after every round."""
    rounds = columns[-1].round
    numbers = np.full((parts + 1, rounds), np.nan)
    front = np.zeros(rounds + 1)
    for column in columns:
        for place, number in column.trace.cells:
            numbers[place, column.round - 1] = number
        front[column.round :] += column.passed
    positive = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1.0)
    low = max(low, high * 1e-6)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(
        np.clip(numbers, low, None),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, rounds + 0.5, -0.5, parts + 0.5),
        norm=LogNorm(low, high if high > low else low * 10),
        cmap="viridis",
    )
    axes.step(np.arange(len(front)) + 0.5, front, where="post", color="tab:red", label="final up to here")
    axes.set(xlabel="round", ylabel=columns[0].trace.axis, title=title)
    axes.legend(loc="upper left")
    figure.colorbar(picture, ax=axes, label=columns[0].trace.meaning)
    return figure


def _counted(columns: Sequence[Column], parts: int, title: str) -> Figure:
    """A cell for every part and round, coloured by its number, or grey if it has none; and the front of what is final.

    Several numbers of one part share its cell as strips, larger ones above. The front after n parts lies below part n.
    """
    rounds = columns[-1].round
    working: dict[tuple[int, int], list[int]] = {}
    front = np.zeros(rounds + 1)
    for column in columns:
        for place, number in column.trace.cells:
            working.setdefault((column.round, place), []).append(int(number))
        front[column.round :] += column.passed
    strips, numbers = [], []
    for (round, place), found in working.items():
        strips += [_strip(round, place, k, len(found)) for k in range(len(found))]
        numbers += sorted(found)
    idle = [(round, place) for round in range(1, rounds + 1) for place in range(parts) if (round, place) not in working]

    last = max(numbers)
    figure = Figure(figsize=(min(8 + rounds / 100, 14), min(3.5 + parts / 12, 8)), layout="constrained")
    axes = figure.add_subplot()
    seam = 0.5 if rounds <= 150 else 0.0  # white lines between cells, where cells are wide enough
    look = {"edgecolor": "white", "linewidth": seam, "antialiased": seam > 0}
    axes.add_collection(PolyCollection([_strip(*cell, 0, 1) for cell in idle], facecolor=IDLE, **look))
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.1, 1, last + 1)))
    norm = BoundaryNorm(np.arange(-0.5, last + 1), last + 1)
    rows = axes.add_collection(PolyCollection(strips, array=np.array(numbers), cmap=colours, norm=norm, **look))
    above = {"clip_on": False, "zorder": 3}  # of the axes' frame, along which it runs while nothing is final
    (line,) = axes.step(np.arange(rounds + 1) + 0.5, front - 0.5, where="post", color="tab:red", linewidth=2, **above)
    axes.set(xlim=(0.5, rounds + 0.5), ylim=(-0.5, parts - 0.5), xlabel="round", ylabel=columns[0].trace.axis, title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    key = [Patch(facecolor=IDLE, edgecolor="0.7"), line]
    figure.legend(key, ["idle", "final below"], loc="outside lower right", ncols=2, frameon=False)
    ticks = range(0, last + 1, last // 10 + 1)
    figure.colorbar(rows, ax=axes, label=columns[0].trace.meaning, ticks=ticks, format="%d").minorticks_off()
    return figure


def _strip(round: int, place: int, k: int, count: int) -> list[tuple[float, float]]:
    """Corners of the k-th of `count` strips of a part's cell, from below."""
    low, high = place - 0.5 + k / count, place - 0.5 + (k + 1) / count
    return [(round - 0.5, low), (round + 0.5, low), (round + 0.5, high), (round - 0.5, high)]
