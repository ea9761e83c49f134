# SPDX-License-Identifier: Apache-2.0
"""Networks whose weights are elsewhere, or of another dtype, while none of their calls runs.

accelerate and diffusers hook a module so that its weights come before its call and go after it, in one of four ways:

- The parameters stay the same objects, and their memory is exchanged: models and groups of layers that are moved between
  devices, and layers that are cast.
- The parameters are placeholders without memory between calls, and the values are in a mapping of the hook: what accelerate
  offloads layer by layer.
- The values are in a file, and the memory between calls holds nothing.
- They stay where they are, on several devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from paradiff.pipelines.network.hooks import REGISTRY

ACCELERATE = "_hf_hook"
"""The attribute of modules that holds accelerate's hook."""


def moves(network: nn.Module) -> bool:
    """Whether a network's weights may come and go with its calls."""
    return any(hook in vars(module) for module in network.modules() for hook in (ACCELERATE, REGISTRY))


def in_files(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module's group of layers that is offloaded to a file: between calls they hold nothing."""
    for hook in getattr(vars(module).get(REGISTRY), "hooks", {}).values():
        group = getattr(hook, "group", None)
        if getattr(group, "offload_to_disk_path", None) is not None:
            yield from getattr(group, "tensor_to_key", ())


def mapped(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where a module's hooks take its weights from at each call: a dict, a key in it, and the parameter's name.

    Weights that are read from files are left out.
    """
    for hook in _hooks(vars(module).get(ACCELERATE)):
        held: Any = getattr(hook, "weights_map", None)
        prefix = ""
        while hasattr(held, "dataset") and hasattr(held, "prefix"):  # a view of accelerate's
            held, prefix = held.dataset, held.prefix + prefix
        held = getattr(held, "state_dict", held)  # a loader of accelerate's, beside its files
        if getattr(hook, "offload", False) and isinstance(held, dict):
            yield from ((held, prefix + name, name) for name, _ in module.named_parameters() if prefix + name in held)


def _hooks(hook: Any) -> list[Any]:
    """A hook of accelerate, or those that it is made of."""
    if hook is None:
        return []
    return [inner for one in hook.hooks for inner in _hooks(one)] if hasattr(hook, "hooks") else [hook]
