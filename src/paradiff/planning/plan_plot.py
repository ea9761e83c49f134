# SPDX-License-Identifier: Apache-2.0
"""The picture of a plan: seconds against the window, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from paradiff.planning.comparison_plot import COLOURS


def draw(title: str, methods: Mapping[str, Sequence[tuple[int, float, float, float]]], plain: float) -> Figure:
    """A figure.

    Args:
        title: Its title.
        methods: Window, predicted seconds, and the least and the most of them, by method.
        plain: Seconds of the sequential chain.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for colour, (name, points) in zip(COLOURS[1:] * len(methods), methods.items(), strict=False):
        windows, seconds, least, most = ([*column] for column in zip(*points, strict=True))
        axes.plot(windows, seconds, color=colour, marker="o", label=name)
        axes.fill_between(windows, least, most, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(plain, color=COLOURS[0], label="sequential")
    axes.set(xlabel="window: most rows of a sample in a round", ylabel="seconds, predicted", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, loc="left")
    return figure
