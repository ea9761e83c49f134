# SPDX-License-Identifier: Apache-2.0
"""The command line's texts made into seeds, sizes, methods and their options. Importing this module loads no torch.

The options of a method are the arguments of its preset: `-m NAME=VALUE` is checked against their names, and VALUE is read by
the argument's annotation (`read_value`). A new preset needs one line in `PRESETS`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from paradiff.app import signatures
from paradiff.errors import LONGEST, refuse_unknown, shown

if TYPE_CHECKING:
    from paradiff.solver.protocol import Method

_PLAIN = ("sequential", "jacobi", "paradigms", "parasolver", "quasi_newton", "srds", "collocation")

PRESETS: dict[str, str] = {
    **dict.fromkeys(_PLAIN, "paradiff.methods.presets"),
    **dict.fromkeys(("piadm_sde", "piadm_ode"), "paradiff.methods.piadm"),
    "chords": "paradiff.methods.chords.method",
    "quasi_deer": "paradiff.methods.deer.method",
    "parataa": "paradiff.methods.parataa",
    "auto": "paradiff.planning.auto",
}
"""The methods of the command line, and the modules that hold their presets under the same name."""


SLOPES = {"zero": "zero", "identity": "identity", "freeze-epsilon": "freeze_epsilon", "freeze-clean-data": "freeze_clean_data"}
"""Slopes by their names on the command line, and in chain/slope.py."""

SHIFTED = "shifted:VARIANCE"

MOST_SEEDS = 100_000
"""Most seeds of one run."""

MOST_STEPS = 100_000
"""Most steps of a pipeline's chain."""

LONGEST_SIDE = 16_384
"""Most pixels of a picture's side."""

DIGITS = 18
"""Most digits of a whole number that surely fits into 64 bits."""


def nearest(given: str, known: Sequence[str]) -> str:
    """The end of a sentence that suggests the nearest known name; empty where none is near."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


# -- texts -------------------------------------------------------------------------------------------------------------


def parse_seeds(text: str) -> list[int]:
    """Seeds from `0-15` or `0,3,7-9`.

    Raises:
        ValueError: If the text is no list of seeds, names one twice, or names a seed that is too large, or too many.
    """
    ranges: list[range] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        large = next((n for n in found.groups() if n and (len(n) > DIGITS + 1 or int(n) >= 2**63)), None) if found else None
        if large is not None:
            raise ValueError(f"the seed {large if len(large) <= 40 else large[:40] + '...'} is too large; seeds are below 2^63")
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ValueError(
                f"seeds are {shown(text)}, of which {shown(part.strip())} is no seed; give whole numbers and rising ranges, "
                "such as 0-15 or 0,3,7-9"
            )
        ranges.append(range(int(found[1]), int(found[2] or found[1]) + 1))
    count = sum(part.stop - part.start for part in ranges)
    if count > MOST_SEEDS:
        raise ValueError(f"seeds are {shown(text)}, which are {count}; give at most {MOST_SEEDS} to one run")
    seeds: dict[int, None] = {}
    for seed in itertools.chain.from_iterable(ranges):
        if seed in seeds:
            raise ValueError(f"seeds are {shown(text)}, which names seed {seed} twice; name each once")
        seeds[seed] = None
    return list(seeds)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT.

    Raises:
        ValueError: If the text is no such pair, or a side is too long.
    """
    found = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not found:
        raise ValueError(f"the size is {shown(text)}; give width and height in pixels as WIDTHxHEIGHT, such as 768x512")
    if any(len(side) > DIGITS or int(side) > LONGEST_SIDE for side in found.groups()):
        raise ValueError(f"the size is {shown(text)}; width and height are at most {LONGEST_SIDE} pixels")
    return int(found[1]), int(found[2])


