# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks' pictures look: 9 inches wide, so that text of 9 points is readable at 900 pixels, and colours that differ
for colour-blind readers too (Okabe and Ito, 2008, "Color Universal Design")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK, GREY, PALE = "#56B4E9", "#CC79A7", "#000000", "#767676", "#C8C8C8"
WIDTH, DPI = 9.0, 150
STYLE = {
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def panels(title: str, height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Figure, np.ndarray]:
    """A figure whose title is its message, and its panels `[rows, columns]`."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        found = figure.subplots(rows, columns, squeeze=False, **more)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    return figure, found


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG."""
    with rc_context(STYLE):
        figure.savefig(path, dpi=DPI)


def heading(axes: Axes, text: str) -> None:
    """The title of a panel."""
    axes.set_title(text, loc="left", fontsize=10)


def plain_log(axes: Axes, which: str = "x", ticks: tuple[float, ...] = ()) -> None:
    """A logarithmic axis with plain numbers, at `ticks` if given."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    if ticks:
        axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value >= 10_000 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def beside(axes: Axes, x: float, y: float, text: str, colour: str, offset: tuple[float, float] = (6, 0), **more: Any) -> None:
    """A label in the colour of what it names, beside a point of it."""
    halo = [withStroke(linewidth=3, foreground="white")]
    axes.annotate(
        text, (x, y), offset, textcoords="offset points", color=colour, va="center", path_effects=halo, zorder=5, **more
    )


def legend(figure: Figure, marks: dict[str, dict[str, Any]]) -> None:
    """A line below the panels that says what each mark stands for, by the properties of a `Line2D`."""
    handles = [Line2D([], [], label=label, **{"ls": "", "marker": "o", "ms": 6} | look) for label, look in marks.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9.5)
