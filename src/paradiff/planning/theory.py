# SPDX-License-Identifier: Apache-2.0
"""The parameters of PIADM that its theorems ask for.

Theorems 3.3 (SDE) and 3.5 (ODE) of arXiv 2405.15986, for data of dimension d, accuracy delta and a score of Lipschitz constant
L known to the error delta, as far as orders go:

| | SDE | ODE |
|---|---|---|
| T | log(d/delta^2) | log(d/delta^2) |
| h = T/N | 1 | 1 |
| epsilon | delta^2/(d log(d/delta^2)) | delta/(sqrt(d) log(d/delta^2)) |
| M = h/epsilon | d/delta^2 up to logarithms | sqrt(d)/delta up to logarithms |
| K | log(d/delta^2) up to log log | the same |
| guarantee | KL <~ d e^(-T) + d epsilon T + delta^2 | TV^2 <~ d e^(-T) + d epsilon^2 T^2 + (T^2 + N^2) delta^2 |

(The ODE column, the constant start and the corrector's orders were recalled, not checked against the paper's text.) The orders
are the paper's; the constants below are our choice and no part of the theorems:

- T = ln(d/delta^2): the first term is delta^2.
- epsilon such that the second term is delta^2.
- h solves L^2 h e^h = 1/e: sufficient for a sweep to contract, by e as a round number. Measured, blocks of length 1 do (docs).
- K = ln(d T/delta^2) + 2, rounded up: as many sweeps as shrink an error of d T to delta^2.
- eta = delta^2/d: early stopping costs W2^2 = d eta = delta^2.
- The ODE's corrector: 1/sqrt(L) long, friction sqrt(8 L), steps of delta/sqrt(d L), ln(d/delta^2) sweeps.

The width d/delta^2 comes from a bound in path space; marginals need less (docs/methods/piadm.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from paradiff.chain.slope import freeze_epsilon
from paradiff.methods.window.blocks import Blocks
from paradiff.methods.window.corrector import Corrector
from paradiff.methods.window.method import WindowMethod
from paradiff.samplers.grid import Grid, paper_grid

HELD = 10
"""Arrays of a window's size that a run holds at its busiest moment, each M states of d numbers: states, noises, the network's
rows and outputs, steps, residuals, updates, and what is being made of them. Measured: 8.7 to 9.9, for 10 to 40
million numbers."""


@dataclass(frozen=True)
class Theory:
    """Parameters from the theorems.

    Attributes:
        kind: `sde` or `ode`.
        dimension: d, at least 1.
        accuracy: delta, in (0, 1).
        lipschitz: L, at least 1: the score of the standard normal, which every chain starts from, has L = 1.
        memory: Bytes that the states may take, or None.
        itemsize: Bytes of a number, 4 or 8.

    Raises:
        ValueError: If a number is out of its range, or the states do not fit the memory.
    """

    kind: Literal["sde", "ode"]
    dimension: int
    accuracy: float
    lipschitz: float = 1.0
    memory: float | None = None
    itemsize: int = 4

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"the dimension is {self.dimension}; it must be at least 1")
        if not 0 < self.accuracy < 1:
            raise ValueError(f"the accuracy delta is {self.accuracy}; it must lie between 0 and 1 (KL is of order delta^2)")
        if not 1 <= self.lipschitz < math.inf:
            raise ValueError(
                f"the Lipschitz constant is {self.lipschitz}; it must be finite and at least 1, that of a standard "
                "normal's score"
            )
        if self.itemsize not in (4, 8):
            raise ValueError(f"a number of {self.itemsize} bytes was asked for; states are float32 (4) or float64 (8)")
        if self.memory is not None and self.bytes > self.memory:
            raise ValueError(self._refusal(self.memory))

    def _refusal(self, memory: float) -> str:
        per_state = HELD * self.dimension * self.itemsize
        width = int(memory // per_state)
        said = f"{self.width} states of {self.dimension} numbers need {self.bytes:.3g} bytes; {memory:.3g} are given"
        if width < 1:
            return f"{said}, less than one state takes ({per_state:.3g}): give more"
        coarsest = Theory(self.kind, self.dimension, 0.999, self.lipschitz, None, self.itemsize)
        lengths = f"blocks of length {width * self.step:.3g} ({math.ceil(self.horizon / (width * self.step))} of them)"
        if coarsest.bytes > memory:
            return f"{said}: what would fit is {lengths} or a window of {width} nodes; no accuracy below 1 does"
        low, high = self.accuracy, 0.999
        for _ in range(60):
            middle = math.sqrt(low * high)
            fits = Theory(self.kind, self.dimension, middle, self.lipschitz, None, self.itemsize).bytes <= memory
            low, high = (low, middle) if fits else (middle, high)
        unit = 10.0 ** (math.floor(math.log10(high)) - 2)
        accuracy = math.ceil(high / unit) * unit  # three digits, rounded up, for a little less would not fit
        return f"{said}: what would fit is an accuracy of {accuracy:.3g}, {lengths}, or a window of {width} nodes"

    @property
    def horizon(self) -> float:
        """T, a whole number of blocks."""
        return self.blocks * self.length

    @cached_property
    def length(self) -> float:
        """h: L^2 h e^h = 1/e."""
        target, h = math.exp(-1) / self.lipschitz**2, 0.3
        for _ in range(50):  # Newton's method on h e^h
            h -= (h * math.exp(h) - target) / ((1 + h) * math.exp(h))
        return h

    @property
    def blocks(self) -> int:
        """N."""
        return max(1, math.ceil(self._log / self.length))

    @property
    def _log(self) -> float:
        return math.log(self.dimension / self.accuracy**2)

    @property
    def step(self) -> float:
        """epsilon."""
        if self.kind == "sde":
            wanted = self.accuracy**2 / (self.dimension * self.horizon)
        else:
            wanted = self.accuracy / (math.sqrt(self.dimension) * self.horizon)
        return self.length / math.ceil(self.length / wanted)

    @property
    def early_stop(self) -> float:
        """eta, below h."""
        return min(self.accuracy**2 / self.dimension, self.length / 2)

    @property
    def width(self) -> int:
        """M, the states held; the last block, which has more steps, is solved in windows of M."""
        return round(self.length / self.step)

    @property
    def sweeps(self) -> int:
        """K."""
        return math.ceil(math.log(self.dimension * max(self.horizon, 1) / self.accuracy**2) + 2)

    @property
    def last_block(self) -> int:
        """Steps of the last block, as `paper_grid` makes them."""
        return math.ceil(math.log(self.length / self.early_stop) / math.log1p(self.step) - 1e-9)

    @property
    def steps(self) -> int:
        """Steps of the chain: what sequential sampling takes."""
        return (self.blocks - 1) * self.width + self.last_block

    @property
    def bytes(self) -> float:
        """Memory of one sample's window: M states of d numbers, `HELD` times."""
        return float(HELD * self.width * self.dimension * self.itemsize)

    @property
    def corrector(self) -> Corrector | None:
        """The ODE's corrector; None for the SDE."""
        if self.kind == "sde":
            return None
        root = math.sqrt(self.lipschitz)
        step = self.accuracy / (math.sqrt(self.dimension) * root)
        steps = max(1, math.ceil(1 / (root * step)))
        return Corrector(steps, min(steps, math.ceil(max(self._log, 1))), math.sqrt(8) * root, step, self.lipschitz)

    def grid(self) -> Grid:
        """The paper's grid with these parameters."""
        return paper_grid(self.blocks, self.step, self.early_stop, length=self.length)

    def method(self) -> WindowMethod:
        """The paper's method with these parameters, for a table on `grid()`."""
        return WindowMethod(
            f"piadm_{self.kind}",
            slope=freeze_epsilon,
            window=self.width,
            predictor="copy",
            tolerance=0.0,
            rule="sweeps",
            sweeps=self.sweeps,
            blocks=Blocks(self.grid().edges),
            corrector=self.corrector,
            chains="stochastic" if self.kind == "sde" else "deterministic",
        )

    def __str__(self) -> str:
        """The parameters, each with its origin."""
        delta = f"{self.accuracy:g}"
        lines = [
            f"PIADM-{self.kind.upper()} for d = {self.dimension}, delta = {delta}, L = {self.lipschitz:g}",
            f"  T = {self.horizon:.4g}          order log(d/delta^2): the paper's; its constant 1: ours",
            f"  h = {self.length:.4g}, N = {self.blocks}     order 1: the paper's; L^2 h e^h = 1/e: ours",
            f"  epsilon = {self.step:.4g}     its order: the paper's; its constant 1: ours",
            f"  eta = {self.early_stop:.4g}         delta^2/d: ours",
            f"  K = {self.sweeps}               order log(d/delta^2): the paper's; ln(d T/delta^2) + 2: ours",
            f"  M = {self.width}             h/epsilon",
            f"  steps = {self.steps}, {self.bytes:.3g} bytes of states",
        ]
        if self.corrector is not None:
            c = self.corrector
            lines.append(f"  corrector: {c.steps} steps of {c.step:.3g}, {c.sweeps} sweeps: the paper's orders, constants ours")
        return "\n".join(lines)
