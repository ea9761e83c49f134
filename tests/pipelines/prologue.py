# SPDX-License-Identifier: Apache-2.0
"""Counts of what a pipeline computes outside of its loop, for comparison with a parallel call."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from torch import nn

STEP = "step"


def modules(pipe: Any) -> dict[str, nn.Module]:
    """All modules of a pipeline's networks by their paths."""
    networks = {part: network for part, network in vars(pipe).items() if isinstance(network, nn.Module)}
    return {f"{part}.{name}": module for part, network in networks.items() for name, module in network.named_modules()}


def outside(pipe: Any, call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What a plain call returns, and how often those modules were computed that its loop does not call.

    The loop is what lies between its first and its last step.
    """
    kind = type(pipe.scheduler)
    step = kind.step
    log = _file()

    @functools.wraps(step)  # pipelines look at its signature
    def logged(*args: Any, **kwargs: Any) -> Any:
        log.write(f"{STEP}\n")
        return step(*args, **kwargs)

    kind.step = logged
    try:
        result = _logged(modules(pipe), log, call)
    finally:
        kind.step = step
    names = _read(log).split()
    places = [place for place, name in enumerate(names) if name == STEP]
    loop = set(names[places[0] : places[-1]])
    return result, Counter(name for name in names if name not in loop)


def computed(pipe: Any, counted: Counter[str], call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What a call returns, and how often it computed these modules."""
    log = _file()
    found = modules(pipe)
    result = _logged({name: found[name] for name in counted}, log, call)
    return result, Counter(_read(log).split())


def _file() -> IO[str]:
    """A file for a log, which nobody reads while it is written: nothing that the library puts back."""
    return tempfile.NamedTemporaryFile("w")


def _read(log: IO[str]) -> str:
    """What was written, after which the file is closed."""
    with log:
        log.flush()
        return Path(log.name).read_text()


def _logged(listed: dict[str, nn.Module], log: IO[str], call: Callable[[], Any]) -> Any:
    """What a call returns; each time that one of the modules is computed, its name is written."""

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def forwarded(*args: Any, **kwargs: Any) -> Any:
            log.write(f"{name}\n")
            return forward(*args, **kwargs)

        return forwarded

    once = {id(module): (name, module) for name, module in listed.items()}  # networks may share an activation
    free = {name: module for name, module in once.values() if "forward" not in vars(module)}
    for name, module in free.items():
        vars(module)["forward"] = counting(name, module.forward)
    try:
        return call()
    finally:
        for module in free.values():
            del vars(module)["forward"]
