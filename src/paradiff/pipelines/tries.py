# SPDX-License-Identifier: Apache-2.0
"""The tries of a pipeline call: how one is undone, and whose error ends it.

A try that fails must not be seen: what the call's arguments, the pipeline, its methods, its networks, the generators and the
environment held before is put back, and the next try, or the plain call, begins as the first one did. An error in a try is one
of three kinds: that of a user's own function, paradiff's refusal of an argument, and anything else, which the plain call may
not meet.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from paradiff.pipelines.host.host import Host
from paradiff.pipelines.loop.callback import Callback
from paradiff.pipelines.loop.random_state import Snapshot
from paradiff.pipelines.network.hooks import call_hooks
from paradiff.pipelines.network.memory import Memory
from paradiff.pipelines.network.origin import is_users, users_methods
from paradiff.pipelines.network.weights import Weights, version_of
from paradiff.pipelines.surroundings import Surroundings
from paradiff.solver.protocol import Observer, Round


class Beginning:
    """What a call finds: its arguments, the pipeline's attributes and methods, its networks, the generators, the environment.

    Args:
        host: What owns the chain.
        arguments: The call's arguments by name. Those that are functions are left alone.

    Attributes:
        lasting: Where there is something that cannot be put back, such as a Python generator, and what of it; None if there is
            nothing.
        weights: The networks' weights.
    """

    def __init__(self, host: Host, arguments: Mapping[str, Any]) -> None:
        owner, kind, networks = host.owner, host.kind, host.networks
        data = {name: value for name, value in arguments.items() if not callable(value)}
        self._random = Snapshot(arguments)
        classes = [(one.__name__, one) for one in (kind, type(owner))]
        methods = [*classes, *((method.__name__, method) for method in users_methods(kind))]
        given = called_memory({name: value for name, value in arguments.items() if callable(value)}, networks)
        self._memory = Memory([*networks.items(), *data.items(), *methods], owners=[owner])
        functions = [*users_methods(kind), *given.functions, *self._memory.functions]
        self.weights = Weights(networks, functions, given.operators | self._memory.operators)
        self._surroundings = Surroundings()
        self.lasting = self._memory.lasting

    def restore(self) -> None:
        """Puts all of it back.

        Raises:
            RuntimeError: If the values of weights are lost.
        """
        lost = self.weights.restore()
        self._memory.restore()
        self._random.restore()
        self._surroundings.restore()
        if lost is not None:
            raise RuntimeError(
                f"the call writes to the weights {lost}, and the parallel run that met this cannot put them back: load the "
                "network again, and call the pipeline with executor='sequential'"
            )


class PlainBeginning:
    """What a plain call finds, so that it can be given up within its loop. Networks of a known library are not recorded, since
    their calls leave them as they are; whether they did is seen.

    Args:
        host: What owns the chain.
        arguments: The call's arguments by name.

    Attributes:
        lasting: As of `Beginning`.
    """

    def __init__(self, host: Host, arguments: Mapping[str, Any]) -> None:
        owner, kind, networks = host.owner, host.kind, host.networks
        data = [(name, value) for name, value in arguments.items() if not callable(value)]
        methods = [(one.__name__, one) for one in (kind, type(owner), *users_methods(kind))]
        parts = [(name, part) for name, network in networks.items() for part in network.modules()]
        users = [(name, part) for name, part in parts if is_users(type(part).__module__) or call_hooks(part)]
        kept = {id(part) for _, part in users}
        library = [part for _, part in parts if id(part) not in kept]
        self._tensors = [tensor for part in library for held in (part._parameters, part._buffers) for tensor in held.values()]
        self._random, self._surroundings = Snapshot(arguments), Surroundings()
        self._memory = Memory([*users, *data, *methods], owners=[owner], leave=library)
        self.lasting = self._memory.lasting
        self._versions = self._seen()

    def _seen(self) -> list[int]:
        return [-1 if tensor is None else version_of(tensor) for tensor in self._tensors]

    @property
    def restorable(self) -> bool:
        """Whether the networks' tensors are as they were."""
        return self._seen() == self._versions

    def restore(self) -> None:
        """Puts all of it back."""
        self._memory.restore()
        self._random.restore()
        self._surroundings.restore()


def called_memory(given: Mapping[str, Any], networks: Mapping[str, nn.Module]) -> Memory:
    """The memory of some functions, methods, partials or objects, without that of networks.

    Args:
        given: What is called, each with its name.
        networks: The networks.
    """
    return Memory(given.items(), leave=[part for network in networks.values() for part in network.modules()])


def hooks_memory(host: Host, readers: list[types.FunctionType]) -> Memory | None:
    """The memory of the functions that torch calls before and after the networks; None if there are none."""
    networks = host.networks
    hooks = [(f"a hook of the {name}", hook) for name, network in networks.items() for hook in call_hooks(network)]
    inside = [module for network in networks.values() for module in network.modules()]
    return Memory(hooks, leave=[*inside, host.scheduler], readers=readers) if hooks else None


@dataclass
class Watched:
    """An observer, and what it raised.

    Attributes:
        observer: The user's observer.
        error: What it raised, or None.
    """

    observer: Observer
    error: BaseException | None = None

    def __call__(self, round: Round) -> bool | None:
        try:
            return self.observer(round)
        except BaseException as error:
            self.error = error
            raise


def users_error(callback: Callback | None, observer: Watched | None) -> BaseException | None:
    """What the user's callback or observer raised in a try; None if neither did."""
    errors = [watched.error for watched in (callback, observer) if watched is not None]
    return next((error for error in errors if error is not None), None)


def is_refusal(error: BaseException) -> bool:
    """Whether an error is a ValueError that paradiff raised itself, in a `raise` statement: a refused argument. An error of
    another rank says so itself."""
    if (known := vars(error).get("refuses")) is not None:
        return known
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if not isinstance(error, ValueError) or trace is None:
        return False
    owner: str = trace.tb_frame.f_globals.get("__name__", "")
    return owner.partition(".")[0] == "paradiff" and _raises(trace)


def _raises(trace: types.TracebackType) -> bool:
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
