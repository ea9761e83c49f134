# SPDX-License-Identifier: Apache-2.0
"""What a pipeline calls of its networks beside `forward`: an autoencoder's `encode`, a text encoder's embedding."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from paradiff.pipelines.by_class import by_class
from paradiff.pipelines.network.origin import function_of
from paradiff.pipelines.network.reads import names

SHARED = ("encode", "decode", "generate", "get_text_features", "get_image_features")
"""Methods that one rank calls for all.

What a network without a window returns is computed on one rank and sent to the others: it costs the others nothing, and all go
on from the same bits, whatever their devices round. Random numbers that such a call draws from torch's own generators are drawn
on all ranks alike: the others take over the generators' states. A call that is handed an object other than numbers, texts and
tensors, such as a cache that it writes into, is made on every rank.
"""


@by_class
def called_names(pipeline: type) -> frozenset[str]:
    """The names in the methods of a pipeline class, and in the functions of their modules that they name, and SHARED."""
    owners = [owner for owner in pipeline.__mro__ if owner not in DiffusionPipeline.__mro__]
    functions = [part for owner in owners for part in map(function_of, vars(owner).values())]
    waiting = [inspect.unwrap(part) for part in functions if isinstance(part, types.FunctionType)]
    found, seen = set[str](SHARED), set[types.FunctionType]()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        for name in names(function.__code__):
            found.add(name)
            other = function.__globals__.get(name)
            if isinstance(other, types.FunctionType) and other.__module__ == function.__module__:
                waiting.append(other)
    return frozenset(found)


def other_methods(module: nn.Module, called: Iterable[str]) -> Iterator[str]:
    """Those of some names that are methods of a network's class or object, other than `forward` and those of every model."""
    for name in called:
        if not (name in vars(module) or hasattr(type(module), name)):
            continue
        if name == "forward" or name.startswith("__") or hasattr(ModelMixin, name):
            continue
        own, known = vars(module).get(name), inspect.getattr_static(type(module), name, None)
        if isinstance(own, types.FunctionType | types.MethodType) or (own is None and isinstance(known, types.FunctionType)):
            yield name


def inner_modules(network: nn.Module, called: Iterable[str]) -> Iterator[nn.Module]:
    """The modules within a network, or within a list of modules in it, that have one of some names."""
    wanted = set(called)
    for path, module in network.named_modules():
        name = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
        if name in wanted and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield module
