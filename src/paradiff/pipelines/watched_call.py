# SPDX-License-Identifier: Apache-2.0
"""The plain call whose first passes are watched, for the choice of a call of which little is known.

A parallel call has to be prepared: its loop is read, its scheduler probed, and walked through. Where no window pays, that would
be for nothing. So the plain call is begun. What its passes take on one state is seen, and what they would take on 2, 4, ... is
measured beside them (network/wider_calls.py), within a share of the call's own passes. By that it goes on, unwatched and bit
for bit as it would be, or it is given up for a parallel one: what it changed is put back, and its first passes are lost.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.known import CallKnown
from paradiff.pipelines.loop.first_step import FirstStep
from paradiff.pipelines.loop.scheduler_proxy import STEP
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.network.hooks import caches
from paradiff.pipelines.network.wider_calls import WiderCalls, wait
from paradiff.pipelines.tries import PlainBeginning
from paradiff.planning.auto import AutoMethod
from paradiff.planning.auto_run import SHARE
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.picking import SHORT, SHORTEST
from paradiff.samplers.scheduler.probe import probe
from paradiff.solver.protocol import Method

SURE = 150
"""Steps from which on a method may pay whatever its calls take, so that the choice is asked for before they are measured."""
LONG = 75
"""Steps below which no method pays where a call on 2 states takes STEEP times as long as one on 1."""
STEEP, STEEPEST = 1.35, 1.9
"""How many times as long a call on 2 states takes where no method pays, on fewer steps than LONG, and than SURE."""
LEAST = 0.5
"""Seconds of a loop below which no choice is made: preparing a parallel call takes a part of them that it could hardly gain."""
COLD = 4
"""How many times as long as later ones a loop's first pass may take."""
UNMEASURED = "since its passes could not be measured"
CHANGES = "since its networks change while its loop runs"
TOO_FEW = "since nothing is known of its calls yet, and few steps leave no room to measure them"


class GivenUp(BaseException):
    """The plain call is given up, within its loop."""


