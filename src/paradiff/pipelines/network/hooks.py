# SPDX-License-Identifier: Apache-2.0
"""Hooks on a network that keep values from one step to the next.

diffusers' caches (first-block cache, FasterCache, pyramid attention broadcast, TaylorSeer, MagCache and others) are hooks in a
registry at the modules, whether `enable_cache` or an `apply_*` function put them there. Those that keep values say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

REGISTRY = "_diffusers_hook"


def stateful_hooks(network: nn.Module) -> list[str]:
    """The classes of diffusers' hooks on a network, or within it, that keep values across steps; each once, in order."""
    registries = [vars(module).get(REGISTRY) for module in network.modules()]
    hooks = [hook for registry in registries for hook in getattr(registry, "hooks", {}).values()]
    return list(dict.fromkeys(type(hook).__name__ for hook in hooks if getattr(hook, "_is_stateful", False)))


def caches(networks: Mapping[str, nn.Module]) -> list[str]:
    """A clause for each of some networks that keeps a cache, or values of another kind, from one step to the next."""
    found: list[str] = []
    for name, network in networks.items():
        hooks = stateful_hooks(network)
        if hooks:
            found.append(f"{name} keeps values across steps in a hook ({', '.join(hooks)})")
        elif getattr(network, "is_cache_enabled", False):
            found.append(f"{name} keeps a cache across steps")
    return found


def call_hooks(network: nn.Module) -> list[Callable[..., Any]]:
    """The functions that torch calls before and after the network's `forward`."""
    return [*network._forward_pre_hooks.values(), *network._forward_hooks.values()]
