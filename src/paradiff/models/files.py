# SPDX-License-Identifier: Apache-2.0
"""Models' files: where a model is, what its index says, and whether it can be read safely.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from paradiff.errors import shown

BUNDLED = Path(__file__).parent / "bundled"
INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def locate(model: str | os.PathLike[str]) -> tuple[str, bool]:
    """Where a model is: its folder or its hub id, and whether it is a folder.

    Raises:
        ValueError: If it is neither the name of a bundled model, nor a pipeline's folder, nor of the form of a hub id.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str) or not model:
        raise ValueError(
            f"the model is {shown(model)}; it must be the name of a bundled one, a folder in diffusers' pipeline format, or a "
            "hub id, as a str"
        )
    folder = BUNDLED / model if (BUNDLED / model / INDEX).is_file() else Path(model)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"the folder {str(folder)!r} is no pipeline: it has no {INDEX}; give a folder that a diffusers pipeline's "
                "save_pretrained wrote"
            )
        return str(folder), True
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "~", "/")):
        bundled = ", ".join(sorted(p.name for p in BUNDLED.iterdir() if p.is_dir())) if BUNDLED.is_dir() else "none"
        raise ValueError(
            f"{model!r} is no model: give a bundled one ({bundled}), a folder in diffusers' pipeline format, or a hub id "
            "such as google/ddpm-church-256"
        )
    return model, False


def read_index(model: str) -> dict[str, Any]:
    """What a model's `model_index.json` says: the pipeline's class, and library and class of every component.

    Raises:
        ValueError: If there is no such model, or its index cannot be read.
    """
    source, _ = locate(model)
    with loading(model):
        index = DiffusionPipeline.load_config(source)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{model!r} could not be loaded: its {INDEX} names no pipeline class; save the pipeline again")
    return index


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every component that an index names; those that are null are left out."""
    pairs = {k: part for k, part in index.items() if isinstance(part, list | tuple) and len(part) == 2 and k[0] != "_"}
    return {name: (str(part[0]), str(part[1])) for name, part in pairs.items() if part[1]}


def is_pixel(index: Mapping[str, Any]) -> bool:
    """Whether an index is that of an unconditional pixel pipeline, made of a `UNet2DModel` and a scheduler."""
    parts = components(index)
    return set(parts) == {"unet", "scheduler"} and parts["unet"][1] == "UNet2DModel"


def check_weights(folder: Path, part: str) -> None:
    """Refuses a component whose weights are not safetensors.

    Raises:
        ValueError: If there are none in `folder/part`.
    """
    if list((folder / part).glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in (folder / part).glob("*") if p.suffix in PICKLES)
    given = f"its weights are {pickles[0]}, a pickle, which can run code when it is read" if pickles else "it has no weights"
    raise ValueError(
        f"the folder {str(folder)!r} holds no safetensors weights in {part}/: {given}; save the pipeline again with "
        "safe_serialization=True"
    )


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Keeps diffusers quiet, and makes one sentence of what cannot be read.

    Raises:
        ValueError: If something within cannot be loaded.
    """
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: weights that do not fit the network
        first = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise ValueError(f"{model!r} could not be loaded: {first}") from error
    finally:
        diffusers_logging.set_verbosity(level)
