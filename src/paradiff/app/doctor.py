# SPDX-License-Identifier: Apache-2.0
"""The command `paradiff doctor`: what this machine can do, and what is missing for the rest."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from paradiff.app.environment import choose_device, environment, use_threads
from paradiff.chain.noise import Keyed
from paradiff.errors import MissingPackage
from paradiff.lazy import EXTRAS
from paradiff.models.files import BUNDLED, INDEX
from paradiff.planning.curves import curve_of
from paradiff.planning.store import FOLDER, cache_folder
from paradiff.solver.evaluator import Evaluator

USES = {
    "PIL": "pictures",
    "diffusers": "pipelines and the bundled models",
    "greenlet": "pipelines whose loops read their step number",
    "imageio": "videos as MP4",
    "imageio_ffmpeg": "videos as MP4",
    "matplotlib": "plots",
    "rich": "the command line",
    "soundfile": "sound as WAV",
    "transformers": "pipelines that follow a text",
    "typer": "the command line",
}
"""What the packages of the extras are for."""

TIMED = "digits"
"""The bundled model whose calls are timed."""


def doctor(device: str, threads: int | None) -> None:
    """Prints what was found.

    Args:
        device: The device whose calls are timed, by name.
        threads: CPU threads; None for as they are.

    Raises:
        ValueError: If the device is not to be had, or the number of threads is out of its range.
    """
    use_threads(threads)
    place = choose_device(device)
    for line in [*_machine(place), *_devices(), *_cache(), *_packages(), *_models(), *_timed(place)]:
        print(line)


def _machine(device: torch.device) -> Iterator[str]:
    found = environment(device)
    cores, count = found["cores"], found["threads"]
    yield f"processor: {found['processor']}, {cores} cores, {count} threads"
    names = ("paradiff", "python", "torch", "diffusers", "numpy")
    yield "versions: " + ", ".join(f"{name} {found[name]}" for name in names)


def _devices() -> Iterator[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(k).total_memory / 2**30
            found.append(f"cuda:{k} ({torch.cuda.get_device_name(k)}, {memory:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    yield f"devices: {', '.join(found)}"
    if len(found) == 1:
        built = (
            "" if torch.backends.cuda.is_built() else "; this torch is built without CUDA: see https://pytorch.org/get-started"
        )
        yield f"missing: a GPU, or its driver; on a CPU a call costs nearly in proportion to its rows{built}"


def _cache() -> Iterator[str]:
    folder = cache_folder()
    if folder is None:
        yield f"measurements: not kept, since {FOLDER} is empty; unset it, or name a folder"
        return
    there = _nearest(folder)
    kept = len([*folder.glob("*.json")]) if folder.is_dir() else 0
    if os.access(there, os.W_OK):
        yield f"measurements: {kept} kept in {str(folder)!r}"
    else:
        yield f"missing: {str(there)!r} cannot be written, so measurements are not kept; name another folder by {FOLDER}"


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _packages() -> Iterator[str]:
    missing = [name for name in USES if importlib.util.find_spec(name) is None]
    for name in missing:
        yield f"missing: {name}, for {USES[name]}; pip install 'paradiff[{EXTRAS[name]}]'"
    if not missing:
        yield "packages: those of all extras are installed"
    try:
        yield f"pipelines: any of diffusers {version('diffusers')} whose loop calls its scheduler's step"
    except PackageNotFoundError:
        return


def _models() -> Iterator[str]:
    """Which bundled models run: each is called once, on two steps of its chain."""
    for path in sorted(p.parent for p in BUNDLED.glob(f"*/{INDEX}")):
        try:
            _run(path.name)
        except MissingPackage as missing:
            yield f"missing: {path.name} does not run: {missing}"
        except Exception as error:
            first = str(error).partition("\n")[0]
            yield f"missing: {path.name} does not run: {type(error).__name__}: {first}"
        else:
            yield f"model {path.name}: runs"


def _run(name: str) -> None:
    from paradiff.models.files import is_pixel, is_policy, read_index

    if is_policy(read_index(name)):
        from paradiff.models.policy import load_policy
        from paradiff.planning.choice import sequential
        from paradiff.solver.loop import sample

        policy = load_policy(name)
        evaluator = Evaluator(policy, conditioning={"observation": torch.zeros(1, policy.observed)})
        sample(evaluator, policy.table("ddpm", 2), Keyed(policy.shape, 0), sequential())
        return
    if is_pixel(read_index(name)):
        from paradiff.models.pixel import load
        from paradiff.planning.choice import sequential
        from paradiff.solver.loop import sample

        model = load(name)
        sample(model, model.table("ddim", 2), Keyed(model.shape, 0), sequential())
        return
    from paradiff.models.pipeline import load_pipeline

    pipeline: Any = load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a red circle", num_inference_steps=2, output_type="latent")


def _timed(device: torch.device) -> Iterator[str]:
    from paradiff.models.pixel import load

    try:
        model = load(TIMED, device=device)
    except MissingPackage:
        return
    evaluator = Evaluator(model, device=device)
    curve, notes = curve_of(evaluator, model.table("ddim", 50), Keyed(model.shape, 0))
    first = curve(1)
    calls = ", ".join(f"{curve(rows) / first:.2g} on {rows}" for rows in curve.points if rows > 1)
    yield f"a call of {TIMED} on {device} takes {1000 * first:.3g} ms on one row, and {calls} rows times that"
    wide = max(curve.points)
    if wide > 1:
        full = curve(wide) / first / wide
        says = (
            "nearly in proportion to its rows: parallel in time pays where fewer states are evaluated than the chain has steps"
        )
        if full < 0.5:
            says = f"far less than in proportion to its rows: {wide} rows cost {full:.0%} of as many calls"
        yield f"so a call costs {says}; `paradiff plan MODEL` says for a model and a chain what pays"
    yield from (f"note: {note}" for note in notes)
