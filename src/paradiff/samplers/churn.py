# SPDX-License-Identifier: Apache-2.0
"""Karras et al.'s stochastic samplers (arXiv 2206.00364, algorithm 2) and AlphaFold 3's (Abramson et al. 2024, algorithm 18).

Before each step from the noise ratio s to s' the state is noised up to h >= s, and the network is called there:

    y  = x + sqrt(h^2 - s^2) lambda z,      h = s (1 + gamma),
    x' = y + eta (s' - h) (y - D(y, h))/h                                                      (1)

So the noised states y are the nodes, and (1) followed by the next step's noise is one step of the table's chain. With `solver`
heun the step is corrected by a second call at x', a node of its own:

    x'' = y + (s' - h)/2 [ (y - D(y))/h + (x' - D(x'))/s' ],                                  but for the last step, to s' = 0.

With `midpoint` the first call leads to the geometric mean u of h and s' alone, and the second call there takes the step, as
DPM-Solver-2 (arXiv 2206.00927) and k-diffusion's `sample_dpm_2` do,

    v = y + (u - h) (y - D(y, h))/h,      x' = y + (s' - h) (v - D(v, u))/u.

Node 0 is noised, too: its level is h of the first step. `Recorded` noise draws as the published loops do: once for the latents,
and once in every step, before the network's call, whether or not gamma is 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from paradiff.chain.draws import Draws
from paradiff.chain.home import made_at_home
from paradiff.chain.prediction import Prediction
from paradiff.chain.table import Table
from paradiff.errors import is_whole, number_of, refuse_unknown, require_truth, shown
from paradiff.samplers.forms import with_end
from paradiff.samplers.schedule import karras_ratios

Solver = Literal["heun", "euler", "midpoint"]
GAMMA = math.sqrt(2) - 1
"""The most that algorithm 2 raises a ratio by, relative to it."""


@made_at_home
def edm(
    steps: int,
    *,
    solver: Solver = "heun",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    sigma_data: float = 0.5,
    preconditioned: bool = False,
    ratios: Tensor | None = None,
) -> Table:
    """The stochastic sampler of Karras et al. (arXiv 2206.00364, algorithm 2), with Heun's, Euler's or midpoint steps.

    Args:
        steps: N, at least 1. With Heun's and midpoint steps the network is called 2N - 1 times.
        solver: The step; the paper's is `heun`.
        s_churn: How much noise is added: gamma = min(s_churn/N, sqrt(2) - 1). 0 for the probability-flow ODE.
        s_min: The smallest ratio at which noise is added.
        s_max: The largest one.
        s_noise: Factor on the deviation of the added noise.
        sigma_min: The last ratio above 0.
        sigma_max: The first ratio.
        rho: How much the ratios crowd towards the last one (eq. 5).
        sigma_data: The data's deviation, of the preconditioning.
        preconditioned: False for a model D(x, sigma), which returns the clean data; True for the raw network F of eq. 7, which
            is given c_in x and the time log(sigma)/4.
        ratios: `[N]` descending ratios above 0, in place of those of eq. 5.

    Raises:
        ValueError: If an argument is out of range.
    """
    refuse_unknown("solver", solver, ("heun", "euler", "midpoint"))
    require_truth("preconditioned", preconditioned)
    levels = descending_to_zero(karras_ratios(sigma_min, sigma_max, steps, rho) if ratios is None else ratios, steps)
    churn, low, noise = (
        _at_least(name, value, 0.0) for name, value in (("s_churn", s_churn), ("s_min", s_min), ("s_noise", s_noise))
    )
    high = _at_least("s_max", s_max, 0.0, finite=False)
    data = _at_least("sigma_data", sigma_data, 0.0)
    if data == 0:
        raise ValueError("sigma_data is 0; it is the data's standard deviation, above 0")
    gamma = torch.where((levels[:-1] >= low) & (levels[:-1] <= high), min(churn / steps, GAMMA), 0.0)
    return _table(
        name=f"edm {solver}",
        levels=levels,
        gamma=gamma,
        noise=noise,
        eta=1.0,
        solver=solver,
        data=data if preconditioned else None,
        publication="EDM",
    )


@made_at_home
def alphafold3(
    steps: int = 200,
    *,
    gamma_0: float = 0.8,
    gamma_min: float = 1.0,
    noise_scale: float = 1.003,
    step_scale: float = 1.5,
    sigma_data: float = 16.0,
    s_min: float = 4e-4,
    s_max: float = 160.0,
    rho: float = 7.0,
) -> Table:
    """AlphaFold 3's sampler (Abramson et al. 2024, algorithm 18), without its random rotations and translations, for a model
    D(x, sigma) of coordinates that does not depend on these.

    Args:
        steps: N, at least 1.
        gamma_0: How much a ratio is raised by, relative to it, where it is above `gamma_min`.
        gamma_min: The largest ratio to which no noise is added.
        noise_scale: lambda, the factor on the deviation of the added noise.
        step_scale: eta, the factor on the step.
        sigma_data: The data's deviation; the ratios are those of `s_min` and `s_max` times it.
        s_min: The last ratio above 0, in units of `sigma_data`.
        s_max: The first ratio, in the same.
        rho: How much the ratios crowd towards the last one.

    Raises:
        ValueError: If an argument is out of range.
    """
    data, gamma = _at_least("sigma_data", sigma_data, 0.0), _at_least("gamma_0", gamma_0, 0.0)
    if not is_whole(steps) or steps < 1:
        raise ValueError(f"the number of steps is {shown(steps)}; it must be a whole number of at least 1")
    # N ratios and a last one above 0, to which the published loop steps in place of 0.
    levels = data * karras_ratios(s_min, s_max, steps + 1, rho)
    raised = torch.where(levels[1:] > _at_least("gamma_min", gamma_min, 0.0), gamma, 0.0)
    return _table(
        name="alphafold3",
        levels=levels,
        gamma=raised,
        noise=_at_least("noise_scale", noise_scale, 0.0),
        eta=_at_least("step_scale", step_scale, 0.0),
        solver="euler",
        data=None,
        publication="AlphaFold 3",
    )


def _table(
    *, name: str, levels: Tensor, gamma: Tensor, noise: float, eta: float, solver: Solver, data: float | None, publication: str
) -> Table:
    """A table in noised nodes, from the `[N+1]` ratios and the `[N]` raises."""
    steps = len(gamma)
    raised = levels[:-1] * (1 + gamma)
    added = noise * (raised**2 - levels[:-1] ** 2).clamp(min=0).sqrt()  # [N], before each step
    after = torch.cat([added[1:], added.new_zeros(1)])  # the noise of the step after
    shrink = 1 + eta * (levels[1:] - raised) / raised
    staged = solver != "euler"
    calls = 2 * steps - 1 if staged else steps
    state, clean = torch.zeros(2, calls, 2 if staged else 1, dtype=torch.float64)
    c = torch.zeros(calls, dtype=torch.float64)
    if staged:
        between = levels[1:-1] if solver == "heun" else (raised[:-1] * levels[1:-1]).sqrt()
        sigma = torch.zeros(calls + 1, dtype=torch.float64)
        sigma[0::2], sigma[1:-1:2], sigma[-1] = raised, between, levels[-1]
        shrink[:-1] = 1 + eta * (between - raised[:-1]) / raised[:-1]
        state[0::2, 0], clean[0::2, 0] = shrink, 1 - shrink
        share = 0.5 if solver == "heun" else 0.0  # of the first slope in the step
        first = share * (levels[1:-1] - raised[:-1]) / raised[:-1]
        second = (1 - share) * (levels[1:-1] - raised[:-1]) / between
        state[1::2] = torch.stack([second, 1 + first], dim=1)
        clean[1::2] = torch.stack([-second, -first], dim=1)
        c[1::2] = added[1:]
    else:
        sigma = torch.cat([raised, levels[-1:]])
        state[:, 0], clean[:, 0], c = shrink, 1 - shrink, after
    prediction: Prediction = "sample"
    p, q = torch.zeros(calls, dtype=torch.float64), torch.ones(calls, dtype=torch.float64)
    scale, times = torch.ones_like(sigma), sigma[:-1]
    if data is not None:
        square = sigma**2 + data**2
        p, q = (data**2 / square)[:-1], (sigma * data / square.sqrt())[:-1]
        scale, times = 1 / square.sqrt(), sigma[:-1].log() / 4
    source = (torch.arange(calls)[:, None] - torch.arange(state.shape[1])).clamp(min=0)
    start = math.sqrt(float(levels[0]) ** 2 + float(added[0]) ** 2)
    terms = [((k + 1, 1.0),) if float(value) > 0 else () for k, value in enumerate(after.tolist())]
    counts = [1] * (steps - 1) + [0]
    if staged:
        terms = [one for own in terms[:-1] for one in ((), own)] + [()]
        counts = [one for _ in range(steps - 1) for one in (0, 1)] + [0]
    begun = ((0, float(added[0]) / start),) if float(added[0]) > 0 else ()
    return Table(
        name=name,
        prediction=prediction,
        t=with_end(times),
        alpha=torch.ones_like(sigma),
        sigma=sigma,
        a=state + clean * p[source],
        b=clean * q[source],
        c=c,
        scale=scale,
        start_scale=start,
        exact_variance=noise == 1 and eta == 1,
        clean=None if data is None else torch.stack([p, q], dim=1),
        draws=Draws(publication, tuple(counts), tuple(terms), before=1, start=(float(levels[0]) / start, begun)),
    )


def descending_to_zero(ratios: Tensor, steps: int) -> Tensor:
    """`[N+1]` the ratios and the sample's, 0."""
    if not isinstance(ratios, Tensor) or ratios.shape != (steps,) or not bool((ratios > 0).all()):
        raise ValueError(f"the ratios are {shown(ratios)}; they must be a tensor of {shown(steps)} numbers above 0")
    if bool((ratios.diff() >= 0).any()):
        raise ValueError("the ratios do not fall from each to the next; give them in descending order")
    return torch.cat([ratios.to(torch.float64), torch.zeros(1, dtype=torch.float64)])


def _at_least(name: str, value: object, least: float, finite: bool = True) -> float:
    number = number_of(value)
    if not number >= least or (finite and not math.isfinite(number)):
        raise ValueError(f"{name} is {shown(value)}; it must be a {'finite ' if finite else ''}number of at least {least:g}")
    return number
