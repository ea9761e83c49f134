# SPDX-License-Identifier: Apache-2.0
"""Models' files: where a model is, what its index says, and whether it can be read safely.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError

from paradiff.errors import shown

BUNDLED = Path(__file__).parent / "bundled"
INDEX = "model_index.json"
POLICY = "DiffusionPolicy"
"""What the index of a diffusion policy (policy.py) names as its class."""

LINES, LONGEST = 2, 300
"""Of a loader's error: lines, and characters of them."""

PATIENCE = 5
"""Seconds that the hub is given to answer."""

MADE_OF = (".json", ".safetensors", ".txt", ".model", ".py")
"""Ends of the names of files that a model is made of: configs, weights, tables of tokens, code."""

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
        bundled = ", ".join(sorted(p.parent.name for p in BUNDLED.glob(f"*/{INDEX}"))) if BUNDLED.is_dir() else "none"
        raise ValueError(
            f"{model!r} is no model: give a bundled one ({bundled}), a folder in diffusers' pipeline format, or a hub id "
            "such as google/ddpm-church-256"
        )
    return model, False


class _Index(ConfigMixin):
    """What reads an index as pipelines do, whose own class takes a second to import."""

    config_name = INDEX


def read_index(model: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model's `model_index.json` says: the pipeline's class, and library and class of every component.

    Raises:
        ValueError: If there is no such model, or its index cannot be read.
    """
    source = _here(model)
    with loading(os.fspath(model)):
        index = _Index.load_config(source)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{model!r} could not be loaded: its {INDEX} names no pipeline class; save the pipeline again")
    return index


def folder_of(model: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Path:
    """The folder that a model's files are read from; those of a hub id are downloaded, unless they are there.

    Raises:
        ValueError: If there is no such model, or it cannot be downloaded.
    """
    source = _here(model)
    if Path(source).is_dir():
        return Path(source)
    from diffusers import DiffusionPipeline

    with loading(os.fspath(model)):
        return Path(DiffusionPipeline.download(source, use_safetensors=True, trust_remote_code=trust_remote_code))


def _here(model: str | os.PathLike[str]) -> str:
    """A model's folder, or its hub id if the hub can be reached.

    Raises:
        ValueError: If there is no such model, or neither the hub nor a copy of the model can be reached.
    """
    source, local = locate(model)
    if local:
        return source
    try:
        HfApi().model_info(source, timeout=PATIENCE)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{source!r} is no folder here, and the hub has no such model, or none for you; check its name, or log in by "
            "`hf auth login`"
        ) from error
    except Exception as error:  # of the HTTP library that the hub's client uses, or that it is told to keep offline
        kept = try_to_load_from_cache(source, INDEX)
        if isinstance(kept, str):
            return str(Path(kept).parent)
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"{source!r} is no folder here, and the hub cannot be reached ({why}); connect to it, or give a folder"
        ) from error
    return source


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of every component that an index names; those that are null are left out."""
    pairs = {k: part for k, part in index.items() if isinstance(part, list | tuple) and len(part) == 2 and k[0] != "_"}
    return {name: (str(part[0]), str(part[1])) for name, part in pairs.items() if part[1]}


def is_pixel(index: Mapping[str, Any]) -> bool:
    """Whether an index is that of an unconditional pixel pipeline, made of a `UNet2DModel` and a scheduler."""
    parts = components(index)
    return set(parts) == {"unet", "scheduler"} and parts["unet"][1] == "UNet2DModel"


def is_policy(index: Mapping[str, Any]) -> bool:
    """Whether an index is that of a policy, made of a `PolicyUNet` and a scheduler."""
    parts = components(index)
    return index["_class_name"] == POLICY and set(parts) == {"unet", "scheduler"} and parts["unet"][1] == "PolicyUNet"


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a component.

    Raises:
        ValueError: If there are none in `folder/part`.
    """
    found = sorted(p for p in (folder / part).glob("*.safetensors") if p.is_file())
    if found:
        return found
    pickles = sorted(p.name for p in (folder / part).glob("*") if p.suffix in PICKLES)
    given = f"its weights are {pickles[0]}, a pickle, which can run code when it is read" if pickles else "it has no weights"
    raise ValueError(
        f"the folder {str(folder)!r} holds no safetensors weights in {part}/: {given}; save the pipeline again with "
        "safe_serialization=True"
    )


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that a model is made of, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in MADE_OF)
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in files}


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Keeps diffusers quiet, and makes one sentence of what its loaders raise.

    Raises:
        ValueError: If something within cannot be loaded.
    """
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # files of any content reach constructors of any class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:LINES])[:LONGEST].rstrip(":")
        name = "" if said and isinstance(error, OSError | RuntimeError | ValueError) else type(error).__name__
        raise ValueError(f"{model!r} could not be loaded: {': '.join(filter(None, (name, said)))}") from error
    finally:
        diffusers_logging.set_verbosity(level)
