# SPDX-License-Identifier: Apache-2.0
"""Small models in diffusers' pipeline format, and the command line run in this process."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

import paradiff
from paradiff.app import cli

DIGITS = Path(paradiff.__file__).parent / "models/bundled/digits"


def tiny_unet(channels: int = 1, **options: object) -> diffusers.UNet2DModel:
    """A network of random weights."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": channels,
            "out_channels": channels,
            "layers_per_block": 1,
            "block_out_channels": (4,),
            "norm_num_groups": 2,
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "add_attention": False,
        }
        | options
    ).eval()


def save_pipeline(
    folder: Path, unet: diffusers.UNet2DModel | None = None, scheduler: object | None = None, **options: object
) -> Path:
    """A folder as `DDPMPipeline.save_pretrained` writes it."""
    pipeline = diffusers.DDPMPipeline(unet=unet or tiny_unet(), scheduler=scheduler or diffusers.DDPMScheduler(**options))
    pipeline.save_pretrained(folder)
    return folder


def hollow(folder: Path, other: Path) -> None:
    """Copies a pipeline's folder with empty files for its weights, which nobody can read."""
    shutil.copytree(folder, other)
    files = list(other.rglob("*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(b"")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call of the command line left: its exit code and its streams."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on stderr of a refusal."""
        assert self.code == 2
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


Cli = Callable[..., Result]


def make_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("sample", "digits", ...)`, which runs `paradiff sample digits ...`."""

    def cli_(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["paradiff", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return cli_
