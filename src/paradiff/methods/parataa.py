# SPDX-License-Identifier: Apache-2.0
"""ParaTAA: fixed-point iteration of order k with triangular Anderson acceleration.

Source: Tang, Tang, Luo, Wang and Chang, "Accelerating Parallel Sampling of Diffusion Models", ICML 2024, arXiv 2402.09970. The
chain is a triangular system of nonlinear equations, one a node. Unrolling each of them over the k nodes before gives others
with the same solution, whose fixed-point iteration carries what a sweep finds over k nodes. For k = 1 it is Jacobi's, for k as
large as the window the exponential form of Picard's. The sweeps are mixed by Anderson's method in a triangular form
(methods/window/anderson.py). A node has converged when the residual of its own step is below either of two tolerances; the
window slides to the first node that has not, and new nodes copy the last state.

With a noise estimate that does not answer to the state a step carries a change of its state by its linear part, which is the
slope `freeze_epsilon`. So a sweep of order k is the window loop's sweep with that slope, cut after k nodes, and ParaTAA a
method of the one loop.
"""

from __future__ import annotations

from paradiff.chain.slope import freeze_epsilon
from paradiff.methods.window.method import WindowMethod
from paradiff.methods.window.mixing import Anderson

TOLERANCE = 1e-3
"""Both tolerances of the authors' scripts."""


def parataa(
    window: int | None = None,
    tolerance: float = TOLERANCE,
    *,
    order: int | None = None,
    history: int | None = None,
    noise_tolerance: float | None = None,
    ridge: float = 1e-3,
) -> WindowMethod:
    """ParaTAA: fixed-point iteration of order k with triangular Anderson acceleration.

    Source: Tang, Tang, Luo, Wang and Chang, "Accelerating Parallel Sampling of Diffusion Models", ICML 2024, arXiv 2402.09970,
    algorithm 1.

    Differs from the authors' code in: states of nodes that enter the window are mixed from their own newest differences, where
    that code takes the oldest kept, zeros included; each sample has a window of its own; a mixing whose residuals grow a
    hundredfold is given up, and plain sweeps go on; states are in the run's own dtype, there in float64. It takes any table:
    a multistep sampler's linear part carries changes to every state that reads them.

    Args:
        window: Nodes solved at once; None for all.
        tolerance: A node has converged when the root mean square residual of its own step is at most this, in the data's
            units. It bounds no error of the sample (docs/methods/parataa.md).
        order: Nodes over which a sweep carries a residual, k; None for the whole window.
        history: Sweeps that are mixed, the present one included, m; the paper takes 2 to 5. 1 mixes none. None for 3, or the
            window if that is less.
        noise_tolerance: A node has also converged when its residual is at most this times the standard deviation of the noise
            that a DDPM step would add there. None for the same number as the tolerance, as in the authors' scripts.
        ridge: lambda, added to the diagonal of the least squares of the mixing, in squares of the data's units.

    Raises:
        ValueError: If a number is out of its range, or order or history is larger than the window.
    """
    return WindowMethod(
        "parataa",
        slope=freeze_epsilon,
        window=window,
        predictor="held",
        tolerance=tolerance,
        rule="residual",
        anderson=Anderson(order=order, history=history, ridge=ridge),
        noise_tolerance=tolerance if noise_tolerance is None else noise_tolerance,
    )
