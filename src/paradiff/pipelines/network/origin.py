# SPDX-License-Identifier: Apache-2.0
"""Which functions and classes are a user's own, and not those of a library that is known."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from typing import Any

MODELS = {"diffusers", "transformers", "accelerate", "peft"}
"""Libraries whose objects hold the memory of networks: hooks, attention processors, caches."""
OTHERS = {"torch", "torchvision", "numpy", "PIL", "tokenizers", "safetensors", "tqdm", "greenlet", "paradiff"}


@functools.lru_cache(maxsize=4096)
def is_users(module: str | None) -> bool:
    """Whether a module is neither of Python's own nor of a library that is known."""
    top = (module or "builtins").partition(".")[0]
    return top not in MODELS and top not in OTHERS and top not in sys.stdlib_module_names


def users_methods(cls: type) -> list[types.FunctionType]:
    """The methods of a class that are of no known library."""
    members = [function_of(part) for owner in cls.__mro__ if is_users(owner.__module__) for part in vars(owner).values()]
    return [part for part in map(inspect.unwrap, filter(callable, members)) if isinstance(part, types.FunctionType)]


def function_of(member: Any) -> Any:
    """The function of a method, a static method or a property."""
    return getattr(member, "__func__", getattr(member, "fget", member)) if not isinstance(member, types.MethodType) else member