class WatchedCall:
    """A plain call of a host, which is made once.

    Args:
        host: What owns the chain.
        known: What is known of the call.
        asked: The method of the settings.
        method: Makes the method that chooses for the call.
        arguments: The call's arguments by name.

    Attributes:
        reason: Why the plain call was chosen; None while it is not.
        tried: Whether that was decided by what was measured, or known.
        wider: The calls that were made beside it; None where it was not begun.
    """

    def __init__(
        self,
        host: Host,
        known: CallKnown,
        asked: AutoMethod,
        method: Callable[[], Method],
        arguments: dict[str, Any],
    ) -> None:
        self._host, self._known, self._asked, self._method, self._arguments = host, known, asked, method, arguments
        self._scheduler: Any = host.scheduler
        curve, _ = known.curve()
        self._known_before = curve is not None and curve.spread is not None
        self._thread = threading.get_ident()
        self._before: PlainBeginning | None = None
        self._first: dict[str, Any] = {}
        self._steps = self._passes = 0
        self._left = self._since = 0.0
        self._own = self._beside = math.inf
        self._calls: dict[int, float] = {}
        self._ended = self._given_up = False
        self.reason: str | None = None
        self.tried = True
        self.wider: WiderCalls | None = None

    @staticmethod
    def fits(host: Host) -> bool:
        """Whether a host's plain call can be watched."""
        scheduler, networks = host.scheduler, host.networks
        known = "step" not in getattr(scheduler, "__dict__", {"step": None}) and hasattr(scheduler, "step")
        compiled = (
            "_orig_mod" in part._modules or vars(part).get("_compiled_call_impl") is not None
            for network in networks.values()
            for part in network.modules()
        )
        return known and bool(networks) and not any(compiled) and not caches(networks)

    def made(self) -> Any:
        """What the call returns; nothing of use where `reason` is None: then it was given up, or not begun."""
        before = self._before = PlainBeginning(self._host, self._arguments)
        if before.lasting is not None:
            return None
        self.wider = WiderCalls(self._host.networks)
        result = None
        try:
            vars(self._scheduler)["step"] = self._step(self._scheduler.step)
            result = self._host.call(self._host.owner, **self._arguments)
        except GivenUp:
            pass
        finally:
            self._end()
        if self._given_up:
            before.restore()
        elif self.reason is None:
            self.reason, self.tried = UNMEASURED, False
        return result

    def _end(self) -> None:
        """From here on the call is as it is without a watch."""
        self._ended = True
        vars(self._scheduler).pop("step", None)
        if self.wider is not None:
            self.wider.remove()
        self._first.clear()

    def _step(self, real: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(real)

        @functools.wraps(real)
        def step(*args: Any, **kwargs: Any) -> Any:
            if self._ended or threading.get_ident() != self._thread:
                return real(*args, **kwargs)
            now = time.perf_counter()
            given = dict(signature.bind(*args, **kwargs).arguments)
            for name, parameter in signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    given.update(given.pop(name, {}))
            self._pass_ended(given, now)
            result = real(*args, **kwargs)
            self._since = time.perf_counter()
            return result

        return step

    def _pass_ended(self, given: dict[str, Any], now: float) -> None:
        self._passes += 1
        wider = self.wider
        assert wider is not None
        if self._passes == 1:
            self._begin(given, wider)
        elif not wait(given.get("model_output")) or wider.failed is not None or wider.own <= 0:
            self._give_up()  # a parallel call tells why there is none
        else:
            self._measured_pass(wider, now - self._since)

    def _begin(self, given: dict[str, Any], wider: WiderCalls) -> None:
        """At the first step: a short loop is left alone, what is known is asked, else measuring begins."""
        steps = self._steps = _steps_from(getattr(self._scheduler, "timesteps", None), given.get("timestep"))
        if steps <= SHORTEST:
            self._stay(SHORT if steps else UNMEASURED, tried=steps > 0)
            return
        if self._left_alone(wider.last):
            return
        scheduler = copy.deepcopy(self._scheduler)
        vars(scheduler).pop("step")
        times = self._scheduler.timesteps
        self._first = {**given, "scheduler": scheduler, "timesteps": times[len(times) - steps :]}
        if wider.last * steps < COLD * LEAST or self._known_before or steps >= SURE:
            wider.begin()  # what its steps change is seen before its scheduler is probed
        else:
            self._measure(wider)

    def _left_alone(self, seconds: float) -> bool:
        """Whether the loop is too short for a choice, in seconds of a pass."""
        least = seconds * self._steps
        return 0 < least < LEAST and self._stay(f"since its loop takes about {least:.2g} s, of which little could be gained")

    def _measure(self, wider: WiderCalls) -> None:
        """Asks what is known, else begins to measure."""
        if (self._known_before or self._steps >= SURE) and self._decide(measuring=not self._known_before):
            return
        self._left = self._known.credit(self._asked, SHARE * self._steps)
        most = STEEP if self._steps < LONG else None
        if self._left < (2 if most is None else most):
            self._known.keep_credit(self._asked, self._left)
            self._stay(TOO_FEW, tried=False)
        else:
            wider.begin(2, most)

    def _measured_pass(self, wider: WiderCalls, seconds: float) -> None:
        """Measures in the next pass what calls on more states take, or decides.

        Args:
            wider: The calls of this pass.
            seconds: Those of this pass.
        """
        width = wider.width
        self._own = min(self._own, wider.own)
        self._beside = min(self._beside, max(seconds - wider.wider - wider.own, 0.0))
        if wider.cut:
            self._stay(f"since a pass of {width} states takes more than {STEEP} times as long as one of 1")
            return
        if not self._calls and width == 1:
            if not self._left_alone(wider.own):
                self._measure(wider)
            return
        if width > 1:
            self._calls[width] = wider.calls
            self._left -= wider.wider / wider.own
            if wider.calls < self._steep / 2 * width * wider.own:  # looks cheap
                wider.begin(2 * width if 2 * width <= min(self._left, self._steps) else 1)
                return
        points = {rows: self._beside + max(calls, self._own) for rows, calls in {1: self._own, **self._calls}.items()}
        points = self._known.keep_measured(LatencyCurve(points)).points
        widest = max(self._calls)
        ratio = points[widest] / points[1]
        if ratio >= self._steep / 2 * widest and self._steps < SURE:
            self._stay(f"since a pass of {widest} states takes {ratio:.2g} times as long as one of 1")
        else:
            self._decide()

    @property
    def _steep(self) -> float:
        return STEEP if self._steps < LONG else STEEPEST

    def _decide(self, *, measuring: bool = False) -> bool:
        """Chooses by what is known; whether that came to a decision.

        Args:
            measuring: Whether a window whose calls are not known is measured, and not chosen.
        """
        if self._before is None or not self._before.restorable:
            return self._stay(CHANGES)
        try:
            table, method = self._table(), self._method()
            assert isinstance(method, AutoMethod)
            chosen = method.chosen(table)
        except Exception:
            return self._give_up()
        if chosen.name == "sequential":
            return self._stay(method.pick(table).why)
        if measuring and isinstance(chosen, AdaptiveMethod):
            return False
        return self._give_up()

    def _table(self) -> Table:
        """The loop's chain.

        Raises:
            Unsupported: If it has no table.
        """
        rest = dict(self._first)
        output, timestep, sample = (rest.pop(name) for name in STEP)
        scheduler, times = rest.pop("scheduler"), rest.pop("timesteps")
        with Modes.exact().entered():
            first = FirstStep(
                scheduler=scheduler, timesteps=times, output=output, sample=sample, timestep=timestep, kwargs=rest
            )
            return probe(first.scheduler, first.timesteps, first.options)

    def _stay(self, reason: str, *, tried: bool = True) -> bool:
        """The plain call goes on."""
        self.reason, self.tried = reason, tried
        self._end()
        return True

    def _give_up(self) -> bool:
        """Gives the plain call up, unless it changed what cannot be put back.

        Raises:
            GivenUp: Then.
        """
        if self._before is None or not self._before.restorable:
            return self._stay(CHANGES)
        self._given_up = True
        self._end()
        raise GivenUp


def _steps_from(times: Any, now: Any) -> int:
    """The steps of a loop from a time on; 0 where it is not one of the scheduler's."""
    if not isinstance(times, Tensor) or times.ndim != 1 or not isinstance(now, Tensor | float | int):
        return 0
    now = torch.as_tensor(now).flatten()[:1].to(times.device)
    found = (times == now).nonzero().flatten().tolist() if now.numel() else []
    return len(times) - found[0] if found else 0
