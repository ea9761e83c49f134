# SPDX-License-Identifier: Apache-2.0
"""The parallel corrector of PIADM-ODE: underdamped Langevin dynamics at frozen time, solved by Picard sweeps.

At noise level u, with s the score of the states' density p there, positions X and momenta P follow

    dX = P dtau,      dP = ( s(X) - gamma P ) dtau + sqrt(2 gamma) dB,                                           (1)

whose stationary law is p x N(0, I). One step of length e with the score frozen, E = exp(-gamma e), is

    X' = X + (1-E)/gamma P + (e - (1-E)/gamma)/gamma s + xi_X
    P' = E P + (1-E)/gamma s + xi_P                                                                             (2)
    Var xi_X = (2/gamma) ( e - 2 (1-E)/gamma + (1-E^2)/(2 gamma) ),   Cov(xi_X, xi_P) = (1-E)^2/gamma,   Var xi_P = 1 - E^2.

All M steps are solved at once: from the constant path X = X_0, a fresh P_0 and noises drawn once, a sweep evaluates the score
at every X and runs (2) with it. After k sweeps the first k points are those of the sequential dynamics.

Source: Chen, Ren, Ying and Rotskoff, arXiv 2405.15986 (the corrector of PIADM-ODE); the parallel form follows Anari, Chewi and
Vuong, "Fast parallel sampling under isoperimetry", COLT 2024. Its purpose there is the proof: it turns an error of transport
into one of total variation. Whether it pays is measured in docs/methods/piadm.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.step import Step
from paradiff.errors import require_real, require_whole
from paradiff.solver.protocol import Query


@dataclass(frozen=True)
class Corrector:
    """Hyper-parameters of the corrector, applied at the end of every block where noise is left.

    Attributes:
        steps: M, steps of the dynamics.
        sweeps: K, Picard sweeps over them; M or more is the sequential dynamics.
        friction: gamma, above 0; None for sqrt(8 L).
        step: e, above 0; None for 1/(M sqrt(L)), so that the dynamics run for 1/sqrt(L).
        lipschitz: L, the Lipschitz constant of the score; None for 1/sigma^2 at each level, the largest curvature that any
            data can have there.

    Raises:
        ValueError: If a number is out of its range, or friction and step are unstable for L.
    """

    steps: int
    sweeps: int
    friction: float | None = None
    step: float | None = None
    lipschitz: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "sweeps"):
            require_whole(f"the corrector's number of {name}", getattr(self, name), 1)
        for name in ("friction", "step", "lipschitz"):
            value = getattr(self, name)
            if value is not None:
                require_real(f"the corrector's {name}", value, positive=True, otherwise=", or None")
        if self.lipschitz is not None:
            self.parameters(self.lipschitz)

    def parameters(self, lipschitz: float) -> tuple[float, float]:
        """Friction and step where the score has that Lipschitz constant.

        Raises:
            ValueError: If (2) is unstable there: on a score -L X its matrix would have an eigenvalue outside the unit circle.
        """
        friction = math.sqrt(8 * lipschitz) if self.friction is None else self.friction
        step = 1 / (self.steps * math.sqrt(lipschitz)) if self.step is None else self.step
        decay, reach, push = _coefficients(friction, step)
        matrix = torch.tensor([[1 - lipschitz * push, reach], [-lipschitz * reach, decay]], dtype=torch.float64)
        radius = float(torch.linalg.eigvals(matrix).abs().max())
        if radius >= 1:
            raise ValueError(
                f"the corrector's friction {friction:.4g} and step {step:.4g} are unstable for the Lipschitz constant "
                f"{lipschitz:.4g}: a step grows {radius:.3g} fold; give a step below about "
                f"{min(1 / math.sqrt(lipschitz), friction / lipschitz):.2g}, more friction, or leave both to their defaults"
            )
        return friction, step


def underdamped_langevin(
    steps: int = 4,
    sweeps: int = 4,
    *,
    friction: float | None = None,
    step: float | None = None,
    lipschitz: float | None = None,
) -> Corrector:
    """The corrector; arguments and errors as of `Corrector`."""
    return Corrector(steps, sweeps, friction, step, lipschitz)


def _coefficients(friction: float, step: float) -> tuple[float, float, float]:
    """E, the factor of P (and of s) in (2), and the factor of s in X'."""
    reach = -math.expm1(-friction * step) / friction
    return math.exp(-friction * step), reach, (step - reach) / friction


