# SPDX-License-Identifier: Apache-2.0
"""What the documentation of a method says of it and of its options, as `paradiff methods` prints it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from textwrap import fill
from typing import Any

from paradiff.app.options import name_of, parameters, words


def documentation(build: Callable[..., Any]) -> str:
    """A preset's docstring, without its indentation."""
    return inspect.getdoc(build) or ""


def summary(build: Callable[..., Any]) -> str:
    """The first line of a preset's docstring."""
    return documentation(build).partition("\n")[0]


def introduction(build: Callable[..., Any]) -> str:
    """A preset's docstring up to its arguments: what the method is, its source, and in what it differs from the paper."""
    return re.split(r"^(?:Args|Raises):$", documentation(build), maxsplit=1, flags=re.MULTILINE)[0].strip()


def argument_texts(build: Callable[..., Any]) -> dict[str, str]:
    """What a preset's docstring says of each of its arguments, each in one line."""
    found = re.search(r"^Args:\n((?:[ ]+.*\n?)*)", documentation(build), re.MULTILINE)
    texts: dict[str, str] = {}
    current = ""
    for line in inspect.cleandoc("\n" + found[1]).splitlines() if found else []:
        start = re.match(r"(\w+): (.*)", line)
        current = start[1] if start else current
        texts[current] = start[2] if start else f"{texts[current]} {line.strip()}"
    return texts


def described(build: Callable[..., Any]) -> str:
    """A method's documentation, and its options with their defaults and what may be given."""
    texts = argument_texts(build)
    lines = [introduction(build), "", "Options (-m NAME=VALUE):"]
    for option, parameter in parameters(build).items():
        given = ", ".join(words(parameter.annotation))
        default = parameter.default
        required = default is parameter.empty
        shown = default if isinstance(default, int | float | str) else "none" if default is None else name_of(default)
        end = "has to be given" if required else f"default {str(shown).lower().replace(' ', '-')}"
        lines += ["", f"  {option}: {given}; {end}"]
        if option in texts:
            lines.append(fill(texts[option], 120, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines if len(lines) > 3 else [lines[0], "", "It has no options."])
