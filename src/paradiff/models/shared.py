# SPDX-License-Identifier: Apache-2.0
"""Networks on several ranks: which rank reads the weights of each, and which ranks hold them.

Denoisers are on all ranks. One rank of each machine reads their weights and sends them to the others. Text encoders, image
encoders, autoencoders and vocoders, which a call needs before its loop and after it, are on the first rank alone. On the others
they have their structure and their buffers, and weights that are absent (absent.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paradiff.models.absent import Absent
from paradiff.solver.machine import Machine

AUTOENCODERS = "diffusers.models.autoencoders."
"""Where diffusers' autoencoders are."""


def is_denoiser(kind: type[nn.Module]) -> bool:
    """Whether a class of networks may be called in a loop: it is diffusers', and no autoencoder."""
    origins = [one.__module__ for one in kind.__mro__]
    return not any(origin.startswith(("transformers.", AUTOENCODERS)) for origin in origins)


def shared_network(
    load: Callable[[], nn.Module], kind: Any, folder: Path, device: torch.device | str, machine: Machine
) -> nn.Module:
    """A network on this rank, whose weights another one may read or hold. All ranks have to call this.

    Args:
        load: Reads it, weights and all.
        kind: Its class, of diffusers or transformers.
        folder: Where its config is.
        device: Where its weights go.
        machine: This machine's ranks.

    Raises:
        ValueError: If it cannot be read, or has other weights here than on the first rank.
        RanksFailed: If another rank cannot read it.
    """
    ranks, device, everywhere = machine.ranks, torch.device(device), is_denoiser(kind)
    read = load().to(device) if (machine.first if everywhere else ranks.place == 0) else None

    def told() -> tuple[dict[str, Any], dict[str, Tensor]]:
        assert read is not None
        return _forms(read), {} if everywhere else dict(read.named_buffers())

    forms, buffers = ranks.on_one(told, device)  # which fails where it could not be read
    network = _blank(kind, folder) if read is None else read
    if {name: shape for name, (shape, _) in forms.items()} != {name: shape for name, (shape, _) in _forms(network).items()}:
        raise ValueError(
            f"the {kind.__name__} in {str(folder)!r} has other weights than on rank 0; give all ranks the same model"
        )
    if read is None:
        make = _empty if everywhere else Absent.of
        made = {name: make(shape, dtype, device) for name, (shape, dtype) in forms.items() if name not in buffers}
        _fill(network, made | buffers)
    if everywhere:
        machine.spread([*network.parameters(), *network.buffers()])
    return network


def _forms(network: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each parameter and buffer, by name; of those under several names the first one."""
    every = [*network.named_parameters(), *network.named_buffers()]
    return {name: (tuple(one.shape), one.dtype) for name, one in every}


def _blank(kind: Any, folder: Path) -> nn.Module:
    """A network of its config, with weights on `meta`."""
    with _on_meta():
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder)).eval()
        return kind(kind.config_class.from_pretrained(folder)).eval()


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _fill(network: nn.Module, made: dict[str, Tensor]) -> None:
    """Puts tensors in place of a network's parameters and buffers."""
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    new: dict[int, Any] = {id(one): nn.Parameter(made[name], requires_grad=False) for name, one in parameters.items()}
    new |= {id(one): made[name] for name, one in buffers.items()}
    for module in network.modules():  # those under several names, too
        for held in (module._parameters, module._buffers):
            held.update({name: new[id(one)] for name, one in held.items() if one is not None})


@contextmanager
def _on_meta() -> Iterator[None]:
    """Has modules that are made within the block keep their parameters on `meta`; their buffers are as ever."""
    own = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        own(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = own
