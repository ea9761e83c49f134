# SPDX-License-Identifier: Apache-2.0
"""Tables and their indices lie on the CPU, also in a script whose default device is another (`torch.set_default_device`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


def default_device() -> torch.device:
    """Where torch makes tensors that are given no device. `torch.get_default_device` of torch 2.4 fails where the default was
    taken back, and knows of no `with torch.device(...)`."""
    return torch.empty(0).device


def at_home() -> contextlib.AbstractContextManager[Any]:
    """Makes tensors that are given no device the CPU's in a `with` block, whatever torch's default device is."""
    return contextlib.nullcontext() if default_device().type == "cpu" else torch.device("cpu")


def made_at_home(make: Callable[Given, Made]) -> Callable[Given, Made]:
    """A function that runs in such a block."""

    @functools.wraps(make)
    def made(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with at_home():
            return make(*args, **kwargs)

    return made
