# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when they are first asked for (PEP 562).

A package whose modules need no more than the core may import them at once. Where a name needs more, or where packages import
each other's modules, the package lists the module of each name instead, and a dependency that is not installed is reported with
the extra that brings it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from paradiff.errors import MissingPackage

EXTRAS = {
    "PIL": "plots",
    "diffusers": "pipelines",
    "greenlet": "pipelines",
    "imageio": "video",
    "imageio_ffmpeg": "video",
    "matplotlib": "plots",
    "rich": "cli",
    "safetensors": "pipelines",
    "soundfile": "sound",
    "transformers": "text",
    "typer": "cli",
}
"""The extra of pyproject.toml that brings a package."""


@contextmanager
def naming_the_extra(use: str) -> Iterator[None]:
    """Names the extra that brings a package, where an import within misses one.

    Args:
        use: What needs the package, the subject of the sentence.

    Raises:
        MissingPackage: If a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        raise MissingPackage(
            f"{use} needs {missing}, which is not installed; pip install 'paradiff[{EXTRAS[missing]}]'"
        ) from error


def lazily(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: The package's `__name__`.
        names: For each name the module that defines it under the same name; `module:other` for another name, `module:` for the
            module itself.

    Returns:
        The two functions. The first raises AttributeError for a name that is not listed, and MissingPackage where the module
        needs a package that is not installed.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, colon, other = names[name].partition(":")
        with naming_the_extra(f"{package}.{name}"):
            found = importlib.import_module(module)
        value = found if colon and not other else getattr(found, other or name)
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted(names)
