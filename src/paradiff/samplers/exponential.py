# SPDX-License-Identifier: Apache-2.0
"""Exponential integrators of the reverse process in Ornstein-Uhlenbeck coordinates, as tables.

With z and u of process.py the reverse process is, for a volatility v (1: the SDE, 0: the probability-flow ODE),

    dz = ( z/2 + (1 + v^2)/2 s ) dtau + v dB,      s = grad log p = (alpha D - z)/sigma^2 = -eps/sigma           (1)

(Chen, Ren, Ying and Rotskoff, arXiv 2405.15986, section 2). An exponential integrator freezes one quantity over a step from u
to u' and integrates the rest exactly. With r = sigma/alpha, primes at u', and the step's length h = u - u':

    score     z' = e^(h/2) z + (1 + v^2) (e^(h/2) - 1) s + v sqrt(e^h - 1) xi                                    (2)
    epsilon   z' = e^(h/2) z - (1 + v^2) alpha' (r - r') eps + v sqrt(e^h - 1) xi                                (3)
    clean     z' = A z + (alpha' - A alpha) D + sigma' sqrt(1 - (r'/r)^(2 v^2)) xi,   A = (sigma'/sigma) (r'/r)^(v^2)   (4)

(2) is the paper's. (4) is DDPM's step at v = 1 and DDIM's at v = 0, where (3) is the same. All have one limit and different
discretisation errors. In (2) and (3) the variance of a pure noise state is kept to second order in h only, in (4) exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.prediction import Prediction
from paradiff.chain.table import Table
from paradiff.errors import number_of, refuse_unknown, require_kind, shown
from paradiff.samplers.forms import in_outputs
from paradiff.samplers.grid import Grid
from paradiff.samplers.process import Process, signal_and_noise

Form = Literal["score", "epsilon", "clean"]
Times = Literal["real", "nearest"]


@made_at_home
def exponential_integrator(
    process: Process,
    grid: Grid,
    *,
    form: Form = "score",
    volatility: float = 1.0,
    prediction: Prediction = "epsilon",
    times: Times = "real",
    clip: Callable[[Tensor], Tensor] | None = None,
) -> Table:
    """The chain of equation (1) on a grid, for a network of any process.

    A last step to u = 0 is always of the form `clean`: it lands on the network's clean-data estimate.

    Args:
        process: What the network was trained on (process.py).
        grid: The levels; its block edges are for the solver.
        form: What is frozen over a step: equations (2), (3), (4).
        volatility: v, at least 0.
        prediction: What the network predicts.
        times: For a network trained at whole times: hand it the `real` time of a level, or the `nearest` whole one.
        clip: Limit on the clean-data estimate (chain/clipping.py).

    Returns:
        The table `exponential_sde` or `exponential_ode`; its states are z, its noise-free start is standard normal.

    Raises:
        ValueError: If an option is unknown, the volatility is negative, a level lies outside those of the process, a form
            does not exist at a level of pure noise, or nearest times are asked of a process without whole times.
    """
    require_kind("the process", process, Process)
    require_kind("the grid", grid, Grid)
    refuse_unknown("form", form, get_args(Form))
    refuse_unknown("times", times, get_args(Times))
    if not 0 <= number_of(volatility) < float("inf"):
        raise ValueError(f"the volatility is {shown(volatility)}; it must be 0 (the ODE) or more; 1 is the reverse SDE")
    volatility = float(volatility)
    _check_levels(process, grid, form)
    alpha, sigma = signal_and_noise(grid.u)
    state, clean, c = _step(form, volatility, grid.u, alpha, sigma)
    if grid.u[-1] == 0:
        state[-1], clean[-1], c[-1] = 0.0, 1.0, 0.0
    t, scale = process.time(alpha, sigma), process.scale(alpha, sigma)
    if times == "nearest":
        if not process.train_times:
            raise ValueError(f"nearest times were asked for, but the process {process.name} has no whole training times")
        t = t.round()
    if not t[0].isfinite():
        raise ValueError(f"the grid begins at pure noise, for which {process.name} has no time; begin at a finite level u")
    if grid.u[-1] == 0:
        t[-1], scale[-1] = 0.0, 1.0  # the sample's own, never looked at
    a, b = in_outputs(prediction, alpha, sigma, state[:, None], clean[:, None])
    return Table(
        name="exponential_sde" if volatility else "exponential_ode",
        prediction=prediction,
        t=t,
        alpha=alpha,
        sigma=sigma,
        a=a,
        b=b,
        c=c,
        scale=scale,
        clip=clip,
        exact_variance=form == "clean" or (form == "epsilon" and volatility == 0),
    )


def _step(form: Form, v: float, u: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[N]` coefficients of z, D and xi."""
    before, after, noise, noise_after = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    shrink = before * noise_after / (after * noise)  # r'/r
    if form == "clean":
        state = noise_after / noise * shrink ** (v * v)
        return state, after - state * before, noise_after * (1 - shrink ** (2 * v * v)).clamp(min=0).sqrt()
    h = u[:-1] - u[1:]
    if form == "score":
        gain = (1 + v * v) * torch.expm1(h / 2) / noise**2
    else:
        gain = (1 + v * v) * after * (noise / before - noise_after / after) / noise
    return (h / 2).exp() - gain, gain * before, v * torch.expm1(h).sqrt()


def _check_levels(process: Process, grid: Grid, form: Form) -> None:
    first, last = float(grid.u[0]), float(grid.u[-1] if grid.u[-1] > 0 else grid.u[-2])
    if first == float("inf") and form != "clean":
        raise ValueError(
            f"the grid begins at pure noise (alpha = 0), where the form {form!r} does not exist; use the clean-data form, "
            "form='clean', or begin at a finite level u"
        )
    slack = 1e-9
    if first > process.highest * (1 + slack):
        raise ValueError(
            f"the grid begins at u = {first:.6g}, noisier than {process.name} ever is, u = {process.highest:.6g}; begin there "
            "or below"
        )
    if last < process.lowest * (1 - slack):
        raise ValueError(
            f"the grid stops at u = {last:.6g}, cleaner than {process.name} ever is, u = {process.lowest:.6g}; stop there "
            "or above"
        )
