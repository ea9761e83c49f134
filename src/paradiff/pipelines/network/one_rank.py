# SPDX-License-Identifier: Apache-2.0
"""Network calls that one rank makes for all: those of text encoders and autoencoders, and of the denoiser at a single state.

On several ranks every rank runs the pipeline's own call. What a network without a window returns is computed on one of them and
sent to the others: it costs the others nothing, and all go on from the same bits, whatever their devices round. Random numbers
that such a call draws from torch's own generators are drawn on all ranks alike: the others take over the generators' states. A
call that is handed an object other than numbers, texts and tensors, such as a cache that it writes into, is made on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from paradiff.pipelines.network.batching import Batching

METHODS = ("encode", "decode")
"""Methods of autoencoders that pipelines call beside `forward`."""


@contextmanager
def on_one_rank(modules: Iterable[nn.Module], batching: Batching) -> Iterator[None]:
    """Has one rank make the calls of autoencoders' own methods while the block lasts; without effect on one process."""
    replaced: list[tuple[nn.Module, str]] = []
    if batching.ranks is not None:
        for module in modules:
            for name in METHODS:
                method = getattr(module, name, None)
                if callable(method) and name not in vars(module):
                    vars(module)[name] = _shared(method, batching)
                    replaced.append((module, name))
    try:
        yield
    finally:
        for module, name in replaced:
            vars(module).pop(name, None)


def _shared(method: Callable[..., Any], batching: Batching) -> Callable[..., Any]:
    @functools.wraps(method)
    def shared(*args: Any, **kwargs: Any) -> Any:
        return batching.for_all(method, args, kwargs)

    return shared
