# SPDX-License-Identifier: Apache-2.0
"""What one request asks for: a sample of one seed on one chain, and how it is solved."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from paradiff.errors import refuse_unknown, require_real, require_whole, shown
from paradiff.methods import presets
from paradiff.methods.chords.method import chords
from paradiff.methods.deer.method import quasi_deer
from paradiff.methods.parataa import parataa
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.solver.protocol import Method

AUTO = "auto"

METHODS: dict[str, Callable[..., Method]] = {
    "sequential": presets.sequential,
    "parasolver": presets.parasolver,
    "quasi_newton": presets.quasi_newton,
    "collocation": presets.collocation,
    "srds": presets.srds,
    "jacobi": presets.jacobi,
    "paradigms": presets.paradigms,
    "chords": chords,
    "parataa": parataa,
    "quasi_deer": quasi_deer,
}
"""Presets by name, beside `auto`."""

BOUNDS = ("window", "rows")
"""Arguments of presets that bound the rows of a round."""

NOISES = ("recorded", "keyed")


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample.

    Attributes:
        seed: Its seed, 0 to 2^63 - 1.
        sampler: The sampler's name; None for the model's own.
        steps: Steps of the chain; None for the model's own.
        eta: Share of the DDPM noise that `ddim` adds, 0 to 1; None for 0.
        noise: `recorded`, the draws of diffusers, or `keyed`.
        method: The method's name; `auto` chooses by the load.
        window: Most rows of a round; None for the method's own number.
        tolerance: Root mean square error that the sample may have by estimate.
        deadline: Seconds from the request to its end; None for no bound.
        prompt: What the sample follows, of a model that follows a text; `negative_prompt` what it keeps away from.
        guidance: How strongly, the pipeline's `guidance_scale`; None for the pipeline's own.
        conditioning: What the network is given beside the state and the time, by name: numbers, or nested lists of them.

    Raises:
        ValueError: If a value is of another kind or out of its range.
    """

    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    noise: str = NOISES[0]
    method: str = AUTO
    window: int | None = None
    tolerance: float | None = None
    deadline: float | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    conditioning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_whole("the seed", self.seed, 0, most=2**63 - 1)
        if self.sampler is not None and not isinstance(self.sampler, str):
            raise ValueError(f"the sampler is {shown(self.sampler)}; give its name, or leave it out")
        if self.steps is not None:
            require_whole("steps", self.steps, 1, ", or left out for the model's own", most=100_000)
        if self.eta is not None:
            require_real("eta", self.eta)
        refuse_unknown("noise", self.noise, NOISES)
        refuse_unknown("method", self.method, [AUTO, *METHODS])
        if self.window is not None:
            require_whole("the window", self.window, 1, ", or left out for the method's own")
        if self.tolerance is not None:
            require_real("the tolerance", self.tolerance, positive=True)
        if self.deadline is not None:
            require_real("the deadline, in seconds,", self.deadline, positive=True)
        for name in ("prompt", "negative_prompt"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"the {name} is {shown(getattr(self, name))}; give one text, or leave it out")
        if self.guidance is not None:
            require_real("the guidance", self.guidance)
        if not isinstance(self.conditioning, Mapping) or not all(isinstance(name, str) for name in self.conditioning):
            raise ValueError(f'the conditioning is {shown(self.conditioning)}; give values by name, such as {{"y": 3}}')

    @classmethod
    def of_json(cls, content: Any) -> SampleRequest:
        """The request that a JSON object describes.

        Raises:
            ValueError: If it is none, or has a field that no request has.
        """
        if not isinstance(content, dict):
            raise ValueError(f'the request is {shown(content)}; give a JSON object, such as {{"seed": 0, "steps": 50}}')
        known = [*inspect.signature(cls).parameters]
        for name in content:
            refuse_unknown("a field of the request", name, known)
        return cls(**{name: value for name, value in content.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """The fields that were given, by name."""
        found = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: value for name, value in found.items() if value not in (None, {})}

    @property
    def allowed(self) -> float:
        """The tolerance, its default included."""
        return DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance


def method_of(name: str, window: int | None, tolerance: float | None) -> Method:
    """The method of a name, which is not `auto`.

    Raises:
        ValueError: If it takes no window, or no tolerance, and one is given.
    """
    build = METHODS[name]
    takes = inspect.signature(build).parameters
    given: dict[str, Any] = {}
    if window is not None and name != "sequential":
        bound = next((option for option in BOUNDS if option in takes), None)
        if bound is None:
            raise ValueError(f"the window is {window}, but method {name!r} has none; leave it out")
        given[bound] = window
    if tolerance is not None and name != "sequential":
        if "tolerance" not in takes:
            raise ValueError(f"the tolerance is {tolerance:g}, but method {name!r} has none; leave it out")
        given["tolerance"] = tolerance
    return build(**given)
