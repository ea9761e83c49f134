# SPDX-License-Identifier: Apache-2.0
"""The picture of a comparison: the worst sample's error of every row against what the row costs and gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

FLOOR = 1e-6
"""Smaller errors are drawn here: rounding."""

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#767676")
"""Okabe and Ito, 2008, "Color Universal Design"."""


def draw(
    title: str, labels: Sequence[str], errors: Sequence[float], rivals: Sequence[bool], panels: Mapping[str, Sequence[float]]
) -> Figure:
    """A figure with a panel for each cost.

    Args:
        title: Its title.
        labels: Of the rows.
        errors: Of their worst samples.
        rivals: Which rows are squares.
        panels: What the rows cost or gain, by the text below the panel.
    """
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (below, values) in zip(axes, panels.items(), strict=True):
        for k, (label, error, rival, value) in enumerate(zip(labels, errors, rivals, values, strict=True)):
            colour = COLOURS[k % len(COLOURS)]
            filled = colour if k < len(COLOURS) else "none"
            place.scatter(
                [value], [max(error, FLOOR)], label=label, marker="s" if rival else "o", edgecolors=colour, facecolors=filled
            )
        place.set(xlabel=below, xscale="log", yscale="log")
        place.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.xaxis.set_minor_formatter(NullFormatter())
        place.grid(color="0.9", linewidth=0.8)
        place.set_axisbelow(True)
    axes[0].set_ylabel("error of the worst sample")
    figure.suptitle(title, x=0.01, ha="left")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