def noise_factors(friction: float, step: float) -> tuple[float, float, float]:
    """The Cholesky factor of the covariance in (2): xi_P = f z, xi_X = g z + h z' for independent standard normal z, z'."""
    gone = -math.expm1(-friction * step)
    if friction * step < 1:  # Var xi_X as the integral that it is, since the closed form cancels there
        nodes, weights = np.polynomial.legendre.leggauss(16)
        position = step / friction * float(weights @ np.expm1(-friction * step * (nodes + 1) / 2) ** 2)
    else:
        decay = math.exp(-friction * step)
        position = 2 / friction * (step - 2 / friction * gone + (1 - decay**2) / (2 * friction))
    momentum = -math.expm1(-2 * friction * step)
    first = math.sqrt(momentum)
    second = gone**2 / friction / first
    return first, second, math.sqrt(max(position - second**2, 0.0))


class Correction:
    """One sample's corrector run at the end of one block.

    Args:
        step: The chain's coefficients.
        corrector: The corrector.
        node: The node at which it is applied.
        block: The block's number; its noise is drawn at nodes of its own, after the chain's.
        noise: Where the noise comes from.
        sample: The sample.
        x: The state at the node.

    Attributes:
        state: The state, corrected once `tell` has returned a tensor.
        change: `[1]` mean square change of the last position in the last sweep, on the device.
    """

    def __init__(self, step: Step, corrector: Corrector, node: int, block: int, noise: Noise, sample: int, x: Tensor) -> None:
        table = step.table
        self._step, self._steps = step, corrector.steps
        self._left = min(corrector.sweeps, corrector.steps)
        self.node = node
        self._alpha, self._sigma = float(table.alpha[node]), float(table.sigma[node])
        self._p, self._q = (float(v) for v in table.clean_at(node))
        lipschitz = self._sigma**-2 if corrector.lipschitz is None else corrector.lipschitz
        friction, length = corrector.parameters(lipschitz)
        self._decay, self._reach, self._push = _coefficients(friction, length)
        first, second, third = noise_factors(friction, length)
        begin = table.steps + block * (2 * corrector.steps + 1)
        z = step.move(noise.draw(sample, range(begin, begin + 2 * corrector.steps + 1)))
        self._momentum, z_momentum, z_position = z[0], z[1 : corrector.steps + 1], z[corrector.steps + 1 :]
        self._kick = first * z_momentum
        self._shift = second * z_momentum + third * z_position
        self._x = x.expand(corrector.steps + 1, *x.shape).clone()
        self._score = torch.zeros_like(self._x[1:])
        self._known = 0  # points whose score is final
        self.change = x.new_empty(0)

    @property
    def state(self) -> Tensor:
        """The last position."""
        return self._x[-1]

    def _points(self) -> Tensor:
        """The positions at which the score is wanted: one in the first sweep, in which all positions are one; later those whose
        score is not final."""
        return self._x[:1] if self._known == 0 else self._x[self._known : -1]

    def ask(self) -> Query:
        """The rows wanted now."""
        points = self._points()
        nodes = torch.full((len(points),), self.node)
        return Query(nodes, self._step.seen(nodes.to(self._step.device, non_blocking=True), points))

    def tell(self, query: Query, outputs: Tensor) -> Tensor | None:
        """Takes the outputs `[R, ...]` of a query and sweeps; `change` if that was the last sweep, else None."""
        points = self._points()
        clean = self._p * points + self._q * outputs
        if self._step.table.clip is not None:
            clean = self._step.table.clip(clean)
        self._score[self._known :] = (self._alpha * clean - points) / self._sigma**2
        self._known += 1
        self._left -= 1
        last = self._x[-1].clone()
        x, momentum = self._x[0], self._momentum
        for m in range(self._steps):
            s = self._score[m]
            x = x + self._reach * momentum + self._push * s + self._shift[m]
            momentum = self._decay * momentum + self._reach * s + self._kick[m]
            self._x[m + 1] = x
        self.change = self._step.mean_square((x - last)[None])
        return self.change if self._left == 0 else None
