# SPDX-License-Identifier: Apache-2.0
"""The conditions of collocation: which chains it interpolates, and which it leaves to the window method.

Interpolation along log(alpha^2/sigma^2) needs one state at each level, on the trajectory. So a chain is left to the window
method over all nodes, from its first round on, where

- a level has no signal or no noise at an inner node, or levels do not rise in order;
- steps have several stages: a second stage is evaluated at a predicted state, which is no state of the trajectory, and its
  defects tell nothing of the trajectory's;
- the first mesh would hold a large part of the chain's nodes (`first_share`): little is left to interpolate;
- the chain adds more noise on its way than the control's `most_volatility` (chain/volatility.py): states between two nodes tell
  little of each other;
- states hold less noise than their levels say, by more than the control's `most_shortfall`, or `most_other_shortfall` where
  steps are not those of ancestral sampling (chain/shortfall.py) or states are not averaged;
- the model's outputs vary from node to node (`Problem.smooth`);
- a sample begins from an earlier run's, and the chain ends while more than the control's `most_undecided` is noise;
- the coefficients would multiply the network's rounding by more than the control's `most_gain`: neither sample nor estimate
  could be trusted.

A mesh that the caller gave, or bounded, is judged by all but the third. A sample whose data are seen to be far smaller or
larger (chain/data_scale.py, the control's `most_square`) than those that its estimates were measured on is taken over later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.sensitivity import log_snr, undecided
from paradiff.chain.shortfall import shortfall, steps_of_ancestral
from paradiff.chain.table import Table
from paradiff.chain.volatility import volatility
from paradiff.methods.collocation.interval import Recurrence, finite_log_snr
from paradiff.methods.collocation.system import CollocationSystem

NOT_SMOOTH = "the model's outputs are said to vary from node to node"
"""Why a chain is left to the window method whose model says so (solver/by_row.py)."""


def unfit_levels(table: Table) -> str | None:
    """Why the nodes of a chain cannot be interpolated along their levels; None where they can."""
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    silent = (sigma <= 0) | ((alpha <= 0) & (torch.arange(table.steps) > 0))
    if bool(silent.any()):
        node = int(silent.nonzero()[0, 0])
        return f"node {node} of the chain has no {'noise' if float(sigma[node]) <= 0 else 'signal'}"
    afresh = len(table.restarts) - 1
    if afresh < table.steps and 3 * (afresh - 1) >= table.steps > 4:  # a multistep sampler starts afresh at its ends
        return f"the sampler's steps have several stages, of which {afresh} of {table.steps} nodes are the first"
    place = finite_log_snr(table)
    if not bool(torch.isfinite(place).all()):
        return f"a chain of {table.steps} step{'s' * (table.steps > 1)} from pure noise has no levels to interpolate along"
    flat = (place.diff() <= 0).nonzero()[:, 0].tolist()
    if flat:
        return f"the signal-to-noise ratio does not rise from node {flat[0]} to node {flat[0] + 1}"
    return None


def too_rough(table: Table, most: float) -> str | None:
    """Why the noise of a chain is too rough to be averaged between a few nodes; None where it is not.

    Args:
        table: The chain.
        most: The largest volatility.
    """
    found = volatility(table)
    if found <= most:
        return None
    return (
        f"the chain adds {found:.3g} times as much noise on its way as an ancestral sampler, and a few nodes tell of {most:g} "
        "times at most"
    )


def too_cold(table: Table, most: float, most_otherwise: float, *, averaged: bool) -> str | None:
    """Why the states of a chain hold too little noise for its levels; None where they do not.

    Args:
        table: The chain.
        most: The largest shortfall of a chain of ancestral steps at averaged states, which know how much noise it adds
            (interval.py).
        most_otherwise: The largest one of other chains, and at states that are not averaged.
        averaged: Whether states are averaged.
    """
    found = shortfall(table)
    if found <= (most if averaged and steps_of_ancestral(table) else most_otherwise):
        return None
    return f"its states hold {100 * found:.0f} % less noise than their levels say"


def too_few_steps(table: Table, nodes: int, share: float) -> str | None:
    """Why a chain is too short for a first mesh of so many nodes; None where it is long enough."""
    if nodes <= share * table.steps:
        return None
    return f"a chain of {table.steps} step{'s' * (table.steps > 1)} leaves little to interpolate between {nodes} nodes"


def ends_early(table: Table, most: float) -> str | None:
    """Why the samples of a chain that begin from an earlier run's are not interpolated: the chain ends while much is undecided.
    None where it does not.

    Args:
        table: The chain.
        most: The largest share of the noise in a sample's variance, for data of mean square 1.
    """
    found = float(undecided(log_snr(table)[-1]))
    if found <= most:
        return None
    return f"the chain ends with {100 * found:.0f} % of noise, where a few evaluations tell little of what early changes become"


def unfit_coefficients(recurrence: Recurrence, system: CollocationSystem, most_gain: float) -> str | None:
    """Why the coefficients of a system cannot be trusted, where a network's rounding may grow by `most_gain`; None where they
    can."""
    reach: Tensor = system.influence[-1].abs() * recurrence.q_u[system.nodes].abs()
    finite = all(bool(torch.isfinite(v).all()) for v in (system.initial, system.influence, system.noise_weights, reach))
    if finite and float(reach.max()) <= most_gain:
        return None
    return (
        "the chain's coefficients overflow"
        if not finite
        else f"the chain's coefficients would multiply the network's rounding by {float(reach.max()):.2g}"
    )
