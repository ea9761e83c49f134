"""Pictures: samples as PNG files, and the trace of a run: nodes of a window, or blocks of a wavefront, by round."""

from __future__ import annotations

from collections.abc import Sequence
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

from paradiff.solver.records import CollocationRecord, PararealRecord, Record, WindowRecord

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


def save_history(history: Sequence[Record], sample: int, parts: int, path: Path, title: str) -> None:
    """Draws one sample's run into a PNG file, in the way of its method.

    Args:
        history: A solution's history.
        sample: Which sample.
        parts: Number of sub-intervals or blocks.
        path: Where the PNG goes.
        title: The figure's title.
    """
    own = [entry for entry in history if entry.sample == sample]
    waves = [entry for entry in own if isinstance(entry, PararealRecord)]
    visits = [entry for entry in own if isinstance(entry, CollocationRecord)]
    if waves:
        wavefront(waves, parts, title).savefig(path, dpi=120, format="png")
    elif visits:
        visited(visits, title).savefig(path, dpi=120, format="png")
    else:
        save_trace([entry for entry in own if isinstance(entry, WindowRecord)], sample, parts, path, title)


def visited(visits: Sequence[CollocationRecord], title: str) -> Figure:
    """Which nodes of the chain a sparse system had evaluated in every round, and how its sample and estimates moved.

    Args:
        visits: The rounds of one sample.
        title: The figure's title.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    rounds = [visit.round for visit in visits for _ in visit.nodes]
    nodes = [node for visit in visits for node in visit.nodes]
    above.scatter(rounds, nodes, s=9, marker="s", color="tab:blue", linewidths=0)
    above.set(ylabel="fine node (0 noise)", title=title)
    for label, values in (
        ("change of the sample", [visit.change for visit in visits]),
        ("estimated error of the gaps", [visit.interpolation_error for visit in visits]),
        ("estimated error of the sweeps", [visit.iteration_error for visit in visits]),
    ):
        shown = [(visit.round, v) for visit, v in zip(visits, values, strict=True) if 0 < v < float("inf")]
        below.plot([r for r, _ in shown], [v for _, v in shown], marker=".", label=label)
    below.set(xlabel="round", ylabel="RMS", yscale="log")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.legend(loc="upper right", fontsize="small")
    return figure


def save_trace(history: Sequence[WindowRecord], sample: int, nodes: int, path: Path, title: str) -> None:
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


def wavefront(waves: Sequence[PararealRecord], blocks: int, title: str) -> Figure:
    """Which iteration every block worked at in every round, and the front of final edges.

    A cell is a block in a round, coloured by iteration, or grey if the block had no row. Several rows of one block share its
    cell as strips, later iterations above. Edge n, at the front, lies below block n.

    Args:
        waves: The rounds of one sample.
        blocks: Number of blocks.
        title: The figure's title.
    """
    rounds = waves[-1].round
    working: dict[tuple[int, int], list[int]] = {}
    front = np.zeros(rounds + 1)
    for wave in waves:
        for block, iteration in wave.rows:
            working.setdefault((wave.round, block), []).append(iteration)
        front[wave.round :] += wave.passed
    strips, iterations = [], []
    for (round, block), found in working.items():
        strips += [_strip(round, block, k, len(found)) for k in range(len(found))]
        iterations += sorted(found)
    idle = [(round, block) for round in range(1, rounds + 1) for block in range(blocks) if (round, block) not in working]

    last = max(iterations)
    figure = Figure(figsize=(min(8 + rounds / 100, 14), min(3.5 + blocks / 12, 8)), layout="constrained")
    axes = figure.add_subplot()
    seam = 0.5 if rounds <= 150 else 0.0  # white lines between cells, where cells are wide enough
    look = {"edgecolor": "white", "linewidth": seam, "antialiased": seam > 0}
    axes.add_collection(PolyCollection([_strip(*cell, 0, 1) for cell in idle], facecolor=IDLE, **look))
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.1, 1, last + 1)))
    norm = BoundaryNorm(np.arange(-0.5, last + 1), last + 1)
    rows = axes.add_collection(PolyCollection(strips, array=np.array(iterations), cmap=colours, norm=norm, **look))
    (line,) = axes.step(np.arange(rounds + 1) + 0.5, front - 0.5, where="post", color="tab:red", linewidth=2, clip_on=False)
    axes.set(xlim=(0.5, rounds + 0.5), ylim=(-0.5, blocks - 0.5), xlabel="round", ylabel="block (0 at the noise)", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    key = [Patch(facecolor=IDLE, edgecolor="0.7"), line]
    figure.legend(key, ["idle", "final below"], loc="outside lower right", ncols=2, frameon=False)
    ticks = range(0, last + 1, last // 10 + 1)
    figure.colorbar(rows, ax=axes, label="iteration", ticks=ticks, format="%d").minorticks_off()
    return figure


def _strip(round: int, block: int, k: int, count: int) -> list[tuple[float, float]]:
    """Corners of the k-th of `count` strips of a block's cell, from below."""
    low, high = block - 0.5 + k / count, block - 0.5 + (k + 1) / count
    return [(round - 0.5, low), (round + 0.5, low), (round + 0.5, high), (round - 0.5, high)]
