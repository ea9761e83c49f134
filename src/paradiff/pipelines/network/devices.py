# SPDX-License-Identifier: Apache-2.0
"""Copies of a pipeline's networks on several devices of one process, which share the states of a window.

The pipeline stays on the first device, and runs there as it does on one. Of a network that is called with a window there is a
copy on each other device from that call on, kept for later calls of the pipeline; weights that changed in between are copied
again. Text encoders and autoencoders, which are called without a window, are never copied.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from paradiff.errors import Unsupported
from paradiff.pipelines.network.holder import is_boundary
from paradiff.pipelines.network.offloaded import moves
from paradiff.solver.replicas import Replicas


class Devices(Replicas):
    """The devices of one process, for a pipeline's networks.

    Args:
        devices: The devices; the first one is the pipeline's own.
        shares: Stretches that a window's states are cut into; as many as devices by default.
    """

    def __init__(self, devices: Sequence[torch.device], shares: int | None = None) -> None:
        super().__init__(devices, shares)
        self._lock = threading.Lock()
        self._copies: dict[tuple[int, torch.device], tuple[nn.Module, nn.Module, list[tuple[int, int]]]] = {}

    def called(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A network's output, computed on the device of this thread and given on that of its inputs.

        Args:
            forward: The network's own `forward`.
            args: Its arguments.
            kwargs: Its named arguments.

        Raises:
            Unsupported: If the network cannot be copied.
        """
        here, home = self.devices[self.place], self.devices[0]
        if here == home:
            return forward(*args, **kwargs)
        module = getattr(forward, "__self__", None)
        if not isinstance(module, nn.Module) or moves(module):
            raise Unsupported(
                "a network's forward is wrapped by another library (offloading, compilation): other devices get no copy of it"
            )
        args, kwargs = _pytree.tree_map_only(Tensor, lambda leaf: leaf.to(here), (args, kwargs))
        output = self._copy(module, here).forward(*args, **kwargs)
        return _pytree.tree_map_only(Tensor, lambda leaf: leaf.to(home), output)

    def _copy(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module's copy on a device, with its present weights."""
        with self._lock:
            state = [*module.parameters(), *module.buffers()]
            versions = [(id(one), one._version if not one.is_inference() else -1) for one in state]
            kept = self._copies.get((id(module), device))
            if kept is not None and kept[0] is module and kept[2] == versions:
                return kept[1]
            with torch.inference_mode(False), torch.no_grad():
                made = _bare(module).to(device)
            self._copies[id(module), device] = module, made, versions
            return made


def _bare(module: nn.Module) -> nn.Module:
    """A copy of a module without boundaries, which call the module itself and those within it."""
    kept = {name: vars(module).pop(name) for name in ("forward", "_compiled_call_impl") if name in vars(module)}
    try:
        made = copy.deepcopy(module)
    finally:
        vars(module).update(kept)
    for part in made.modules():
        for name in [name for name, value in vars(part).items() if is_boundary(value)]:
            del vars(part)[name]
    return made
