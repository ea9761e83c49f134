# SPDX-License-Identifier: Apache-2.0
"""diffusers' modular pipelines, whose loop is a block among others."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

from paradiff.pipelines.host.host import Host

LOGGER = "diffusers.modular_pipelines.modular_pipeline"
"""The logger to which blocks report each error that passes through them."""
STATE = "latents"
"""What a loop's block hands on beside what it leaves behind."""


class ModularHost(Host):
    """A modular pipeline. See `Host`."""

    def loops(self) -> list[Any]:
        """The blocks that are loops."""
        return list(_loops(self.owner._blocks))

    def obstacles(self) -> list[str]:
        return []

    def index_reads(self) -> list[str] | None:
        return None

    def kept(self) -> list[str]:
        """The names of what the last pass of a loop hands on, other than the state, as its block says."""
        names = [output.name for block in self.loops() for output in block.intermediate_outputs]
        return [name for name in dict.fromkeys(names) if name != STATE]

    def scopes(self) -> list[dict[str, Any]]:
        walking = [inspect.unwrap(type(block).__call__).__globals__ for block in self.loops()]
        return [*super().scopes(), *{id(scope): scope for scope in walking}.values()]

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        with quiet(), super().trying():
            yield

    def copied(self, proxy: Any) -> Any:
        owner = super().copied(proxy)
        vars(owner)["_blocks"] = _copied(owner._blocks)
        return owner


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets blocks report no refusal of paradiff's as an error of theirs."""
    logger = logging.getLogger(LOGGER)
    logger.addFilter(_is_no_refusal)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """Whether a record is not about an error of paradiff's, which a try is refused with."""
    kind = sys.exc_info()[0]
    return kind is None or kind.__module__.partition(".")[0] != "paradiff"


def _loops(block: Any) -> Iterator[Any]:
    """The blocks that are loops, in a block."""
    if hasattr(block, "loop_step"):
        yield block
        return
    for part in (getattr(block, "sub_blocks", None) or {}).values():
        yield from _loops(part)


def _copied(block: Any) -> Any:
    """A copy of a block and of the blocks in it, which share all else."""
    own = copy.copy(block)
    parts = getattr(own, "sub_blocks", None)
    if parts:
        own.sub_blocks = type(parts)((name, _copied(part)) for name, part in parts.items())
    return own
