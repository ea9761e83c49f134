# SPDX-License-Identifier: Apache-2.0
"""Signal and noise levels of a probed chain, and what its network's output says of the clean data.

A scheduler's step gives the coefficients of the chain, but not the levels alpha[i], sigma[i] of its nodes nor the clean-data
estimate D = p x + q m, which slopes, first guesses and error estimates need (chain/table.py). Families of schedulers keep them
in different places:

| family | alpha | sigma | D |
|---|---|---|---|
| behind a preconditioning (EDM, cosine DPM-Solver) | 1 | `sigmas` | probed from `precondition_outputs` |
| DPM-Solver, DEIS, UniPC, SA-Solver | from `_sigma_to_alpha_sigma_t` | likewise | by prediction type |
| flow matching | 1 - `sigmas` | `sigmas` | flow |
| flow matching, times inverted | `sigmas` | 1 - `sigmas` | x + sigma m |
| Euler, Heun, KDPM2, LMS | 1 | `sigmas` (and `sigmas_interpol`) | by prediction type |
| improved pseudo linear multistep | `alphas` | `betas` | v |
| DDPM, DDIM, PNDM, LCM, TCD | root of `alphas_cumprod` | root of the rest | by prediction type |
| consistency models, whose steps land on D and add noise | 1 | `sigmas` | a x + b m |

Every family whose attributes a scheduler has is tried, and the first one whose levels agree with the coefficients is taken, or
the one that agrees best: a known clean datum must stay on its ray, and variances must add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.prediction import Prediction, clean_coefficients
from paradiff.chain.table import landed

PREDICTIONS: dict[Any, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "flow",
    None: "flow",  # flow matching has no such option
}
AGREES = 1e-4  # mean relative difference that float32 arithmetic in a scheduler explains
LEAST_SIGMA = 1e-6  # of a node that the network sees, so that q is not 0


@dataclass(frozen=True)
class Levels:
    """Levels of the N + 1 nodes and coefficients of the clean-data estimate at the first N.

    Attributes:
        prediction: What the network predicts; where `clean` is given, the nearest of the four.
        alpha: `[N+1]` signal levels.
        sigma: `[N+1]` noise levels.
        clean: `[N, 2]` p and q, where not those of the prediction.
    """

    prediction: Prediction
    alpha: Tensor
    sigma: Tensor
    clean: Tensor | None = None

    @property
    def estimate(self) -> tuple[Tensor, Tensor]:
        """p and q, `[N]` each."""
        if self.clean is not None:
            return self.clean[:, 0], self.clean[:, 1]
        return clean_coefficients(self.prediction, self.alpha[:-1], self.sigma[:-1])


def levels_of(scheduler: Any, t: Tensor, places: list[int] | None, scale: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Levels:
    """The levels that agree best with the coefficients.

    Args:
        scheduler: The scheduler, after `set_timesteps`.
        t: `[N]` times.
        places: The scheduler's own step index at each node, or None where it keeps none.
        scale: `[N]` factors on the network's input.
        a: `[N, P]` coefficients of the states.
        b: `[N, P]` coefficients of the outputs.
        c: `[N]` deviations of the noise.
    """
    best, least = None, float("inf")
    for candidate in _candidates(scheduler, t, places, scale, a, b):
        checked = _completed(candidate, a, b, c)
        p, q = checked.estimate
        if not all(torch.isfinite(v).all() for v in (checked.alpha, checked.sigma, p, q)):
            continue
        wanted = torch.stack([checked.alpha, checked.sigma], dim=1)[1:]
        off = (landed(a, b, c, checked.alpha, checked.sigma, p, q) - wanted).abs() / (wanted.abs() + 1e-2)
        mismatch = float(off[:, 0].mean() + off[:, 1].mean() / 2)  # some samplers add more noise than the process has
        if mismatch < least:
            best, least = checked, mismatch
        if least < AGREES:
            break
    assert best is not None, "the last candidate is always finite"
    return best


def _completed(levels: Levels, a: Tensor, b: Tensor, c: Tensor) -> Levels:
    """The levels with no node of the network at sigma = 0, and the sample's, where it is not known, that of the last step."""
    alpha, sigma = levels.alpha.clone(), levels.sigma.clone()
    sigma[:-1] = sigma[:-1].clamp(min=LEAST_SIGMA)
    if not torch.isfinite(alpha[-1] + sigma[-1]):
        alpha[-1] = sigma[-1] = 0
        p, q = Levels(levels.prediction, alpha, sigma, levels.clean).estimate
        alpha[-1], sigma[-1] = landed(a, b, c, alpha, sigma, p, q)[-1]
        if abs(alpha[-1] - 1) < 1e-5 and sigma[-1] < 1e-5:
            alpha[-1], sigma[-1] = 1, 0
    return Levels(levels.prediction, alpha, sigma, levels.clean)


