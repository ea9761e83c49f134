# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++(2S) on noise ratios, deterministic or ancestral: arXiv 2211.01095, algorithm 1, and k-diffusion's
`sample_dpmpp_2s_ancestral`.

A step from the ratio s lands on s' through d, where the noise of deviation u = eta s' sqrt(1 - s'^2/s^2) is added,
d^2 = s'^2 - u^2. The network is called at s and at the geometric mean v of s and d, each call a node,

    y = (v/s) x + (1 - v/s) D(x, s),      x' = (d/s) x + (1 - d/s) D(y, v) + lambda u z,                          (1)

but for the step to s' = 0, which lands on D(x, s).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.draws import Draws
from paradiff.chain.home import made_at_home
from paradiff.chain.table import Table
from paradiff.errors import require_real, shown
from paradiff.samplers.churn import descending_to_zero
from paradiff.samplers.forms import with_end
from paradiff.samplers.schedule import karras_ratios


@made_at_home
def dpmpp_2s(
    steps: int,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    ratios: Tensor | None = None,
) -> Table:
    """DPM-Solver++(2S) for a model D(x, sigma), which returns the clean data.

    Args:
        steps: N, at least 1. The network is called 2N - 1 times.
        eta: How much of the most noise a step adds: 0 for the ODE, 1 for ancestral sampling.
        s_noise: lambda, the factor on the deviation of the added noise.
        sigma_min: The last ratio above 0.
        sigma_max: The first ratio.
        rho: How much the ratios crowd towards the last one.
        ratios: `[N]` descending ratios above 0, in place of those of these three.

    Raises:
        ValueError: If an argument is out of range.
    """
    require_real("eta", eta)
    if eta > 1:
        raise ValueError(f"eta is {shown(eta)}; it must be between 0, for the ODE, and 1, for ancestral sampling")
    require_real("s_noise", s_noise)
    levels = descending_to_zero(karras_ratios(sigma_min, sigma_max, steps, rho) if ratios is None else ratios, steps)
    before, after = levels[:-2], levels[1:-1]
    up = float(eta) * after * (1 - (after / before) ** 2).sqrt()
    down = (after**2 - up**2).clamp(min=0).sqrt()
    between = (before * down).sqrt()
    calls = 2 * steps - 1
    state, clean = torch.zeros(2, calls, 2, dtype=torch.float64)
    sigma, c = torch.zeros(calls + 1, dtype=torch.float64), torch.zeros(calls, dtype=torch.float64)
    sigma[0::2][:-1], sigma[-2], sigma[1:-1:2] = before, levels[-2], between
    shrink = torch.cat([between / before, torch.zeros(1, dtype=torch.float64)])
    state[0::2, 0], clean[0::2, 0] = shrink, 1 - shrink
    state[1::2, 1], clean[1::2, 0] = down / before, 1 - down / before
    c[1::2] = s_noise * up
    counts = [one for _ in range(steps - 1) for one in (0, 1)] + [0]
    terms = [one for k, u in enumerate(up.tolist()) for one in ((), ((k, 1.0),) if u > 0 and s_noise > 0 else ())] + [()]
    return Table(
        name="dpmpp_2s" if eta == 0 else "dpmpp_2s ancestral",
        prediction="sample",
        t=with_end(sigma[:-1]),
        alpha=torch.ones_like(sigma),
        sigma=sigma,
        a=state,
        b=clean,
        c=c,
        start_scale=float(levels[0]),
        exact_variance=s_noise == 1,
        draws=Draws("k-diffusion", tuple(counts), tuple(terms)),
    )
