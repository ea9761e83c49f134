# SPDX-License-Identifier: Apache-2.0
"""Tensors as the solvers compute with them: dense, of real numbers that are at hand, and of torch's own class.

A subclass without a dispatch of its own (a `Parameter`, say) is a plain tensor by another name; one with its own (a `DTensor`,
a `MaskedTensor`) or without numbers (the meta device) is none.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

DISPATCH = "__torch_dispatch__"


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor with a number in memory for each of its places."""
    return isinstance(value, Tensor) and not (value.is_nested or value.is_meta) and value.layout is torch.strided


def is_plain(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor of real numbers, of torch's own class or of a subclass that computes as that does."""
    return (
        is_dense(value)
        and getattr(type(value), DISPATCH, None) is getattr(Tensor, DISPATCH, None)
        and not (value.is_quantized or value.is_complex())
    )


def plain(value: Tensor) -> Tensor:
    """A plain tensor as one of torch's own class, without a derivative; the same memory."""
    return value if type(value) is Tensor and not value.requires_grad else value.detach().as_subclass(Tensor)
