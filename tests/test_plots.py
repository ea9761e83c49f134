"""Pictures: pixels are those of diffusers, the grid holds every sample, the trace is drawn whatever the run was like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.pil_utils import numpy_to_pil
from PIL import Image
from problems import TABLES, run

from paradiff import Sweep, jacobi, paradigms, parasolver, sequential
from paradiff.plots import PIXELS, grid, save_trace, to_image


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
    for draw in (lambda x: to_image(x[0]), grid):
        with pytest.raises(ValueError, match=message):
            draw(torch.zeros(2, channels, 4, 4))


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
}


@pytest.mark.parametrize("method", METHODS)
def test_the_trace_of_any_run_is_a_picture(method: str, tmp_path: Path) -> None:
    table = TABLES["ddpm"]
    found = run(table, METHODS[method], samples=2)
    path = tmp_path / "trace.png"
    save_trace(found.history, 1, len(METHODS[method].edges(table)) - 1, path, "a title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.array(picture.convert("RGB"))
    assert pixels.shape[0] > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # Not a blank sheet.


@pytest.mark.parametrize("change", [[0.0, 0.0], [torch.inf, torch.inf], [1e-30, 1e30], [1.0, 1.0], [0.5, torch.inf]])
def test_extreme_changes_are_drawn(change: list[float], tmp_path: Path) -> None:
    history = [Sweep(1, 0, 0, change, 1), Sweep(2, 0, 1, change[1:], 1)]
    save_trace(history, 0, 2, tmp_path / "trace.png", "extreme")
    assert (tmp_path / "trace.png").stat().st_size > 5000


def test_only_the_asked_sample_is_drawn(tmp_path: Path) -> None:
    found = run(TABLES["ddim"], parasolver(5), samples=2)
    for sample in (0, 1):
        save_trace(found.history, sample, 12, tmp_path / f"{sample}.png", "")
    alone = [s for s in found.history if s.sample == 1]
    save_trace(alone, 1, 12, tmp_path / "alone.png", "")
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
