# SPDX-License-Identifier: Apache-2.0
"""A command's parameters, read off a dataclass whose fields are annotated as typer takes them (request.py)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

Option = tuple[Any, Any]
"""How a command takes a field in its own way: the annotation, and the default, `...` where there is none."""


def taking(
    kind: type[Any], *, without: tuple[str, ...] = (), otherwise: Mapping[str, Option] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function whose first argument is an object of a dataclass.

    The command's parameters are the fields of the dataclass, then the function's other arguments.

    Args:
        kind: The dataclass.
        without: Fields that the command has no option for; they keep their defaults.
        otherwise: Fields that the command takes in its own way.
    """
    own = dict(otherwise or {})
    hints = get_type_hints(kind, include_extras=True)
    made: list[inspect.Parameter] = []
    for field in dataclasses.fields(kind):
        if field.name not in without:
            several = field.default is dataclasses.MISSING  # a list, or another one
            annotation, default = own.get(field.name, (hints[field.name], [] if several else field.default))
            default = inspect.Parameter.empty if default is ... else default
            made.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default))
    names = [parameter.name for parameter in made]

    def command_of(body: Callable[..., None]) -> Callable[..., None]:
        rest = [*inspect.signature(body, eval_str=True).parameters.values()][1:]

        def command(**given: Any) -> None:
            body(kind(**{name: given.pop(name) for name in names}), **given)

        command.__name__, command.__doc__ = body.__name__, body.__doc__
        vars(command)["__signature__"] = inspect.Signature([*made, *(p.replace(kind=p.KEYWORD_ONLY) for p in rest)])
        return command

    return command_of
