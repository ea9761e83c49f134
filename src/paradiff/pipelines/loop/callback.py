# SPDX-License-Identifier: Apache-2.0
"""`callback_on_step_end` in a parallel run: called in order, once a step, with states that are final.

A callback that only reads (previews, logging, progress) gets the states of the plain call, several steps at a time. A callback
that changes the loop's course is refused by name, since later steps have been swept before it is called. It may interrupt the
call (interrupt.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paradiff.pipelines.network.attributes import Attributes

CALLBACK, INPUTS, LEGACY = "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback"
INTERRUPT = ("interrupt", "_interrupt")


class Callback:
    """A user's callback.

    Args:
        pipeline: The pipeline that it is called with.
        function: `function(pipeline, step, time, {"latents": ...})`.

    Attributes:
        timesteps: `[N]` the loop's times; set at the loop's first step.
        dtype: Dtype of the loop's states; set at the loop's first step.
        error: What the function raised, or None.
    """

    timesteps: Tensor
    dtype: torch.dtype

    def __init__(self, pipeline: Any, function: Any) -> None:
        self._pipeline, self._function = pipeline, function
        self.error: BaseException | None = None
        self._networks = Attributes(part for part in vars(pipeline).values() if isinstance(part, nn.Module))
        self._own: frozenset[str] | None = None  # the pipeline's attributes before the callback could add any

    @classmethod
    def of(cls, pipeline: Any, arguments: Mapping[str, Any]) -> Callback | None:
        """The callback among a call's arguments.

        Raises:
            ValueError: If it asks for more than the latents, or is of the old form.
        """
        if arguments.get(LEGACY) is not None:
            raise ValueError(
                f"{LEGACY}= was given, which may read any value of the loop while it runs; a parallel run gives final "
                f"states only: use {CALLBACK}=, or leave it out"
            )
        function = arguments.get(CALLBACK)
        if function is None:
            return None
        wanted = getattr(function, "tensor_inputs", None) or arguments.get(INPUTS) or ["latents"]
        more = [name for name in wanted if name != "latents"]
        if more:
            raise ValueError(
                f"{CALLBACK} asks for {', '.join(more)}, with which it could change later steps; a parallel run has swept "
                "those already and gives the latents only: ask for these alone, or call the pipeline outside of parallelize"
            )
        return cls(pipeline, function)

    @staticmethod
    def without(arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the call without those of the callback."""
        return {name: value for name, value in arguments.items() if name not in (CALLBACK, INPUTS)}

    def on_final(self, first: int, states: Tensor) -> None:
        """Calls the callback with the final states `[n, ...]` of the nodes from `first` on, in order.

        Raises:
            ValueError: If the callback changes the latents, the pipeline or a setting of its networks.
        """
        if self._own is None:
            self._own = frozenset(vars(self._pipeline))
        for k, state in enumerate(states):
            latents = state.to(self.dtype, copy=True)
            given, before = latents.clone(), _simple(self._pipeline)
            self._networks.mark()
            step = first - 1 + k
            try:
                returned = self._function(self._pipeline, step, self.timesteps[step], {"latents": latents})
            except BaseException as error:
                self.error = error
                raise
            back = returned.get("latents", latents) if isinstance(returned, Mapping) else latents
            extra = [k for k in returned if k != "latents"] if isinstance(returned, Mapping) else []
            after = _simple(self._pipeline).items()
            own = self._own - {*INTERRUPT}
            changed = [name for name, value in after if name in own and before.get(name, value) != value]
            what = "the latents" if not torch.equal(back, given) else ", ".join([*extra, *(f"pipe.{n}" for n in changed)])
            what = what or self._networks.changed()
            if what:
                raise ValueError(
                    f"{CALLBACK} changed {what} after step {step}; a parallel run has swept later steps already and cannot "
                    "follow that: leave the change out, or call the pipeline outside of parallelize"
                )


def _simple(pipeline: Any) -> dict[str, Any]:
    """The pipeline's attributes that are numbers, strings or None."""
    return {k: v for k, v in vars(pipeline).items() if isinstance(v, bool | int | float | str | None)}
