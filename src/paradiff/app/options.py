"""Options of the command line that are texts or belong to one method, made into seeds and methods."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from paradiff.chain import slope
from paradiff.methods import piadm
from paradiff.methods import presets as methods
from paradiff.methods.window.corrector import Corrector, underdamped_langevin
from paradiff.samplers.schedule import refuse_unknown
from paradiff.solver.protocol import Method

METHODS: dict[str, Callable[..., Method]] = {
    "sequential": methods.sequential,
    "jacobi": methods.jacobi,
    "paradigms": methods.paradigms,
    "parasolver": methods.parasolver,
    "quasi_newton": methods.quasi_newton,
    "srds": methods.srds,
    "collocation": methods.collocation,
    "piadm_sde": piadm.piadm_sde,
    "piadm_ode": piadm.piadm_ode,
}
SLOPES: dict[str, Any] = {
    "zero": slope.zero,
    "identity": slope.identity,
    "freeze-epsilon": slope.freeze_epsilon,
    "freeze-clean-data": slope.freeze_clean_data,
}
OPTIONS = ("window", "tolerance", "rule", "stride", "warmup", "slope", "blocks", "coarse", "schedule", "iterations", "rows")
OPTIONS += ("secants", "sweeps", "stagger", "corrector")
OPTIONS += ("nodes", "max_nodes", "order", "shift", "exact", "target", "warm_start")
COARSE = {"one-step": "one step", "two-step": "two step"}


def parse_seeds(text: str) -> list[int]:
    """Seeds from `0-15` or `0,3,7-9`.

    Raises:
        ValueError: If the text is no list of seeds, or names one twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ValueError(
                f"seeds are {text!r}, of which {part.strip()!r} is no seed; give whole numbers and rising ranges, such as "
                "0-15 or 0,3,7-9"
            )
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    twice = next((s for s in seeds if seeds.count(s) > 1), None)
    if twice is not None:
        raise ValueError(f"seeds are {text!r}, which names seed {twice} twice; name each once")
    if max(seeds) >= 2**63:
        raise ValueError(f"the seed {max(seeds)} is too large; seeds are below 2^63")
    return seeds


def make_method(name: str, **options: Any) -> Method:
    """The method of a name with the options that were given.

    Raises:
        ValueError: If an option is not one of the method's, or has a value it cannot take.
    """
    build = METHODS[name]
    known = inspect.signature(build).parameters
    given = {k: v for k, v in options.items() if v is not None}
    for option in given:
        if option not in known:
            takes = ", ".join(f"--{k.replace('_', '-')}" for k in known if k in OPTIONS) or "no options"
            raise ValueError(
                f"--{option.replace('_', '-')} was given, but method {name!r} has no such option; it takes {takes}"
            )
    if "slope" in given:
        given["slope"] = parse_slope(given["slope"])
    if "coarse" in given:
        given["coarse"] = parse_coarse(given["coarse"])
    if "corrector" in given:
        given["corrector"] = parse_corrector(given["corrector"])
    missing = next((k for k, v in known.items() if v.default is v.empty and k not in given), None)
    if missing is not None:
        raise ValueError(f"method {name!r} needs --{missing}; give a number of {missing}")
    return build(**given)


def parse_corrector(text: str) -> Corrector:
    """A corrector from STEPSxSWEEPS.

    Raises:
        ValueError: If the text is no such pair.
    """
    found = re.fullmatch("([0-9]+)x([0-9]+)", text)
    if not found:
        raise ValueError(f"the corrector is {text!r}; give steps and sweeps as STEPSxSWEEPS, such as 4x4")
    return underdamped_langevin(int(found[1]), int(found[2]))


def parse_slope(text: str) -> slope.Slope:
    """A slope by name; `shifted:V` for data of variance V."""
    if text.startswith("shifted:"):
        try:
            return slope.shifted(float(text.removeprefix("shifted:")))
        except ValueError as error:
            raise ValueError(f"the slope is {text!r}; shifted takes a positive data variance, such as shifted:0.5") from error
    refuse_unknown("slope", text, [*SLOPES, "shifted:VARIANCE"])
    if text not in SLOPES:
        raise ValueError(f"the slope is {text!r}; give a data variance, such as shifted:0.5")
    return SLOPES[text]


def parse_coarse(text: str) -> str | int | slope.Slope:
    """A coarse propagator: `one-step`, `two-step`, a number of steps a block, or a slope as `parse_slope` reads it.

    Raises:
        ValueError: If the text is none of these.
    """
    if re.fullmatch("-?[0-9]+", text):
        return int(text)
    if text.startswith("shifted:"):
        return parse_slope(text)
    refuse_unknown("coarse", text, [*COARSE, "a number of steps a block", *SLOPES, "shifted:VARIANCE"])
    return COARSE[text] if text in COARSE else parse_slope(text)
