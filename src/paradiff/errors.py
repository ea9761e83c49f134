# SPDX-License-Identifier: Apache-2.0
"""Sentences for what cannot be: arguments of the wrong kind, missing packages, pipelines whose loops have no parallel form."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import TypeIs

LONGEST = 60
"""Characters of a value that a sentence shows."""


class Unsupported(Exception):
    """A loop, scheduler or option that has no parallel form here. The text is a clause for the user: what was found."""


class NeedsLanes(Unsupported):
    """The loop body read the step number or the time in Python, where the states of a window differ: each state needs a lane
    of its own (pipelines/executors/lanes.py)."""


class NeedsOrder(Unsupported):
    """A network's calls depend on those before, so that they are right in the loop's own order alone, whatever the executor."""


class Carried(NeedsOrder):
    """Evidence that a loop keeps something from one pass to the next, which no executor can follow."""


class MixedWindows(NeedsLanes):
    """The loop body mixed the states of two rounds, which belong to other nodes."""


class Edited(Unsupported):
    """The loop changes its states between steps, which the method that was chosen for it cannot follow."""


class ChosenPlain(Unsupported):
    """The plain call was chosen for a loop, for the reason in the text."""


class RanksFailed(Exception):
    """The end of a run on several ranks: one of them died, hangs, failed, or disagrees with the others. The text is a sentence
    that names it."""


class NotHere(ValueError):
    """A network's weights are needed on a rank that does not hold them. The text is a sentence for the user."""


class NotFinite(ValueError):
    """A state of a chain, or an output of its network, holds NaN or infinity. The text is a sentence for the user."""


class NotWalked(Unsupported):
    """The loop does not iterate its scheduler's times."""


class MissingPackage(ImportError):
    """A package of an extra that is not installed. The text is a sentence: what needs it, and how to install it."""


def shown(value: object) -> str:
    """A value as a sentence shows it: in one short line, of arrays the kind and the shape alone, and no object's address."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if getattr(value, "is_nested", False) is True:  # which has no shape
        return f"a nested {type(value).__name__}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) > 0:
        kind = {"ndarray": "an array"}.get(type(value).__name__, f"a {type(value).__name__}")
        layout = str(getattr(value, "layout", "torch.strided")).removeprefix("torch.")
        place = ", on the meta device" if getattr(value, "is_meta", False) is True else ""
        left = place if layout == "strided" else f", {layout}"
        return f"{kind} of shape {tuple(shape)} and {getattr(value, 'dtype', 'no dtype')}{left}"
    if isinstance(value, int) and abs(value) >= 10**LONGEST:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    if text.startswith("<"):
        return f"a {type(value).__name__}"
    first = text.split("\n", 1)[0][:LONGEST]
    return text if first == text else f"{first.rstrip()}..."


def refuse_unknown(option: str, given: str, known: Sequence[str]) -> None:
    """Raises ValueError, with the nearest known name, unless `given` is one of `known`."""
    if isinstance(given, str) and given in known:
        return
    near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{option} is {shown(given)}; it must be one of {', '.join(known)}{hint}")


def is_whole(value: object) -> TypeIs[int]:
    """Whether a value is a whole number, of Python or numpy; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeIs[float]:
    """Whether a value is a real number, of Python or numpy; a truth value is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def are_whole(value: object) -> TypeIs[Sequence[int]]:
    """Whether a value is a sequence of whole numbers; an empty one is."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) and all(map(is_whole, value))


def require_whole(name: str, value: object, least: int, otherwise: str = "", *, most: int | None = None) -> None:
    """Refuses what is no whole number of at least `least`, or one above `most`.

    Args:
        name: The argument, as the sentence begins with it.
        value: What was given.
        least: The smallest number allowed.
        otherwise: What else may be given, as the sentence ends with it: `", or None for all"`.
        most: The largest number allowed; None for no bound.

    Raises:
        ValueError: With the argument's name, what was given, and what was expected.
    """
    if not is_whole(value) or value < least or (most is not None and value > most):
        bound = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number, at least {least}{bound}{otherwise}")


def number_of(value: object) -> float:
    """A real number as a float, infinite where no float holds it; NaN for any other value."""
    if not is_real(value):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def require_real(name: str, value: object, *, positive: bool = False, otherwise: str = "") -> None:
    """Refuses what is no finite number of at least 0.

    Args:
        name: The argument, as the sentence begins with it.
        value: What was given.
        positive: Whether 0 is refused too.
        otherwise: What else may be given, as the sentence ends with it.

    Raises:
        ValueError: With the argument's name, what was given, and what was expected.
    """
    number = number_of(value)
    if not 0 <= number < math.inf or (positive and number == 0):
        expected = "positive" if positive else "0 or more"
        raise ValueError(f"{name} is {shown(value)}; it must be a number, {expected}, and finite{otherwise}")


def require_between(name: str, value: object, least: float, most: float) -> None:
    """Refuses what is no number from `least` to `most`, or not finite.

    Args:
        name: The argument, as the sentence begins with it.
        value: What was given.
        least: The smallest number allowed.
        most: The largest.

    Raises:
        ValueError: With the argument's name, what was given, and what was expected.
    """
    number = number_of(value)
    if not least <= number <= most or math.isinf(number):
        expected = f"from {least:g} to {most:g}" if math.isfinite(most) else f"at least {least:g}, and finite"
        raise ValueError(f"{name} is {shown(value)}; it must be a number, {expected}")


def require_truth(name: str, value: object) -> None:
    """Refuses what is no truth value.

    Args:
        name: The argument, as the sentence begins with it.
        value: What was given.

    Raises:
        ValueError: With the argument's name, what was given, and what was expected.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; it must be True or False")


def require_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses what is none of the choices.

    Args:
        name: The argument, as the sentence begins with it.
        value: What was given.
        choices: What may be given.

    Raises:
        ValueError: With the argument's name, what was given, and the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}")


def require_kind(name: str, value: object, kind: type, otherwise: str = "") -> None:
    """Refuses what is no object of a class.

    Args:
        name: The argument, as the sentence begins with it.
        value: What was given.
        kind: The class.
        otherwise: What else may be given, as the sentence ends with it.

    Raises:
        ValueError: With the argument's name, what was given, and what was expected.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {shown(value)}; it must be a {kind.__name__}{otherwise}")
