# SPDX-License-Identifier: Apache-2.0
"""The arguments of a pipeline class's `__call__`, by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def bound(kind: Any, pipeline: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; those of `*args` as a tuple.

    Args:
        kind: The pipeline's class.
        pipeline: The pipeline.
        args: The call's arguments without names.
        kwargs: Those with names.

    Raises:
        TypeError: If they do not fit, as the call raises it.
    """
    signature = inspect.signature(kind.__call__)
    arguments = dict(signature.bind(pipeline, *args, **kwargs).arguments)
    own, *others = signature.parameters.values()
    itself = arguments.pop(own.name)
    if own.kind is own.VAR_POSITIONAL:
        arguments[own.name] = itself[1:]
    for parameter in others:
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def plain_call(kind: Any) -> Callable[..., Any]:
    """The class's own `__call__`, as a function of the pipeline and of what `bound` returns."""
    call = kind.__call__
    parameters = list(inspect.signature(call).parameters.values())
    spread = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if spread is None:
        return call
    ahead = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    @functools.wraps(call)
    def spreading(pipeline: Any, **named: Any) -> Any:
        rest = named.pop(spread, ())
        return call(pipeline, *[named.pop(name) for name in ahead if rest], *rest, **named)

    return spreading