def parse_argument(text: str) -> tuple[str, Any]:
    """Name and value from NAME=VALUE; the value as JSON where it is JSON, else as text.

    Raises:
        ValueError: If the text is no such pair, or its value is empty.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"the argument is {shown(text)}; give it as NAME=VALUE, such as guidance_rescale=0.7")
    if not value.strip():
        raise ValueError(
            f"the argument {_cut(name)} is empty; give it a value ({_cut(name)}='\"\"' for an empty text), or leave it out"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _cut(text: str) -> str:
    """A text as a sentence shows it without quotes."""
    return text if text.isprintable() and len(text) <= LONGEST else shown(text)


def split_options(texts: Sequence[str]) -> dict[str, str]:
    """The NAME=VALUE texts of `-m` by name, `-` in names as `_`.

    Raises:
        ValueError: If a text is no such pair, a value is empty, or a name occurs twice.
    """
    given: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"the method option is {shown(text)}; give it as NAME=VALUE, such as -m blocks=20")
        if not value.strip():
            raise ValueError(f"the method option {_cut(name)} is empty; give it a value, or leave it out")
        if name in given:
            raise ValueError(
                f"the method option {_cut(name)} was given twice, as {_cut(given[name])} and {_cut(value.strip())}; give it "
                "once"
            )
        given[name] = value.strip()
    return given


# -- methods -----------------------------------------------------------------------------------------------------------


def preset(name: str) -> Callable[..., Method]:
    """The preset of a method.

    Raises:
        ValueError: If there is no method of that name.
    """
    refuse_unknown("method", name, list(PRESETS))
    return getattr(importlib.import_module(PRESETS[name]), name)


def parameters(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a preset that a text can be given for, with annotations that are types."""
    return _with_texts(inspect.signature(build, eval_str=True).parameters)


def known_parameters(name: str) -> dict[str, inspect.Parameter]:
    """The same of a method, read off its preset's source without importing it; every default is `...`."""
    return _with_texts(signatures.parameters(PRESETS[name], name))


