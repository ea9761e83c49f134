# SPDX-License-Identifier: Apache-2.0
"""The files of `--previews`: the samples as they are known after each round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from paradiff.app import plots
from paradiff.app.folder import made_folder
from paradiff.app.launched import rank
from paradiff.solver.previews import Preview, Previews


@contextmanager
def preview_folder(folder: str | None) -> Iterator[None]:
    """The folder of previews, made if it does not exist, for as long as the block lasts. One that was made goes again where
    nothing was written into it. Ranks other than the first write nothing, and make none.

    Args:
        folder: Its path; None for no previews.

    Raises:
        ValueError: If it is not empty, or cannot be written.
    """
    if folder is None or rank() > 0:
        yield
        return
    with made_folder(Path(folder), "the folder of previews"):
        if any(Path(folder).iterdir()):
            raise ValueError(f"the folder of previews {folder!r} is not empty; give another one")
        yield


def previews_into(
    folder: Path, console: Console, *, name: str = "", pictures: Callable[[Tensor], Tensor | None] | None = None
) -> Previews:
    """What writes the samples after each round into a folder; on ranks other than the first it writes nothing.

    Args:
        folder: The folder.
        console: Where each preview is told.
        name: What files' names begin with.
        pictures: The pictures of a preview's samples, None where they are none; by default the samples are pictures. What are
            none are written as tensors, and said to be the states of the loop.
    """

    def show(preview: Preview) -> None:
        if rank() > 0:
            return
        found = preview.sample if pictures is None else pictures(preview.sample)
        path = folder / f"{name}round-{preview.round:03}.{'safetensors' if found is None else 'png'}"
        if found is None:
            save_file({"states": preview.sample.contiguous().cpu()}, path)
        else:
            plots.grid(found).save(path, format="PNG")
        what = " (the loop's states, which are no pictures yet)" if found is None else ""
        estimate = f"estimated error {preview.estimated_error:.2g}, {preview.seconds:.2g} s"
        console.print(
            f"{name}round {preview.round}: {estimate}; {path}{what}",
            soft_wrap=True,
            markup=False,
        )

    return Previews(show)
