# SPDX-License-Identifier: Apache-2.0
"""What a call finds around it, outside of its objects: environment variables, context variables, torch's default dtype."""

from __future__ import annotations

import contextvars
import os
from typing import Any

import torch


class Surroundings:
    """The surroundings at the time of its making."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._context: dict[contextvars.ContextVar[Any], Any] = dict(contextvars.copy_context())
        self._dtype = torch.get_default_dtype()

    def restore(self) -> None:
        """Puts them back. A context variable that was set since, and had no value before, keeps its value."""
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        for name, value in self._environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        for variable, value in self._context.items():
            if variable.get(None) is not value:
                variable.set(value)
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
