# SPDX-License-Identifier: Apache-2.0
"""Plain calls whose steps are watched: one beside a parallel call, to compare both, and one that is interrupted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paradiff.pipelines.loop.audit import granted
from paradiff.pipelines.loop.interrupt import Interrupt


def call_and_last_state(scheduler: Any, call: Callable[[], Any]) -> tuple[Any, Tensor | None]:
    """What a plain call returns, and what the scheduler's last step in it returned; None if there was no step."""
    last: list[Tensor] = []

    def note(result: Any) -> None:
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]

    result = _watched(scheduler, call, note)
    return result, last[0].clone() if last else None


def interrupted_call(scheduler: Any, interrupt: Interrupt, call: Callable[[], Any]) -> Any:
    """What a plain call returns that is interrupted during its first step."""
    return _watched(scheduler, call, lambda result: interrupt.set())


def _watched(scheduler: Any, call: Callable[[], Any], watch: Callable[[Any], None]) -> Any:
    """What a call returns, in which the result of each of the scheduler's steps is shown to a function."""
    real = scheduler.step

    @functools.wraps(real)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        watch(result)
        return result

    vars(scheduler)["step"] = step
    try:
        return call()
    finally:
        del vars(scheduler)["step"]


def difference(found: Tensor, plain: Tensor | None, estimate: float, eps: float) -> str | None:
    """A clause for the difference of two samples `[B, ...]`, RMS of the worst member, if it is beyond twice the estimate and
    beyond rounding; else None. A run that was stopped, whose estimate is infinite, is not compared.

    Args:
        found: The parallel call's sample.
        plain: The plain call's.
        estimate: The estimated error.
        eps: That of the coarsest dtype in which the network was computed.
    """
    if not math.isfinite(estimate):
        return None
    if plain is None or plain.shape != found.shape:
        return "its sample has another shape than the plain call's"
    a, b = (v.to(torch.float64).reshape(len(v), -1) for v in (found, plain))
    error, size = (float(v.square().mean(1).sqrt().amax()) for v in (a - b, b))
    eps = max(eps, torch.finfo(plain.dtype).eps)
    if error <= max(2 * estimate, granted(eps) * size):
        return None
    return f"its sample differs from the plain call's by {error:.2g} (RMS), where {estimate:.2g} was estimated"