def _candidates(scheduler: Any, t: Tensor, places: list[int] | None, scale: Tensor, a: Tensor, b: Tensor) -> Iterator[Levels]:
    """What the table of this module lists, as far as the scheduler has it."""
    prediction = PREDICTIONS.get(scheduler.config.get("prediction_type"), "epsilon")
    ends = None if places is None else [*places, places[-1] + 1]
    if ends is not None and isinstance(getattr(scheduler, "sigmas", None), Tensor) and ends[-1] < len(scheduler.sigmas):
        yield from _in_sigmas(scheduler, prediction, scheduler.sigmas.double(), ends, scale)
        sigma = scheduler.sigmas.double()[ends]
        yield Levels("sample", torch.ones_like(sigma), sigma, torch.stack([a[:, 0], b[:, 0]], dim=1))
    alphas, betas = getattr(scheduler, "alphas", None), getattr(scheduler, "betas", None)
    if (
        ends is not None
        and isinstance(alphas, Tensor)
        and isinstance(betas, Tensor)
        and len(betas) == len(scheduler.timesteps) + 1
    ):
        yield Levels("v", alphas.double()[ends], betas.double()[ends])
    table = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(table, Tensor):
        kind: Prediction = "epsilon" if prediction == "flow" else prediction
        yield Levels(kind, *_with_open_end(_roots(table, t)))
        if len(t) > 1 and t[0] < t[-1]:  # an inversion, whose network sees the time that a step leads to
            yield Levels(kind, *_with_open_end(_roots(table, (t - (t[1] - t[0])).clamp(min=0))))
    ramp = torch.linspace(1, 0, len(t) + 1, dtype=torch.float64)
    yield Levels("epsilon", torch.ones_like(ramp), ramp)


def _roots(table: Tensor, t: Tensor) -> Tensor:
    """`[2, N]` signal and noise levels at times `[N]`, from squared signal levels. At whole times they have the rounding of
    the scheduler, which is what a limit on the clean-data estimate meets."""
    below = t.floor().long().clamp(0, len(table) - 1)
    exact = torch.stack([table[below] ** 0.5, (1 - table[below]).clamp(min=0) ** 0.5]).double()
    above = (below + 1).clamp(max=len(table) - 1)
    squares = torch.lerp(table.double()[below], table.double()[above], (t - below).clamp(0, 1))
    return torch.where(t == below, exact, torch.stack([squares.sqrt(), (1 - squares).clamp(min=0).sqrt()]))


def _with_open_end(levels: Tensor) -> Tensor:
    """`[2, N+1]` levels, the last ones to be found from the last step."""
    return torch.cat([levels, torch.full((2, 1), torch.nan, dtype=torch.float64)], dim=1)


def _in_sigmas(scheduler: Any, prediction: Prediction, table: Tensor, ends: list[int], scale: Tensor) -> Iterator[Levels]:
    """The families that keep `sigmas`."""
    sigma = table[ends]
    between = getattr(scheduler, "sigmas_interpol", None)
    if isinstance(between, Tensor):  # a two-stage sampler, whose second stages are seen in the scale of the input only
        known = torch.cat([table, between.double()])
        known = known[torch.isfinite(known)]
        seen = (scale**-2 - 1).clamp(min=0).sqrt()
        sigma = torch.cat([known[(known - seen[:, None]).abs().argmin(1)], sigma[-1:]])
    one = torch.ones_like(sigma)
    if hasattr(scheduler, "precondition_outputs"):
        unit, none = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        rows = [[scheduler.precondition_outputs(x, m, s) for x, m in ((unit, none), (none, unit))] for s in sigma[:-1]]
        yield Levels("v", one, sigma, torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64))
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        pairs = [scheduler._sigma_to_alpha_sigma_t(s) for s in sigma]
        yield Levels(prediction, *torch.tensor([[float(v) for v in pair] for pair in pairs], dtype=torch.float64).T)
    bounded = float(table.max()) <= 1 + 1e-6
    if prediction == "flow" and bounded:
        if table[0] < table[-1]:
            yield Levels("flow", sigma, 1 - sigma, torch.stack([one, 1 - sigma], dim=1)[:-1])
        yield Levels("flow", 1 - sigma, sigma)
    yield Levels("epsilon" if prediction == "flow" else prediction, one, sigma)
