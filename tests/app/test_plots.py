# SPDX-License-Identifier: Apache-2.0
"""Pictures: pixels are those of diffusers, the grid holds every sample, the trace is drawn whatever the run was like, and shows
of a wavefront every row."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.utils.pil_utils import numpy_to_pil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from problems import SHAPE, TABLES, network, run

from paradiff.app.plots import PIXELS, draw, grid, save_history, to_image
from paradiff.chain.noise import Keyed
from paradiff.methods.presets import collocation, jacobi, paradigms, parasolver, sequential, srds
from paradiff.solver.loop import sample
from paradiff.solver.records import CollocationRecord, PararealRecord, Scale, Trace, WindowRecord


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_rounded_as_diffusers_does(channels: int) -> None:
    x = torch.randn(channels, 6, 9, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:5] = torch.tensor([-1.0, 1.0, 0.0, -5.0, 5.0])
    # What pipelines do: to 0 ... 1, then to numpy, then to 8 bits.
    wanted = numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)[None].numpy())[0]
    found = to_image(x)
    assert found.mode == ("L" if channels == 1 else "RGB")
    assert found.size == (9, 6)
    assert found.mode == wanted.mode
    assert np.array_equal(np.array(found), np.array(wanted))


def test_every_level_of_grey_is_reached_and_its_edges_are_those_of_diffusers() -> None:
    x = torch.linspace(-1.1, 1.1, 20000).view(1, 100, 200)
    found = np.array(to_image(x))
    assert set(found.ravel().tolist()) == set(range(256))
    wanted = numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)[None].numpy())[0]
    assert np.array_equal(found, np.array(wanted))


def test_lower_precision_is_drawn_too() -> None:
    x = torch.rand(1, 4, 4) * 2 - 1
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert np.abs(np.array(to_image(x.to(dtype))).astype(int) - np.array(to_image(x))).max() <= 1


@pytest.mark.parametrize("channels", [2, 4])
def test_a_sample_that_is_no_picture_is_refused(channels: int) -> None:
    message = rf"a sample has {channels} channels; a picture has 1 \(grey\) or 3 \(colour\)"
    for make in (lambda x: to_image(x[0]), grid):
        with pytest.raises(ValueError, match=message):
            make(torch.zeros(2, channels, 4, 4))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 8, 16), (3, 128, 100)])
def test_the_grid_holds_every_sample(count: int, size: tuple[int, int, int]) -> None:
    x = (torch.arange(count).view(-1, 1, 1, 1) / 10 - 0.5).expand(count, *size)
    found = np.array(grid(x))
    zoom = max(1, PIXELS // max(size[1:]))
    paper, levels = 255, [int(np.array(to_image(s)).flat[0]) for s in x]
    for level in levels:
        assert level != paper
        assert (found == level).sum() == zoom**2 * np.prod(size)
    assert len(np.unique(found)) == count + 1  # Each sample's level and the paper's.


METHODS = {
    "sequential": sequential(),
    "jacobi": jacobi(),
    "paradigms": paradigms(5),
    "parasolver": parasolver(5),
    "stride": parasolver(stride=3),
    "exact": parasolver(tolerance=0.0),
    "collocation": collocation(8),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_trace_of_any_run_is_a_picture(method: str, tmp_path: Path) -> None:
    table = TABLES["ddpm"]
    found = run(table, METHODS[method], samples=2)
    path = tmp_path / "trace.png"
    save_history(found.history, 1, len(METHODS[method].edges(table)) - 1, path, "a title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert picture.height > 300
    assert colours is not None
    assert len(colours) > 50  # Not a blank sheet.


@pytest.mark.parametrize("change", [[0.0, 0.0], [torch.inf, torch.inf], [1e-30, 1e30], [1.0, 1.0], [0.5, torch.inf]])
def test_extreme_changes_are_drawn(change: list[float], tmp_path: Path) -> None:
    history = [WindowRecord(1, 0, 0, change, 1), WindowRecord(2, 0, 1, change[1:], 1)]
    save_history(history, 0, 2, tmp_path / "trace.png", "extreme")
    assert (tmp_path / "trace.png").stat().st_size > 5000


def test_only_the_asked_sample_is_drawn(tmp_path: Path) -> None:
    found = run(TABLES["ddim"], parasolver(5), samples=2)
    for one in (0, 1):
        save_history(found.history, one, 12, tmp_path / f"{one}.png", "")
    alone = [s for s in found.history if s.sample == 1]
    save_history(alone, 1, 12, tmp_path / "alone.png", "")
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


# -- wavefronts --------------------------------------------------------------------------------------------------------

BLOCKS = 4
SRDS = {
    "pipelined": srds(BLOCKS, iterations=3),
    "batched": srds(BLOCKS, ordering="batched", iterations=2),
    "two coarse steps": srds(BLOCKS, 2, iterations=2),
    "slope": srds(BLOCKS, parasolver().slope, iterations=2),
    "rows": srds(BLOCKS, rows=2, iterations=2),
    "no iteration": srds(BLOCKS, iterations=0),
    "one block": srds(1),
}


def waves_of(name: str) -> tuple[list[PararealRecord], int]:
    """A run of two samples on 12 steps: the rounds of the second, and the number of blocks."""
    method, table = SRDS[name], TABLES["ddpm"]
    found = sample(network, table, Keyed(SHAPE, 0, 2), method, dtype=torch.float64)
    return [w for w in found.history if isinstance(w, PararealRecord) and w.sample == 1], len(method.edges(table)) - 1


class Drawn:
    """A figure's pixels, to be read at the figure's own coordinates: round and block."""

    def __init__(self, figure: Figure) -> None:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.place = figure.axes[0].transData

    def at(self, round: float, block: float) -> tuple[int, ...]:
        x, y = self.place.transform((round, block))
        return tuple(self.pixels[len(self.pixels) - 1 - int(y), int(x)].tolist())


@pytest.mark.parametrize("name", SRDS)
def test_every_row_of_a_wavefront_is_a_cell_of_its_iterations_colour(name: str) -> None:
    waves, blocks = waves_of(name)
    drawn = Drawn(draw(waves, blocks, "a title"))
    colours, idle = defaultdict(set), set()
    for wave in waves:
        for block in range(blocks):
            rows = sorted(iteration for at, iteration in wave.rows if at == block)
            for k, iteration in enumerate(rows):
                colours[iteration].add(drawn.at(wave.round, block - 0.5 + (k + 0.5) / len(rows)))
            if not rows:
                idle.add(drawn.at(wave.round, block))
    assert set(colours) == set(range(max(colours) + 1))
    assert {len(found) for found in colours.values()} == {1}
    shades = np.array([found.pop() for _, found in sorted(colours.items())])
    if blocks == 1:
        assert not idle
        return
    ((red, green, blue),) = idle
    assert red == green == blue
    assert 200 < red < 250  # Neither dark nor the paper.
    for one in (*shades, np.array([255, 255, 255])):
        assert np.abs(one.astype(int) - [red, green, blue]).max() > 20
    assert (np.abs(np.diff(shades.astype(int), axis=0)).max(1) > 50).all()


def test_the_wavefronts_drawn_hold_cells_of_one_row_of_two_and_of_more() -> None:
    found = defaultdict(set)
    for name in SRDS:
        for wave in waves_of(name)[0]:
            for block in range(BLOCKS):
                rows = [iteration for at, iteration in wave.rows if at == block]
                found[len(rows)].add(len(set(rows)))
    assert set(found) >= {0, 1, 2, 3}
    assert (found[0], found[1], found[2]) == ({0}, {1}, {1, 2})


@pytest.mark.parametrize("name", SRDS)
def test_the_front_rises_past_the_edges_that_became_final(name: str) -> None:
    waves, blocks = waves_of(name)
    figure = draw(waves, blocks, "a title")
    drawn, settled, heights = Drawn(figure), 0, set()
    for wave in waves[1:]:
        settled += waves[wave.round - 2].passed  # Known before this round.
        red, green, blue = drawn.at(wave.round, settled - 0.5)
        assert red > 150 > 100 > max(green, blue), (wave.round, settled)
        heights.add(settled)
        for other in set(range(blocks)) - {settled}:
            red, green, blue = drawn.at(wave.round, other - 0.5)
            assert not red > 150 > 100 > max(green, blue), (wave.round, other)
    assert settled + waves[-1].passed == blocks
    assert len(heights) > 1 or name in ("batched", "no iteration", "one block")
    axes = figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0.5, len(waves) + 0.5), (-0.5, blocks - 0.5))
    assert axes.get_title() == "a title"


def test_the_wavefronts_file_holds_the_asked_sample_only(tmp_path: Path) -> None:
    history = [
        PararealRecord(1, 0, [(0, 0)], [], 0),
        PararealRecord(1, 1, [(1, 0)], [], 0),
        PararealRecord(2, 0, [(1, 0)], [], 2),
        PararealRecord(2, 1, [(0, 1)], [], 2),
    ]
    for one in (0, 1):
        save_history(history, one, 2, tmp_path / f"{one}.png", "")
    save_history(history[1::2], 1, 2, tmp_path / "alone.png", "")
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.format == "PNG"


# -- any record --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """A record of a kind that the pictures have not seen."""

    round: int
    sample: int
    passed: int
    shown: Trace

    def to_json(self) -> dict[str, Any]:
        return {}

    def trace(self) -> Trace:
        return self.shown


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("curves", [{}, {"size": 0.5, "other": float("inf")}])
def test_a_new_kind_of_record_is_drawn_as_it_asks_to_be(scale: Scale, curves: dict[str, float]) -> None:
    trace = Trace(axis="place (0 first)", scale=scale, meaning="a number", cells=[(0, 1), (1, 2)], curves=curves)
    figure = draw([Own(1, 0, 1, trace), Own(2, 0, 1, trace)], 2, "a title")
    FigureCanvasAgg(figure).draw()
    assert figure.axes[0].get_ylabel() == "place (0 first)"
    assert figure.axes[0].get_title() == "a title"
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert ("a number" in labels) == (scale != "marked")
    assert ("RMS" in labels) == (scale == "marked" and bool(curves))


def test_records_of_other_parts_than_the_first_are_left_out() -> None:
    # A collocation run that is verified by a window over all nodes: the window's sweeps are about other parts.
    found = CollocationRecord(1, 0, [0, 3], 2, 0.1, 0.2, 0.3)
    figure = draw([found, WindowRecord(2, 0, 0, [0.5], 1)], 4, "")
    assert len(figure.axes[0].collections[0].get_offsets()) == 2


def test_a_record_shows_what_it_recorded() -> None:
    assert WindowRecord(3, 0, 5, [0.5, 0.25], 1).trace().cells == [(6, 0.5), (7, 0.25)]
    assert PararealRecord(1, 0, [(2, 1), (2, 0)], [], 0).trace().cells == [(2, 1), (2, 0)]
    trace = CollocationRecord(1, 0, [0, 3], 2, 0.1, 0.2, 0.3).trace()
    assert [place for place, _ in trace.cells] == [0, 3]
    assert sorted(trace.curves.values()) == [0.1, 0.2, 0.3]
