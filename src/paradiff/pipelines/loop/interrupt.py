# SPDX-License-Identifier: Apache-2.0
"""`pipe._interrupt = True`, by which a callback or another thread ends a call, in a parallel run.

A plain call that is interrupted passes over its remaining steps and goes on with the state that it has. A parallel run holds
several states; it goes on with the newest final one, which is the plain call's state after the same number of steps. After a
callback that interrupts at step i, that is the state which the callback was given, in both.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor

from paradiff.pipelines.network.reads import names

NAMES = {"interrupt", "_interrupt"}
READ = re.compile(r"\b(if|while)\b[^\n:]*[.\"'](_?interrupt)\b")


class Interrupt:
    """The flag of a pipeline by which its calls are interrupted.

    Args:
        pipeline: The user's pipeline.
        plain: Its class.

    Attributes:
        node: The newest node whose state is final; 0 if none is known.
        state: `[B, ...]` its state, or None.
    """

    def __init__(self, pipeline: Any, plain: type) -> None:
        self._attributes: dict[str, Any] = vars(pipeline)
        name = flag(plain)
        self._name = name if name is None or name[0] == "_" or name in self._attributes else f"_{name}"
        self.node, self.state = 0, None
        self._held = False

    def __bool__(self) -> bool:
        """Whether the pipeline is interrupted and its loop heeds that."""
        return self._name is not None and (self._held or bool(self._attributes.get(self._name, False)))

    def clear(self) -> None:
        """Takes the flag back, as a call of the pipeline does when it begins."""
        if self._name is not None and self._name in self._attributes:
            self._attributes[self._name] = False

    def set(self) -> None:
        """Sets the flag."""
        if self._name is not None:
            self._attributes[self._name] = True

    def hold(self) -> None:
        """Hides the flag from the loop for a pass, until `release`."""
        self._held = True
        self.clear()

    def release(self) -> None:
        """Shows the flag again, if it was hidden."""
        if self._held:
            self._held = False
            self.set()

    def on_final(self, first: int, states: Tensor) -> None:
        """Keeps the newest of the final states `[n, ...]` of the nodes from `first` on."""
        if len(states):
            self.node, self.state = first + len(states) - 1, states[-1].clone()


def flag(plain: type) -> str | None:
    """The attribute that the methods of a pipeline class ask in order to pass over a step; None if there is none."""
    for name in dir(plain):
        for member in (vars(cls)[name] for cls in plain.__mro__ if name in vars(cls)):
            function = inspect.unwrap(member) if inspect.isfunction(member) else None
            if function is None:
                break
            try:
                found = READ.search(inspect.getsource(function)) if NAMES & names(function.__code__) else None
            except (OSError, TypeError):
                found = None
            if found is not None:
                return found[2]
            if "super" not in function.__code__.co_names:
                break  # what it overrides is not called
    return None