def _with_texts(found: Mapping[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    return {name: parameter for name, parameter in found.items() if set(words(parameter.annotation)) - {"none"}}


def make_method(name: str, texts: Sequence[str] = (), **shared: Any) -> tuple[Method, dict[str, Any]]:
    """A method, and what its preset was called with, defaults included; slopes and correctors that were given, as texts.

    Args:
        name: The method's name.
        texts: NAME=VALUE, as `-m` takes them.
        shared: The options that the command line has by name; None where not given.

    Raises:
        ValueError: If an option is not one of the method's, was given twice, is missing, or has a value it cannot take.
    """
    refuse_unknown("method", name, list(PRESETS))
    given = split_options(texts)
    own = {option: value for option, value in shared.items() if value is not None}
    twice = next((option for option in own if option in given), None)
    if twice is not None:
        raise ValueError(f"{twice} was given twice, as --{twice} and as -m {twice}; give it once")
    known = known_parameters(name)
    for option in (*own, *given):
        if option not in known:
            source = f"--{option} was given, but " if option in own else ""
            takes = f"it takes {', '.join(known)}" if known else "it takes no options"
            raise ValueError(f"{source}method {name!r} has no option {shown(option)}; {takes}{nearest(option, list(known))}")
    missing = next((option for option, p in known.items() if p.default is p.empty and option not in given | own), None)
    if missing is not None:
        raise ValueError(f"method {name!r} needs {missing}; give it as -m {missing}=VALUE")
    values = own | {option: read_value(option, text, known[option].annotation) for option, text in given.items()}
    texts_of = {option: value if _is_plain(value) else given[option] for option, value in values.items()}
    build = preset(name)  # imports torch, which no refusal above needs
    return build(**values), {option: p.default for option, p in parameters(build).items()} | texts_of


def effective_options(method: Method, called: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a method's options after its own defaults, as JSON.

    Args:
        method: The method.
        called: What its preset was called with. A None among them stands for the preset's own choice, which the method holds.
    """
    return {option: as_json(getattr(method, option, None) if value is None else value) for option, value in called.items()}


def as_json(value: Any) -> Any:
    """An option's value as run.json has it: a number, a text, a list of numbers, the name of a slope or a corrector."""
    if _is_plain(value):
        return value
    return str(value) if isinstance(value, Path) else name_of(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list)


def name_of(value: Any) -> str:
    """An object as the command line would be given it."""
    name = getattr(value, "__name__", "").replace("_", "-")
    if name in SLOPES:
        return name
    if hasattr(value, "variance"):
        return f"shifted:{value.variance:g}"
    if hasattr(value, "steps") and hasattr(value, "sweeps"):
        return f"{value.steps}x{value.sweeps}"
    return type(value).__name__ if not callable(value) else "own"


# -- values by annotation ----------------------------------------------------------------------------------------------

WHOLE = re.compile(r"[+-]?[0-9]+")
TRUTH = {"true": True, "false": False}


def members(annotation: Any) -> Iterator[Any]:
    """The members of a union, of nested ones too, the texts last, since every value is one."""
    if get_origin(annotation) in (Union, UnionType):
        found = [member for part in get_args(annotation) for member in members(part)]
        yield from sorted(found, key=lambda member: member in (str, Path))
    else:
        yield annotation


def words(annotation: Any) -> list[str]:
    """What may be given for an annotation: names as they are written, and what else in words."""
    found: list[str] = []
    for member in members(annotation):
        origin = get_origin(member)
        if origin is Literal:
            found += [str(value).replace(" ", "-") for value in get_args(member)]
        elif member is NoneType:
            found.append("none")
        elif member is bool:
            found += list(TRUTH)
        elif member is int:
            found.append("a whole number")
        elif member is float:
            found.append("a number")
        elif origin is Sequence:
            found.append("whole numbers such as 0,4,8")
        elif origin is Callable:
            found += [*SLOPES, SHIFTED]
        elif getattr(member, "__name__", "") == "Corrector":
            found.append("STEPSxSWEEPS such as 4x4")
        elif member in (str, Path):
            found.append("a text")
    return list(dict.fromkeys(found))


def read_value(option: str, text: str, annotation: Any) -> Any:
    """An option's value from its text, by its annotation.

    Whole numbers, numbers, `true` and `false`, `none`, names of a `Literal` (with `-` for a space), lists such as `0,4,8`,
    slopes (`identity`, `shifted:0.5`), correctors (`4x4`), texts. An annotation that can be none of these takes no text.

    Raises:
        ValueError: If the text is no value of that kind, or a whole number of too many digits.
    """
    for member in members(annotation):
        origin = get_origin(member)
        if origin is Literal:
            names = {str(value).replace(" ", "-"): value for value in get_args(member)}
            if text.replace(" ", "-") in names:
                return names[text.replace(" ", "-")]
        elif member is NoneType and text in ("none", "None"):
            return None
        elif member is bool and text in TRUTH:
            return TRUTH[text]
        elif member is int and WHOLE.fullmatch(text):
            return _whole(option, text)
        elif member is float and _is_number(text):
            return float(text)
        elif origin is Sequence and "," in text and all(WHOLE.fullmatch(part.strip()) for part in text.split(",")):
            return [_whole(option, part.strip()) for part in text.split(",")]
        elif origin is Callable and (text in SLOPES or text.startswith("shifted:")):
            return parse_slope(option, text)
        elif getattr(member, "__name__", "") == "Corrector" and re.fullmatch("[0-9]+x[0-9]+", text):
            return parse_corrector(text)
        elif member in (str, Path):
            return text
    known = words(annotation)
    expected = f"it must be one of {', '.join(known)}" if len(known) > 1 else f"give {known[0]}"
    raise ValueError(f"{option} is {shown(text)}; {expected}{nearest(text, [word for word in known if ' ' not in word])}")


def _whole(option: str, text: str) -> int:
    if len(text.lstrip("+-0")) > DIGITS:
        raise ValueError(f"{option} is {text[:40]}, a number of more than {DIGITS} digits; give a smaller one")
    return int(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse_slope(option: str, text: str) -> Any:
    """A slope by name; `shifted:V` for data of variance V.

    Raises:
        ValueError: If V is no positive number.
    """
    slopes = importlib.import_module("paradiff.chain.slope")
    if text in SLOPES:
        return getattr(slopes, SLOPES[text])
    try:
        return slopes.shifted(float(text.removeprefix("shifted:")))
    except ValueError as error:
        raise ValueError(f"{option} is {shown(text)}; shifted takes a positive data variance, such as shifted:0.5") from error


def parse_corrector(text: str) -> Any:
    """A corrector from STEPSxSWEEPS."""
    steps, sweeps = text.split("x")
    return importlib.import_module("paradiff.methods.window.corrector").underdamped_langevin(int(steps), int(sweeps))
