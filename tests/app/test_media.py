# SPDX-License-Identifier: Apache-2.0
"""Outputs of pipelines as files: what is decoded from a written file is what was given, and a missing extra is named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paradiff.app import media, plots
from paradiff.app.media import FRAMES_A_SECOND, Output, read_output

RATE = 16_000


def brightening(frames: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """`[F, C, H, W]` frames of one grey each, from -0.8 to 0.8."""
    return torch.linspace(-0.8, 0.8, frames).view(-1, 1, 1, 1).expand(frames, channels, height, width).clone()


def decoded(path: Path, height: int, width: int) -> tuple[np.ndarray, str]:
    """`[F, H, W, 3]` levels of a video, and what ffmpeg says of it."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    line = [program, "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    found = subprocess.run(line, capture_output=True, check=True)
    return np.frombuffer(found.stdout, np.uint8).reshape(-1, height, width, 3), found.stderr.decode()


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 48, 3), (10, 14, 1)])
def test_a_video_is_decoded_as_it_was_given(height: int, width: int, channels: int, tmp_path: Path) -> None:
    """Frames of one grey survive the codec but for the rounding of its colour space, 4 of 255 levels at most."""
    pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    frames = brightening(7, height, width, channels)
    Output(frames, None, 0, fps=5).save(tmp_path, "clip")
    assert {file.name for file in tmp_path.iterdir()} == {"clip.png", "clip.mp4"}
    found, said = decoded(tmp_path / "clip.mp4", height, width)
    assert len(found) == 7
    assert f"{width}x{height}" in said
    assert "5 fps" in said
    wanted = (frames[:, :1].permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(found - wanted).max() <= 4
    assert np.array_equal(np.array(Image.open(tmp_path / "clip.png")), np.array(plots.grid(frames)))


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_decoded_as_it_was_given(channels: int, tmp_path: Path) -> None:
    """Rounding to 16 bits moves a sample by at most half of 1/32767; what lies outside of -1 ... 1 is cut."""
    soundfile = pytest.importorskip("soundfile")
    sound = torch.sin(torch.arange(2000) / 20) * torch.tensor([[0.9], [-1.5]])[:channels]
    Output(None, sound, RATE).save(tmp_path, "tone")
    assert [file.name for file in tmp_path.iterdir()] == ["tone.wav"]
    levels, rate = soundfile.read(tmp_path / "tone.wav", dtype="int16", always_2d=True)
    assert rate == RATE
    assert soundfile.info(tmp_path / "tone.wav").subtype == "PCM_16"
    assert np.abs(levels.T / 32767 - sound.clamp(-1, 1).numpy()).max() <= 0.51 / 32767


@pytest.mark.parametrize(
    ("output", "extra", "written"),
    [
        (Output(brightening(3, 8, 8), None, 0, fps=5), "video", {"a.png"}),
        (Output(None, torch.zeros(1, 100), RATE), "sound", set()),
    ],
)
def test_a_missing_extra_is_named_and_the_other_files_are_written(
    output: Output, extra: str, written: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "find_spec", lambda module: None)
    with pytest.warns(UserWarning, match=rf"a\.\w+ is not written, because .* install 'paradiff\[{extra}\]'"):
        output.save(tmp_path, "a")
    assert {file.name for file in tmp_path.iterdir()} == written


class Flickering:
    """A pipeline that says how many frames a second it makes."""

    def __call__(self, prompt: str = "", frame_rate: float = 24.0) -> None: ...


@pytest.mark.parametrize(
    ("result", "pipeline", "fps"),
    [
        ({"frames": np.zeros((1, 4, 8, 8, 3), np.float32)}, object(), FRAMES_A_SECOND),
        ({"frames": np.zeros((1, 4, 8, 8, 3), np.float32)}, Flickering(), 24.0),
        ({"frames": [[Image.new("RGB", (8, 8))] * 4]}, object(), FRAMES_A_SECOND),
        ({"images": np.zeros((4, 8, 8, 3), np.float32)}, Flickering(), 0),
    ],
)
def test_frames_of_a_video_are_told_from_pictures(result: dict[str, Any], pipeline: object, fps: float) -> None:
    found = read_output(result, pipeline)
    assert found.pictures is not None
    assert found.pictures.shape == (4, 3, 8, 8)
    assert found.fps == fps


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"audios": torch.zeros(1, 2, 0)}, "sound of shape (1, 2, 0)"),
        ({"images": np.zeros((1, 0, 8, 3))}, "pictures of shape (1, 0, 8, 3)"),
        ({"frames": np.zeros((1, 0, 8, 8, 3))}, "pictures of shape (1, 0, 8, 8, 3)"),
    ],
)
def test_what_is_empty_is_refused(result: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"without an entry; ask for a larger size, or a longer piece") as met:
        read_output(result, object())
    assert said in str(met.value)
