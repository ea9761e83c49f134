# SPDX-License-Identifier: Apache-2.0
"""Weights that another rank holds: their shape, dtype and device, without their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paradiff.errors import NotHere

KEPT = {"detach", "alias", "view_as"}
"""Operations that give the same weights."""


class Absent(Tensor):
    """The weights of a network whose calls another rank makes. They take no memory, and can be moved and cast.

    Raises:
        NotHere: If they are computed with.
    """

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Absent:
        """Makes one.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            device: Where the other rank's are, or would be.
        """
        return Tensor._make_wrapper_subclass(Absent, torch.Size(shape), dtype=dtype, device=device)

    def __repr__(self, **_: Any) -> str:
        return f"Absent({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What is made of weights that are not here: the same, elsewhere or in another dtype.

        Raises:
            NotHere: If it is anything else.
        """
        name, given = func.overloadpacket.__name__, kwargs or {}
        if name in KEPT:
            return Absent.of(args[0].shape, args[0].dtype, args[0].device)
        if name == "_to_copy":
            one = args[0]
            return Absent.of(one.shape, given.get("dtype") or one.dtype, given.get("device") or one.device)
        raise NotHere(
            "the pipeline reads weights outside of its networks' calls, which rank 0 alone holds; call it from Python, by "
            "paradiff.parallelize(pipe, mesh=mesh), where each rank holds all of them"
        )


def is_absent(module: nn.Module) -> bool:
    """Whether another rank holds the weights of a module."""
    return any(isinstance(weight, Absent) for weight in module.parameters())
