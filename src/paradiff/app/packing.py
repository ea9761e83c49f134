# SPDX-License-Identifier: Apache-2.0
"""The bytes of a shard: safetensors, or a tar of pictures. The same samples give the same bytes."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from paradiff.app.media import Output

ABOUT = "paradiff"
"""The key of safetensors' metadata that holds what a shard is, as JSON: it keeps no order among several."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, and how far to trust it.

    Attributes:
        output: Pictures, frames or sound.
        estimated_error: Estimated root mean square difference to the sequential sample; 0 if exact.
        status: A code of `solver.Status`.
    """

    output: Output
    estimated_error: float
    status: str


def pack(format: str, mode: str, seeds: Sequence[int], samples: Sequence[Sample]) -> bytes:
    """The bytes of a shard.

    Args:
        format: `safetensors` or `png`.
        mode: `batched` or `parallel`.
        seeds: Of the samples.
        samples: In order.

    Raises:
        ValueError: If the samples have not one shape, which safetensors need.
    """
    first = samples[0].output
    about = {"mode": mode, "status": [one.status for one in samples]}
    about |= {"rate": first.rate} if first.rate else {}
    about |= {"fps": first.fps} if first.fps else {}
    errors = [one.estimated_error for one in samples]
    if format == "png":
        listed = [
            {"seed": seed, "estimated_error": error if error < float("inf") else None}
            for seed, error in zip(seeds, errors, strict=True)
        ]
        return _tar({**about, "samples": listed}, seeds, [one.output for one in samples])
    tensors = {
        "seeds": torch.tensor(seeds, dtype=torch.int64),
        "samples": _stacked([_data(one.output) for one in samples]),
        "estimated_error": torch.tensor(errors, dtype=torch.float64),
    }
    if first.pictures is not None and first.sound is not None:
        tensors["sound"] = _stacked([one.output.data if one.output.sound is None else one.output.sound for one in samples])
    return save(tensors, {ABOUT: json.dumps(about)})


def _data(output: Output) -> Tensor:
    """Pictures, frames or sound; a single picture without the axis that counts them."""
    return output.data[0] if output.pictures is not None and not output.fps and len(output.pictures) == 1 else output.data


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """All samples, on the host.

    Raises:
        ValueError: If they have not one shape.
    """
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1:
        raise ValueError(
            f"samples have shapes {shapes[0]} and {shapes[1]}, which one file of tensors cannot hold; use --format png"
        )
    return torch.stack([part.detach().cpu() for part in parts]).contiguous()


def _tar(about: Mapping[str, Any], seeds: Sequence[int], outputs: Sequence[Output]) -> bytes:
    """An uncompressed tar of `shard.json` and the files of every seed, without dates and owners."""
    data = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="paradiff-") as place, tarfile.open(fileobj=data, mode="w") as tar:
        (Path(place) / "shard.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        _add(tar, Path(place) / "shard.json")
        for seed, output in zip(seeds, outputs, strict=True):
            output.save(Path(place), f"seed-{seed}")
            for path in sorted(Path(place).glob(f"seed-{seed}.*")):
                _add(tar, path)
                path.unlink()
    return data.getvalue()


def _add(tar: tarfile.TarFile, path: Path) -> None:
    """Adds a file under its name alone."""
    entry = tarfile.TarInfo(path.name)
    entry.size = path.stat().st_size
    with open(path, "rb") as file:
        tar.addfile(entry, file)
